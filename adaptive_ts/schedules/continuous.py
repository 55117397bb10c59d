"""Noise schedules in continuous time: t in (0, 1), noise at t = 1, computed in float32 as t is.

All are closed forms that keep float32's digits at both ends of t. Outside its range of log-SNR
``from_log_snr`` gives the nearer end, 0 or 1.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

from adaptive_ts.schedules.base import MAX_LOG_SNR, NoiseSchedule
from adaptive_ts.types import PerExample

_SMALLEST = math.exp(-MAX_LOG_SNR / 2)  # of an amplitude: its square is the smallest SNR
_TINY = 1e-18  # below any SNR that counts: no logarithm of 0 at the ends, and no NaN slope


def _continuous(
    name: str,
    *,
    alpha: Callable[[PerExample], PerExample],
    sigma: Callable[[PerExample], PerExample],
    log_snr: Callable[[PerExample], PerExample],
    from_log_snr: Callable[[PerExample], PerExample],
) -> NoiseSchedule:
    """The schedule, its functions checked for the dtype of t and held inside their ranges."""

    def real(t: PerExample) -> PerExample:
        t = jnp.asarray(t)
        if not jnp.issubdtype(t.dtype, jnp.floating):
            raise ValueError(f"t is {t.dtype}; {name} is continuous and takes floats in (0, 1)")
        return t if t.dtype == jnp.float64 else t.astype(jnp.float32)

    def held(value: PerExample) -> PerExample:
        return jnp.clip(value, -MAX_LOG_SNR, MAX_LOG_SNR)

    return NoiseSchedule(
        name,
        None,
        None,
        alpha=lambda t: alpha(real(t)),
        sigma=lambda t: sigma(real(t)),
        log_snr=lambda t: held(log_snr(real(t))),
        from_log_snr=lambda value: jnp.clip(from_log_snr(held(real(value))), 0.0, 1.0),
    )


def rectified_flow(*, shift: float = 1.0) -> NoiseSchedule:
    """The straight line from data (t = 0) to noise (t = 1): alpha = 1 - s, sigma = s.

      s = shift t / (1 + (shift - 1) t),  log SNR = 2 log((1 - t) / t) - 2 log(shift)

    Train it with the prediction "flow", eps - x_0. Its errors and those of the other
    predictions at the same x_t are the same up to a factor of t:
    ||flow error||^2 = ||eps error||^2 / (1 - s)^2 = ||x_0 error||^2 / s^2.

    The first code of rectified flow (Liu et al.) counts the other way: data at t = 1, x = t x_0 +
    (1 - t) eps, target x_0 - eps. Its t is 1 - t here, and its target the negative.

    Args:
      shift: a > 0; above 1 it moves every t to more noise (SD3 uses 3 for 1024 x 1024 images).

    Returns:
      A ``NoiseSchedule`` with ``num_timesteps=None``.

    Raises:
      ValueError: shift not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.continuous import rectified_flow
      >>> print(rectified_flow(shift=3.0).sigma(jnp.array([0.25, 0.5])))
      [0.5  0.75]

    Source: Liu, Gong & Liu 2022, arXiv 2209.03003, Eq. 1; Esser et al. 2024 (SD3),
    arXiv 2403.03206, Eqs. 13 and 23 (shift).
    """
    _check("rectified_flow", "need shift > 0", math.isfinite(shift) and shift > 0, shift=shift)

    def log_snr(t: PerExample) -> PerExample:
        signal, noise = jnp.maximum(1 - t, _TINY), jnp.maximum(t, _TINY)
        return 2 * (jnp.log(signal / noise) - math.log(shift))

    def from_log_snr(value: PerExample) -> PerExample:
        return 1 / (1 + shift * jnp.exp(value / 2))

    return _continuous(
        "rectified_flow",
        alpha=lambda t: (1 - t) / (1 + (shift - 1) * t),
        sigma=lambda t: shift * t / (1 + (shift - 1) * t),
        log_snr=log_snr,
        from_log_snr=from_log_snr,
    )


def vp_linear(*, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
    """DDPM's linear betas in the limit of many timesteps; variance preserving.

      B(t) = beta_min t + (beta_max - beta_min) t^2 / 2
      alpha^2 = exp(-B),  sigma^2 = 1 - exp(-B),  log SNR = -log(exp(B) - 1)

    Args:
      beta_min, beta_max: the rate at t = 0 and at t = 1, 0 <= beta_min <= beta_max.

    Returns:
      A ``NoiseSchedule`` with ``num_timesteps=None``.

    Raises:
      ValueError: rates that are negative, falling or all 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.continuous import vp_linear
      >>> [round(float(x), 3) for x in vp_linear().log_snr(jnp.array([0.001, 1.0]))]
      [9.115, -10.05]

    Source: Song et al. 2021, arXiv 2011.13456, Eq. 33; in this form Karras et al. 2022,
    arXiv 2206.00364, Table 1.
    """
    _check(
        "vp_linear",
        "need 0 <= beta_min <= beta_max and beta_max > 0",
        0 <= beta_min <= beta_max < math.inf and beta_max > 0,
        beta_min=beta_min,
        beta_max=beta_max,
    )
    slope = beta_max - beta_min

    def total(t: PerExample) -> PerExample:
        return t * (beta_min + slope / 2 * t)

    def log_snr(t: PerExample) -> PerExample:
        b = jnp.maximum(total(t), _TINY)
        return -b - jnp.log(-jnp.expm1(-b))

    def from_log_snr(value: PerExample) -> PerExample:
        b = jnp.logaddexp(-value, 0.0)  # the root below does not cancel
        return 2 * b / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * b))

    return _continuous(
        "vp_linear",
        alpha=lambda t: jnp.exp(-total(t) / 2),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(-total(t))),
        log_snr=log_snr,
        from_log_snr=from_log_snr,
    )


def vp_cosine() -> NoiseSchedule:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), log SNR = -2 log tan(pi t / 2).

    Without the offset s of the discrete ``cosine``, and not clipped: the SNR is 0 at t = 1.

    Returns:
      A ``NoiseSchedule`` with ``num_timesteps=None``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.continuous import vp_cosine
      >>> [round(float(x), 3) for x in vp_cosine().log_snr(jnp.array([0.25, 0.75]))]
      [1.763, -1.763]

    Source: Salimans & Ho 2022, arXiv 2202.00512; Nichol & Dhariwal 2021,
    arXiv 2102.09672, Eq. 17 with s = 0.
    """

    def sine(t: PerExample) -> PerExample:
        return jnp.sin(math.pi / 2 * t)

    def log_snr(t: PerExample) -> PerExample:
        signal, noise = jnp.maximum(sine(1 - t), _TINY), jnp.maximum(sine(t), _TINY)
        return 2 * jnp.log(signal / noise)

    def from_log_snr(value: PerExample) -> PerExample:
        below = value > 0
        away = jnp.where(below, value, -value)  # not abs, whose derivative at 0 is not that of t
        near = 2 / math.pi * jnp.arctan(jnp.exp(-away / 2))  # distance to the nearer end
        return jnp.where(below, near, 1 - near)

    return _continuous(
        "vp_cosine",
        alpha=lambda t: sine(1 - t),  # exact near t = 1, where float32 pi / 2 is not
        sigma=sine,
        log_snr=log_snr,
        from_log_snr=from_log_snr,
    )


