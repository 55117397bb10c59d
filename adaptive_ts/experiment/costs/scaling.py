"""How the cost of a step grows with the number of devices, by the compiler's own count."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from adaptive_ts.experiment.assembly.build import build, first_state
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig
from adaptive_ts.experiment.costs.counts import Cost, cost_of
from adaptive_ts.experiment.costs.entries import image_of
from adaptive_ts.experiment.data.decoding import Dataset
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.train.plan import Jobs, Plan, make_jobs


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
    """Value of ``probe`` -> the step that ``train`` compiles."""
    built = build(config, mesh)
    config = replace(config, {"train.steps": built.probe_every or 1})
    key = jax.eval_shape(jax.random.key, 0)
    init, state = first_state(built, (config.train.batch_size, *image.shape), key, mesh)
    images: Any = jax.ShapeDtypeStruct((config.train.batch_size, *image.shape), image.dtype)
    dataset = Dataset(config.data.name, images, np.zeros(0, np.int32), 1, "")
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
