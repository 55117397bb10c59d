"""Making images: DDPM's ancestral sampling, and DDIM."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.diffusion import NoiseSchedule
from adaptive_ts.types import Key, Params

# (params, x_t (b, H, W, C), t (b,)) -> the predicted noise, like x_t
EpsFn = Callable[[Params, jax.Array, jax.Array], jax.Array]


def solver_timesteps(num_timesteps: int, steps: int) -> np.ndarray:
    """(steps,) int32, from T - 1 down to 0, evenly spaced."""
    return np.round(np.linspace(num_timesteps - 1, 0, steps)).astype(np.int32)


def make_generator(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    *,
    solver: Literal["ddpm", "ddim"] = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large",
) -> Callable[[Params, Key, jax.Array], jax.Array]:
    """(params, key, index (b,)) -> images (b, H, W, C) in [-1, 1].

    Image i depends on the key and on its index alone, not on the batch it is made in. From t to
    the next timestep s of a subsequence (abar_s = 1 after the last), with x0 predicted and
    clipped to [-1, 1] and eps made consistent with it:
    x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - v) eps + sqrt(v) z. ``"ddim"``: v = eta^2 times the
    posterior variance of the step. ``"ddpm"``: the posterior mean, which is the same with
    eta = 1, plus noise of the posterior variance ("fixed_small") or of 1 - abar_t / abar_s, the
    beta of the step ("fixed_large"); no noise in the last step.

    Args:
      eps_fn: the model, as a noise predictor.
      schedule: the noise schedule it was trained with.
      shape: (H, W, C) of one image.
      solver: ``"ddpm"`` or ``"ddim"``.
      steps: how many evaluations, at most T; T is full ancestral sampling.
      eta: DDIM's noise.
      variance: of the ancestral step.

    Raises:
      ValueError: ``steps`` outside [1, T], a negative ``eta``, an unknown solver or variance.

    Source: Ho et al. 2020 (arXiv 2006.11239), Algorithm 2; Song et al. 2021 (arXiv 2010.02502),
    Eq. 12.
    """
    if schedule.num_timesteps is None or not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(f"steps must be from 1 to {schedule.num_timesteps}, got {steps}")
    if solver not in ("ddpm", "ddim") or variance not in ("fixed_large", "fixed_small"):
        raise ValueError(f"unknown solver or variance: {solver!r}, {variance!r}")
    if eta < 0:
        raise ValueError(f"eta must be >= 0, got {eta}")
    table = _solver_table(schedule, steps, 1.0 if solver == "ddpm" else eta)
    if solver == "ddpm" and variance == "fixed_large":
        table["noise"] = np.sqrt(table["step_beta"]) * (table["t"] > 0)
    table = {k: v.astype(np.int32 if k == "t" else np.float32) for k, v in table.items()}

    def generate(params: Params, key: Key, index: jax.Array) -> jax.Array:
        keys = collectives.example_keys(key, index)

        def noise(number: jax.Array) -> jax.Array:
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, number), shape))(keys)

        def advance(x: jax.Array, row: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            t = jnp.full(index.shape, row["t"])
            eps = eps_fn(params, x, t)
            x0 = jnp.clip((x - row["sigma"] * eps) / row["alpha"], -1.0, 1.0)
            eps = (x - row["alpha"] * x0) / row["sigma"]
            mean = row["next_alpha"] * x0 + row["direction"] * eps
            return mean + row["noise"] * noise(row["t"]), None

        x, _ = jax.lax.scan(advance, noise(jnp.int32(schedule.num_timesteps)), table)
        return jnp.clip(x, -1.0, 1.0)

    return jax.jit(generate)


def _solver_table(schedule: NoiseSchedule, steps: int, eta: float) -> dict[str, np.ndarray]:
    """The coefficients of each step, float64 (steps,)."""
    t = solver_timesteps(schedule.num_timesteps, steps)
    whole = np.cumprod(1.0 - schedule.betas)
    now, then = whole[t], np.append(whole[t[1:]], 1.0)
    step_beta = 1 - now / then
    variance = eta**2 * step_beta * (1 - then) / (1 - now)
    return {
        "t": t,
        "alpha": np.sqrt(now),
        "sigma": np.sqrt(1 - now),
        "next_alpha": np.sqrt(then),
        "direction": np.sqrt(np.maximum(1 - then - variance, 0.0)),
        "noise": np.sqrt(variance),
        "step_beta": step_beta,
    }
