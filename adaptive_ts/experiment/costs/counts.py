"""What a compiled step costs; what `scaling` found, as a table for reading and rows for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adaptive_ts.experiment.costs.messages import Tally, count_collectives

_NAMES = {"uniform": "uniform", "plain": "{}", "probe": "with a probe"}


class Cost(NamedTuple):
    """What a step costs on each device.

    Attributes:
      flops: by the compiler, which counts the body of a loop once.
      bytes_accessed: read and written, likewise.
      temp_bytes: memory besides the state and the batch.
      collectives: kind -> messages between devices, and what they carry.
      uncertain: how many of them are in loops without a known end, counted once.
      loops: turns of the loops that multiply matrices or convolve; None where it is unknown.
    """

    flops: float
    bytes_accessed: float
    temp_bytes: int
    collectives: Mapping[str, Tally]
    uncertain: int
    loops: tuple[int | None, ...]

    @property
    def messages(self) -> Tally:
        """Of all kinds."""
        return Tally(
            *(sum(column) for column in zip((0, 0), *self.collectives.values(), strict=True))
        )


def cost_of(compiled: Any) -> Cost:
    """Of a compiled function."""
    cost, found = compiled.cost_analysis(), count_collectives(compiled.as_text())
    cost = cost[0] if isinstance(cost, list) else cost
    return Cost(
        float(cost["flops"]),
        float(cost["bytes accessed"]),
        compiled.memory_analysis().temp_size_in_bytes,
        *found,
    )


def probe_share(costs: Mapping[str, Cost], every: int) -> float | None:
    """FLOPs that probes add to a cycle of f_S steps, over those of f_S steps without one.

    None for a sampler that does not probe, or does at each step.
    """
    if not {"plain", "probe"} <= set(costs):
        return None
    plain = costs["plain"].flops
    return (costs["probe"].flops - plain) / every / plain


def added(costs: Mapping[str, Cost], name: str) -> Tally:
    """Messages of a step beyond those of the uniform sampler's, and the bytes."""
    pairs = zip(costs[name].messages, costs["uniform"].messages, strict=True)
    return Tally(*(own - uniform for own, uniform in pairs))


def rows(found: Mapping[int, Mapping[str, Cost]], every: int) -> list[dict[str, Any]]:
    """One dict per number of devices."""
    return [
        {
            "devices": count,
            "steps": {name: _plain(cost) for name, cost in costs.items()},
            "probe_share_of_flops": probe_share(costs, every),
            "added_collectives": {
                name: added(costs, name)._asdict() for name in costs if name != "uniform"
            },
        }
        for count, costs in found.items()
    ]


def _plain(cost: Cost) -> dict[str, Any]:
    kinds = {kind: tally._asdict() for kind, tally in cost.collectives.items()}
    return {**cost._asdict(), "collectives": kinds}


def text(about: Mapping[str, Any], found: Mapping[int, Mapping[str, Cost]], platform: str) -> str:
    """The report, to be read.

    Args:
      about: "row", "model", "sampler", "every", "batch_size".
      found: devices -> name of a step -> its cost.
      platform: of the devices.
    """
    lines = [
        "{row}: {model}, {sampler} sampler, f_S={every}; of one device, as compiled for "
        "{platform}; nothing was run".format(**about, platform=platform),
        f"strong scaling: the global batch of {about['batch_size']} is shared by the devices",
        "",
        _line("devices", "images", "step", "GFLOP", "MB accessed", "MB temp", "collectives"),
    ]
    for count, costs in found.items():
        cells = (str(count), str(about["batch_size"] // count))
        for name, cost in costs.items():
            label = _NAMES[name].format(about["sampler"])
            lines.append(_line(*cells, label, *_numbers(cost), _messages(cost)))
            cells = ("", "")
    lines += ["", *_derived(found, about["every"]), *notes(_all(found), platform)]
    return "\n".join(line.rstrip() for line in lines)


def _line(*cells: str) -> str:
    count, images, step, flops, accessed, temp, messages = cells
    head = f"{count:>8}{images:>8}  {step:<14}"
    return f"{head}{flops:>10}{accessed:>13}{temp:>10}  {messages}"


def _numbers(cost: Cost) -> tuple[str, ...]:
    mega = (f"{size / 1e6:,.1f}" for size in (cost.bytes_accessed, cost.temp_bytes))
    return f"{cost.flops / 1e9:,.4g}", *mega


def _messages(cost: Cost) -> str:
    told = [f"{n} {kind} ({_size(size)})" for kind, (n, size) in cost.collectives.items()]
    return ", ".join(told) or "none"


def _size(size: float) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.2f} kB"


def _derived(found: Mapping[int, Mapping[str, Cost]], every: int) -> list[str]:
    lines = []
    for count, costs in found.items():
        parts = []
        share = probe_share(costs, every)
        if share is not None:
            parts.append(f"a probe each {every} steps adds {share:.2%} FLOPs")
        for name, of in (("plain", "step"), ("probe", "step with a probe")):
            if name in costs:
                more, size = added(costs, name)
                parts.append(f"{more:+d} collectives ({_size(size)}) in a {of}")
        lines.append(f"on {count}, over uniform: {'; '.join(parts) or 'nothing else to compare'}")
    return lines


def _all(found: Mapping[int, Mapping[str, Cost]]) -> list[Cost]:
    return [cost for costs in found.values() for cost in costs.values()]


def notes(costs: Sequence[Cost], platform: str) -> list[str]:
    """What the compiler's counts leave out, a line each."""
    found = []
    if any(cost.loops for cost in costs):
        turns = sorted({str(n or "?") for cost in costs for n in cost.loops}, key=len)
        found.append(
            f"FLOPs and MB accessed hold the body of a loop once: there are loops of "
            f"{', '.join(turns)} turns (--sampler.chunk, --train.accumulate)"
        )
    if any(cost.uncertain for cost in costs):
        found.append("of loops without a known end the collectives count once: there are such")
    if platform == "gpu":
        found.append(
            "FLOPs leave out what libraries compute, as convolutions: JAX_PLATFORMS=cpu has all"
        )
    return found
