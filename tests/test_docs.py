"""What the documentation says is run: docstring examples, and the Python blocks of all pages."""

import ast
import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest
from documents import PAGES, ROOT, fences, python_blocks, read

import adaptive_ts

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
# CONTRIBUTING.md's are files, which tests/test_contributing.py writes.
SESSIONS = [page for page in PAGES if python_blocks(read(page)) and page != "CONTRIBUTING.md"]
NOTEBOOKS = [page for page in PAGES if page.startswith("docs/notebooks/") and "index" not in page]


def _examples(module) -> list[doctest.DocTest]:
    # Empty globals: an example brings its own imports, so that it can be pasted.
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run_as_pasted(name):
    if name == "adaptive_ts.integrations.hackable_diffusion":
        pytest.importorskip("hackable_diffusion")
    runner, said = doctest.DocTestRunner(verbose=False), []
    for test in _examples(importlib.import_module(name)):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_docstring_examples_are_found():
    modules = [importlib.import_module(n) for n in MODULES if "hackable_diffusion" not in n]
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
        if name == "Weighting":  # an alias has no docstring; the reference has its words
            continue
        text = inspect.cleandoc(thing.__doc__ or "")
        first = text.split("\n")[0]
        assert len(first) > 10 and not text.startswith(f"{name}("), f"{name} has no docstring"
        if inspect.isfunction(thing):
            assert ">>> " in text, f"{name} has no example"
            example = text.partition("Example:")[2]
            assert f"{name}(" in example, f"the example of {name} does not call it"
        else:
            assert inspect.isclass(thing) or inspect.ismodule(thing), f"{name} is something else"


@pytest.mark.parametrize("page", SESSIONS)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, quick_compilation):
    monkeypatch.chdir(tmp_path)  # what a block writes
    session = {"__name__": "page"}
    with jax.numpy_rank_promotion("allow"):  # JAX's default, as a reader has it
        for number, code in enumerate(python_blocks(read(page)), 1):
            exec(compile(code, f"{page}, python block {number}", "exec"), session)


def test_the_pages_that_have_python_are_read():
    assert {"README.md", "docs/tutorial/nnx.md", "docs/tutorial/shard_map.md"} <= set(SESSIONS)


def test_readme_shows_the_integration():
    called = "".join(python_blocks(read("README.md")))
    for part in ("sampler.init(", "sampler.sample(", "draw.weight", "sampler.update("):
        assert part in called, f"no python block of README.md has {part}"


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_notebooks_are_python_and_are_run_by_the_build(page):
    text = read(page)
    assert text.startswith("---\njupytext:"), f"{page} has no header of a notebook"
    cells = [block.code for block in fences(text) if block.language == "{code-cell}"]
    assert cells
    for cell in cells:
        ast.parse(cell)
