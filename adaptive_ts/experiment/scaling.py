"""How the cost of a step grows with the number of devices, by the compiler's own count.

``python -m adaptive_ts.experiment.scaling [ROW] [--devices N ...] [--out FILE]
[--field.path VALUE ...]``

ROW is one of ``configs/`` (default: overhead). Nothing is trained: the steps that ``train.py``
would take on N devices, with the uniform sampler and with the row's own, without a probe and with
one, are compiled and looked at. Strong scaling: the global batch is the row's whatever N is.

Printed of each step, for one device: FLOPs, bytes read and written, memory besides the state and
the batch, and the messages between devices with what they carry. The compiler puts up to 256
arrays into one. Then the probe's share of the FLOPs, ((probe - plain) / f_S) / plain, and the
messages that the sampler adds to uniform's. ``--mesh.fsdp F`` splits the model's state over F of
the devices.

Without accelerators, or with ``JAX_PLATFORMS=cpu``, the devices are virtual ones on the CPU, as
many as it takes.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.cli import Parser, parse, run_cli, usable
from adaptive_ts.experiment.compiling import compiling
from adaptive_ts.experiment.config import Config, SamplerConfig, replace, to_dict
from adaptive_ts.experiment.data import Dataset
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.factory import build, first_state, known_names
from adaptive_ts.experiment.files import write_json
from adaptive_ts.experiment.plan import Jobs, Plan, make_jobs
from adaptive_ts.experiment.scaling_report import Cost, cost_of, rows, text
from adaptive_ts.experiment.throughput_entries import image_of

DEVICES = (1, 2, 4, 8)


def step_jobs(config: Config, count: int, image: jax.ShapeDtypeStruct) -> Jobs:
    """ "uniform", "plain" and "probe", as far as there are such -> what `compiling` takes.

    Args:
      config: its sampler is that of "plain" and "probe".
      count: devices.
      image: one, of `image_of`.

    Raises:
      UserError: options that don't go together, or devices that can't share batch or state.
    """
    devices = jax.devices()
    if count > len(devices):
        kind = devices[0].platform
        hint = "" if kind == "cpu" else ", or start with JAX_PLATFORMS=cpu for virtual ones"
        raise UserError(f"--devices: {count} are not there, but {len(devices)} of {kind}{hint}")
    mesh = sharding.make_mesh(devices[:count], data=config.mesh.data, fsdp=config.mesh.fsdp)
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    own = config.sampler
    uniform = dataclasses.replace(config, sampler=SamplerConfig(name="uniform", every=own.every))
    jobs = {"uniform": _steps(uniform, mesh, image)[None]}
    if own.name != "uniform":
        names = {None: "plain", False: "plain", True: "probe"}
        jobs |= {names[variant]: job for variant, job in _steps(config, mesh, image).items()}
    return jobs


def _steps(config: Config, mesh: jax.sharding.Mesh, image: jax.ShapeDtypeStruct) -> Jobs:
    """Value of ``probe`` -> the step that ``train.py`` compiles."""
    built = build(config, mesh)
    config = replace(config, {"train.steps": built.probe_every or 1})
    key = jax.eval_shape(jax.random.key, 0)
    init, state = first_state(built, (config.train.batch_size, *image.shape), key, mesh)
    images = jax.ShapeDtypeStruct((config.train.batch_size, *image.shape), image.dtype)
    dataset = Dataset(config.data.name, images, None, 1, "")
    plan = Plan("", config, Path(), mesh, built, dataset, key, key, init, state, print)
    jobs = make_jobs(plan, 0)
    return {variant: jobs[variant] for variant in (None, False, True) if variant in jobs}


def measure(config: Config, counts: Sequence[int]) -> dict[int, dict[str, Cost]]:
    """Devices -> step, by the names of `step_jobs` -> its cost.

    Raises:
      UserError: as `step_jobs` does.
    """
    image = image_of(config)
    jobs = {
        (count, name): job
        for count in counts
        for name, job in step_jobs(config, count, image).items()
    }
    found: dict[int, dict[str, Cost]] = {count: {} for count in counts}
    with compiling(jobs) as compiled, tqdm(total=len(jobs), desc="compiling") as bar:
        for count, name in jobs:
            found[count][name] = cost_of(compiled((count, name)))
            bar.update()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", nargs="+", type=int, help="how many; default: 1 2 4 8, what fsdp divides")
    add("--out", type=Path, help="file of the results, JSON")
    add("--configs", default="configs", help="folder of rows")
    return parser


def main(argv: list[str], *, virtual: bool = False) -> int:
    """The command.

    Args:
      argv: its arguments.
      virtual: make as many devices of the CPU as it takes; JAX must not have looked for any yet.
    """
    named = bool(argv) and not argv[0].startswith("-")
    args, overrides = _parser().parse_known_args(argv[named:])
    row = argv[0] if named else "overhead"
    row, config = parse([row, *overrides], configs_dir=args.configs, known=known_names())
    fsdp = config.mesh.fsdp
    counts = args.devices or [n for n in DEVICES if n % fsdp == 0] or [fsdp]
    for count in counts:
        if count < 1:
            raise UserError(f"--devices: {count} is out of range: must be at least 1")
    if virtual:
        _make_virtual(max(counts))
    if args.out is not None:
        if args.out.is_dir():
            raise UserError(f"--out: {args.out} is a folder: give a file")
        with usable(args.out):
            args.out.parent.mkdir(parents=True, exist_ok=True)
    found = measure(config, list(dict.fromkeys(counts)))
    about = {
        "row": row,
        "model": f"{config.model.name} on images of {config.data.name}",
        "sampler": config.sampler.name,
        "every": config.sampler.every,
        "batch_size": config.train.batch_size,
    }
    platform = jax.default_backend()
    if args.out is not None:
        report = {**about, "platform": platform, "jax": jax.__version__}
        with usable(args.out):
            write_json(
                args.out,
                {**report, "rows": rows(found, about["every"]), "config": to_dict(config)},
            )
    print(text(about, found, platform))
    return 0


def _make_virtual(count: int) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = flags.strip()
    # Of machine code alone: what is counted is the same, in half the time.
    jax.config.update("jax_disable_most_optimizations", True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "scaling"
    run_cli(lambda argv: main(argv, virtual=True))
