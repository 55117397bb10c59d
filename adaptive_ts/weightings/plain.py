"""Loss weightings: the log-SNR of an example -> the weight of its loss.

Each is one objective, whatever the model predicts: ``prediction`` names the model's own mean
squared error, which the weight multiplies, and the weight is converted to it. An SNR of 0 or
infinity gives the weight at a log-SNR of -40 or 40.

``schedule`` is for ``prediction="v"``, whose error depends on alpha^2 + sigma^2 besides the
log-SNR: None where that is 1 (the variance is preserved), and where the weighting is handed to
something that knows the schedule, such as `with_weighting`. It changes nothing for others.

Those that need the noise schedule are in ``scheduled``.
"""

import math

import jax
import jax.numpy as jnp

from adaptive_ts.schedules.base import MAX_LOG_SNR, NoiseSchedule
from adaptive_ts.types import PerExample, Weighting
from adaptive_ts.weightings.predictions import check_number, weighting_of


def constant(*, prediction: str = "eps") -> Weighting:
    """Weight 1 on the model's own squared error, whatever it predicts.

    So it is four different objectives: ``convert(constant(), "x0", "eps")`` is uniform on x_0.

    Args:
      prediction: what the model predicts: "eps", "x0", "v" or "flow".

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.constant()(jnp.asarray([-2.0, 3.0])))
      [1. 1.]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 14 (on eps).
    """
    return weighting_of(jnp.zeros_like, prediction, prediction)


def p2(
    gamma: float = 1.0,
    k: float = 1.0,
    *,
    prediction: str = "eps",
    schedule: NoiseSchedule | None = None,
    as_published: bool = False,
) -> Weighting:
    """Less weight where there is little noise: 1 / (k + SNR)^gamma on the eps error.

    With gamma = k = 1 and alpha^2 + sigma^2 = 1 it is sigma^2, and not normalised: the mean over
    the ``linear`` schedule is 0.72. The authors' code has gamma = 0 (off) by default; they train
    with 1 or 0.5.

    Args:
      gamma: >= 0.
      k: > 0.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".
      schedule: the noise schedule, for "v" where it does not preserve the variance.
      as_published: as in the authors' code, the same weights whatever the model predicts.

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: gamma or k out of range, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.p2()(jnp.asarray([0.0])))
      [0.5]

    Source: Choi et al. 2022, arXiv 2204.00227, Eq. 8.
    """
    gamma = check_number("p2", "gamma", gamma, zero=True)
    log_k = math.log(check_number("p2", "k", k))

    def log_weight(log_snr: PerExample) -> PerExample:
        return -gamma * jnp.logaddexp(log_k, log_snr)

    return weighting_of(log_weight, prediction if as_published else "eps", prediction, schedule)


def min_snr(
    gamma: float = 5.0,
    *,
    prediction: str = "eps",
    schedule: NoiseSchedule | None = None,
    as_published: bool = False,
) -> Weighting:
    """min(SNR, gamma) on the x_0 error: no more than gamma where there is little noise.

      x0: min(SNR, gamma)    eps: min(1, gamma / SNR)    v: min(SNR, gamma) / (SNR + 1)

    Args:
      gamma: > 0.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".
      schedule: the noise schedule, for "v" where it does not preserve the variance.
      as_published: as the type "min_snr_5" of the authors' code: "v" and "flow" get the formula
        of eps, and an SNR of 0 gets weight 1 (where x0's and v's is about 0).

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: gamma out of range, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.min_snr()(jnp.log(jnp.asarray([10.0, 5.0, 1.0]))).round(3))
      [0.5 1.  1. ]

    Source: Hang et al. 2023, arXiv 2303.09556.
    """
    log_gamma = math.log(check_number("min_snr", "gamma", gamma))
    if not as_published:
        return weighting_of(lambda lam: jnp.minimum(lam, log_gamma), "x0", prediction, schedule)

    def log_weight(log_snr: PerExample) -> PerExample:
        log_w = jnp.minimum(log_snr, log_gamma) - (0 if prediction == "x0" else log_snr)
        return jnp.where(log_snr <= -MAX_LOG_SNR, 0.0, log_w)

    return weighting_of(log_weight, prediction, prediction)


def soft_min_snr(
    gamma: float = 4.0, *, prediction: str = "eps", schedule: NoiseSchedule | None = None
) -> Weighting:
    """SNR gamma / (SNR + gamma) on the x_0 error: ``min_snr`` without the corner.

    It is 1 / (sigma^2 + sigma_data^2) with gamma = 1 / sigma_data^2, here at sigma_data = 0.5.
    Arguments, returns and errors as for ``min_snr``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.soft_min_snr()(jnp.log(jnp.asarray([4.0]))))
      [0.5]

    Source: Crowson et al. 2024 (HDiT), arXiv 2401.11605; code of k-diffusion.
    """
    log_gamma = math.log(check_number("soft_min_snr", "gamma", gamma))
    return weighting_of(
        lambda lam: log_gamma - jnp.logaddexp(lam, log_gamma), "eps", prediction, schedule
    )


