"""Noise schedules of T integer timesteps, each from its betas.

The word "sigmoid" names two of them: ``sigmoid`` bends abar, ``sigmoid_beta`` bends beta.
"""

import math

import numpy as np
from scipy.special import expit

from adaptive_ts.schedules.base import NoiseSchedule, discrete_betas, from_betas


def _ends(
    name: str, num_timesteps: int, beta_start: float, beta_end: float, rescale: bool
) -> tuple[float, float]:
    scale = 1000 / _checked_length(name, num_timesteps) if rescale else 1.0
    ends = (scale * beta_start, scale * beta_end)
    if not all(0 < beta < 1 for beta in ends):
        raise ValueError(
            f"{name}: beta_start={beta_start}, beta_end={beta_end}, times {scale:g}, must stay "
            "inside (0, 1); lower them" + (", or raise num_timesteps" if rescale else "")
        )
    return ends


def _checked_length(name: str, num_timesteps: int) -> int:
    if num_timesteps < 2:
        raise ValueError(f"{name}: num_timesteps is {num_timesteps}; it must be at least 2")
    return num_timesteps


def linear(
    num_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = False,
) -> NoiseSchedule:
    """Betas evenly spaced from beta_start to beta_end.

    Args:
      num_timesteps: T >= 2.
      beta_start, beta_end: the first and last beta, in (0, 1).
      rescale: multiply both by 1000 / T, so that a T other than 1000 ends at the same noise
        (OpenAI's code does, DDPM's does not).

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: T below 2, or betas outside (0, 1).

    Example:
      >>> import adaptive_ts as ats
      >>> ats.schedules.linear(100, rescale=True).betas[-1].round(6).item()
      0.2

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Sec. 4.
    """
    start, end = _ends("linear", num_timesteps, beta_start, beta_end, rescale)
    return from_betas("linear", np.linspace(start, end, num_timesteps))


def quad(
    num_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = False,
) -> NoiseSchedule:
    """Square roots of beta evenly spaced. Arguments, returns and errors as for ``linear``.

    Example:
      >>> import adaptive_ts as ats
      >>> ats.schedules.quad(3, beta_start=0.01, beta_end=0.09).betas.round(6).tolist()
      [0.01, 0.04, 0.09]

    Source: Song, Meng & Ermon 2021, arXiv 2010.02502, code; cifar10.json of the official
    code of Kim et al., arXiv 2411.09998.
    """
    start, end = _ends("quad", num_timesteps, beta_start, beta_end, rescale)
    return from_betas("quad", np.linspace(math.sqrt(start), math.sqrt(end), num_timesteps) ** 2)


def cosine(
    num_timesteps: int = 1000, *, s: float = 0.008, max_beta: float = 0.999
) -> NoiseSchedule:
    """beta_t = min(1 - f((t + 1) / T) / f(t / T), max_beta), f(u) = cos^2(pi/2 (u + s)/(1 + s)).

    Args:
      num_timesteps: T >= 2.
      s: offset that keeps the first betas from vanishing, at least 0.
      max_beta: in (0, 1); with T = 1000 only the last beta is clipped.

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: T below 2, s negative, or max_beta outside (0, 1).

    Example:
      >>> import adaptive_ts as ats
      >>> ats.schedules.cosine().betas[-1].item()
      0.999

    Source: Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17.
    """
    if s < 0 or not 0 < max_beta < 1:
        raise ValueError(f"cosine: s={s}, max_beta={max_beta}; need s >= 0 and 0 < max_beta < 1")
    u = np.arange(_checked_length("cosine", num_timesteps) + 1) / num_timesteps
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    return from_betas("cosine", np.minimum(1 - f[1:] / f[:-1], max_beta))


