"""Errors of one prediction in units of another's: what lets a weighting serve all four."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adaptive_ts.diffusion.corruption import PREDICTIONS
from adaptive_ts.schedules.base import MAX_LOG_SNR, NoiseSchedule, known
from adaptive_ts.types import PerExample, Weighting

_MAX_LOG_WEIGHT = 80.0  # float32 ends at exp(88)
_ROUNDING = 1e-5  # of log(alpha^2 + sigma^2) in float32, where it is 0


def clip_log_snr(log_snr: PerExample) -> PerExample:
    """float32, held at -40 to 40 as the schedules hold it; NaN stays."""
    log_snr = jnp.asarray(log_snr)
    if not jnp.issubdtype(log_snr.dtype, jnp.floating):
        raise ValueError(
            f"a weighting takes the log-SNR, got {log_snr.dtype}: schedule.log_snr(t), not t"
        )
    return jnp.clip(log_snr.astype(jnp.float32), -MAX_LOG_SNR, MAX_LOG_SNR)


def log_error_ratio(
    prediction: str, log_snr: PerExample, log_power: PerExample | None = None
) -> PerExample:
    """log of ||prediction's error||^2 / ||x_0 error||^2 at the same x_t.

    x0: 0. eps: log SNR. v: log(1 + SNR) + log(alpha^2 + sigma^2), ``log_power`` the latter, None
    for 0. flow: 2 log(1 + sqrt(SNR)).
    """
    match known(prediction, PREDICTIONS, "prediction"):
        case "eps":
            return log_snr
        case "v":
            ratio = jax.nn.softplus(log_snr)
            return ratio if log_power is None else ratio + log_power
        case "flow":
            return 2 * jax.nn.softplus(log_snr / 2)
    return jnp.zeros_like(log_snr)


def log_power_of(schedule: NoiseSchedule) -> Callable[[PerExample], PerExample] | None:
    """t -> log(alpha^2 + sigma^2); None where that is 0: the variance is preserved."""

    def log_power(t: PerExample) -> PerExample:
        return jnp.log(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)

    T = schedule.num_timesteps
    with jax.ensure_compile_time_eval():
        middle = (jnp.arange(256, dtype=jnp.float32) + 0.5) / 256
        t = middle if T is None else jnp.floor(middle * T).astype(jnp.int32)
        preserved = bool(jnp.all(jnp.abs(log_power(t)) < _ROUNDING))
    return None if preserved else log_power


def _by_log_snr(schedule: NoiseSchedule | None) -> Callable[[PerExample], PerExample | None]:
    """log-SNR -> what `log_error_ratio` takes of it."""
    log_power = None if schedule is None else log_power_of(schedule)
    if schedule is None or log_power is None:
        return lambda log_snr: None
    inverse = schedule.from_log_snr
    if inverse is None:
        raise ValueError(
            f"{schedule.name} has no from_log_snr, which a weighting of v needs where "
            "alpha^2 + sigma^2 is not 1"
        )
    return lambda log_snr: log_power(inverse(log_snr))


@dataclasses.dataclass(frozen=True, eq=False)  # not a tuple: jit needs weak references to it
class _Preserving:
    """A weighting of "v" for schedules that preserve the variance, until one is named."""

    on: Callable[[NoiseSchedule | None], Weighting]

    def __call__(self, log_snr: PerExample, /) -> PerExample:
        return self.on(None)(log_snr)


def on_schedule(weighting: Weighting, schedule: NoiseSchedule) -> Weighting:
    """The weighting for a schedule: its own alpha and sigma count where "v" is involved.

    One of another origin, or made with a schedule, is left as it is.
    """
    return weighting.on(schedule) if isinstance(weighting, _Preserving) else weighting


def weighting_of(
    log_weight: Callable[[PerExample], PerExample],
    space: str,
    prediction: str,
    schedule: NoiseSchedule | None = None,
) -> Weighting:
    """``log_weight`` is that of the squared error of ``space``; the model predicts ``prediction``.

    All in logarithms, so that an SNR of 0 or infinity gives finite weights. Where one of the two
    is "v", ``schedule`` says what alpha^2 + sigma^2 is: None for 1, until `on_schedule`.
    """
    known(prediction, PREDICTIONS, "prediction")

    def on(schedule: NoiseSchedule | None) -> Weighting:
        log_power = _by_log_snr(schedule)

        def weighting(log_snr: PerExample) -> PerExample:
            log_snr = clip_log_snr(log_snr)
            log_w = log_weight(log_snr)
            if space != prediction:
                power = log_power(log_snr)
                log_w = log_w + log_error_ratio(space, log_snr, power)
                log_w = log_w - log_error_ratio(prediction, log_snr, power)
            weight = jnp.exp(jnp.minimum(log_w, _MAX_LOG_WEIGHT))
            return jnp.where(jnp.isnan(log_snr), log_snr, weight)

        return weighting

    if space == prediction or "v" not in (space, prediction):
        return on(None)
    return _Preserving(on) if schedule is None else on(schedule)


def convert(
    weighting: Weighting,
    from_prediction: str,
    to_prediction: str,
    *,
    schedule: NoiseSchedule | None = None,
) -> Weighting:
    """A weighting of one prediction's error as the same objective on another's.

      w_to = w_from ||from error||^2 / ||to error||^2

    with, per ||x_0 error||^2 at the same x_t: eps SNR, v (SNR + 1) (alpha^2 + sigma^2), flow
    (eps - x_0) (1 + sqrt(SNR))^2.

    Args:
      weighting: (b,) log-SNR -> (b,) weight of the squared error of ``from_prediction``.
      from_prediction, to_prediction: "eps", "x0", "v" or "flow".
      schedule: whose alpha^2 + sigma^2 counts in v's error. None for 1, variance preserved, until
        `with_weighting` or another of this library names one.

    Returns:
      A ``Weighting`` for a model that predicts ``to_prediction``.

    Raises:
      ValueError: an unknown prediction, or a schedule without ``from_log_snr`` that does not
        preserve the variance.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> uniform_on_x0 = weightings.convert(weightings.constant(), "x0", "v")
      >>> print(uniform_on_x0(jnp.asarray([0.0])))  # 1 / (SNR + 1)
      [0.5]

    Source: Salimans & Ho 2022, arXiv 2202.00512, Sec. 4.
    """
    for prediction in (from_prediction, to_prediction):
        known(prediction, PREDICTIONS, "prediction")

    def on(schedule: NoiseSchedule | None) -> Weighting:
        inner = weighting if schedule is None else on_schedule(weighting, schedule)
        log_power = _by_log_snr(schedule if changes else None)

        def converted(log_snr: PerExample) -> PerExample:
            clipped = clip_log_snr(log_snr)
            power = log_power(clipped)
            source, target = (log_error_ratio(p, clipped, power) for p in pair)
            return inner(log_snr) * jnp.exp(source - target)

        return converted

    pair = (from_prediction, to_prediction)
    changes = from_prediction != to_prediction and "v" in pair
    if not changes and not isinstance(weighting, _Preserving):
        return on(None)
    return _Preserving(on) if schedule is None else on(schedule)


def check_number(name: str, what: str, value: float, *, zero: bool = False) -> float:
    """The value, if it is finite and above 0 (or 0, if allowed)."""
    if math.isfinite(value) and (value > 0 or (zero and value == 0)):
        return float(value)
    raise ValueError(f"{name}: {what}={value}; need a finite {what} {'>=' if zero else '>'} 0")
