"""What a run consists of before its first step, and what is compiled for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.assembly.build import Built, build, check_classes, first_state
from adaptive_ts.experiment.assembly.state import TrainState, shardings
from adaptive_ts.experiment.assembly.step import make_density, make_step, variant
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset, is_latent
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import Log, UserError
from adaptive_ts.experiment.train.run_folder import check_folder
from adaptive_ts.types import Key

Jobs = dict[Any, tuple[Any, tuple[Any, ...]]]


class Plan(NamedTuple):
    """All that stays the same while a run goes on.

    Attributes:
      row: the name of its row.
      config: with a workdir.
      folder: that of the run.
      mesh: the devices.
      built: the parts.
      dataset: the training images.
      key: randomness of the steps, on every device.
      key_init: randomness of the first state, likewise.
      init: key -> the first state.
      state: its shapes, dtypes and shardings.
      log: takes a line; silent but in process 0.
    """

    row: str
    config: Config
    folder: Path
    mesh: Mesh
    built: Built
    dataset: Dataset
    key: Key
    key_init: Key
    init: Callable[[Key], TrainState]
    state: TrainState
    log: Log


def make_plan(row: str, config: Config, log: Log, *, keep: bool = True) -> Plan:
    """Reads the data and builds the parts; the run's folder is looked at, not touched.

    Args:
      row: the name of its row.
      config: with a workdir.
      log: takes a line.
      keep: as for `data.load`.

    Raises:
      UserError: a mistake of the user's, or data that cannot be had.
    """
    assert config.workdir is not None
    folder = Path(config.workdir).expanduser().resolve()
    log = log if jax.process_index() == 0 else lambda line: None
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    check_folder(folder, config)
    dataset = load_split(config.data, "train", log, keep=keep)
    check_classes(config, dataset)
    if config.sampler.decoder_nll and is_latent(dataset.images.dtype):
        raise UserError(
            f"--sampler.decoder_nll: True is of 8-bit pixels, and {dataset.name} holds latents: "
            "leave it out"
        )
    built = build(config, mesh)
    keys = jax.jit(jax.random.split, out_shardings=sharding.replicated(mesh))
    key_init, key = keys(seed_key(config.seed))
    shape = (config.train.batch_size, *dataset.images.shape[1:])
    init, state = first_state(built, shape, key_init, mesh)
    return Plan(row, config, folder, mesh, built, dataset, key, key_init, init, state, log)


def make_jobs(plan: Plan, start: int) -> Jobs:
    """What a run compiles that goes on from step ``start``, for `compiling`.

    ``"init"`` (key) at the start; the values of ``probe`` that the steps ahead have (state, batch,
    key); ``"density"`` (sampler state, batch).
    """
    config, every, parts = plan.config, plan.built.probe_every, plan.built.parts
    numbers = range(start + 1, config.train.steps + 1)
    variants = {variant(number, every) for number in numbers[: every or 1]}
    rows = sharding.split(plan.mesh)
    shape = (config.train.batch_size, *plan.dataset.images.shape[1:])
    batch = {
        "image": jax.ShapeDtypeStruct(shape, plan.dataset.images.dtype, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    placed = shardings(plan.state)
    first = {} if start else {"init": (jax.jit(plan.init, out_shardings=placed), (plan.key_init,))}
    steps = {
        probe: (make_step(parts, probe=probe, state=plan.state), (plan.state, batch, plan.key))
        for probe in sorted(variants, key=bool)  # the first steps don't probe
    }
    return {**first, **steps, "density": (make_density(parts), (plan.state.sampler, batch))}
