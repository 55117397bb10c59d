"""Readers of the documentation: its pages, their blocks, commands, flags, paths and links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
PAGES = tuple(p for p in PAGES if not re.match(r"docs/(_build|jupyter_execute|tables)/", p))

_FENCE = re.compile(
    r"(?P<before>[^\n]*)\n(?P<indent>[ ]*)```(?P<language>[{}\w-]*)[^\n]*\n(?P<code>.*?)\n[ ]*```",
    re.DOTALL,
)
_SHELL = ("bash", "console", "sh", "")
_COMMAND = re.compile(r"(?<![\w./-])(adaptive-ts|train\.py)(?![\w/])")


class Fence(NamedTuple):
    """A fenced block.

    Attributes:
      language: as written: ``python``, ``bash``, ``{code-cell}``.
      code: the lines.
      before: the line before it, in which ``<!-- runs -->`` may stand.
    """

    language: str
    code: str
    before: str


def read(page: str) -> str:
    return (ROOT / page).read_text()


def fences(text: str) -> list[Fence]:
    return [
        Fence(m["language"], m["code"], m["before"].strip())
        for m in _FENCE.finditer("\n" + text)
    ]  # fmt: skip


def added_lines(diff: str) -> list[str]:
    """The lines that a diff adds, without those that are empty."""
    return [line[1:] for line in diff.split("\n") if line.startswith("+") and line[1:].strip()]


def changed(source: str, diff: str) -> str:
    """The source after a diff of unnumbered hunks, parted by lines that begin with ``@@``.

    Each hunk's old lines have to be in the source once, one after the other; ``...`` between two
    of them stands for any others, which go too.
    """
    for hunk in filter(str.strip, re.split(r"^@@.*\n?", diff, flags=re.MULTILINE)):
        lines = hunk.rstrip("\n").split("\n")
        old = [line[1:] for line in lines if line[:1] in (" ", "-") or line == "..."]
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "+"))
        pattern = "".join(r"(?:.*\n)*?" if line == ".." else re.escape(f"{line}\n") for line in old)
        source, times = re.subn(f"^{pattern}", lambda _, new=new: new, source, flags=re.MULTILINE)
        assert times == 1, f"found {times} times:\n{hunk}"
    return source


def python_blocks(text: str) -> list[str]:
    return [block.code for block in fences(text) if block.language == "python"]


def shell_lines(code: str) -> list[str]:
    """The lines of a shell block, without comments and continuations."""
    return [line.split(" #")[0].strip() for line in code.replace("\\\n", " ").split("\n")]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def typed(text: str) -> list[str]:
    """What a reader may type: the lines of shell blocks, and inline code."""
    shell = [block for block in fences(text) if block.language in _SHELL]
    return [line for block in shell for line in shell_lines(block.code)] + inline_code(text)


def command_of(line: str) -> list[str] | None:
    """``adaptive-ts``'s arguments in one command; ``train.py`` is its ``train``. None: it is none.

    Usage lines, with their ``[...]``, and sentences that only name a command are none.
    """
    found = _COMMAND.search(line)
    if found is None or "[" in line or "..." in line:
        return None
    words = shlex.split(line[found.end() :].replace('"', " "))
    if found[1] == "train.py":
        return ["train", *words]
    return words if words and not words[0].isupper() else None


def commands(text: str) -> list[list[str]]:
    """The arguments of every ``adaptive-ts`` and ``train.py`` that a reader may type."""
    parts = [part for line in typed(text) for part in re.split(r"&&|\||;", line)]
    return [argv for argv in map(command_of, parts) if argv is not None]


def flags(text: str) -> set[str]:
    """Every ``--group.field`` of the text, without ``--field.path``, the word for all of them."""
    return set(re.findall(r"--([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+)", text)) - {"field.path"}


def switches(text: str) -> set[str]:
    """Every other ``--name`` in inline code."""
    spans = " ".join(inline_code(text))
    return set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)(?![\w.-])", spans))


def paths(text: str) -> set[str]:
    """Files and folders of the repository that the text names.

    Without those with a placeholder, and those that the reader is to write (``File: ...``).
    """
    text = re.sub(r"^File: .*$", "", text, flags=re.MULTILINE)
    words = " ".join(typed(text)).split()
    found = {word.rstrip(",.:") for word in words}
    inside = re.compile(r"(docs|configs|tests|adaptive_ts|\.ci)/[\w./*-]*$")
    return {word for word in found if inside.match(word) and not re.search(r"[A-Z]{3}", word)}


def links(text: str) -> set[str]:
    """Relative link and image paths, outside of code."""
    words = re.sub(r"`[^`\n]+`", "", prose(text))
    found = re.findall(r"\]\(\s*<?([^)>\s]+)", words)
    found += re.findall(r"(?:src|href)=\"([^\"]+)", words)
    return {path.partition("#")[0] for path in found if not re.match(r"[a-z]+:|#", path)}
