"""Samplers whose distribution is fixed in advance."""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.grid import GridSample, TimeGrid, open_unit
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    Metrics,
    PerExample,
    State,
    TimestepSample,
    TimestepSampler,
)


def uniform(
    grid: TimeGrid, *, stratified: bool = False, axis_name: AxisName = None
) -> TimestepSampler:
    """Uniform timesteps, independent or one per stratum of (0, 1).

    Stratified: u_i = (pi(i) + v_i) / N with a random permutation pi of the N examples of the
    global batch and independent v_i ~ U(0, 1). The marginal stays uniform; the average over a
    batch varies less, and the place in the batch says nothing about t.

    Args:
      grid: the time grid.
      stratified: one draw per stratum of the global batch.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.uniform(ats.discrete(1000), stratified=True)
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> draw = sampler.sample(jax.random.key(0), sampler.init(jax.random.key(1), batch), batch)
      >>> print(jnp.sort(draw.t // 250))
      [0 1 2 3]

    Source: Ho et al. 2020 (arXiv 2006.11239), Algorithm 1; strata: McKay et al. 1979.
    """

    def init(key: Key, batch: Batch) -> State:
        return ()

    def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
        size = collectives.batch_size(batch)
        index = collectives.example_index(size, axis_name)
        key_stratum, key_jitter = jax.random.split(key)
        u = jax.vmap(jax.random.uniform)(collectives.example_keys(key_jitter, index))
        if stratified:
            total = size * collectives.axis_size(axis_name)
            stratum = jax.random.permutation(key_stratum, total)[index]
            u = (stratum.astype(jnp.float32) + u) / total
        u = open_unit(u)
        return TimestepSample(grid.to_t(u), u, jnp.ones((size,), jnp.float32))

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return grid.uniform_log_density(sample.t)

    def update(
        state: State, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[State, Metrics]:
        return state, {}

    return TimestepSampler(init, GridSample(grid, draw), log_density, update)
