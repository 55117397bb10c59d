"""The wheel of this checkout, and commands that see nothing else of it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_PACKAGES = re.compile(
    r"dns error|error sending request|failed to fetch|Could not connect|Connection refused|"
    r"Temporary failure in name resolution|NewConnectionError|Network is unreachable|"
    r"Failed to establish a new connection|network was disabled",
    re.IGNORECASE,
)


def find_uv() -> list[str] | None:
    beside = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if beside:
        return [beside]
    return [sys.executable, "-m", "uv"] if find_spec("uv") else None


def run_outside(command, cwd: Path) -> str:
    """Its stdout; a skip where packages cannot be had, and a failure for any other reason."""
    # Nothing of this checkout, and nothing of the environment the tests run in, may leak in.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    run = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**env, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip
    if run.returncode and NO_PACKAGES.search(run.stderr + run.stdout):
        pytest.skip(f"no packages can be had here: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, f"{command}:\n{run.stdout}\n{run.stderr}"
    return run.stdout


def build_wheel(folder: Path) -> Path:
    uv = find_uv()
    if uv:
        command = [*uv, "build", "--wheel", "--out-dir", folder, ROOT]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT]
    run_outside(command, folder)
    (path,) = folder.glob("*.whl")
    return path
