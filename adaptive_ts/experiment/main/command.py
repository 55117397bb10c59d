"""``adaptive-ts COMMAND ...``: one name for all commands, each a module of this package."""

import importlib
import os
import sys
from collections.abc import Mapping

from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.errors import UserError, nearest

COMMANDS: Mapping[str, str] = {
    "train": "train a diffusion model, or go on training it",
    "generate": "make images with a trained run",
    "evaluate": "compare a run's images with real ones, measure its bound",
    "tables": "train and compare the rows of a table, seed by seed",
    "encode": "make a data set of latents of a folder of images",
    "decode": "make images of latents",
    "overhead": "what a sampler costs per step, over uniform",
    "throughput": "images per second, of training and of generation",
    "scaling": "how the cost of a step grows with the devices",
}
"""Name -> what it does. The module has the same name, and a function ``main(argv)``."""


def main(argv: list[str]) -> int:
    """Runs a command; its name comes first."""
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        import adaptive_ts

        print(f"adaptive-ts {adaptive_ts.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command: {nearest(name, COMMANDS)}")
    sys.argv[0] = f"adaptive-ts {name}"  # what a mistake is told by
    return importlib.import_module(f"adaptive_ts.experiment.main.{name}").main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: adaptive-ts COMMAND [...]",
            "",
            "Timestep sampling for training diffusion and flow models.",
            "",
            *lines,
            "",
            "adaptive-ts COMMAND --help has each command's options; --version the version.",
        ]
    )


def run() -> None:
    """The console script."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the host's processor
    sys.argv[0] = "adaptive-ts"
    run_cli(main)
