"""Images per second: of training, sampler beside sampler and PyTorch, and of generation.

``python -m adaptive_ts.experiment.throughput [ROW] [--field.path VALUE ...] [--batch_sizes N ...]
[--dtypes float32 bfloat16] [--samplers NAME ...] [--torch] [--peak_tflops X ...] [--cycles N]
[--no_generate] [--out FILE] [--trace DIR]``

ROW is one of ``configs/`` (default: overhead; cifar10 for a GPU). Of each dtype, batch size and
sampler, whole cycles of f_S steps as ``train.py`` runs them, on a batch that lies on the devices;
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
import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from adaptive_ts.experiment import sharding, throughput_torch
from adaptive_ts.experiment.cli import Parser, parse, run_cli, usable
from adaptive_ts.experiment.config import Config, to_dict, validate
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.factory import build, known_names
from adaptive_ts.experiment.files import write_json
from adaptive_ts.experiment.throughput_entries import (
    Plan,
    flops_per_image,
    image_of,
    make_turns,
    trace,
)
from adaptive_ts.experiment.throughput_peaks import arithmetic, explained, peaks_of
from adaptive_ts.experiment.throughput_race import CannotRunError, Race, in_turn
from adaptive_ts.experiment.throughput_report import Yardstick, rows, text

DTYPES = ("float32", "bfloat16")
_OWN = {"--model.dtype": "--dtypes"}  # a field of which there are several here


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="throughput",
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
    add("--configs", default="configs", help="folder of rows")
    return parser


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, with ``row``, and the fields' overrides; checked as far as that goes alone.

    Raises:
      UserError: an unknown or malformed option, or a value out of range.
    """
    named = bool(argv) and not argv[0].startswith("-")
    args, overrides = _parser().parse_known_args(argv[named:])
    args.row = argv[0] if named else "overhead"
    for token in overrides:
        name = token.partition("=")[0]
        if name in _OWN:
            raise UserError(f"{name}: there are several here: use {_OWN[name]}")
    for name, values in (("cycles", [args.cycles]), ("batch_sizes", args.batch_sizes or [])):
        for value in values:
            if value < 1:
                raise UserError(f"--{name}: {value} is out of range: must be at least 1")
    return args, overrides


def make_plan(config: Config, args: argparse.Namespace, mesh: Mesh) -> Plan:
    """What to measure.

    Raises:
      UserError: samplers that are unknown or do not go with the row's options, batch sizes that
        the devices can't share, or what PyTorch has not.
    """
    own = config.sampler.name
    samplers = args.samplers or ("uniform", own if own != "uniform" else "adaptive")
    plan = Plan(
        config=config,
        dtypes=tuple(dict.fromkeys(args.dtypes)),
        batch_sizes=tuple(dict.fromkeys(args.batch_sizes or (config.train.batch_size,))),
        samplers=tuple(dict.fromkeys(samplers)),
        torch=args.torch,
        generate=not args.no_generate,
        cycles=args.cycles,
    )
    for sampler in plan.samplers:
        chosen = plan.config_of(sampler, plan.dtypes[0], plan.batch_sizes[0])
        problems = validate(chosen, known_names())
        if problems:
            raise UserError("; ".join(problems).replace("--sampler.name:", "--samplers:"))
        build(chosen, mesh)  # what is wrong with the options is known before anything runs
    for size in plan.batch_sizes:
        try:
            sharding.check_batch_size(size, mesh)
        except UserError as error:
            option = "--batch_sizes" if args.batch_sizes else "--train.batch_size"
            raise UserError(str(error).replace("--train.batch_size", option)) from None
    if plan.torch:
        throughput_torch.check_torch(config, mesh)
    return plan


def measure(
    row: str,
    plan: Plan,
    mesh: Mesh,
    *,
    peak_tflops: list[float] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    traces: Path | None = None,
) -> dict[str, Any]:
    """The report, as ``--out`` has it.

    Args:
      row: its name, for the report.
      plan: what is measured.
      mesh: the devices.
      peak_tflops: of one device, one for all dtypes or one for each; None: from the table.
      save: gets the report before the first round and after each.
      traces: folder of the profiles.
    """
    computed_in = _arithmetic(plan, mesh)
    kind, image = mesh.devices.flat[0].device_kind, image_of(plan.config)
    peaks = peaks_of(computed_in, kind, peak_tflops)
    yardstick = Yardstick(
        plan.config.sampler.every, flops_per_image(plan, mesh, image), peaks, mesh.size
    )
    about = _about(row, plan, mesh, image, yardstick, computed_in)

    def report(race: Race) -> dict[str, Any]:
        done = max(map(len, race.seconds.values()), default=0)
        return {**about, "cycles": done, "rows": rows(plan.entries(), race, yardstick)}

    save(report(Race({entry: [] for entry in plan.entries()}, {})))
    turns = make_turns(plan, mesh, image, _progress)
    with _progress(len(turns) * (plan.cycles + 1), "measuring") as tell:
        race = in_turn(
            turns,
            plan.cycles,
            after_turn=lambda entry: tell(),
            after_round=lambda race: save(report(race)),
        )
    if traces is not None:
        trace(turns, traces, _progress)
    return report(race)


def _arithmetic(plan: Plan, mesh: Mesh) -> dict[str, str]:
    device = mesh.devices.flat[0]
    precision = jax.config.jax_default_matmul_precision
    capability = getattr(device, "compute_capability", None)
    return {
        dtype: arithmetic(dtype, device.platform, precision=precision, capability=capability)
        for dtype in plan.dtypes
    }


def _about(
    row: str,
    plan: Plan,
    mesh: Mesh,
    image: jax.ShapeDtypeStruct,
    yardstick: Yardstick,
    computed_in: dict[str, str],
) -> dict[str, Any]:
    config, kind = plan.config, mesh.devices.flat[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    settings = [explained(dtype, kind) for dtype, kind in computed_in.items()]
    if plan.torch:
        settings.append(throughput_torch.settle(mesh, computed_in.get("float32", "tf32")))
        versions |= throughput_torch.versions()
    c = config.generate
    sides = "x".join(map(str, image.shape))
    return {
        "row": row,
        "model": f"{config.model.name} on {sides} images of {config.data.name}",
        "devices": f"{mesh.size} x {kind}{_cores(mesh)}",
        "device_kind": kind,
        "versions": {"python": platform.python_version(), **versions},
        "settings": settings,
        "computed_in": computed_in,
        "peak_tflops": dict(yardstick.peaks),
        "flops_per_image": yardstick.flops_per_image,
        "every": yardstick.every,
        "generation": f"{c.solver}, {c.steps} steps",
        "config": to_dict(config),
    }


def _cores(mesh: Mesh) -> str:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return f" ({os.cpu_count()} cores in all)" if on_cpu else ""


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], Any]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what) as bar:
        yield bar.update


def main(argv: list[str]) -> int:
    """The command."""
    args, overrides = arguments(argv)
    row, config = parse([args.row, *overrides], configs_dir=args.configs, known=known_names())
    if args.torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read as JAX starts
    mesh = sharding.make_mesh()
    plan = make_plan(config, args, mesh)
    _check_places(args)

    def save(report: dict[str, Any]) -> None:
        if args.out is not None:
            with usable(args.out, "--out"):
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


def _check_places(args: argparse.Namespace) -> None:
    """That results can be written is known before anything slow."""
    if args.out is not None:
        if args.out.is_dir():
            raise UserError(f"--out: {args.out} is a folder: give a file")
        with usable(args.out, "--out"):
            args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.trace is not None:
        with usable(args.trace, "--trace"):
            args.trace.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "throughput"
    run_cli(main)