def vdm_linear(*, gamma_min: float = -13.3, gamma_max: float = 5.0) -> NoiseSchedule:
    """Log-SNR falls linearly: -(gamma_min + t (gamma_max - gamma_min)); variance preserving.

      alpha^2 = sigmoid(log SNR),  sigma^2 = sigmoid(-log SNR)

    Args:
      gamma_min, gamma_max: -log SNR at t = 0 and at t = 1.

    Returns:
      A ``NoiseSchedule`` with ``num_timesteps=None``.

    Raises:
      ValueError: not increasing, or beyond -40 to 40.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.continuous import vdm_linear
      >>> [round(float(x), 2) for x in vdm_linear().log_snr(jnp.array([0.0, 0.5, 1.0]))]
      [13.3, 4.15, -5.0]

    Source: Kingma et al. 2021 (VDM), arXiv 2107.00630, Sec. 3.2; the ends are its code's.
    """
    _check(
        "vdm_linear",
        f"need -{MAX_LOG_SNR:g} <= gamma_min < gamma_max <= {MAX_LOG_SNR:g}",
        -MAX_LOG_SNR <= gamma_min < gamma_max <= MAX_LOG_SNR,
        gamma_min=gamma_min,
        gamma_max=gamma_max,
    )

    def gamma(t: PerExample) -> PerExample:
        return gamma_min + t * (gamma_max - gamma_min)

    return _continuous(
        "vdm_linear",
        alpha=lambda t: 1 / jnp.sqrt(1 + jnp.exp(gamma(t))),
        sigma=lambda t: 1 / jnp.sqrt(1 + jnp.exp(-gamma(t))),
        log_snr=lambda t: -gamma(t),
        from_log_snr=lambda value: (-value - gamma_min) / (gamma_max - gamma_min),
    )


def ve_log_linear(*, sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """Variance exploding: alpha = 1, sigma = sigma_min^(1 - t) sigma_max^t.

    x_t is as large as its noise: the model scales its own input, and the noise at t = 1 is
    N(0, sigma_max^2), not N(0, 1). EDM draws sigma from a law of its own (``log_normal_sigma``);
    this is the axis that the law is put on.

    Args:
      sigma_min, sigma_max: noise amplitude at t = 0 and at t = 1, in units of the data.

    Returns:
      A ``NoiseSchedule`` with ``num_timesteps=None``.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max, or an SNR beyond exp(-40) to exp(40).

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.continuous import ve_log_linear
      >>> print(ve_log_linear().sigma(jnp.array([0.0, 0.5, 1.0])).round(3))
      [2.e-03 4.e-01 8.e+01]

    Source: Song et al. 2021, arXiv 2011.13456, App. C; the ends are those of Karras et al.
    2022 (EDM), arXiv 2206.00364, Table 1.
    """
    _check(
        "ve_log_linear",
        f"need {_SMALLEST:.1e} <= sigma_min < sigma_max <= {1 / _SMALLEST:.1e}",
        _SMALLEST <= sigma_min < sigma_max <= 1 / _SMALLEST,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    low, span = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def log_sigma(t: PerExample) -> PerExample:
        return low + span * t

    return _continuous(
        "ve_log_linear",
        alpha=jnp.ones_like,
        sigma=lambda t: jnp.exp(log_sigma(t)),
        log_snr=lambda t: -2 * log_sigma(t),
        from_log_snr=lambda value: (-value / 2 - low) / span,
    )


def _check(name: str, remedy: str, holds: bool, **received: float) -> None:
    if not holds:
        said = ", ".join(f"{key}={value}" for key, value in received.items())
        raise ValueError(f"{name}: {said}; {remedy}")
