"""What the model sees and what it is asked for: corruption, targets and conversions."""

import jax
import jax.numpy as jnp

from adaptive_ts.schedules.base import NoiseSchedule, known
from adaptive_ts.types import PerExample

PREDICTIONS = ("eps", "x0", "v", "flow")


def _per_example(values: PerExample, like: jax.Array) -> jax.Array:
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def as_float(x: jax.Array, what: str = "x0") -> jax.Array:
    """At least float32."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{what} is {x.dtype}; scale images to float in [-1, 1]: x / 127.5 - 1")
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def same_shapes(t: PerExample, **arrays: jax.Array) -> None:
    shapes = {name: x.shape for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}; a learned variance is not supported")
    shape = next(iter(shapes.values()))
    times = jnp.shape(t)
    if not 1 <= len(times) < len(shape) or times != shape[: len(times)]:
        raise ValueError(
            f"t {times} and images {shape}: need (b,) and (b, ...), or a time for each of the "
            "images' leading axes, as (b, frames) and (b, frames, ...)"
        )


def corrupt(schedule: NoiseSchedule, x0: jax.Array, noise: jax.Array, t: PerExample) -> jax.Array:
    """x_t = alpha(t) x_0 + sigma(t) noise.

    Args:
      schedule: the noise schedule.
      x0: (b, ...) float, such as NHWC images in [-1, 1].
      noise: (b, ...), standard normal.
      t: (b,), or a time for each of more leading axes: (b, frames) for x0 (b, frames, ...).

    Returns: (b, ...) at least float32.
    Raises: ValueError: integer images, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> x0 = jnp.ones((2, 8, 8, 1))
      >>> x_t = ats.corrupt(ats.schedules.linear(), x0, 0 * x0, jnp.array([0, 999]))
      >>> [round(float(x), 5) for x in x_t[:, 0, 0, 0]]
      [0.99995, 0.00635]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 4.
    """
    same_shapes(t, x0=x0, noise=noise)
    x0, noise = as_float(x0), as_float(noise, "noise")
    alpha, sigma = schedule.alpha(t).astype(x0.dtype), schedule.sigma(t).astype(x0.dtype)
    return _per_example(alpha, x0) * x0 + _per_example(sigma, x0) * noise


def prediction_target(
    schedule: NoiseSchedule, prediction: str, x0: jax.Array, noise: jax.Array, t: PerExample
) -> jax.Array:
    """What the model regresses on: eps, x0, v = alpha eps - sigma x0, or flow = eps - x0.

    Args: as for ``corrupt``; prediction: "eps", "x0", "v" or "flow".
    Returns: (b, ...) at least float32.
    Raises: ValueError: an unknown prediction, integer images, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> x0, t = jnp.ones((1, 2, 2, 1)), jnp.array([999])
      >>> v = ats.diffusion.prediction_target(ats.schedules.linear(), "v", x0, 3 * x0, t)
      >>> float(v.max()) < -0.9
      True

    Source: Salimans & Ho 2022, arXiv 2202.00512, App. D; Liu et al. 2022, arXiv 2209.03003.
    """
    known(prediction, PREDICTIONS, "prediction")
    if prediction == "v":  # the corruption turned by 90 degrees
        return corrupt(schedule._replace(sigma=lambda t: -schedule.sigma(t)), noise, x0, t)
    same_shapes(t, x0=x0, noise=noise)
    if prediction == "flow":
        return as_float(noise, "noise") - as_float(x0)
    return as_float(noise if prediction == "eps" else x0)


def predicted_eps(
    schedule: NoiseSchedule, prediction: str, output: jax.Array, x_t: jax.Array, t: PerExample
) -> jax.Array:
    """The noise that a model's output implies.

    eps; (x_t - alpha x0) / sigma; (sigma x_t + alpha v) / (alpha^2 + sigma^2), whose denominator
    is 1 where variance is preserved; (x_t + alpha flow) / (alpha + sigma).

    Args:
      schedule: the noise schedule.
      prediction: "eps", "x0", "v" or "flow".
      output, x_t: (b, ...).
      t: (b,), or a time for each of more leading axes.

    Returns: (b, ...) at least float32.
    Raises: ValueError: an unknown prediction, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> x_t, t = jnp.ones((1, 2, 2, 1)), jnp.array([500])
      >>> ats.diffusion.predicted_eps(ats.schedules.linear(), "x0", 0 * x_t, x_t, t).shape
      (1, 2, 2, 1)

    Source: Salimans & Ho 2022, arXiv 2202.00512, App. D.
    """
    known(prediction, PREDICTIONS, "prediction")
    same_shapes(t, model_output=output, x_t=x_t)
    output, x_t = as_float(output, "model output"), as_float(x_t, "x_t")
    if prediction == "eps":
        return output
    pair = (schedule.alpha, schedule.sigma)
    alpha, sigma = (_per_example(f(t), x_t).astype(x_t.dtype) for f in pair)
    if prediction == "flow":
        return (x_t + alpha * output) / (alpha + sigma)
    if prediction == "x0":
        return (x_t - alpha * output) / sigma
    return (sigma * x_t + alpha * output) / (alpha**2 + sigma**2)