def constant_beta(
    num_timesteps: int = 1000, *, beta: float = 0.02, rescale: bool = False
) -> NoiseSchedule:
    """The same beta at every timestep: abar_t = (1 - beta)^(t + 1).

    Args:
      num_timesteps: T >= 2.
      beta: in (0, 1).
      rescale: as for ``linear``.

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: T below 2, or beta outside (0, 1).

    Example:
      >>> from adaptive_ts.schedules.discrete import constant_beta
      >>> constant_beta(100, rescale=True).betas[-1].round(6).item()
      0.2

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, code ("const").
    """
    _, end = _ends("constant_beta", num_timesteps, beta, beta, rescale)
    return from_betas("constant_beta", np.full(num_timesteps, end))


def jsd(num_timesteps: int = 1000) -> NoiseSchedule:
    """beta_t = 1 / (T - t): abar falls by 1 / T a step, to exactly 0 at the last one.

    At t = T - 1 the SNR is 0 (log-SNR held at -40): x_t is noise alone, so train with the
    prediction "x0", "v" or "flow"; the bound of ``vlb_loss`` is not defined.

    Args:
      num_timesteps: T >= 2.

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: T below 2.

    Example:
      >>> from adaptive_ts.schedules.discrete import jsd
      >>> jsd(4).betas.round(3).tolist()
      [0.25, 0.333, 0.5, 1.0]

    Source: Sohl-Dickstein et al. 2015, arXiv 1503.03585, Sec. 2.4.1; "jsd" in DDPM's code.
    """
    return from_betas("jsd", 1 / np.arange(_checked_length("jsd", num_timesteps), 0.0, -1.0))


