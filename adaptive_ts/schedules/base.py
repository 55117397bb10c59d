"""What a noise schedule is, and what DDPM tabulates from its betas, in float64 on the host."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adaptive_ts.types import PerExample

VARIANCES = ("fixed_large", "fixed_small")
MAX_LOG_SNR = 40.0  # beyond it float32 holds no trace of the noise, or of the signal


class NoiseSchedule(NamedTuple):
    """x_t = alpha(t) x_0 + sigma(t) eps. Discrete, or continuous with no betas.

    Attributes:
      name: for messages.
      num_timesteps: T, or None when t is continuous.
      betas: (T,) float64 on the host, or None when t is continuous.
      alpha, sigma: t (b,) -> (b,) float32, the signal and noise amplitudes.
      log_snr: t (b,) -> (b,) float32, natural log of (alpha / sigma)^2, falling in t. Finite:
        an SNR of 0 or infinity is held at -40 or 40.
      from_log_snr: (b,) float32 -> t (b,), its inverse; on discrete timesteps the nearest one.
        None where it is not known.
    """

    name: str
    num_timesteps: int | None
    betas: np.ndarray | None
    alpha: Callable[[PerExample], PerExample]
    sigma: Callable[[PerExample], PerExample]
    log_snr: Callable[[PerExample], PerExample]
    from_log_snr: Callable[[PerExample], PerExample] | None = None


def from_betas(name: str, betas: np.ndarray) -> NoiseSchedule:
    """A discrete schedule from its betas: abar_t = prod_{s <= t} (1 - beta_s).

    alpha = sqrt(abar), sigma = sqrt(1 - abar), log SNR = log abar - log(1 - abar), tabulated
    in float64 from sums of log1p(-beta) and cast to float32 once.

    Args:
      name: for messages.
      betas: (T,) noise variances in (0, 1), T >= 2; the last may be 1, for an SNR of 0.

    Returns:
      A ``NoiseSchedule``; its callables take integer t in [0, T).

    Raises:
      ValueError: fewer than two betas, or one outside (0, 1) and not the last.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> schedule = ats.schedules.from_betas("constant", np.full(10, 0.5))
      >>> [round(float(x), 2) for x in schedule.log_snr(jnp.array([0, 9]))]
      [0.0, -6.93]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 4.
    """
    betas = np.array(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2:
        raise ValueError(f"{name}: betas have shape {betas.shape}; give (T,) with T >= 2")
    if not (np.all((betas > 0) & (betas <= 1)) and np.all(betas[:-1] < 1)):
        raise ValueError(
            f"{name}: betas span [{betas.min():g}, {betas.max():g}]; keep them inside (0, 1) "
            "(only the last may be 1)"
        )
    betas.setflags(write=False)
    log_abar = log_alphas_bar(betas)
    log_noise = np.log(-np.expm1(log_abar))
    log_snr = np.clip(log_abar - log_noise, -MAX_LOG_SNR, MAX_LOG_SNR)
    between = -(log_snr[1:] + log_snr[:-1]) / 2  # rises with t

    def nearest(value: PerExample) -> PerExample:
        edges = jnp.asarray(between.astype(np.float32))
        return jnp.searchsorted(edges, -value, method="scan_unrolled").astype(jnp.int32)

    def table(values: np.ndarray) -> Callable[[PerExample], PerExample]:
        return lambda t: lookup(values, t, jnp.float32)

    return NoiseSchedule(
        name,
        betas.size,
        betas,
        alpha=table(np.exp(0.5 * log_abar)),
        sigma=table(np.exp(0.5 * log_noise)),
        log_snr=table(log_snr),
        from_log_snr=nearest,
    )


def log_alphas_bar(betas: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # a last beta of 1
        return np.cumsum(np.log1p(-betas))


def lookup(table: np.ndarray, t: PerExample, dtype: Any) -> PerExample:
    if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
        raise ValueError(f"t is {jnp.result_type(t)}; a discrete schedule takes integers in [0, T)")
    return jnp.asarray(table.astype(dtype))[t]


def known(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, 1, 0.0)[0]
    raise ValueError(f"{what} {value!r} is unknown; did you mean {near!r}? Known: {list(allowed)}")


def discrete_betas(schedule: NoiseSchedule) -> np.ndarray:
    if schedule.betas is None:
        raise ValueError(f"{schedule.name} is continuous; VLB terms need a discrete schedule")
    return schedule.betas


def noise_variance_table(schedule: NoiseSchedule) -> np.ndarray:
    return -np.expm1(log_alphas_bar(discrete_betas(schedule)))


class PosteriorTables(NamedTuple):
    """(T,) float64 host arrays; see ``posterior_tables``."""

    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    model_variance: np.ndarray
    model_log_variance: np.ndarray
    loss_coef: np.ndarray


def posterior_tables(schedule: NoiseSchedule, variance: str = "fixed_large") -> PosteriorTables:
    """q(x_{t-1} | x_t, x_0) and the model's variance, as DDPM tabulates them.

    Posterior variance beta_t (1 - abar_{t-1}) / (1 - abar_t). The model's variance is beta
    (fixed_large) or the posterior's (fixed_small). The log-variances at t = 0 are those of the
    posterior at t = 1. loss_coef (nats per eps-MSE) is
    beta^2 / (2 model_variance (1 - beta) (1 - abar)), infinite at t = 0 for fixed_small and
    where beta is 1.

    Raises: ValueError: an unknown variance, or a continuous schedule.

    Example:
      >>> import adaptive_ts as ats
      >>> ats.schedules.posterior_tables(ats.schedules.linear()).loss_coef[999].round(7).item()
      0.0102045

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eqs. 7 and 12.
    """
    known(variance, VARIANCES, "variance")
    betas, noise = discrete_betas(schedule), noise_variance_table(schedule)
    before = np.append(0.0, noise[:-1])  # 1 - abar_{t-1}
    posterior = betas * before / noise
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    large = variance == "fixed_large"
    model = betas if large else posterior
    with np.errstate(divide="ignore"):
        loss_coef = betas**2 / (2 * model * (1 - betas) * noise)
    return PosteriorTables(
        posterior,
        clipped,
        model,
        np.append(clipped[0], np.log(betas[1:])) if large else clipped,
        loss_coef,
    )
