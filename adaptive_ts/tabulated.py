"""Distributions over the buckets of a time grid: draws by inverse CDF, and their density."""

import jax.numpy as jnp

from adaptive_ts.grid import TimeGrid
from adaptive_ts.schedules import NoiseSchedule
from adaptive_ts.types import PerBucket, PerExample

_MARGIN = 1e-3  # keeps u inside its cell, where rounding cannot move it to a neighbour


def draw_from_buckets(
    grid: TimeGrid, probabilities: PerBucket, v: PerExample
) -> tuple[PerExample, PerExample]:
    """(t, u) of the draws v ~ U(0, 1) by the inverse CDF, uniform in u within a bucket.

    Args:
      grid: the time grid.
      probabilities: (n,) of the grid's buckets, >= 0; normalised here.
      v: (b,) in (0, 1); coupled v (strata, a lattice) give coupled draws.

    Returns:
      t (b,) and u (b,) float32. A bucket of probability 0 is never drawn.
    """
    cdf = jnp.cumsum(probabilities.astype(jnp.float32))
    cdf = cdf / cdf[-1]
    # The first bucket whose cdf exceeds v < 1 = cdf[-1]: empty buckets are passed over.
    bucket = jnp.searchsorted(cdf, v, side="right", method="scan_unrolled").astype(jnp.int32)
    below = jnp.where(bucket > 0, cdf[jnp.maximum(bucket - 1, 0)], 0.0)
    inside = (v - below) / jnp.maximum(cdf[bucket] - below, 1e-30)
    t = bucket_timesteps(grid)[bucket]
    lo, hi = grid.cell(t)
    u = lo + (hi - lo) * jnp.clip(inside, _MARGIN, 1 - _MARGIN)
    return (grid.to_t(u) if grid.num_timesteps is None else t), u


def bucket_log_density(grid: TimeGrid, probabilities: PerBucket, t: PerExample) -> PerExample:
    """log(n p) of t's bucket: the density relative to uniform; probabilities sum to 1."""
    relative = probabilities.astype(jnp.float32) * grid.num_buckets
    return jnp.log(relative[grid.to_bucket(t)])


def bucket_timesteps(grid: TimeGrid) -> PerBucket:
    """(n,) one timestep per bucket: t itself, or the middle of the bucket in continuous time."""
    if grid.num_timesteps is not None:
        return jnp.arange(grid.num_timesteps, dtype=jnp.int32)
    middle = (jnp.arange(grid.num_buckets, dtype=jnp.float32) + 0.5) / grid.num_buckets
    return grid.to_t(middle)


def check_schedule(grid: TimeGrid, schedule: NoiseSchedule) -> None:
    """Raises ValueError unless the schedule takes the grid's timesteps."""
    if grid.num_timesteps != schedule.num_timesteps:
        raise ValueError(
            f"the grid has {_timesteps(grid.num_timesteps)}, the {schedule.name} schedule "
            f"{_timesteps(schedule.num_timesteps)}: give both the same"
        )


def _timesteps(number: int | None) -> str:
    return "continuous time" if number is None else f"{number} timesteps"