def warmup(
    num_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    fraction: float = 0.1,
    rescale: bool = False,
) -> NoiseSchedule:
    """Betas evenly spaced over the first floor(fraction T) timesteps, then beta_end.

    Args:
      num_timesteps: T >= 2.
      beta_start, beta_end: the first and last beta, in (0, 1).
      fraction: in [0, 1]; 0.1 and 0.5 are DDPM's "warmup10" and "warmup50".
      rescale: as for ``linear``.

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: T below 2, betas outside (0, 1), or fraction outside [0, 1].

    Example:
      >>> from adaptive_ts.schedules.discrete import warmup
      >>> warmup(6, beta_start=0.1, beta_end=0.3, fraction=0.5).betas.round(6).tolist()
      [0.1, 0.2, 0.3, 0.3, 0.3, 0.3]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, code ("warmup10", "warmup50").
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"warmup: fraction is {fraction}; keep it in [0, 1]")
    start, end = _ends("warmup", num_timesteps, beta_start, beta_end, rescale)
    betas = np.full(num_timesteps, end)
    steps = int(num_timesteps * fraction)
    betas[:steps] = np.linspace(start, end, steps)
    return from_betas("warmup", betas)


def sigmoid(
    num_timesteps: int = 1000,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    clip_min: float = 1e-9,
    max_beta: float = 0.999,
) -> NoiseSchedule:
    """abar falls as a sigmoid: beta_t = min(1 - g((t + 1) / T) / g(t / T), max_beta).

      g(u) = max(clip_min, (S(end / tau) - S(x)) / (S(end / tau) - S(start / tau))),
      x = (start + u (end - start)) / tau, S the logistic function

    Args:
      num_timesteps: T >= 2.
      start, end: the stretch of the logistic function, start < end.
      tau: temperature > 0; higher is closer to a straight line.
      clip_min: floor of g, in [0, 1); it is abar at T - 1 if max_beta is 1.
      max_beta: in (0, 1]; at the default it, and not clip_min, sets the last beta.

    Returns:
      A ``NoiseSchedule``.

    Raises:
      ValueError: an argument out of range, or g flat in float64 or at its floor for more than
        the last timestep.

    Example:
      >>> from adaptive_ts.schedules.discrete import sigmoid
      >>> schedule = sigmoid(4, max_beta=1.0)
      >>> (1 - schedule.betas).cumprod().round(3).tolist()
      [0.851, 0.5, 0.149, 0.0]

    Source: Jabri, Fleet & Chen 2022, arXiv 2212.11972, code; Chen 2023, arXiv 2301.10972,
    Algorithm 1. In betas up to 0.999: denoising-diffusion-pytorch.
    """
    if not (start < end and tau > 0 and 0 <= clip_min < 1 and 0 < max_beta <= 1):
        raise ValueError(
            f"sigmoid: start={start}, end={end}, tau={tau}, clip_min={clip_min}, "
            f"max_beta={max_beta}; need start < end, tau > 0, 0 <= clip_min < 1, 0 < max_beta <= 1"
        )
    u = np.arange(_checked_length("sigmoid", num_timesteps) + 1) / num_timesteps
    # S(end) - S(x) = S(-x) - S(-end), which keeps its digits where both are near 1.
    fall = expit(-(start + u * (end - start)) / tau) - expit(-end / tau)
    g = np.maximum(fall / fall[0], clip_min)
    g[-1] = clip_min
    if np.any(np.diff(g) >= 0):
        raise ValueError(
            f"sigmoid: with start={start}, end={end}, tau={tau} abar does not fall from step to "
            f"step, or is below clip_min={clip_min} before the last; raise tau or lower clip_min"
        )
    return from_betas("sigmoid", np.minimum(1 - g[1:] / g[:-1], max_beta))


def sigmoid_beta(
    num_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = False,
) -> NoiseSchedule:
    """beta = beta_start + (beta_end - beta_start) S(x), x evenly spaced from -6 to 6.

    S is the logistic function, so the betas end 0.25% of their span short of both ends.
    Arguments, returns and errors as for ``linear``. Not the ``sigmoid`` of abar.

    Example:
      >>> from adaptive_ts.schedules.discrete import sigmoid_beta
      >>> sigmoid_beta(3, beta_start=0.1, beta_end=0.3).betas.round(4).tolist()
      [0.1005, 0.2, 0.2995]

    Source: Song, Meng & Ermon 2021, arXiv 2010.02502, code ("sigmoid").
    """
    start, end = _ends("sigmoid_beta", num_timesteps, beta_start, beta_end, rescale)
    betas = start + (end - start) * expit(np.linspace(-6, 6, num_timesteps))
    return from_betas("sigmoid_beta", betas)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule with its last SNR moved to 0, as at generation, where x_T is noise alone.

      sqrt(abar'_t) = (sqrt(abar_t) - sqrt(abar_{T-1})) sqrt(abar_0)
                      / (sqrt(abar_0) - sqrt(abar_{T-1}))

    The first timestep stays as it is. At the last one eps says nothing about x_0: train with
    the prediction "x0", "v" or "flow"; the bound of ``vlb_loss`` is not defined.

    Args:
      schedule: a discrete schedule.

    Returns:
      A ``NoiseSchedule`` whose last beta is 1.

    Raises:
      ValueError: a continuous schedule, or an SNR that is 0 in float64 before the last timestep.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.schedules.discrete import linear, zero_terminal_snr
      >>> schedule = zero_terminal_snr(linear())
      >>> [round(float(x), 5) for x in schedule.alpha(jnp.array([0, 999]))]
      [0.99995, 0.0]

    Source: Lin et al. 2024, arXiv 2305.08891, Algorithm 1.
    """
    if schedule.num_timesteps is None:
        raise ValueError(f"{schedule.name} is continuous; zero_terminal_snr needs a discrete one")
    betas = discrete_betas(schedule)
    alpha = np.sqrt(np.cumprod(1 - betas))
    if np.any(np.diff(alpha) >= 0):
        raise ValueError(f"{schedule.name}: its SNR is 0 before the last timestep; lower its betas")
    alpha = (alpha - alpha[-1]) / (alpha[0] - alpha[-1])  # in units of the first
    rescaled = 1 - (alpha[1:] / alpha[:-1]) ** 2
    return from_betas(f"{schedule.name}, zero terminal SNR", np.append(betas[0], rescaled))