def max_snr(
    gamma: float = 5.0, *, prediction: str = "eps", schedule: NoiseSchedule | None = None
) -> Weighting:
    """max(SNR, gamma) on the x_0 error. Arguments, returns and errors as for ``min_snr``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.max_snr(prediction="x0")(jnp.asarray([-3.0])).round(3))
      [5.]

    Source: Hang et al. 2023, arXiv 2303.09556, code ("max_snr_k").
    """
    log_gamma = math.log(check_number("max_snr", "gamma", gamma))
    return weighting_of(lambda lam: jnp.maximum(lam, log_gamma), "x0", prediction, schedule)


def truncated_snr(*, prediction: str = "eps", schedule: NoiseSchedule | None = None) -> Weighting:
    """max(SNR, 1) on the x_0 error: the larger of the errors of x_0 and eps.

    Args, returns and errors as for ``constant``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.truncated_snr()(jnp.log(jnp.asarray([4.0, 0.25]))))
      [1. 4.]

    Source: Salimans & Ho 2022, arXiv 2202.00512, Sec. 4.
    """
    return weighting_of(lambda lam: jnp.maximum(lam, 0.0), "x0", prediction, schedule)


def snr(*, prediction: str = "eps", schedule: NoiseSchedule | None = None) -> Weighting:
    """SNR on the x_0 error, which is weight 1 on eps.

    Args, returns and errors as for ``constant``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.snr(prediction="x0")(jnp.log(jnp.asarray([4.0]))))
      [4.]

    Source: Salimans & Ho 2022, arXiv 2202.00512, Sec. 4.
    """
    return weighting_of(jnp.zeros_like, "eps", prediction, schedule)


def snr_plus_one(*, prediction: str = "eps", schedule: NoiseSchedule | None = None) -> Weighting:
    """SNR + 1 on the x_0 error, which is weight 1 on v where alpha^2 + sigma^2 = 1.

    Args, returns and errors as for ``constant``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.snr_plus_one()(jnp.log(jnp.asarray([4.0]))))
      [1.25]

    Source: Salimans & Ho 2022, arXiv 2202.00512, Sec. 4.
    """
    return weighting_of(jax.nn.softplus, "x0", prediction, schedule)


def debiased(
    *,
    max_snr: float | None = None,
    prediction: str = "eps",
    schedule: NoiseSchedule | None = None,
    as_published: bool = False,
) -> Weighting:
    """1 / sqrt(SNR) on the eps error: more weight where there is much noise.

    Not normalised: the mean over the ``linear`` schedule is 17.8, a factor of the learning rate
    for other optimizers than Adam.

    Args:
      max_snr: cap on the SNR, for a smallest weight of 1 / sqrt(max_snr); others than the authors
        use 1000. None for no cap.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".
      schedule: the noise schedule, for "v" where it does not preserve the variance.
      as_published: as in the authors' code, the same weights whatever the model predicts.

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: max_snr not above 0, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> print(weightings.debiased()(jnp.log(jnp.asarray([4.0, 0.25]))))
      [0.5 2. ]

    Source: Yu et al. 2023, arXiv 2310.08442.
    """
    cap = MAX_LOG_SNR
    if max_snr is not None:
        cap = math.log(check_number("debiased", "max_snr", max_snr))

    def log_weight(log_snr: PerExample) -> PerExample:
        return -0.5 * jnp.minimum(log_snr, cap)

    return weighting_of(log_weight, prediction if as_published else "eps", prediction, schedule)


def edm(
    sigma_data: float = 0.5, *, prediction: str = "eps", schedule: NoiseSchedule | None = None
) -> Weighting:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on the x_0 error, s = 1 / sqrt(SNR).

    It makes the loss of EDM's network 1 at every noise level at the start. With sigma_data = 1 it
    is ``snr_plus_one``. s is the noise over the signal: sigma / alpha.

    Args:
      sigma_data: standard deviation of the data, > 0.
      prediction: what the model predicts: "eps", "x0" (EDM's denoiser), "v" or "flow".
      schedule: the noise schedule, for "v" where it does not preserve the variance.

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: sigma_data out of range, or an unknown prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts import weightings
      >>> sigma = jnp.asarray([0.5])
      >>> print(weightings.edm(prediction="x0")(-2 * jnp.log(sigma)).round(3))
      [8.]

    Source: Karras et al. 2022, arXiv 2206.00364, Table 1 and Eq. 8.
    """
    log_variance = 2 * math.log(check_number("edm", "sigma_data", sigma_data))
    return weighting_of(lambda lam: jnp.logaddexp(lam, -log_variance), "x0", prediction, schedule)
