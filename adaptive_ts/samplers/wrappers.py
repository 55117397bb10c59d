"""Samplers made from samplers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.schedules.base import NoiseSchedule
from adaptive_ts.timesteps.grid import GridSample, TimeGrid, open_unit
from adaptive_ts.timesteps.tables import check_schedule
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LogDensityFn,
    Metrics,
    PerExample,
    State,
    TimestepSample,
    TimestepSampler,
    Weighting,
)
from adaptive_ts.weightings.predictions import on_schedule


def importance_weighted(sampler: TimestepSampler) -> TimestepSampler:
    """Weights each draw by uniform over proposal, so that the objective stays the uniform one.

    weight_i = w_i exp(-log_density_i): E[weight * loss] is the mean of w * loss over uniform t.

    Args:
      sampler: the proposal. Its own weights w are kept as a factor; one that is importance
        weighted already is left as it is.

    Returns:
      A `TimestepSampler` with the same state, draws and ``log_density``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.importance_weighted(ats.uniform(ats.discrete(10)))
      >>> batch = {"image": jnp.zeros((2, 8, 8, 1))}
      >>> print(sampler.sample(jax.random.key(0), (), batch).weight)
      [1. 1.]

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3.
    """

    base = sampler.sample
    if isinstance(base, GridSample):
        return sampler._replace(sample=dataclasses.replace(base, proposal=sampler.log_density))

    def weigh(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return jnp.exp(-jax.lax.stop_gradient(sampler.log_density(state, sample, batch)))

    return _weighted(sampler, weigh)


def mixed_with_uniform(
    sampler: TimestepSampler,
    prob: float,
    *,
    grid: TimeGrid | None = None,
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Draws from (1 - prob) p + prob uniform, so that importance weights are at most 1 / prob.

    (On a grid with ``rounding="nearest"`` twice that at its two ends, which uniform draws reach
    half as often.)

    Args:
      sampler: p. Where it is importance weighted, the mixture is.
      prob: probability of a uniform draw, in [0, 1].
      grid: the sampler's time grid; needed only for a sampler that does not name its own
        (``sampler.sample.grid``).
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with the same state; its ``log_density`` is the mixture's.

    Raises:
      ValueError: ``prob`` outside [0, 1], or no grid.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.mixed_with_uniform(ats.uniform(ats.discrete(10)), 0.1)
      >>> batch = {"image": jnp.zeros((2, 8, 8, 1))}
      >>> draw = sampler.sample(jax.random.key(0), (), batch)
      >>> print(jnp.exp(sampler.log_density((), draw, batch)).round(3))
      [1. 1.]

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), released code, ``uniform_prob``.
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    base = _named(sampler, grid)
    grid = base.grid
    log_keep, log_mix = (np.float32(np.log(p)) if p > 0 else -np.inf for p in (1 - prob, prob))

    def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
        key_sample, key_mix = jax.random.split(key)
        sample = base.draw(key_sample, state, batch)
        index = collectives.example_index(sample.t.shape[0], axis_name)
        keys = collectives.example_keys(key_mix, index)
        u, coin = jax.vmap(lambda k: jax.random.uniform(k, (2,), jnp.float32))(keys).T
        mix = coin < prob
        u = jnp.where(mix, open_unit(u), sample.u)
        t = jnp.where(mix, grid.to_t(u), sample.t)
        return TimestepSample(t, u, sample.weight)

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return jnp.logaddexp(
            log_keep + sampler.log_density(state, sample, batch),
            log_mix + grid.uniform_log_density(sample.t),
        )

    def update(
        state: State,
        sample: TimestepSample,
        losses: PerExample,
        *,
        uniform_prob: float = 0.0,
        **extra: Any,
    ) -> tuple[State, Metrics]:
        # What learns from its draws must know which are its own: of mixtures of mixtures, too.
        mixed = 1 - (1 - prob) * (1 - uniform_prob)
        return sampler.update(state, sample, losses, uniform_prob=mixed, **extra)

    proposal = None if base.proposal is None else log_density
    sample = GridSample(grid, draw, base.weigh, proposal, base.single)
    return sampler._replace(sample=sample, log_density=log_density, update=update)


def with_weighting(
    sampler: TimestepSampler, weighting: Weighting, schedule: NoiseSchedule
) -> TimestepSampler:
    """Multiplies the loss of every draw by a weighting of its log-SNR.

    weight_i = w_i weighting(log SNR(t_i)): the draws and their density stay as they are.

    Args:
      sampler: draws the timesteps. Its own weights w are kept as a factor.
      weighting: (b,) log-SNR -> (b,) weight, such as ``weightings.min_snr()``.
      schedule: the noise schedule, of the same timesteps as the sampler's grid.

    Returns:
      A `TimestepSampler` with the same state, draws and ``log_density``.

    Raises:
      ValueError: the schedule's timesteps are not the grid's; a weighting of "v" with a schedule
        that neither preserves the variance nor has ``from_log_snr``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler, schedule = ats.uniform(ats.discrete(1000)), ats.schedules.linear(1000)
      >>> sampler = ats.with_weighting(sampler, ats.weightings.p2(gamma=1.0), schedule)
      >>> draw = sampler.sample(jax.random.key(0), (), {"image": jnp.zeros((2, 8, 8, 1))})
      >>> print(jnp.all(draw.weight < 1))
      True

    Source: Choi et al. 2022 (arXiv 2204.00227), Eq. 8, is the first of these weightings.
    """
    grid = getattr(sampler.sample, "grid", None)
    if grid is not None:
        check_schedule(grid, schedule)
    weighting = on_schedule(weighting, schedule)

    def weigh(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return weighting(schedule.log_snr(sample.t))

    return _weighted(sampler, weigh)


def with_density_of(sampler: TimestepSampler, other: TimestepSampler) -> TimestepSampler:
    """Multiplies the loss of every draw by the density that ``other`` has there.

    weight_i = w_i v_i exp(other.log_density_i), with v the other's own weights, its importance
    weights too. What ``other`` does
    to the objective by drawing more often than uniform becomes a loss weighting, and ``sampler``
    is free to choose the timesteps: an adaptive sampler on top of a heuristic. On top of uniform
    timesteps it is ``other`` by weights, the same objective in expectation.

    Args:
      sampler: draws the timesteps. Its own weights w are kept as a factor.
      other: a sampler of the same grid; it is updated with the draws of ``sampler``.

    Returns:
      A `TimestepSampler` whose state is the pair of theirs, with the draws, ``log_density`` and
      metrics of ``sampler``.

    Raises:
      ValueError: their grids differ, or ``other`` learns from its own draws only (`adaptive`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> grid = ats.discrete(1000)
      >>> sampler = ats.with_density_of(ats.uniform(grid), ats.beta(grid, 1.0, 2.0))
      >>> batch = {"image": jnp.zeros((2, 8, 8, 1))}
      >>> state = sampler.init(jax.random.key(0), batch)
      >>> draw = sampler.sample(jax.random.key(1), state, batch)
      >>> print(jnp.allclose(draw.weight, 2 * (1 - draw.u), atol=2e-3))
      True

    Source: ours; that a law of timesteps is a loss weighting in expectation: Kingma and Gao 2023
    (arXiv 2303.00848), section 3.
    """
    grids = [getattr(s.sample, "grid", None) for s in (sampler, other)]
    sizes = [grid and (grid.num_timesteps, grid.num_buckets) for grid in grids]
    if None not in grids and sizes[0] != sizes[1]:
        raise ValueError(
            f"both samplers need the same grid, got timesteps and buckets {sizes[0]} and {sizes[1]}"
        )
    if getattr(other.sample, "single", None) == "adaptive":
        raise ValueError(
            "other is, or wraps, an adaptive sampler, whose policy learns from its own draws only: "
            "give a sampler that is fixed or learns a table as other, and adaptive as sampler"
        )
    base, own = sampler.sample, getattr(other.sample, "factor", None)
    inner = base.weigh if isinstance(base, GridSample) else None

    def init(key: Key, batch: Batch) -> State:
        keys = jax.random.split(collectives.threefry(key))
        return sampler.init(keys[0], batch), other.init(keys[1], batch)

    def factor(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        density = jnp.exp(jax.lax.stop_gradient(other.log_density(state[1], sample, batch)))
        if own is None:
            return density
        # What other never draws counts for nothing, whatever its importance weight.
        return density * jnp.where(density > 0, own(state[1], sample, batch), 0.0)

    def weigh(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        weight = factor(state, sample, batch)
        return weight if inner is None else weight * inner(state[0], sample, batch)

    def sample(key: Key, state: State, batch: Batch, **axes: Any) -> TimestepSample:
        drawn = base(key, state[0], batch, **axes)
        return drawn._replace(weight=drawn.weight * factor(state, drawn, batch))

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return sampler.log_density(state[0], sample, batch)

    def update(
        state: State, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[State, Metrics]:
        first, metrics = sampler.update(state[0], sample, losses, **extra)
        second, _ = other.update(state[1], sample, losses, **extra)
        return (first, second), metrics

    if isinstance(base, GridSample):

        def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
            return base.draw(key, state[0], batch)

        proposal = None if base.proposal is None else log_density
        single = base.single or getattr(other.sample, "single", None)
        sample = GridSample(base.grid, draw, weigh, proposal, single)
    return TimestepSampler(init, sample, log_density, update)


def _named(sampler: TimestepSampler, grid: TimeGrid | None) -> GridSample:
    """The sampler's ``sample``, which names its grid, or made to name this one."""
    if isinstance(sampler.sample, GridSample):
        return sampler.sample
    if grid is None:
        raise ValueError("this sampler does not name its time grid: pass grid=")
    return GridSample(grid, sampler.sample)


def _weighted(sampler: TimestepSampler, weigh: LogDensityFn) -> TimestepSampler:
    base = sampler.sample
    if not isinstance(base, GridSample):

        def draw(key: Key, state: State, batch: Batch, **axes: Any) -> TimestepSample:
            sample = base(key, state, batch, **axes)
            return sample._replace(weight=sample.weight * weigh(state, sample, batch))

        return sampler._replace(sample=draw)

    inner = base.weigh
    if inner is None:
        return sampler._replace(sample=dataclasses.replace(base, weigh=weigh))

    def both(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return inner(state, sample, batch) * weigh(state, sample, batch)

    return sampler._replace(sample=dataclasses.replace(base, weigh=both))
