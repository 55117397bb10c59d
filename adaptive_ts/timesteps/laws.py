"""Distributions over timesteps that are fixed in advance, and the sampler made from one."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from scipy import special

from adaptive_ts import collectives
from adaptive_ts.timesteps.draws import Coupling, check_coupling, unit_draws
from adaptive_ts.timesteps.grid import GridSample, TimeGrid
from adaptive_ts.timesteps.tables import bucket_log_density, cell_edges, draw_from_buckets
from adaptive_ts.types import (
    AxisName,
    Batch,
    InitFn,
    Key,
    Metrics,
    PerBucket,
    PerExample,
    State,
    TimestepSample,
    TimestepSampler,
    UpdateFn,
)


class Law(NamedTuple):
    """A distribution over the timesteps of a grid.

    Attributes:
      draw: v (b,) in (0, 1) -> (t, u), each (b,), by the inverse CDF: t does not fall in v, so
        that coupled v give coupled timesteps.
      log_density: t (b,) -> (b,), relative to uniform over the grid's t.
    """

    draw: Callable[[PerExample], tuple[PerExample, PerExample]]
    log_density: Callable[[PerExample], PerExample]


class Symmetric(NamedTuple):
    """A standard distribution on the real line, symmetric about 0.

    Attributes:
      cdf: float64 on the host, exact in the lower tail (the upper one is its mirror image).
      lower_quantile: p (b,) in (0, 1/2] -> (b,), at most 0.
      log_pdf: (b,) -> (b,).
    """

    cdf: Callable[[np.ndarray | float], np.ndarray]
    lower_quantile: Callable[[PerExample], PerExample]
    log_pdf: Callable[[PerExample], PerExample]


NORMAL = Symmetric(special.ndtr, ndtri, lambda z: -z * z / 2 - 0.5 * math.log(2 * math.pi))


def check_parameters(law: str, remedy: str, holds: bool, **received: Any) -> None:
    """Raises ValueError with the parameters received, and the remedy, unless ``holds``."""
    if not holds:
        said = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise ValueError(f"{law}: got {said}; {remedy}")


def static_sampler(
    grid: TimeGrid, law: Law, *, coupling: Coupling = "independent", axis_name: AxisName = None
) -> TimestepSampler:
    """The sampler that draws from a law, with weights 1 and an empty state.

    Raises:
      ValueError: an unknown coupling.
    """
    check_coupling(coupling)

    def init(key: Key, batch: Batch) -> State:
        return ()

    def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
        size = collectives.batch_size(batch)
        t, u = law.draw(unit_draws(key, size, coupling=coupling, axis_name=axis_name))
        return TimestepSample(t, u, jnp.ones((size,), jnp.float32))

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return law.log_density(sample.t)

    def update(
        state: State, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[State, Metrics]:
        return state, {}

    return TimestepSampler(init, GridSample(grid, draw), log_density, update)


def table_sampler(
    grid: TimeGrid,
    init: InitFn,
    probabilities: Callable[[State], PerBucket],
    update: UpdateFn[...],
    *,
    importance_weighted: bool = False,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
    single: str | None = None,
) -> TimestepSampler:
    """The sampler that draws from a table which its state determines.

    Args:
      grid: the time grid.
      init, update: of the sampler.
      probabilities: state -> (n,), for `draw_from_buckets`; they sum to 1.
      importance_weighted: weight the draws by 1 / (T p_t).
      coupling: of the draws of a batch.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
      single: the sampler's name, if it draws one time per example only.

    Raises:
      ValueError: an unknown coupling.
    """
    check_coupling(coupling)

    def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
        size = collectives.batch_size(batch)
        v = unit_draws(key, size, coupling=coupling, axis_name=axis_name)
        t, u = draw_from_buckets(grid, probabilities(state), v)
        return TimestepSample(t, u, jnp.ones((size,), jnp.float32))

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        return bucket_log_density(grid, probabilities(state), sample.t)

    proposal = log_density if importance_weighted else None
    sample = GridSample(grid, draw, proposal=proposal, single=single)
    return TimestepSampler(init, sample, log_density, update)


def uniform_law(grid: TimeGrid) -> Law:
    """u = v."""
    return Law(lambda v: (grid.to_t(v), v), grid.uniform_log_density)


def tabulated_law(grid: TimeGrid, probabilities: np.ndarray) -> Law:
    """The law of a table: of the timesteps, or of n equal cells of u in continuous time.

    Args:
      grid: the time grid.
      probabilities: (n,) on the host, >= 0 and not all 0; normalised here.
    """
    table = np.asarray(probabilities, np.float64)
    total = table.sum()
    check_parameters(
        "a law of timesteps",
        "its parameters leave no mass to any of them",
        0 < total < math.inf,
        total_mass=float(total),
    )
    table = (table / total).astype(np.float32)
    return Law(
        lambda v: draw_from_buckets(grid, jnp.asarray(table), v),
        lambda t: bucket_log_density(grid, jnp.asarray(table), t),
    )


def unit_law(
    grid: TimeGrid,
    *,
    cdf: Callable[[np.ndarray], np.ndarray],
    quantile: Callable[[PerExample], PerExample],
    log_pdf: Callable[[PerExample], PerExample],
) -> Law:
    """The law of a u on (0, 1): a table on a discrete grid, closed forms in continuous time.

    Args:
      grid: the time grid; on a discrete one a timestep has the exact mass of its cell of u.
      cdf: float64 on the host, of (0, 1) and its ends.
      quantile: (b,) -> (b,) float32, the inverse of ``cdf``.
      log_pdf: (b,) -> (b,) float32.
    """
    if grid.num_timesteps is not None:
        return tabulated_law(grid, np.maximum(np.diff(cdf(cell_edges(grid))), 0.0))

    def draw(v: PerExample) -> tuple[PerExample, PerExample]:
        u = _inside(quantile(v))
        return grid.to_t(u), u

    return Law(draw, lambda t: log_pdf(_inside(grid.to_u(t))))


def logit_normal_law(grid: TimeGrid, mean: float, std: float) -> Law:
    """logit u ~ N(mean, std^2)."""
    mean, std = float(mean), float(std)

    def log_pdf(u: PerExample) -> PerExample:
        log_u, log_rest = jnp.log(u), jnp.log1p(-u)
        z = (log_u - log_rest - mean) / std
        return NORMAL.log_pdf(z) - math.log(std) - log_u - log_rest

    return unit_law(
        grid,
        cdf=lambda u: special.ndtr((special.logit(u) - mean) / std),
        quantile=lambda v: jax.nn.sigmoid(mean + std * ndtri(v)),
        log_pdf=log_pdf,
    )


def truncated_normal_law(grid: TimeGrid, mean: float, std: float) -> Law:
    """u ~ N(mean, std^2), conditioned on (0, 1)."""
    base = truncated(NORMAL, mean, std, 0.0, 1.0)
    return unit_law(
        grid,
        cdf=lambda u: interval_mass(NORMAL, (0.0 - mean) / std, (u - mean) / std),
        quantile=base.quantile,
        log_pdf=base.log_pdf,
    )


class Truncated(NamedTuple):
    """A distribution conditioned on an interval (lo, hi).

    Attributes:
      mass: of the interval before conditioning, float64.
      quantile: v (b,) in (0, 1) -> (b,) float32 in [lo, hi], rising.
      log_pdf: (b,) -> (b,) float32, for arguments inside the interval.
    """

    mass: float
    quantile: Callable[[PerExample], PerExample]
    log_pdf: Callable[[PerExample], PerExample]


def truncated(base: Symmetric, loc: float, scale: float, lo: float, hi: float) -> Truncated:
    """loc + scale Z, conditioned on (lo, hi)."""
    z_lo, z_hi = (lo - loc) / scale, (hi - loc) / scale
    mass = float(interval_mass(base, z_lo, z_hi))
    below, above = float(base.cdf(z_lo)), float(base.cdf(-z_hi))
    log_norm = math.log(scale) + math.log(mass) if mass > 0 else math.inf

    def quantile(v: PerExample) -> PerExample:
        # From the nearer end: 1 - p has no digits left in float32 where p is close to 1.
        p, q = below + v * mass, above + (1 - v) * mass
        z = base.lower_quantile(jnp.minimum(jnp.minimum(p, q), 0.5))
        return jnp.clip(loc + scale * jnp.where(p <= q, z, -z), lo, hi)

    return Truncated(mass, quantile, lambda x: base.log_pdf((x - loc) / scale) - log_norm)


def interval_mass(base: Symmetric, lo: np.ndarray | float, hi: np.ndarray | float) -> np.ndarray:
    """P(lo < Z < hi) in float64, from the nearer tail, so that small masses keep their digits."""
    lo, hi = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    mirror = lo > 0
    start, end = np.where(mirror, -hi, lo), np.where(mirror, -lo, hi)
    return base.cdf(end) - base.cdf(start)


def _inside(u: PerExample) -> PerExample:
    """u in (0, 1), down to the smallest normal number: laws may pile up next to 0."""
    return jnp.clip(u, 2.0**-126, 1 - 2.0**-24)
