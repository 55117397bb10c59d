"""A trained run measured: its held-out bound, and what its timesteps' gradients are worth."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adaptive_ts.experiment.assembly.state import final_keys
from adaptive_ts.experiment.assembly.step import prepare
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.evaluate.diagnostics import GradientNoise, gradient_noise, step_effects
from adaptive_ts.experiment.evaluate.likelihood import Evaluation, evaluate, geometric_strata
from adaptive_ts.experiment.generate.trained import Trained
from adaptive_ts.experiment.quality.reference import evenly_spaced
from adaptive_ts.types import Batch

EXAMPLES = 64  # of each batch of the diagnostics
_STRATA = 14  # from each end of the time axis
_TIMESTEPS_AT_ONCE = 4  # of one device

Tell = Callable[[int], Any]


class Diagnosis(NamedTuple):
    """Attributes:
    timesteps: (n,) where.
    noise: `GradientNoise` of one example, over 64 training images.
    effects: (n, n) of `step_effects`: a step on 64 training images at timestep i, measured on as
      many held-out ones at timestep j.
    """

    timesteps: np.ndarray
    noise: GradientNoise
    effects: np.ndarray


class Measured(NamedTuple):
    """Attributes:
    quality: of `image_quality`.
    likelihood: of `held_out_likelihood`.
    diagnosis: of `diagnose`, or None.
    """

    quality: Mapping[str, Any]
    likelihood: Evaluation
    diagnosis: Diagnosis | None


def held_out_likelihood(
    config: Config,
    trained: Trained,
    dataset: Dataset,
    mesh: Mesh,
    *,
    num_images: int,
    tell: Tell = lambda count: None,
) -> Evaluation:
    """Loss and VLB of the averaged weights; with the run's seed and 256 images its summary's.

    Args:
      config: of the run; its seed is the noise's.
      trained: the checkpoint.
      dataset: held-out images.
      mesh: the devices.
      num_images: how many, in whole batches of the run's size where there are some.
      tell: receives how many images are begun with.
    """
    size = -(-config.train.batch_size // mesh.size) * mesh.size
    return evaluate(
        trained.built,
        trained.state.ema,
        dataset,
        size,
        final_keys(config.seed)[0],
        mesh,
        max_images=num_images,
        tell=tell,
    )


def diagnostic_timesteps(num_timesteps: int) -> np.ndarray:
    """(n,) int32, n at most 28, close together at both ends, where timesteps differ most."""
    return geometric_strata(num_timesteps, _STRATA).timesteps


def diagnose(
    config: Config,
    trained: Trained,
    train: Dataset,
    held_out: Dataset,
    mesh: Mesh,
    *,
    tell: Tell = lambda count: None,
) -> Diagnosis:
    """Gradient noise and effects of steps, at the weights that train, with their optimizer.

    The loss is the run's own, without loss weighting and importance weights, and for the effects
    without dropout. The timesteps are shared by the devices.

    Args:
      config: of the run; its seed is the noise's.
      trained: the checkpoint.
      train: images that the steps are on.
      held_out: others, that their effect is measured on.
      mesh: the devices.
      tell: receives how many timesteps are done, of 2 n in all.
    """
    parts, state = trained.built.parts, trained.state
    timesteps = diagnostic_timesteps(config.schedule.num_timesteps)
    on, off = (_examples(dataset, mesh) for dataset in (train, held_out))
    key_noise, key_effects = jax.random.split(final_keys(config.seed)[0])

    def noise(t: jax.Array, params: Any, batch: Batch) -> GradientNoise:
        return gradient_noise(parts.loss_fn, params, batch, t, key_noise)

    def effects(t: jax.Array, params: Any, opt_state: Any, batch: Batch, other: Batch) -> jax.Array:
        return step_effects(
            trained.built.loss, parts.optimizer, params, opt_state, batch, other,
            timesteps, key_effects, rows=t,
        )  # fmt: skip

    return Diagnosis(
        timesteps,
        _by_timestep(noise, timesteps, (state.params, on), mesh, tell),
        _by_timestep(effects, timesteps, (state.params, state.opt_state, on, off), mesh, tell),
    )


def _by_timestep(
    function: Callable[..., Any], timesteps: np.ndarray, arguments: Any, mesh: Mesh, tell: Tell
) -> Any:
    """function((k,) timesteps, *arguments), some timesteps on each device at a time."""
    count, devices = len(timesteps), mesh.size
    block = min(_TIMESTEPS_AT_ONCE, -(-count // devices)) * devices
    rows, whole = PartitionSpec(sharding.axes(mesh)), PartitionSpec()
    # Without the check a gradient is of the device's own timesteps, not the sum over devices.
    run = jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(rows, *(whole for _ in arguments)),
            out_specs=rows,
            check_vma=False,
        )
    )
    found = []
    for start in range(0, count, block):
        part = timesteps[start : start + block]
        full = np.concatenate([part, np.repeat(part[-1:], block - len(part))])
        found.append(jax.tree.map(sharding.fetch, run(sharding.put_whole(full, mesh), *arguments)))
        tell(len(part))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


def _examples(dataset: Dataset, mesh: Mesh) -> Batch:
    """Evenly spaced images of a set, and their labels, on every device."""
    index = evenly_spaced(dataset.images.shape[0], EXAMPLES)
    images, labels = dataset.rows(index)
    whole = sharding.replicated(mesh)
    batch = prepare({"image": images, "label": labels}, None)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, whole, lambda i: np.asarray(x)[i]), batch
    )
