"""Distributions over the buckets of a time grid: draws by inverse CDF, and their density."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.schedules.base import NoiseSchedule
from adaptive_ts.timesteps.grid import TimeGrid, open_unit, strata
from adaptive_ts.types import Key, PerBucket, PerExample

_MARGIN = 1e-3  # keeps u inside its cell, where rounding cannot move it to a neighbour


def draw_from_buckets(
    grid: TimeGrid, probabilities: PerBucket, v: PerExample
) -> tuple[PerExample, PerExample]:
    """(t, u) of the draws v ~ U(0, 1) by the inverse CDF, uniform in u within a bucket.

    Args:
      grid: the time grid.
      probabilities: (n,), >= 0, normalised here: of the timesteps on a discrete grid, of n
        equal cells of u in continuous time (any n).
      v: (b,) in (0, 1); coupled v (strata, a lattice) give coupled draws.

    Returns:
      t (b,) and u (b,) float32. A bucket of probability 0 is never drawn.
    """
    _check_length(grid, probabilities)
    p = probabilities.astype(jnp.float32)
    # A parallel sum may rise by a rounding error where p is 0, and fall by one elsewhere.
    cdf = jax.lax.cummax(jnp.where(p > 0, jnp.cumsum(p), 0.0))
    cdf = cdf / cdf[-1]
    # The first bucket whose cdf exceeds v < 1 = cdf[-1]: empty buckets are passed over.
    bucket = jnp.searchsorted(cdf, v, side="right", method="scan_unrolled").astype(jnp.int32)
    below = jnp.where(bucket > 0, cdf[jnp.maximum(bucket - 1, 0)], 0.0)
    inside = (v - below) / jnp.maximum(cdf[bucket] - below, 1e-30)
    if grid.num_timesteps is None:
        lo = bucket.astype(jnp.float32) / len(p)
        hi = lo + 1 / len(p)
    else:
        lo, hi = grid.cell(bucket)
    u = open_unit(lo + (hi - lo) * jnp.clip(inside, _MARGIN, 1 - _MARGIN))
    return (grid.to_t(u) if grid.num_timesteps is None else bucket), u


def bucket_log_density(grid: TimeGrid, probabilities: PerBucket, t: PerExample) -> PerExample:
    """log(n p) of t's bucket: the density relative to uniform; probabilities sum to 1."""
    _check_length(grid, probabilities)
    n = probabilities.shape[0]
    if grid.num_timesteps is None:
        t = jnp.clip(jnp.floor(grid.to_u(t) * n), 0, n - 1).astype(jnp.int32)
    return jnp.log(probabilities.astype(jnp.float32) * n)[t]


class Strata(NamedTuple):
    """Equal cuts of the time grid, for what its many timesteps are too fine to estimate.

    Attributes:
      num: m, how many.
      timesteps: (m,) the middle of each.
      jittered: key -> (m,) a uniform draw in each.
      share: (m,) float32, the probabilities that uniform timesteps give the strata.
      to_stratum: t (b,) -> (b,) int32 in [0, m).
      spread: (m,) probabilities of the strata -> (n,) for `draw_from_buckets`: shared equally
        by a stratum's timesteps on a discrete grid (n = T), as they are in continuous time.
    """

    num: int
    timesteps: PerBucket
    jittered: Callable[[Key], PerBucket]
    share: PerBucket
    to_stratum: Callable[[PerExample], PerExample]
    spread: Callable[[PerBucket], PerBucket]


