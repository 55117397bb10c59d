"""The training state: everything that changes from step to step, as one pytree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.learning.statistics import LossStatistics, init_statistics
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


def final_keys(seed: int) -> tuple[Key, Key]:
    """What a run of this seed measures its bound with at its end, and makes its images from."""
    _, key = jax.random.split(seed_key(seed))
    of_bound, of_images = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    return of_bound, of_images


def abstract(init: Callable[[Key], TrainState], key: Key, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it.

    On a mesh with an axis ``fsdp`` the model's parameters, their average and its optimizer's state
    are split over it; the sampler's state is small and everywhere whole.
    """
    whole, state = sharding.replicated(mesh), jax.eval_shape(init, key)

    def placed(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    model = {
        name: jax.tree.map(lambda x: placed(x, sharding.shared(mesh, x.shape)), value)
        for name, value in state._asdict().items()
        if name in ("params", "ema", "opt_state")
    }
    return jax.tree.map(lambda x: placed(x, whole), state)._replace(**model)


def shardings(tree: Any) -> Any:
    """Where each leaf of a placed tree, abstract or not, lives."""
    return jax.tree.map(lambda x: x.sharding, tree)
