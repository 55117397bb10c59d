"""The messages between devices in a compiled program, counted from its text (``as_text()``)."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")  # left out where they are 1
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"n":"(\d+)"\}')


class Tally(NamedTuple):
    """Attributes:
    count: messages; one that carries several arrays is one.
    bytes: what they carry: of each the larger of what goes in and what comes out, on one device.
    """

    count: int
    bytes: int


class Collectives(NamedTuple):
    """Attributes:
    tallies: kind, of those that occur -> how many, each as often as its loops go round.
    uncertain: how many of them are in loops of which the compiler knows no end, counted once.
    loops: turns of each loop that multiplies matrices or convolves; None where it is unknown.
    """

    tallies: dict[str, Tally]
    uncertain: int
    loops: tuple[int | None, ...]


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # the operands, and what follows them

    def operands(self) -> list[str]:
        depth = 1
        for place, char in enumerate(self.rest):
            depth += (char == "(") - (char == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:place])
        return []


def count_collectives(text: str) -> Collectives:
    """What one run of a program, optimised HLO, sends.

    A start and its done are one message; all branches of a conditional count. A program of one
    device sends nothing: what its text may hold of messages goes from the device to itself.
    """
    computations, entry = _computations(text)

    @functools.cache
    def arithmetic(name: str) -> bool:
        return any(
            step.opcode in ("dot", "convolution") or any(arithmetic(n) for n, _ in _called(step))
            for step in computations.get(name, ())
        )

    @functools.cache
    def totals(name: str) -> Counter:
        found, steps = Counter(), computations.get(name, [])
        types = {step.name: step.type for step in steps}
        for step in steps:
            kind = step.opcode.removesuffix("-start")
            if kind in KINDS:
                size = _payload(step, types.get)
                found += Counter({(kind, "count"): 1, (kind, "bytes"): size})
                continue
            for callee, turns in _called(step):
                own = totals(callee)
                found += Counter({key: (turns or 1) * value for key, value in own.items()})
                if turns is None:
                    found["uncertain"] += sum(own[kind, "count"] for kind in KINDS)
                    found["uncertain"] -= own["uncertain"]  # they are among them
        return found

    loops = tuple(
        _turns(step)
        for steps in computations.values()
        for step in steps
        if step.opcode == "while" and (body := _BODY.search(step.rest)) and arithmetic(body[1])
    )
    devices = math.prod(int(n) for n in _DEVICES.findall(text.partition("\n")[0]))
    found = totals(entry) if devices > 1 else Counter()
    tallies = {
        kind: Tally(found[kind, "count"], found[kind, "bytes"])
        for kind in KINDS
        if found[kind, "count"]
    }
    return Collectives(tallies, found["uncertain"], loops)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Name -> instructions, and the name of the entry."""
    found, entry, steps = {}, "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            steps = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif (instruction := _INSTRUCTION.match(line)) is not None:
            steps.append(_Instruction(*instruction.groups()))
    return found, entry


def _called(step: _Instruction) -> Iterator[tuple[str, int | None]]:
    """The computations that an instruction runs, and how often; None: who knows."""
    if step.opcode.endswith(("-done", "-update")):
        return  # what was started
    turns = 1
    if step.opcode == "while":
        turns = _turns(step)
        for name in _CONDITION.findall(step.rest):
            yield name, None if turns is None else turns + 1
    for name in _CALLS.findall(step.rest):
        yield name, turns
    for names in _BRANCHES.findall(step.rest):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _turns(loop: _Instruction) -> int | None:
    known = _TRIPS.search(loop.rest)
    return None if known is None else int(known[1])


def _payload(step: _Instruction, type_of: Callable[[str, str], str]) -> int:
    operands = step.operands()
    given = sum(sum(_sizes(type_of(name, ""))) for name in operands)
    sizes = _sizes(step.type)
    if step.opcode.endswith("-start") and step.opcode != "all-reduce-start":
        sizes = sizes[len(operands) : 2 * len(operands)]  # operands, results, and what it needs
    return max(given, sum(sizes))


def _sizes(kind: str) -> list[int]:
    """Bytes of each array of a type, such as ``(f32[4]{0}, /*index=1*/bf16[2,2]{1,0})``."""
    return [
        math.ceil(math.prod(int(side) for side in sides.split(",") if side) * _bits(dtype) / 8)
        for dtype, sides in _SHAPE.findall(kind)
    ]


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)  # f8e4m3fn, bf16, s4
    return int(digits[0]) if digits else 0  # a token
