"""What the documentation says is run: docstring examples, README blocks, flags, rows and links."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import adaptive_ts
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import leaf_types
from adaptive_ts.experiment.config.row_files import load_rows

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "python -m pip install uv && uv run train.py",
    "python -m pip install uv && uv run pytest",
)
PLACEHOLDERS = {"field.path"}  # of "--field.path VALUE"
SWITCHES = {"list", "help", "dry_run"}  # of train.py, not fields
MODULES = [
    "adaptive_ts",
    *(
        module.name
        for module in pkgutil.walk_packages(adaptive_ts.__path__, "adaptive_ts.")
        if not module.name.startswith("adaptive_ts.experiment")
    ),
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "adaptive_ts" / "experiment").rglob("*.py"))
        if ">>> " in path.read_text()
    ),
]


def _read(name: str) -> str:
    path = ROOT / name
    return path.read_text() if path.exists() else ""


def _examples(module) -> list[doctest.DocTest]:
    # Empty globals: an example brings its own imports, so that it can be pasted.
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run_as_pasted(name):
    runner, said = doctest.DocTestRunner(verbose=False), []
    for test in _examples(importlib.import_module(name)):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_docstring_examples_are_found():
    modules = [importlib.import_module(name) for name in MODULES]
    found = {test.name for module in modules for test in _examples(module)}
    assert {
        "adaptive_ts.samplers.adaptive.adaptive",
        "adaptive_ts.timesteps.grid.discrete",
    } <= found
    assert len(found) > 35


def test_every_public_name_is_documented():
    assert list(adaptive_ts.__all__) == sorted(set(adaptive_ts.__all__))
    for name in adaptive_ts.__all__:
        thing = getattr(adaptive_ts, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            other = "neither a function, a class, the type alias nor a module of functions"
            assert name in ("Weighting", "weightings"), f"{name}: {other}"
            continue
        text = inspect.cleandoc(thing.__doc__ or "")
        first = text.split("\n")[0]
        assert len(first) > 10 and not text.startswith(f"{name}("), f"{name} has no docstring"
        if inspect.isfunction(thing):
            assert ">>> " in text, f"{name} has no example"
            example = text.partition("Example:")[2]
            assert f"{name}(" in example, f"the example of {name} does not call it"


_FENCE = re.compile(
    r"(?P<before>[^\n]*)\n(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)\n[ ]*```",
    re.DOTALL,
)


def fences(text: str) -> list[tuple[str, str, str]]:
    """(language, code, the line before) of each fenced block."""
    return [(m["language"], m["code"], m["before"].strip()) for m in _FENCE.finditer("\n" + text)]


def python_blocks(text: str) -> list[str]:
    return [
        code
        for language, code, before in fences(text)
        if language == "python" and before != "<!-- not run -->"
    ]


def shell_words(text: str) -> list[str]:
    """What a reader may type: the lines of blocks that are not Python, and inline code."""
    blocks = [code.replace("\\\n", " ") for kind, code, _ in fences(text) if kind != "python"]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split(" #")[0] for block in blocks for line in block.split("\n")] + inline


def train_commands(text: str) -> list[str]:
    """What follows ``train.py`` in each command, up to the next command of the line."""
    tails = [line.split("train.py", 1)[1] for line in shell_words(text) if "train.py" in line]
    return [re.split(r"&&|\||;", tail)[0] for tail in tails]


def flags(text: str) -> set[str]:
    """Every ``--group.field`` of the text, and every ``--name`` of a train.py command."""
    dotted = re.findall(r"--([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+)", text)
    of_train = re.findall(r"--([a-z][a-z0-9_.]*[a-z0-9_])", " ".join(train_commands(text)))
    return {*dotted, *of_train} - PLACEHOLDERS


def rows(text: str) -> set[str]:
    """The row that each train.py command names."""
    heads = [re.match(r"\s+([A-Za-z0-9][\w.-]*)(?=\s|$)", tail) for tail in train_commands(text)]
    return {head[1] for head in heads if head} - {"ROW"}


def links(text: str) -> set[str]:
    """Relative link and image paths, outside of code."""
    prose = re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = re.findall(r"\]\(\s*<?([^)>\s]+)", prose) + re.findall(
        r"(?:src|href)=\"([^\"]+)", prose
    )
    return {
        path.partition("#")[0]
        for path in found
        if not re.match(r"[a-z]+:|#", path)
    }  # fmt: skip


def test_the_readers_above_read():
    text = """Text with [a link](docs/a.md#part), ![a picture](pic.png), [far](https://x.y).
`uv run train.py small --seed 1` and `train.py [ROW] [--field.path VALUE ...]`

```python
x = 1
```
<!-- not run -->
```python
x = 2
```
```
uv run --extra cuda13 train.py big \\
  --train.steps 3   # --no.flag is a comment
```
"""
    assert python_blocks(text) == ["x = 1"]
    assert flags(text) >= {"seed", "train.steps"} and "extra" not in flags(text)
    assert "field.path" not in flags(text)
    assert rows(text) == {"small", "big"}
    assert links(text) == {"docs/a.md", "pic.png"}


def test_readme_holds_the_two_commands():
    text = _read("README.md")
    for command in COMMANDS:
        assert command in text, f"README.md lacks: {command}"


def test_readme_shows_the_integration():
    called = "".join(python_blocks(_read("README.md")))
    for part in ("sampler.init(", "sampler.sample(", "draw.weight", "sampler.update("):
        assert part in called, f"no python block of README.md that is run has {part}"


@pytest.mark.parametrize("number", range(len(python_blocks(_read("README.md")))))
def test_readme_block_runs(number, tmp_path, monkeypatch):
    code = python_blocks(_read("README.md"))[number]
    monkeypatch.chdir(tmp_path)  # what a block writes
    with jax.numpy_rank_promotion("allow"):  # JAX's default, as a reader has it
        exec(compile(code, f"README.md, python block {number + 1}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_flags_and_rows_exist(name):
    text = _read(name)
    unknown = flags(text) - set(leaf_types(Config)) - SWITCHES
    assert not unknown, f"{name} names flags that train.py has not: {sorted(unknown)}"
    unknown = rows(text) - set(load_rows(ROOT / "configs"))
    assert not unknown, f"{name} names rows that configs/ has not: {sorted(unknown)}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_exist(name):
    missing = {path for path in links(_read(name)) if not (ROOT / path).exists()}
    assert not missing, f"{name} links to {sorted(missing)}"
