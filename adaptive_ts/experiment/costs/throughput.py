"""Images per second: of training, sampler beside sampler and PyTorch, and of generation."""

import argparse
import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.groups import Config, to_dict
from adaptive_ts.experiment.costs import torch_trainer
from adaptive_ts.experiment.costs.entries import Plan, flops_per_image, image_of, make_turns, trace
from adaptive_ts.experiment.costs.peaks import arithmetic, explained, peaks_of
from adaptive_ts.experiment.costs.race import Race, in_turn
from adaptive_ts.experiment.costs.throughput_report import Yardstick, rows
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError


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
        problems = validate(chosen)
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
        torch_trainer.check_torch(config, mesh)
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
    # JAX sets the attributes of its options at run time.
    precision = jax.config.jax_default_matmul_precision  # pyrefly: ignore[missing-attribute]
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
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    settings = [explained(dtype, kind) for dtype, kind in computed_in.items()]
    if plan.torch:
        settings.append(torch_trainer.settle(mesh, computed_in.get("float32", "tf32")))
        versions |= torch_trainer.versions()
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
