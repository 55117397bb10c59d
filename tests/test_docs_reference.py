"""The reference has each public name on exactly one page."""

import ast
import functools
import importlib
import re

import pytest
from documents import ROOT

FACES = (
    "adaptive_ts",
    "adaptive_ts.diffusion",
    "adaptive_ts.integrations",
    "adaptive_ts.learning",
    "adaptive_ts.samplers",
    "adaptive_ts.schedules",
    "adaptive_ts.timesteps",
    "adaptive_ts.weightings",
)
BESIDE = {"adaptive_ts.testing.SamplerReport"}  # what a public function returns
EXTRA = "adaptive_ts.integrations.hackable_diffusion"  # imports a package that may not be there
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: ([\w.]+)", re.MULTILINE)
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def resolved(name: str):
    """What a dotted name means to a user: attributes, not modules behind a function's name."""
    return functools.reduce(getattr, name.split(".")[1:], importlib.import_module("adaptive_ts"))


def entries() -> list[tuple[str, str]]:
    """(page, dotted name) of every directive."""
    importlib.import_module("adaptive_ts.testing")
    return [
        (page.stem, name)
        for page in PAGES
        if "_build" not in page.parts
        for _, name in DIRECTIVE.findall(page.read_text())
        if not name.startswith(EXTRA)
    ]


def test_the_module_of_an_extra_is_in_the_reference():
    tree = ast.parse((ROOT / f"{EXTRA.replace('.', '/')}.py").read_text())
    made = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    public = {f"{EXTRA}.{name}" for name in made if not name.startswith("_")}
    listed = [
        name
        for page in PAGES
        if "_build" not in page.parts
        for _, name in DIRECTIVE.findall(page.read_text())
        if name.startswith(EXTRA)
    ]
    assert sorted(public) == sorted(listed) and len(public) == 4


@pytest.mark.parametrize("face", FACES)
def test_each_public_name_is_on_one_page(face):
    module = importlib.import_module(face)
    listed = [(resolved(name), f"{name} on {page}") for page, name in entries()]
    for name in module.__all__:
        found = [where for thing, where in listed if thing is getattr(module, name)]
        assert len(found) == 1, f"{face}.{name}: {found or 'on no page of docs/reference'}"


def test_nothing_else_is_in_the_reference():
    public = [
        getattr(module, name)
        for module in map(importlib.import_module, FACES)
        for name in module.__all__
    ]
    for page, name in entries():
        known = any(resolved(name) is thing for thing in public) or name in BESIDE
        assert known, f"docs/reference/{page}.md has {name}, which is not public"