def strata_of(grid: TimeGrid, num: int) -> Strata:
    """A time grid in ``num`` equal strata: cells of u, or runs of T / num timesteps.

    On a discrete grid t belongs to stratum floor((t + 1/2) num / T); none is empty.

    Args:
      grid: the time grid.
      num: how many strata are asked for.

    Returns:
      `Strata`, T of them if ``num`` is more than T.

    Raises:
      ValueError: ``num`` is not an integer of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> from adaptive_ts.timesteps.tables import strata_of
      >>> cells = strata_of(ats.discrete(10), 5)
      >>> print(cells.to_stratum(jnp.asarray([0, 1, 2, 9])))
      [0 0 1 4]
      >>> print(cells.spread(jnp.asarray([0.6, 0.1, 0.1, 0.1, 0.1])))
      [0.3  0.3  0.05 0.05 0.05 0.05 0.05 0.05 0.05 0.05]
    """
    if isinstance(num, bool) or not isinstance(num, int | np.integer) or num < 1:
        raise ValueError(f"num_buckets must be an integer of at least 1, got {num!r}")
    T = grid.num_timesteps
    num = int(num if T is None else min(num, T))
    if T is None:

        def to_stratum(t: PerExample) -> PerExample:
            return jnp.clip(jnp.floor(grid.to_u(t) * num), 0, num - 1).astype(jnp.int32)

        middle = (np.arange(num, dtype=np.float32) + 0.5) / np.float32(num)
        share = jnp.full((num,), 1 / num, jnp.float32)

        def jittered(key: Key) -> PerBucket:
            return strata(grid, num, key)

        return Strata(num, grid.to_t(jnp.asarray(middle)), jittered, share, to_stratum, lambda p: p)
    table = ((2 * np.arange(T) + 1) * num // (2 * T)).astype(np.int32)
    size = np.bincount(table)
    middle = (np.cumsum(size) - size + size // 2).astype(np.int32)
    part = (1 / size).astype(np.float32)  # of its stratum, for one timestep

    def drawn(key: Key) -> PerBucket:
        w = jax.random.uniform(key, (num,), jnp.float32)
        inside = jnp.floor(w * size.astype(np.float32)).astype(jnp.int32)
        first = (np.cumsum(size) - size).astype(np.int32)
        return jnp.add(first, jnp.minimum(inside, (size - 1).astype(np.int32)))

    return Strata(
        num,
        jnp.asarray(middle),
        drawn,
        jnp.asarray((size / T).astype(np.float32)),
        lambda t: jnp.asarray(table)[t],
        lambda p: (p * part)[table],
    )


def bucket_timesteps(grid: TimeGrid) -> PerBucket:
    """(n,) one timestep per bucket: t itself, or the middle of the bucket in continuous time."""
    if grid.num_timesteps is not None:
        return jnp.arange(grid.num_timesteps, dtype=jnp.int32)
    middle = (jnp.arange(grid.num_buckets, dtype=jnp.float32) + 0.5) / grid.num_buckets
    return grid.to_t(middle)


def cell_edges(grid: TimeGrid) -> np.ndarray:
    """(T + 1,) float64 on the host: the draws u that map to t lie between edges t and t + 1."""
    T = grid.num_timesteps
    assert T is not None, "continuous time has no cells"
    with jax.ensure_compile_time_eval():
        lo, hi = (np.asarray(x, np.float64) for x in grid.cell(jnp.arange(T, dtype=jnp.int32)))
    edges = np.append(lo, hi[-1])
    # An edge in float32 leaves the mass of a cell four digits: so the grids of this package
    # in float64, and other people's as they are.
    step = np.arange(T + 1)
    for exact in (step / T, np.clip((step - 0.5) / (T - 1), 0.0, 1.0)):
        if np.abs(edges - exact).max() < 2.0**-23:
            return exact
    return edges


def check_schedule(grid: TimeGrid, schedule: NoiseSchedule) -> None:
    """Raises ValueError unless the schedule takes the grid's timesteps."""
    if grid.num_timesteps != schedule.num_timesteps:
        raise ValueError(
            f"the grid has {_timesteps(grid.num_timesteps)}, the {schedule.name} schedule "
            f"{_timesteps(schedule.num_timesteps)}: give both the same"
        )


def _check_length(grid: TimeGrid, probabilities: PerBucket) -> None:
    if grid.num_timesteps not in (None, probabilities.shape[0]):
        raise ValueError(
            f"probabilities have shape {probabilities.shape}: the grid's timesteps need "
            f"({grid.num_timesteps},)"
        )


def _timesteps(number: int | None) -> str:
    return "continuous time" if number is None else f"{number} timesteps"
