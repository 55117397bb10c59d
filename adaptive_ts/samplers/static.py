"""Uniform timesteps, a table of one's own, and the Beta law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from adaptive_ts.timesteps.draws import Coupling
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.laws import (
    Law,
    check_parameters,
    static_sampler,
    tabulated_law,
    uniform_law,
    unit_law,
)
from adaptive_ts.types import AxisName, PerExample, TimestepSampler


def uniform(
    grid: TimeGrid,
    *,
    stratified: bool = False,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Uniform timesteps, independent or coupled across the batch.

    The marginal of each draw is uniform whatever the coupling; the average over a batch varies
    less with ``"stratified"`` (one draw in each of N equal strata), ``"low_discrepancy"`` (a
    randomly shifted lattice) and ``"antithetic"`` (pairs u, 1 - u) draws.

    Args:
      grid: the time grid.
      stratified: short for ``coupling="stratified"``.
      coupling: of the N draws of the global batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state.

    Raises:
      ValueError: an unknown coupling, or ``stratified`` together with another one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.uniform(ats.discrete(1000), stratified=True)
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> draw = sampler.sample(jax.random.key(0), sampler.init(jax.random.key(1), batch), batch)
      >>> print(jnp.sort(draw.t // 250))
      [0 1 2 3]

    Source: Ho et al. 2020 (arXiv 2006.11239), Algorithm 1; strata: McKay et al. 1979; the
    lattice: Kingma et al. 2021 (arXiv 2107.00630), App. I.1.
    """
    if stratified:
        check_parameters(
            "uniform",
            "stratified=True is short for coupling='stratified'; give one of them",
            coupling in ("independent", "stratified"),
            stratified=stratified,
            coupling=coupling,
        )
        coupling = "stratified"
    return static_sampler(grid, uniform_law(grid), coupling=coupling, axis_name=axis_name)


def from_probabilities(
    grid: TimeGrid,
    probabilities: ArrayLike,
    *,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps from a table of probabilities.

    P(t) = probabilities[t]; in continuous time the probabilities of n equal cells of u, which
    is uniform inside a cell.

    Args:
      grid: the time grid.
      probabilities: (n,) >= 0 with sum 1: n = T on a discrete grid, any n in continuous time.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state. A timestep of probability 0 is never drawn.

    Raises:
      ValueError: a wrong shape, a probability that is negative or not finite, or a sum more
        than 1e-3 from 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.from_probabilities(ats.discrete(3), [0.0, 1.0, 0.0])
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> print(sampler.sample(jax.random.key(0), (), batch).t)
      [1 1 1 1]
    """
    table = np.asarray(probabilities, np.float64)
    expected = grid.num_timesteps
    if table.ndim != 1 or table.size == 0 or expected not in (None, table.size):
        need = "(n,)" if expected is None else f"({expected},), one per timestep"
        raise ValueError(f"from_probabilities: got the shape {table.shape}; give {need}")
    bad = np.flatnonzero(~(np.isfinite(table) & (table >= 0)))
    if bad.size:
        raise ValueError(
            f"from_probabilities: got {table[bad[0]]} at {bad[0]}; all must be finite and >= 0"
        )
    check_parameters(
        "from_probabilities",
        "divide the probabilities by their sum",
        abs(table.sum() - 1) <= 1e-3,
        sum=float(table.sum()),
    )
    return static_sampler(grid, tabulated_law(grid, table), coupling=coupling, axis_name=axis_name)


def beta(
    grid: TimeGrid,
    a: float,
    b: float = 1.0,
    *,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps from a fixed Beta distribution.

    u ~ Beta(a, b), p(u) = u^(a - 1) (1 - u)^(b - 1) / B(a, b). B-TTDM has a = 0.8, b = 1, which
    favours low noise. On a discrete grid a timestep has the exact mass of its cell of u; in
    continuous time u comes from a table of the inverse CDF in log-odds, right to five digits.

    Args:
      grid: the time grid.
      a: first parameter, positive; below 1 it favours low noise.
      b: second parameter, positive; above 1 it favours low noise.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: a parameter that is not positive and finite.

    Example:
      >>> import adaptive_ts as ats
      >>> p = ats.effective_density(ats.beta(ats.discrete(1000), 0.8))
      >>> print(f"{p[0]:.6f} {p[999]:.6f}")
      0.003981 0.000800

    Source: Zheng et al., ECCV 2024 (Beta-tuned timestep diffusion model); the recommended
    a = 0.8 is known to us at second hand only.
    """
    check_parameters(
        "beta",
        "both must be positive and finite",
        0 < a < math.inf and 0 < b < math.inf,
        a=a,
        b=b,
    )
    return static_sampler(
        grid, _beta_law(grid, float(a), float(b)), coupling=coupling, axis_name=axis_name
    )


def _beta_law(grid: TimeGrid, a: float, b: float) -> Law:
    # In log-odds of u against those of v the inverse CDF has almost straight ends, of slopes
    # 1/a and 1/b, so that linear interpolation keeps the digits of the smallest u.
    odds = np.linspace(-17.0, 17.0, 4097)  # of all float32 v in (0, 1)
    with np.errstate(divide="ignore"):
        log_u = np.log(special.betaincinv(a, b, special.expit(odds)))
        log_rest = np.log(special.betaincinv(b, a, special.expit(-odds)))
    table = np.clip(log_u - log_rest, -90.0, 90.0).astype(np.float32)
    odds, log_norm = odds.astype(np.float32), float(special.betaln(a, b))

    def quantile(v: PerExample) -> PerExample:
        return jax.nn.sigmoid(jnp.interp(jnp.log(v) - jnp.log1p(-v), odds, table))

    return unit_law(
        grid,
        cdf=lambda u: special.betainc(a, b, u),
        quantile=quantile,
        log_pdf=lambda u: (a - 1) * jnp.log(u) + (b - 1) * jnp.log1p(-u) - log_norm,
    )
