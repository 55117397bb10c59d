"""Solvers: from noise to images, by a model that predicts the noise or what stands for it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.experiment.solvers.steps import SOLVERS, make_path, solver_table
from adaptive_ts.schedules.base import VARIANCES, NoiseSchedule, known
from adaptive_ts.types import Key, Params

# (params, x_t (b, H, W, C), t (b,)) -> the predicted noise, like x_t; with labels, and a fourth
# argument (b,), if images are made with labels
EpsFn = Callable[..., jax.Array]

_CLEAN: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "eps": lambda x, eps, row: (x - row["sigma"] * eps) / row["alpha"],
    "x0": lambda x, x0, row: x0,
    "v": lambda x, v, row: (
        (row["alpha"] * x - row["sigma"] * v) / (row["alpha"] ** 2 + row["sigma"] ** 2)
    ),
    "flow": lambda x, flow, row: (x - row["sigma"] * flow) / (row["alpha"] + row["sigma"]),
}


def make_generator(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    *,
    solver: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    variance: str = "fixed_large",
    spacing: str = "linear",
    clip: bool = True,
    prediction: str = "eps",
    t_max: float = 1.0,
) -> Callable[..., jax.Array]:
    """(params, key, index (b,), label (b,) = None) -> images (b, H, W, C).

    Image i depends on the key, on its index and its label alone, not on the batch it is made in.
    Each evaluation of the model gives x0, clipped to [-1, 1], and the eps that is consistent with
    it. From alpha, sigma at t to alpha', sigma' at the next stop (1 and 0 after the last):

    ``"ddim"``: x' = alpha' x0 + sqrt(sigma'^2 - v) eps + sqrt(v) z, where v is eta^2 times the
    posterior variance of the step. ``"ddpm"``: the posterior mean, which is the same with eta = 1,
    plus noise of the posterior variance ("fixed_small") or of sigma^2 - (alpha sigma' / alpha')^2,
    which is the beta of the step ("fixed_large"); no noise in the last step. ``"dpmpp_2m"``:
    DPM-Solver++ 2M, of second order in log(alpha / sigma). ``"euler"``, ``"heun"``: the
    probability flow ODE in tau = sigma / (alpha + sigma), which for ``rectified_flow`` is t
    itself, dx / dt = eps - x0; Euler's step is that of DDIM with eta = 0, and Heun, of second
    order, evaluates the model 2 steps - 1 times (the last step is Euler's).

    Second order takes a path that is smooth to its end: where sigma falls like sqrt(t), as that of
    ``vp_linear`` does, the quadratic spacing has it and the linear one has not. DPM-Solver++'s own
    measure, log(alpha / sigma), is infinite at the clean end: it gains more from the quadratic
    spacing than the others.

    The start is noise of variance alpha^2 + sigma^2, that of data with variance 1; the same for
    every solver and number of steps.

    Args:
      eps_fn: the model, as a noise predictor; with labels as its fourth argument if images are
        made with labels.
      schedule: the noise schedule it was trained with, discrete or continuous.
      shape: (H, W, C) of one image.
      solver: one of ``SOLVERS``.
      steps: how many, at most T; with T "ddpm" is full ancestral sampling.
      eta: DDIM's noise.
      variance: of the ancestral step.
      spacing: of the timesteps, ``"linear"`` or ``"quadratic"``; see ``solver_timesteps``.
      clip: False for data beyond [-1, 1].
      prediction: what ``eps_fn`` predicts, if not the noise: ``"x0"``, ``"v"`` or ``"flow"``. From
        an SNR of 0 the noise says nothing about the image; the others do.
      t_max: where continuous time begins, in (0, 1].

    Returns:
      The function, jitted.

    Raises:
      ValueError: an argument out of range or unknown; eta with a solver that adds no noise; noise
        prediction from an SNR of 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> from adaptive_ts.experiment.solvers.generator import make_generator
      >>> black = lambda params, x, t: jnp.full_like(x, -1.0)
      >>> generate = make_generator(black, ats.schedules.rectified_flow(), (2, 2, 1), solver="heun",
      ...                           steps=3, prediction="x0")
      >>> generate(None, jax.random.key(0), jnp.arange(4)).mean().item()
      -1.0

    Source: Ho et al. 2020 (arXiv 2006.11239), Algorithm 2; Song et al. 2021 (arXiv 2010.02502),
    Eq. 12; Lu et al. 2022 (arXiv 2211.01095), Algorithm 2; Karras et al. 2022 (arXiv 2206.00364),
    Algorithm 1; Liu et al. 2022 (arXiv 2209.03003).
    """
    known(solver, SOLVERS, "solver")
    known(variance, VARIANCES, "variance")
    known(prediction, tuple(_CLEAN), "prediction")
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be >= 0, got {eta}")
    if eta and solver not in ("ddim", "ddpm"):
        raise ValueError(f"eta is DDIM's noise, {solver} adds none; leave it out, got {eta}")
    path = make_path(schedule, steps, spacing=spacing, t_max=t_max)
    if path.signal[0] == 0 and prediction == "eps":
        instead = "predict x0, v or flow"
        instead += "" if schedule.num_timesteps else ", or begin at a t_max below 1, such as 0.999"
        raise ValueError(
            f"{schedule.name} has an SNR of 0 at t={path.t[0]:g}, where the noise says nothing "
            f"about the image: {instead}"
        )
    table = solver_table(path, solver, eta=eta, variance=variance)
    start = float(np.sqrt(path.signal[0] + path.noise[0]))
    real = jnp.result_type(float)
    table = {k: v if k in ("t", "number") else v.astype(real) for k, v in table.items()}
    clean = _CLEAN[prediction]

    def generate(
        params: Params, key: Key, index: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        keys, labels = collectives.example_keys(key, index), () if label is None else (label,)

        def draw(number: jax.Array) -> jax.Array:
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, number), shape))(keys)

        def advance(carry: tuple[jax.Array, Any], row: dict[str, Any]) -> tuple[Any, None]:
            x, memory = carry
            output = eps_fn(params, x, jnp.full(index.shape, row["t"]), *labels)
            x0 = clean(x, output, row)
            x0 = jnp.clip(x0, -1.0, 1.0) if clip else x0
            eps = (x - row["alpha"] * x0) / row["sigma"]
            x = row["to_x0"] * x0 + row["to_eps"] * eps
            if memory is not None:
                x = x + row["memory"] * memory
                memory = row["keep_x0"] * x0 + row["keep_eps"] * eps
            if "noise" in row:  # with eta = 0 too: without it the compiler rounds differently
                x = x + row["noise"] * draw(row["number"])
            return (x, memory), None

        x = draw(jnp.int32(path.first))
        x = x if start == 1.0 else start * x
        memory = jnp.zeros_like(x) if "memory" in table else None
        (x, _), _ = jax.lax.scan(advance, (x, memory), table)
        return jnp.clip(x, -1.0, 1.0) if clip else x

    return jax.jit(generate)


def guided(eps_fn: EpsFn, weight: float, null_label: int) -> EpsFn:
    """Classifier-free guidance: (params, x, t, label) -> eps_null + w (eps_label - eps_null).

    w = 1 is the plain conditional model, w = 0 the unconditional one, and above 1 it is pushed
    away from the latter. DiT's cfg scale is this w; Ho & Salimans' own is w - 1, that is
    (1 + w) eps_label - w eps_null. It holds for x0, v and flow predictions as well, each of
    which is affine in eps at its x_t. The two are one batch of 2 b, each image beside its double,
    so that a batch split over devices stays where it is.

    Args:
      eps_fn: (params, x (b, ...), t (b,), label (b,)) -> like x, trained with labels dropped.
      weight: w >= 0.
      null_label: the label that stands for none.

    Returns:
      A function like ``eps_fn``.

    Raises:
      ValueError: a weight that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.experiment.solvers.generator import guided
      >>> eps_fn = lambda params, x, t, label: x * label[:, None]
      >>> x, t = jnp.ones((2, 1)), jnp.zeros((2,), jnp.int32)
      >>> guided(eps_fn, 3.0, 10)(None, x, t, jnp.array([11, 12])).ravel().tolist()
      [13.0, 16.0]

    Source: Ho & Salimans 2022, arXiv 2207.12598, Eq. 6; Peebles & Xie 2023 (DiT),
    arXiv 2212.09748.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"the weight of guidance must be >= 0 and finite, got {weight}")

    def both(params: Params, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        labels = jnp.stack([label, jnp.full_like(label, null_label)], axis=1).reshape(-1)
        eps = eps_fn(params, jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), labels)
        eps = eps.reshape(-1, 2, *eps.shape[1:])
        return eps[:, 1] + weight * (eps[:, 0] - eps[:, 1])

    return both
