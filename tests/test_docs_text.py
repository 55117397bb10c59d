"""What the pages say without running: links, paths, names, sizes, and how to cite."""

import inspect
import re
import tomllib

import pytest
import yaml
from documents import (
    PAGES,
    ROOT,
    command_of,
    commands,
    fences,
    flags,
    inline_code,
    links,
    paths,
    python_blocks,
    read,
    switches,
    typed,
)

import adaptive_ts as ats

COMMANDS = (
    "python -m pip install uv && uv run train.py",
    "python -m pip install uv && uv run pytest",
)
MANY = 200_000  # bytes of a file under docs/


def test_the_readers_read():
    text = """Text with [a link](docs/a.md#part), ![a picture](pic.png), [far](https://x.y).
`uv run train.py small --seed 1`, `train.py [ROW]`, `adaptive-ts COMMAND --help`, `--out DIR`,
`configs/a.py`, `configs/NAME.py` and `see tests/b.py`.

```python
x = 1
```
<!-- runs -->
```bash
uv run --extra cuda13 train.py big \\
  --train.steps 3   # --no.flag is a comment
cd here && adaptive-ts tables t --rows a "b c"
```
"""
    assert python_blocks(text) == ["x = 1"]
    assert fences(text)[1].before == "<!-- runs -->"
    assert commands(text) == [
        ["train", "big", "--train.steps", "3"],
        ["tables", "t", "--rows", "a", "b", "c"],
        ["train", "small", "--seed", "1"],
    ]
    assert command_of("adaptive-ts train [ROW]") is None
    assert flags(text) == {"train.steps", "no.flag"}
    assert switches(text) == {"seed", "help", "out"}
    assert paths(text) == {"configs/a.py", "tests/b.py"}
    assert links(text) == {"docs/a.md", "pic.png"}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_relative_links_exist(page):
    missing = {path for path in links(read(page)) if not ((ROOT / page).parent / path).exists()}
    assert not missing, f"{page} links to {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    named = paths(read(page)) - {"docs/_build"}  # the one that a command of theirs makes
    missing = {path for path in named if not any(ROOT.glob(path.rstrip("/")))}
    assert not missing, f"{page} names {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page):
    have = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    named = set(re.findall(r"--extra ([\w-]+)", " ".join(typed(read(page)))))
    assert named <= {*have}, f"{page} names extras that pyproject.toml has not"


def test_readme_is_short_and_holds_the_two_commands():
    assert len((ROOT / "README.md").read_bytes()) <= 8_000
    lines = [line for block in fences(read("README.md")) for line in block.code.split("\n")]
    for command in COMMANDS:  # CI reads the second at the beginning of a line
        assert any(re.match(rf"\s*{re.escape(command)}", line) for line in lines), command


def test_no_file_of_the_docs_is_large():
    built = ("_build", "jupyter_execute", ".jupyter_cache")
    files = [p for p in (ROOT / "docs").rglob("*") if p.is_file() and not {*p.parts} & {*built}]
    assert not {str(p) for p in files if p.stat().st_size > MANY}


def _functions(face) -> set[str]:
    return {name for name in face.__all__ if inspect.isfunction(getattr(face, name))}


WRAPPERS = {"importance_weighted", "mixed_with_uniform", "with_density_of", "with_weighting"}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", _functions(ats.samplers) - WRAPPERS),
        ("docs/howto/choose_sampler.md", _functions(ats.samplers)),
        (
            "docs/concepts/schedules.md",
            _functions(ats.schedules) - {"from_betas", "posterior_tables"},
        ),
        ("docs/concepts/objective.md", _functions(ats.weightings) - {"convert"}),
        ("docs/concepts/adaptive.md", {*inspect.signature(ats.adaptive).parameters}
         - {"grid", "policy", "axis_name"}),
    ],
)  # fmt: skip
def test_pages_name_all_there_are(page, names):
    said = " ".join(inline_code(read(page)))
    missing = {name for name in names if not re.search(rf"\b{name}\b", said)}
    assert not missing, f"{page} does not name {sorted(missing)}"


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["version"] == ats.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    paper = cited["preferred-citation"]
    readme = read("README.md")
    assert paper["title"] in readme and f"version = {{{ats.__version__}}}" in readme
    assert paper["identifiers"][0]["value"] in readme
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert " and ".join(names) in readme
