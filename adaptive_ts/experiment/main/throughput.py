"""Images per second: of training, sampler beside sampler and PyTorch, and of generation.

``adaptive-ts throughput [ROW] [--field.path VALUE ...] [--batch_sizes N ...]
[--dtypes float32 bfloat16] [--samplers NAME ...] [--torch] [--peak_tflops X ...] [--cycles N]
[--no_generate] [--out FILE] [--trace DIR]``

ROW is one of ``configs/`` (default: overhead; cifar10 for a GPU). Of each dtype, batch size and
sampler, whole cycles of f_S steps as ``train`` runs them, on a batch that lies on the devices;
with ``--torch`` the same U-Net, loss, clipping, Adam and average in PyTorch, eager and compiled;
and the row's images by its solver. All take turns, cycle by cycle after one to warm up, so that a
machine whose speed drifts slows all alike. Utilisation is the model's FLOPs (the compiler's count
of the uniform step) over what the device computes at best. The pixels are random: no data set is
needed. ``--out`` is written anew after each round: what a stopped measurement found is in it.

``--trace DIR`` then writes a profile of one step of each: drop ``perfetto_trace.json.gz``, or
PyTorch's ``trace.json``, on https://ui.perfetto.dev, or look at DIR in TensorBoard with the plugin
of xprof. Memory that JAX takes at its start PyTorch cannot have: with ``--torch`` JAX takes it as
it needs it (``XLA_PYTHON_CLIENT_PREALLOCATE``).
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_ts.experiment.commands import Parser, usable, usable_file
from adaptive_ts.experiment.config.command_line import parse, split_row
from adaptive_ts.experiment.errors import UserError

DTYPES = ("float32", "bfloat16")
_OWN = {"--model.dtype": "--dtypes"}  # a field of which there are several here


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="adaptive-ts throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--batch_sizes", nargs="+", type=int, help="images at once; default: the row's")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    add("--samplers", nargs="+", help="default: uniform and the row's own (or adaptive)")
    add("--torch", action="store_true", help="PyTorch too, eager and compiled")
    add(
        "--peak_tflops",
        nargs="+",
        type=float,
        help="of one device at best, for all dtypes or for each; default: from a table",
    )
    add("--cycles", type=int, default=5, help="rounds that count; default: 5")
    add("--no_generate", action="store_true", help="training alone")
    add("--out", type=Path, help="file of the results, JSON")
    add("--trace", type=Path, help="folder of profiles, one step of each that trains")
    add("--configs", help="folder of rows; default: ./configs and the built-in ones")
    return parser


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, with ``row``, and the fields' overrides; checked as far as that goes alone.

    Raises:
      UserError: an unknown or malformed option, or a value out of range.
    """
    row, rest = split_row(argv, "overhead")
    args, overrides = make_parser().parse_known_args(rest)
    args.row = row
    for token in overrides:
        name = token.partition("=")[0]
        if name in _OWN:
            raise UserError(f"{name}: there are several here: use {_OWN[name]}")
    for name, values in (("cycles", [args.cycles]), ("batch_sizes", args.batch_sizes or [])):
        for value in values:
            if value < 1:
                raise UserError(f"--{name}: {value} is out of range: must be at least 1")
    return args, overrides


def main(argv: list[str]) -> int:
    """The command."""
    args, overrides = arguments(argv)
    row, config = parse([args.row, *overrides], configs_dir=args.configs)
    if args.torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read as JAX starts
    from adaptive_ts.experiment.costs.race import CannotRunError
    from adaptive_ts.experiment.costs.throughput import make_plan, measure
    from adaptive_ts.experiment.costs.throughput_report import text
    from adaptive_ts.experiment.devices import sharding
    from adaptive_ts.experiment.files import write_json

    mesh = sharding.make_mesh()
    plan = make_plan(config, args, mesh)
    if args.out is not None:
        usable_file(args.out)
    if args.trace is not None:
        with usable(args.trace, "--trace"):
            args.trace.mkdir(parents=True, exist_ok=True)

    def save(report: dict[str, Any]) -> None:
        if args.out is not None:
            with usable(args.out):
                write_json(args.out, report)

    try:
        report = measure(
            row, plan, mesh, peak_tflops=args.peak_tflops, save=save, traces=args.trace
        )
    except CannotRunError as error:
        raise UserError(f"{error}: give a smaller model", exit_code=1) from None
    save(report)
    print(text(report))
    return 0
