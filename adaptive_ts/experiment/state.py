"""The training state: everything that changes from step to step, as one pytree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.statistics import LossStatistics, init_statistics
from adaptive_ts.types import Batch, Key, Params, Scalar, TimestepSampler

LOSS_BUCKETS = 100  # resolution of the loss per timestep


class TrainState(NamedTuple):
    """Attributes:
    step: () int32, optimizer steps taken; also the position in the data.
    params: of the model.
    ema: their exponential moving average, which generates.
    opt_state: of the model's optimizer.
    sampler: the timestep sampler's state.
    statistics: the training loss per timestep bucket, over about the last thousand steps.
    """

    step: Scalar
    params: Params
    ema: Params
    opt_state: optax.OptState
    sampler: Any
    statistics: LossStatistics


def make_init(
    init_params: Callable[[Key, Batch], Params],
    optimizer: optax.GradientTransformation,
    sampler: TimestepSampler,
    batch: Batch,
) -> Callable[[Key], TrainState]:
    """key -> the state before the first step; ``batch`` may be abstract."""

    def init(key: Key) -> TrainState:
        key_params, key_sampler = jax.random.split(key)
        params = init_params(key_params, batch)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            sampler=sampler.init(key_sampler, batch),
            statistics=init_statistics(LOSS_BUCKETS),
        )

    return init


def first_state(
    init_params: Callable[[Key, Batch], Params],
    optimizer: optax.GradientTransformation,
    sampler: TimestepSampler,
    shape: tuple[int, ...],
    key: Key,
    mesh: Mesh,
) -> tuple[Callable[[Key], TrainState], TrainState]:
    """What makes the first state, and its shapes: here a model meets the images it cannot take.

    Args:
      init_params: of the model, as `make_init` takes it; likewise the next two.
      optimizer: of the model.
      sampler: of the timesteps.
      shape: (b, H, W, C) of the images.
      key: randomness of the state.
      mesh: the devices.

    Raises:
      UserError: the model cannot take them.
    """
    init = make_init(
        init_params, optimizer, sampler, {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    )
    try:
        return init, abstract(init, key, mesh)
    except ValueError as error:
        found, size = " ".join(str(error).split()), "x".join(map(str, shape[1:]))
        raise UserError(
            f"--model: {found}; the images are {size}: choose another --data.image_size, or other "
            "options of --model"
        ) from error


def abstract(init: Callable[[Key], TrainState], key: Key, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    whole = sharding.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init, key)
    )
