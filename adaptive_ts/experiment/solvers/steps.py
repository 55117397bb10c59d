"""What each solver does, as a table of numbers: host arithmetic in float64, no model.

One row is one evaluation of the model at (x, t), from which x0 and eps follow with
x = alpha x0 + sigma eps. Then, with a memory m of one image and standard normal z,

  x <- to_x0 x0 + to_eps eps + memory m + noise z,    m <- keep_x0 x0 + keep_eps eps

and the last x is the image. All the solvers are of this form, so one loop runs them all, and one
evaluation of the model is compiled whichever is chosen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adaptive_ts.experiment.config.groups import SPACINGS
from adaptive_ts.schedules.base import NoiseSchedule, discrete_betas, known

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "euler", "heun")

Table = dict[str, np.ndarray]


class Path(NamedTuple):
    """Where a solver stops on the way from noise to the clean image, which is the last stop.

    Attributes:
      t: (n,) where the model is evaluated, falling; int32, or a float in continuous time.
      signal: (n + 1,) float64, alpha^2 there and, last, 1.
      noise: (n + 1,) float64, sigma^2 there and, last, 0.
      number: (n,) int32, which of an image's draws of noise belongs to each step.
      first: that of the noise it starts from.
    """

    t: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    number: np.ndarray
    first: int


def solver_timesteps(num_timesteps: int, steps: int, spacing: str = "linear") -> np.ndarray:
    """Discrete timesteps to evaluate the model at, int32, falling to 0.

    ``"linear"``: (steps,) evenly spaced from T - 1. ``"quadratic"``: floor(c i^2), i = 0, 1, ..,
    steps - 1, the last of them at 0.8 T, which is where the authors' code begins; at most
    ``steps``, since those that the floor makes equal are one (a DDIM step between equals does
    nothing).

    Args:
      num_timesteps: T.
      steps: 1 to T; at least 2 if quadratic.
      spacing: ``"linear"`` or ``"quadratic"``.

    Raises:
      ValueError: ``steps`` out of range, or an unknown spacing.

    Example:
      >>> from adaptive_ts.experiment.solvers.steps import solver_timesteps
      >>> solver_timesteps(1000, 5).tolist(), solver_timesteps(1000, 5, "quadratic").tolist()
      ([999, 749, 500, 250, 0], [800, 450, 200, 50, 0])

    Source: Song et al. 2021, arXiv 2010.02502, App. D.2.
    """
    known(spacing, SPACINGS, "spacing")
    least = 1 if spacing == "linear" else 2
    if not least <= steps <= num_timesteps:
        raise ValueError(f"steps must be from {least} to {num_timesteps}, got {steps}")
    if spacing == "linear":
        return np.round(np.linspace(num_timesteps - 1, 0, steps)).astype(np.int32)
    squares = np.linspace(0.0, np.sqrt(0.8 * num_timesteps), steps) ** 2
    return np.unique(squares.astype(np.int32))[::-1]


def make_path(
    schedule: NoiseSchedule, steps: int, *, spacing: str = "linear", t_max: float = 1.0
) -> Path:
    """The stops of a solver; see ``make_generator`` for the arguments.

    In continuous time t_max i / steps, i = steps, .., 1, or t_max (i / steps)^2 if quadratic.
    """
    known(spacing, SPACINGS, "spacing")
    if schedule.num_timesteps is not None:
        if t_max != 1.0:
            raise ValueError(f"t_max is for continuous time, {schedule.name} is not; got {t_max}")
        t = solver_timesteps(schedule.num_timesteps, steps, spacing)
        whole = np.append(np.cumprod(1.0 - discrete_betas(schedule))[t], 1.0)
        return Path(t, whole, 1.0 - whole, t, schedule.num_timesteps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max must be in (0, 1], got {t_max}")
    share = np.arange(steps, 0, -1) / steps
    t = (t_max * (share if spacing == "linear" else share**2)).astype(jnp.result_type(float))
    functions: tuple[Callable[..., Any], ...] = (schedule.alpha, schedule.sigma)  # of NumPy's t
    squares = (np.asarray(f(t), np.float64) ** 2 for f in functions)
    signal, noise = (np.append(x, end) for x, end in zip(squares, (1.0, 0.0), strict=True))
    if not np.all(noise[:-1] > 0):
        raise ValueError(
            f"{schedule.name} has no noise at t={t[np.argmin(noise[:-1])]:g}, where the solver "
            f"evaluates the model: use fewer steps than {steps}, or a schedule with sigma > 0"
        )
    return Path(t, signal, noise, np.arange(1, steps + 1, dtype=np.int32), 0)


def solver_table(path: Path, solver: str, *, eta: float = 0.0, variance: str = "") -> Table:
    """The rows of a solver, float64, t and number apart; see the module and ``make_generator``.

    ``"dpmpp_2m"`` and ``"heun"`` have the three columns of the memory, the others that of noise.
    """
    if solver == "ddpm":
        return _first_order(path, 1.0, variance == "fixed_large")
    if solver == "dpmpp_2m":
        return _multistep(path)
    if solver == "heun":
        return _heun(path)
    return _first_order(path, eta)  # Euler's step is DDIM's with eta = 0


def _first_order(path: Path, eta: float, large: bool = False) -> Table:
    """DDIM, and with eta = 1 ancestral sampling; ``large`` adds more noise to the same mean."""
    total = path.signal + path.noise
    # What the forward process adds from the next stop to this one; DDPM's beta of the step.
    step = np.maximum(total[:-1] - path.signal[:-1] / path.signal[1:] * total[1:], 0.0)
    variance = eta**2 * step * path.noise[1:] / path.noise[:-1]
    return {
        "t": path.t,
        "number": path.number,
        "alpha": np.sqrt(path.signal[:-1]),
        "sigma": np.sqrt(path.noise[:-1]),
        "to_x0": np.sqrt(path.signal[1:]),
        "to_eps": np.sqrt(np.maximum(path.noise[1:] - variance, 0.0)),
        "noise": np.sqrt(step) * (path.noise[1:] > 0) if large else np.sqrt(variance),
    }


def _multistep(path: Path) -> Table:
    """DDIM's step, its x0 extrapolated from this one and the last, along log(alpha / sigma).

    With h the step in log(alpha / sigma), h' the one before and q = h / (2 h'), Algorithm 2 is
    x <- alpha' x0 + sigma' eps + (alpha' - sigma' alpha / sigma) q (x0 - x0 before). It begins
    with q = 0, and ends so too: the clean image is infinitely far. q is at most 1 here: with 20
    linear steps of 1000 timesteps the last but one would have 5, and be worse than DDIM's. (The
    authors' code takes some last steps of first order instead.)
    """
    table, n = _first_order(path, 0.0), len(path.t)
    q = np.zeros(n)
    if n > 2:
        with np.errstate(divide="ignore"):  # an SNR of 0 to begin with: h' is infinite, q is 0
            half_log_snr = 0.5 * (np.log(path.signal[:-1]) - np.log(path.noise[:-1]))
        h = np.diff(half_log_snr)
        q[1:-1] = np.minimum(h[1:] / (2 * h[:-1]), 1.0)
    ahead = (table["to_x0"] - table["to_eps"] * table["alpha"] / table["sigma"]) * q
    del table["noise"]
    return {
        **table,
        "to_x0": table["to_x0"] + ahead,
        "memory": -ahead,
        "keep_x0": np.ones(n),
        "keep_eps": np.zeros(n),
    }


def _heun(path: Path) -> Table:
    """Heun in tau = sigma / (alpha + sigma), where every schedule is the straight flow.

    y = x / (alpha + sigma) = (1 - tau) x0 + tau eps moves by dy / dtau = eps - x0. Two rows per
    step: Euler's (which is DDIM's), with half of its slope kept; then the other half, of the slope
    at its end. At the clean image eps is not defined, so the last step is Euler's alone.
    """
    scale = np.sqrt(path.signal) + np.sqrt(path.noise)
    tau = np.sqrt(path.noise) / scale
    half, middle, to = np.diff(tau) / 2, (tau[:-1] + tau[1:]) / 2, scale[1:]
    euler, zeros = _first_order(path, 0.0), np.zeros(len(path.t))
    del euler["noise"]
    first = {**euler, "memory": zeros, "keep_x0": to * (1 - middle), "keep_eps": to * middle}
    second = {name: np.roll(column, -1) for name, column in euler.items()}
    second |= {"to_x0": -to * half, "to_eps": to * half, "memory": zeros + 1}
    second |= {"keep_x0": zeros, "keep_eps": zeros}
    pairs = {name: np.stack([first[name], second[name]], axis=1) for name in first}
    return {name: rows.reshape(-1)[:-1] for name, rows in pairs.items()}
