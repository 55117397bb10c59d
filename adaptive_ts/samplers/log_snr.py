"""Timesteps whose log-SNR follows a law: EDM's log-normal sigma, Laplace, Cauchy, cosine."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.schedules.base import (
    MAX_LOG_SNR,
    NoiseSchedule,
    discrete_betas,
    known,
    log_alphas_bar,
)
from adaptive_ts.timesteps.draws import Coupling
from adaptive_ts.timesteps.grid import TimeGrid, open_unit
from adaptive_ts.timesteps.laws import (
    NORMAL,
    Law,
    Symmetric,
    check_parameters,
    interval_mass,
    static_sampler,
    tabulated_law,
    truncated,
)
from adaptive_ts.timesteps.tables import check_schedule
from adaptive_ts.types import AxisName, PerExample, TimestepSampler

_MIN_MASS = 1e-6


def _laplace_cdf(z: np.ndarray | float) -> np.ndarray:
    tail = np.exp(-np.abs(z)) / 2
    return np.where(z < 0, tail, 1 - tail)


def _sech_cdf(z: np.ndarray | float) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 2 / math.pi * np.arctan(np.exp(z / 2))


LAPLACE = Symmetric(
    _laplace_cdf,
    lambda p: jnp.log(2 * p),
    lambda z: -jnp.abs(z) - math.log(2),
)
CAUCHY = Symmetric(
    lambda z: np.arctan2(1.0, -z) / math.pi,
    lambda p: -1 / jnp.tan(math.pi * p),
    lambda z: -jnp.log1p(z * z) - math.log(math.pi),
)
SECH = Symmetric(
    _sech_cdf,
    lambda p: 2 * jnp.log(jnp.tan(math.pi / 2 * p)),
    lambda z: -jnp.logaddexp(z / 2, -z / 2) - math.log(math.pi),
)


def log_normal_sigma(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    *,
    placement: Literal["cdf", "nearest"] = "cdf",
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """EDM's law: ln sigma ~ N(p_mean, p_std^2), sigma = sqrt(1 / SNR).

    On a discrete grid each draw of sigma goes to a timestep: to the one whose ln sigma is
    nearest (``"cdf"``: the exact mass between the midpoints in log-SNR), or to the one whose
    sigma is nearest (``"nearest"``, as in Stability AI's code). The first and the last timestep
    also take what lies beyond them. In continuous time the law is conditioned on the grid's
    range of log-SNR, and p(t) = p(ln sigma) |d ln sigma / dt| has the Jacobian that a density
    evaluated at the timesteps lacks.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps.
      p_mean: of ln sigma; above -1.2 for more noise.
      p_std: of ln sigma, positive.
      placement: of a sigma on the timesteps; discrete grids only.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1 (EDM's are `weightings.edm`).

    Raises:
      ValueError: a p_mean that is not finite, a p_std that is not positive and finite, an
        unknown placement, a schedule whose timesteps are not the grid's, that cannot be
        inverted, or that holds nearly nothing of the law.

    Example:
      >>> import adaptive_ts as ats
      >>> sampler = ats.log_normal_sigma(ats.discrete(1000), ats.schedules.linear(1000))
      >>> print(f"{ats.effective_density(sampler)[:200].sum():.3f}")  # sigma below 0.72
      0.767

    Source: Karras et al. 2022 (arXiv 2206.00364), Table 1; nearest sigma:
    Stability-AI/generative-models, ``denoiser.py``.
    """
    known(placement, ("cdf", "nearest"), "placement")
    check_parameters(
        "log_normal_sigma",
        "placement='nearest' needs timesteps; leave it out in continuous time",
        placement == "cdf" or grid.num_timesteps is not None,
        placement=placement,
    )
    _check("log_normal_sigma", p_mean=p_mean, p_std=p_std)
    law = _log_snr_law(
        grid, schedule, NORMAL, -2 * p_mean, 2 * p_std, nearest_sigma=placement == "nearest"
    )
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def log_snr_laplace(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    loc: float = 0.0,
    scale: float = 0.5,
    *,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps whose log-SNR is Laplace distributed.

    p(lambda) = exp(-|lambda - loc| / scale) / (2 scale), put on the timesteps as in
    `log_normal_sigma`.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps.
      loc: mean of log-SNR (natural); below 0 for more noise.
      scale: b, positive; the paper has 0.5 for images of 256^2, 0.75 for 512^2.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: a loc that is not finite, a scale that is not positive and finite, or a
        schedule as in `log_normal_sigma`.

    Example:
      >>> import adaptive_ts as ats
      >>> sampler = ats.log_snr_laplace(ats.discrete(1000), ats.schedules.linear(1000))
      >>> print(int(ats.effective_density(sampler).argmax()))
      258

    Source: Hang et al. 2024 (arXiv 2407.03297), Table 1.
    """
    _check("log_snr_laplace", loc=loc, scale=scale)
    law = _log_snr_law(grid, schedule, LAPLACE, loc, scale)
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def log_snr_cauchy(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    loc: float = 0.0,
    scale: float = 1.0,
    *,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps whose log-SNR is Cauchy distributed.

    p(lambda) = scale / (pi ((lambda - loc)^2 + scale^2)), put on the timesteps as in
    `log_normal_sigma`. Its tails are heavy: on DDPM's linear schedule the first and the last
    timestep get three percent each.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps.
      loc: centre of log-SNR (natural); below 0 for more noise.
      scale: gamma, positive. The paper's value is not known to us.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: as for `log_snr_laplace`.

    Example:
      >>> import adaptive_ts as ats
      >>> schedule = ats.schedules.linear(1000)
      >>> p = ats.effective_density(ats.log_snr_cauchy(ats.discrete(1000), schedule))
      >>> print(f"{p[0]:.3f} {p[999]:.3f}")
      0.036 0.031

    Source: Hang et al. 2024 (arXiv 2407.03297), Table 1.
    """
    _check("log_snr_cauchy", loc=loc, scale=scale)
    law = _log_snr_law(grid, schedule, CAUCHY, loc, scale)
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def log_snr_cosine(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """The log-SNRs of the cosine schedule with uniform t, on timesteps of any schedule.

    lambda = shift + (2 / scale) ln cot(pi v / 2), v ~ U(0, 1): for shift 0 and scale 1
    p(lambda) = sech(lambda / 2) / (2 pi). Put on the timesteps as in `log_normal_sigma`.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps.
      shift: mean of log-SNR (natural); below 0 for more noise.
      scale: s, positive; above 1 it narrows the law (it divides, as in the paper).
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: as for `log_snr_laplace`.

    Example:
      >>> import adaptive_ts as ats
      >>> sampler = ats.log_snr_cosine(ats.discrete(1000), ats.schedules.cosine(1000))
      >>> p = 1000 * ats.effective_density(sampler)  # its own schedule: about uniform
      >>> print(f"{p[100]:.2f} {p[900]:.2f}")
      0.99 0.99

    Source: Hang et al. 2024 (arXiv 2407.03297), Table 1.
    """
    _check("log_snr_cosine", shift=shift, scale=scale)
    law = _log_snr_law(grid, schedule, SECH, shift, 1 / scale)
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def lognorm_timestep(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    *,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """The "lognorm" baseline of SpeeD's code, for comparison with its tables.

    p(t) ~ (1 - s)^-2 exp(-logit(s)^2 / 2), s = sqrt(1 - abar_t). Despite its name it is neither
    SD3's logit-normal nor EDM's log-normal: s is the noise amplitude and not t / T, p is the
    logit-normal density of s times s / (1 - s), without the Jacobian ds/dt.

    Args:
      grid: the time grid; discrete.
      schedule: the noise schedule, of the same timesteps.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state and weights 1.

    Raises:
      ValueError: continuous time, or a schedule whose timesteps are not the grid's.

    Example:
      >>> import adaptive_ts as ats
      >>> sampler = ats.lognorm_timestep(ats.discrete(1000), ats.schedules.linear(1000))
      >>> print(int(ats.effective_density(sampler).argmax()))
      348

    Source: Wang et al., CVPR 2025 (arXiv 2405.17403), released code.
    """
    check_schedule(grid, schedule)
    if grid.num_timesteps is None:
        raise ValueError(
            "lognorm_timestep is a law of timesteps: got a continuous grid; use a discrete one, "
            "or logit_normal or log_normal_sigma"
        )
    log_abar = log_alphas_bar(discrete_betas(schedule))
    log_s = np.log(-np.expm1(log_abar)) / 2
    log_rest = log_abar - np.log1p(np.exp(log_s))  # 1 - s = abar / (1 + s)
    with np.errstate(invalid="ignore"):
        log_p = -2 * log_rest - (log_s - log_rest) ** 2 / 2
    log_p = np.where(np.isfinite(log_p), log_p, -np.inf)  # the limit at an SNR of 0
    law = tabulated_law(grid, np.exp(log_p - log_p.max()))
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def _check(name: str, **received: float) -> None:
    centre, width = received.values()
    what = list(received)
    check_parameters(
        name,
        f"{what[0]} must be finite, {what[1]} positive and finite",
        math.isfinite(centre) and 0 < width < math.inf,
        **received,
    )


def _log_snr_law(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    base: Symmetric,
    loc: float,
    scale: float,
    *,
    nearest_sigma: bool = False,
) -> Law:
    """log-SNR = loc + scale Z, Z of the standard law."""
    check_schedule(grid, schedule)
    loc, scale = float(loc), float(scale)
    if grid.num_timesteps is not None:
        edges = _log_snr_edges(schedule, nearest_sigma)  # falling
        p = interval_mass(base, (edges[1:] - loc) / scale, (edges[:-1] - loc) / scale)
        return tabulated_law(grid, p)
    if schedule.from_log_snr is None:
        raise ValueError(
            f"the {schedule.name} schedule has no from_log_snr: give one that has, or use timesteps"
        )
    with jax.ensure_compile_time_eval():
        ends = grid.to_t(jnp.asarray([0.0, 1.0], jnp.float32))
        t_lo, t_hi = (float(t) for t in ends)
        hi, lo = (float(x) for x in schedule.log_snr(ends))
    held = truncated(base, loc, scale, lo, hi)
    check_parameters(
        f"a law of log-SNR with centre {loc:g} and width {scale:g}",
        "move the law, widen it, or widen the grid's t_min and t_max",
        held.mass >= _MIN_MASS,
        range_of_log_snr=(lo, hi),
        mass_inside=held.mass,
    )
    log_span = math.log(t_hi - t_lo)

    def draw(v: PerExample) -> tuple[PerExample, PerExample]:
        t = jnp.clip(schedule.from_log_snr(held.quantile(1 - v)), t_lo, t_hi)
        return t, open_unit(grid.to_u(t))

    def log_density(t: PerExample) -> PerExample:
        log_snr, slope = jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))
        return held.log_pdf(log_snr) + jnp.log(jnp.abs(slope)) + log_span

    return Law(draw, log_density)


def _log_snr_edges(schedule: NoiseSchedule, nearest_sigma: bool) -> np.ndarray:
    """(T + 1,) float64, falling: a log-SNR between edges t and t + 1 goes to timestep t."""
    log_abar = log_alphas_bar(discrete_betas(schedule))
    log_snr = np.clip(log_abar - np.log(-np.expm1(log_abar)), -MAX_LOG_SNR, MAX_LOG_SNR)
    if nearest_sigma:
        sigma = np.exp(-log_snr / 2)
        between = -2 * np.log((sigma[1:] + sigma[:-1]) / 2)
    else:
        between = (log_snr[1:] + log_snr[:-1]) / 2
    return np.concatenate([[np.inf], between, [-np.inf]])
