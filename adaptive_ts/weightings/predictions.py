"""Errors of one prediction in units of another's: what lets a weighting serve all four."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adaptive_ts.diffusion.corruption import PREDICTIONS
from adaptive_ts.schedules.base import MAX_LOG_SNR, known
from adaptive_ts.types import PerExample, Weighting

_MAX_LOG_WEIGHT = 80.0  # float32 ends at exp(88)


def clip_log_snr(log_snr: PerExample) -> PerExample:
    """float32, held at -40 to 40 as the schedules hold it; NaN stays."""
    log_snr = jnp.asarray(log_snr)
    if not jnp.issubdtype(log_snr.dtype, jnp.floating):
        raise ValueError(
            f"a weighting takes the log-SNR, got {log_snr.dtype}: schedule.log_snr(t), not t"
        )
    return jnp.clip(log_snr.astype(jnp.float32), -MAX_LOG_SNR, MAX_LOG_SNR)


def log_error_ratio(prediction: str, log_snr: PerExample) -> PerExample:
    """log of ||prediction's error||^2 / ||x_0 error||^2 at the same x_t.

    x0: 0. eps: log SNR. v: log(1 + SNR), where alpha^2 + sigma^2 = 1. flow:
    2 log(1 + sqrt(SNR)).
    """
    match known(prediction, PREDICTIONS, "prediction"):
        case "eps":
            return log_snr
        case "v":
            return jax.nn.softplus(log_snr)
        case "flow":
            return 2 * jax.nn.softplus(log_snr / 2)
    return jnp.zeros_like(log_snr)


def weighting_of(
    log_weight: Callable[[PerExample], PerExample], space: str, prediction: str
) -> Weighting:
    """``log_weight`` is that of the squared error of ``space``; the model predicts ``prediction``.

    All in logarithms, so that an SNR of 0 or infinity gives finite weights.
    """
    known(prediction, PREDICTIONS, "prediction")

    def weighting(log_snr: PerExample) -> PerExample:
        log_snr = clip_log_snr(log_snr)
        log_w = log_weight(log_snr)
        if space != prediction:
            log_w = log_w + log_error_ratio(space, log_snr) - log_error_ratio(prediction, log_snr)
        weight = jnp.exp(jnp.minimum(log_w, _MAX_LOG_WEIGHT))
        return jnp.where(jnp.isnan(log_snr), log_snr, weight)

    return weighting


def convert(weighting: Weighting, from_prediction: str, to_prediction: str) -> Weighting:
    """A weighting of one prediction's error as the same objective on another's.

      w_to = w_from ||from error||^2 / ||to error||^2

    with, per ||x_0 error||^2 at the same x_t: eps SNR, v SNR + 1 (where alpha^2 + sigma^2 = 1),
    flow (eps - x_0) (1 + sqrt(SNR))^2.

    Args:
      weighting: (b,) log-SNR -> (b,) weight of the squared error of ``from_prediction``.
      from_prediction, to_prediction: "eps", "x0", "v" or "flow".

    Returns:
      A ``Weighting`` for a model that predicts ``to_prediction``.

    Raises:
      ValueError: an unknown prediction.

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

    def converted(log_snr: PerExample) -> PerExample:
        clipped = clip_log_snr(log_snr)
        source, target = (log_error_ratio(p, clipped) for p in (from_prediction, to_prediction))
        return weighting(log_snr) * jnp.exp(source - target)

    return converted


def check_number(name: str, what: str, value: float, *, zero: bool = False) -> float:
    """The value, if it is finite and above 0 (or 0, if allowed)."""
    if math.isfinite(value) and (value > 0 or (zero and value == 0)):
        return float(value)
    raise ValueError(f"{name}: {what}={value}; need a finite {what} {'>=' if zero else '>'} 0")
