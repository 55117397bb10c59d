"""The timestep laws of Stable Diffusion 3: logit-normal, mode and cosmap."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from adaptive_ts.timesteps.draws import Coupling
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.laws import (
    Law,
    check_parameters,
    logit_normal_law,
    static_sampler,
    unit_law,
)
from adaptive_ts.types import AxisName, PerExample, TimestepSampler

_MAX_SCALE = 2 / (math.pi - 2)  # beyond it the quantile function of `mode` turns back


def logit_normal(
    grid: TimeGrid,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    shift: float = 1.0,
    diffusers_time: bool = False,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps whose logit is normal: most of them in the middle.

    logit u ~ N(mean, std^2), then the timestep shift u -> a u / (1 + (a - 1) u), which adds
    log a to the logit. u grows with noise, as t in the paper: a positive mean favours high noise.

    In diffusers the draw is an index into a descending list of timesteps, index = floor(1000 u),
    sigma = (1000 - index) / 1000, so that there a positive mean favours low noise.
    ``diffusers_time=True`` has the direction of that code. The two agree for mean 0.

    Args:
      grid: the time grid.
      mean: of the logit.
      std: of the logit, positive.
      shift: a, positive; above 1 it moves all timesteps to more noise. SD3 has 3 at 1024^2.
      diffusers_time: u counts from noise to data before the shift, as in diffusers.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1. Its density vanishes so fast at
      both ends that importance weights have no finite variance: mix it with uniform first.

    Raises:
      ValueError: a mean that is not finite, a std or shift that is not positive and finite.

    Example:
      >>> import adaptive_ts as ats
      >>> p = ats.effective_density(ats.logit_normal(ats.discrete(1000), 0.5))
      >>> print(int(p.argmax()))
      718
      >>> p = ats.effective_density(ats.logit_normal(ats.discrete(1000), 0.5, diffusers_time=True))
      >>> print(int(p.argmax()))
      281

    Source: Esser et al. 2024 (arXiv 2403.03206), Eqs. 19 and 23; diffusers,
    ``compute_density_for_timestep_sampling``.
    """
    check_parameters(
        "logit_normal",
        "mean must be finite, std and shift positive and finite",
        math.isfinite(mean) and 0 < std < math.inf and 0 < shift < math.inf,
        mean=mean,
        std=std,
        shift=shift,
    )
    centre = (-mean if diffusers_time else mean) + math.log(shift)
    law = logit_normal_law(grid, centre, std)
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def mode(
    grid: TimeGrid,
    scale: float = 1.29,
    *,
    shift: float = 1.0,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """SD3's heavy-tailed law: most timesteps in the middle, but the ends are never left out.

    u = v + s (v - sin^2(pi v / 2)), v ~ U(0, 1), then shifted as in `logit_normal`. The paper's
    formula is this one at 1 - v. The law is symmetric: it is the same in both directions of time.

    Args:
      grid: the time grid.
      scale: s, from -1 to 2 / (pi - 2) = 1.75: above 0 it favours the middle, below 0 the ends.
      shift: a, positive; above 1 it moves all timesteps to more noise.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: a scale for which u would fall in v, or a shift that is not positive and finite.

    Example:
      >>> import adaptive_ts as ats
      >>> p = ats.effective_density(ats.mode(ats.discrete(1000)))
      >>> print(f"{1000 * p[0]:.2f} {1000 * p[500]:.2f}")
      0.44 3.79

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 20.
    """
    check_parameters(
        "mode", f"scale must be from -1 to {_MAX_SCALE:.4f}", -1 <= scale <= _MAX_SCALE, scale=scale
    )
    scale = float(scale)
    knots = np.linspace(0.0, 1.0, 4097)
    values = _mode_quantile(np, knots, scale).astype(np.float32)
    knots = knots.astype(np.float32)

    def log_pdf(u: PerExample) -> PerExample:
        v = jnp.interp(u, values, knots)
        slope = 1 + scale - scale * math.pi / 2 * jnp.sin(math.pi * v)
        return -jnp.log(jnp.maximum(slope, 1e-6))

    law = _shifted(
        "mode",
        grid,
        shift,
        cdf=lambda u: _solve(lambda v: _mode_quantile(np, v, scale), u),
        quantile=lambda v: _mode_quantile(jnp, v, scale),
        log_pdf=log_pdf,
    )
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def cosmap(
    grid: TimeGrid,
    *,
    shift: float = 1.0,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """The law that gives rectified flow the log-SNRs of the cosine schedule.

    p(u) = 2 / (pi - 2 pi u + 2 pi u^2), drawn as u = 1 - 1 / (tan(pi v / 2) + 1), then shifted
    as in `logit_normal`. Symmetric: the same in both directions of time.

    Args:
      grid: the time grid.
      shift: a, positive; above 1 it moves all timesteps to more noise.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: a shift that is not positive and finite.

    Example:
      >>> import adaptive_ts as ats
      >>> p = ats.effective_density(ats.cosmap(ats.discrete(1000)))
      >>> print(f"{1000 * p[0]:.2f} {1000 * p[500]:.2f}")
      0.64 1.27

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 21.
    """

    def quantile(v: PerExample) -> PerExample:
        sine, cosine = jnp.sin(math.pi / 2 * v), jnp.sin(math.pi / 2 * (1 - v))
        return sine / (sine + cosine)

    law = _shifted(
        "cosmap",
        grid,
        shift,
        cdf=lambda u: 2 / math.pi * np.arctan2(u, 1 - u),
        quantile=quantile,
        log_pdf=lambda u: math.log(2 / math.pi) - jnp.log1p(2 * u * (u - 1)),
    )
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def _shifted(
    name: str,
    grid: TimeGrid,
    shift: float,
    *,
    cdf: Callable[[np.ndarray], np.ndarray],
    quantile: Callable[[PerExample], PerExample],
    log_pdf: Callable[[PerExample], PerExample],
) -> Law:
    """The law of a s / (1 + (a - 1) s), s of the law that is given."""
    check_parameters(name, "shift must be positive and finite", 0 < shift < math.inf, shift=shift)
    a = float(shift)

    def shifted(v: PerExample) -> PerExample:
        s = quantile(v)
        return a * s / (1 + (a - 1) * s)

    def log_pdf_shifted(u: PerExample) -> PerExample:
        back = a - (a - 1) * u
        return log_pdf(u / back) + math.log(a) - 2 * jnp.log(back)

    return unit_law(
        grid,
        cdf=lambda u: cdf(u / (a - (a - 1) * u)),
        quantile=shifted,
        log_pdf=log_pdf_shifted,
    )


def _mode_quantile(xp, v, scale):
    return v + scale * (v - xp.sin(math.pi / 2 * v) ** 2)


def _solve(rising: Callable[[np.ndarray], np.ndarray], value: np.ndarray) -> np.ndarray:
    """x in [0, 1] with rising(x) = value, by bisection in float64."""
    lo, hi = np.zeros_like(value), np.ones_like(value)
    for _ in range(60):
        middle = (lo + hi) / 2
        below = rising(middle) < value
        lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
    return (lo + hi) / 2
