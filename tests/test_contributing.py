"""CONTRIBUTING.md's "How to add a sampler", followed literally in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from small_run import ROOT

CHECK = """
import adaptive_ts as ats
from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError

_, config = parse("digits --sampler.name power --sampler.power.k 3".split())
sampler = build(config, sharding.make_mesh()).parts.sampler
p = ats.effective_density(sampler)
assert p.shape == (1000,) and abs(p[999] - (1 - 0.999**3)) < 1e-6, p[999]
for argv, words in (
    ("--sampler.name power --sampler.power.k 0", ""),
    ("--sampler.power.k 3", "mean nothing to the adaptive sampler"),
    ("--sampler.name pwoer", "did you mean 'power'?"),
):
    try:
        build(parse(["digits", *argv.split()])[1], sharding.make_mesh())
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(argv)
print("fine")
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy of the repository in which the steps were taken."""
    copy, text = tmp_path_factory.mktemp("copy"), (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("adaptive_ts", "configs", "tests/support", "tests/conftest.py", "pyproject.toml"):
        place = copy / name
        place.parent.mkdir(parents=True, exist_ok=True)
        made = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        made(ROOT / name, place)
    steps = text[text.index("## How to add a sampler") : text.index("## House rules")]
    files = re.findall(r"^File: `([^`]+)`\n\n```python\n(.*?)\n```", steps, re.M | re.S)
    patches = re.findall(r"^```diff\n(.*?)\n```", steps, re.M | re.S)
    assert len(files) == 2 and len(patches) == 4
    for name, content in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(content + "\n")
    for patch in patches:
        subprocess.run(
            ["git", "apply", "-"], cwd=copy, input=f"{patch}\n", text=True, check=True,
            env={**os.environ, "GIT_DIR": str(copy / "none")},
        )  # fmt: skip
    return copy


def run(folder, *command):
    env = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(followed):
    # One of the three grids: the others cost as much again and follow no other step.
    options = ("-n", "0", "-q", "-k", "T1000 or law or bad")
    assert "3 passed, 2 deselected" in run(followed, "-m", "pytest", *options, "tests/samplers")


def test_the_command_line_knows_it_and_its_options(followed):
    assert run(followed, "-c", CHECK).strip() == "fine"
    text = run(followed, "-m", "adaptive_ts.experiment.main", "train", "--help")
    assert "--sampler.power.k FLOAT" in " ".join(text.split())
    assert "Above 1 it favours high noise." in " ".join(text.split())
