"""Loss weightings that need the noise schedule: by its slope, or tabulated per timestep."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.schedules.base import (
    VARIANCES,
    NoiseSchedule,
    discrete_betas,
    known,
    log_alphas_bar,
    noise_variance_table,
    posterior_tables,
)
from adaptive_ts.types import PerExample, Weighting
from adaptive_ts.weightings.predictions import weighting_of

_FIRST = 2.0**-24  # 1 - 2**-24 is the largest float32 t below 1


def sigmoid(
    bias: float = 0.0, *, schedule: NoiseSchedule | None = None, prediction: str = "eps"
) -> Weighting:
    """sigmoid(bias - log SNR) on the eps error; with a schedule, times -d log SNR / dt.

    On x_0 that is exp(bias) sigmoid(log SNR - bias) (-d log SNR / dt). The derivative makes
    the objective that of a uniform law of the log-SNR, whatever the schedule. It belongs to
    uniform t alone (importance-weighted ones included): leave it out where t is drawn otherwise.

    On discrete timesteps the derivative is that of central differences, per unit of t / T (at an
    SNR of 0 its neighbour's); in continuous time it is that of ``schedule.log_snr``, at t from
    2**-24 to 1 - 2**-24.

    Args:
      bias: of the log-SNR, natural; a larger one gives more weight to little noise.
      schedule: the noise schedule that maps t to the log-SNR, or None for no derivative.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: bias not finite, a schedule without ``from_log_snr``, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.sigmoid(2.0)(jnp.asarray([2.0])))
      [0.5]

    Source: Kingma & Gao 2023 (VDM++), arXiv 2303.00848; Hoogeboom et al. 2024 (SiD2),
    arXiv 2410.19324.
    """
    if not np.isfinite(bias):
        raise ValueError(f"sigmoid: bias={bias}; need a finite bias, in units of the log-SNR")
    slope = None if schedule is None else _log_slope(schedule)

    def log_weight(log_snr: PerExample) -> PerExample:
        log_w = jax.nn.log_sigmoid(bias - log_snr)
        return log_w if slope is None else log_w + slope(log_snr)

    return weighting_of(log_weight, "eps", prediction, schedule)


def vlb(
    schedule: NoiseSchedule, *, variance: str = "fixed_large", prediction: str = "eps"
) -> Weighting:
    """The variational bound's own weight of the squared error, in nats per mean over dimensions.

    Discrete: beta^2 / (2 exp(model log-variance) (1 - beta) (1 - abar)) on eps. Summed over t the
    weighted losses are the bound, but for terms that the model has no part in; ``vlb_loss`` has
    both, in bits. The log-variance at t = 0 is that of the posterior at t = 1, so the weight is
    finite there.

    Continuous: -(d log SNR / dt) / 2 on eps. The bound is their mean over uniform t.

    Args:
      schedule: the noise schedule.
      variance: of the model, "fixed_large" or "fixed_small"; of no effect in continuous time.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: an unknown variance or prediction, a schedule without ``from_log_snr``, or a
        discrete one that ends at an SNR of 0, where the weight is infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> schedule = ats.schedules.linear()
      >>> weighting = ats.weightings.vlb(schedule)
      >>> print(weighting(schedule.log_snr(jnp.asarray([999]))).round(7))
      [0.0102045]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 12; continuous: Kingma et al. 2021
    (VDM), arXiv 2107.00630.
    """
    known(variance, VARIANCES, "variance")
    if schedule.num_timesteps is None:
        slope = _log_slope(schedule)
        return weighting_of(lambda lam: slope(lam) - math.log(2), "eps", prediction, schedule)
    betas = discrete_betas(schedule)
    if betas[-1] == 1:
        raise ValueError(
            f"vlb: {schedule.name} ends at an SNR of 0, where the weight is infinite; give a "
            "schedule whose last beta is below 1"
        )
    log_variance = posterior_tables(schedule, variance).model_log_variance
    rest = 2 * (1 - betas) * noise_variance_table(schedule)
    table = 2 * np.log(betas) - log_variance - np.log(rest)
    return weighting_of(_by_timestep(schedule, table), "eps", prediction, schedule)


def change_aware(
    schedule: NoiseSchedule,
    *,
    tau: float = 0.7,
    lam: float = 0.6,
    prediction: str = "eps",
    as_published: bool = False,
) -> Weighting:
    """SpeeD's weight on the eps error: more for the timesteps where the noise changes fast.

      w_t = (1 - lam) + (2 lam - 1) (g_t - min g) / (max g - min g)

    with g the central differences of 1 - abar. From tau T on, where training has little left
    to learn, w_t is at most w at tau T. (On ``linear``, ``quad`` and ``cosine`` w falls there by
    itself.) Where g is the same at all timesteps, so is w: 0.5.

    Args:
      schedule: a discrete noise schedule.
      tau: share of the timesteps before the convergence area, in (0, 1].
      lam: the largest weight, in [0.5, 1]; 1 - lam is the smallest, and 0.5 makes all equal.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".
      as_published: as in the authors' code: weight 1 from tau T on, so that the convergence area
        gets more than any other timestep, and the same weights whatever the model predicts.

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: tau or lam out of range (the default of the authors' code, lam = 5, gives
        negative weights), a continuous schedule, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> schedule = ats.schedules.linear()
      >>> weighting = ats.weightings.change_aware(schedule)
      >>> print(weighting(schedule.log_snr(jnp.asarray([0, 219, 999]))).round(3))
      [0.409 0.6   0.4  ]

    Source: Wang et al. 2024 (SpeeD), arXiv 2405.17403; released code.
    """
    if not (0 < tau <= 1 and 0.5 <= lam <= 1):
        raise ValueError(f"change_aware: tau={tau}, lam={lam}; need 0 < tau <= 1, 0.5 <= lam <= 1")
    if schedule.num_timesteps is None:
        raise ValueError(f"change_aware: {schedule.name} is continuous; give a discrete schedule")
    change = np.gradient(noise_variance_table(schedule))
    span = np.ptp(change)
    flat = span < 1e-9 * np.abs(change).max()  # of rounding errors, as on jsd
    share = 0.5 if flat else (change - change.min()) / span
    weights = (1 - lam) + (2 * lam - 1) * share * np.ones_like(change)
    first = round(tau * len(weights))  # of the convergence area
    if as_published:
        weights[first:] = 1.0
    else:
        weights[first:] = np.minimum(weights[first:], weights[min(first, len(weights) - 1)])
    with np.errstate(divide="ignore"):  # a weight of 0
        by_timestep = _by_timestep(schedule, np.log(weights))
    space = prediction if as_published else "eps"
    return weighting_of(by_timestep, space, prediction, schedule)


def _by_timestep(schedule: NoiseSchedule, table: np.ndarray) -> Callable[[PerExample], PerExample]:
    """log-SNR -> the entry of the timestep with the nearest log-SNR."""
    inverse, table = _inverse(schedule), table.astype(np.float32)

    def look_up(log_snr: PerExample) -> PerExample:
        return jnp.asarray(table)[inverse(log_snr)]

    return look_up


def _log_slope(schedule: NoiseSchedule) -> Callable[[PerExample], PerExample]:
    """log-SNR -> log(-d log SNR / dt), t from 0 to 1."""
    inverse = _inverse(schedule)
    if schedule.num_timesteps is not None:
        log_noise = np.log(noise_variance_table(schedule))
        log_snr = log_alphas_bar(discrete_betas(schedule)) - log_noise
        change = -np.gradient(log_snr[np.isfinite(log_snr)]) * schedule.num_timesteps
        change = np.pad(change, (0, log_snr.size - change.size), mode="edge")  # an SNR of 0
        return _by_timestep(schedule, np.log(change))

    def log_slope(log_snr: PerExample) -> PerExample:
        t = jnp.clip(inverse(log_snr), _FIRST, 1 - _FIRST)
        _, slope = jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))
        return jnp.log(jnp.maximum(-slope, jnp.finfo(slope.dtype).tiny))

    return log_slope


def _inverse(schedule: NoiseSchedule) -> Callable[[PerExample], PerExample]:
    if schedule.from_log_snr is None:
        raise ValueError(f"{schedule.name} has no from_log_snr, which this weighting needs")
    return schedule.from_log_snr
