"""Losses: the mean squared error of a prediction, and VLB terms in bits/dim."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.diffusion.corruption import (
    PREDICTIONS,
    as_float,
    corrupt,
    predicted_eps,
    prediction_target,
    same_shapes,
)
from adaptive_ts.diffusion.images import ImageFn, image_reader
from adaptive_ts.schedules.base import (
    NoiseSchedule,
    discrete_betas,
    known,
    log_alphas_bar,
    lookup,
    noise_variance_table,
    posterior_tables,
)
from adaptive_ts.types import AxisName, Batch, Key, Params, PerExample

PredictFn: TypeAlias = Callable[[Params, jax.Array, PerExample, Batch, Key], jax.Array]


def _bounded(schedule: NoiseSchedule) -> NoiseSchedule:
    if discrete_betas(schedule)[-1] == 1:
        raise ValueError(
            f"{schedule.name} ends at an SNR of 0, where the VLB term is infinite; train with "
            "denoising_loss, or give a schedule whose last beta is below 1"
        )
    return schedule


def _mean(x: jax.Array, leading: int = 1) -> PerExample:
    """Over all but the leading axes, which are t's."""
    return jnp.mean(x, axis=tuple(range(leading, x.ndim)))


@dataclasses.dataclass(frozen=True, eq=False)  # not a tuple: jit needs weak references to it
class ExampleLoss:
    """A ``LossFn`` whose noise is folded by global example index: shard_map == global view.

    Attributes:
      at: (params, batch, t, key, index) -> (b,); index (b,) int32 names each example's noise.
        With a time for each of the images' leading axes, t (b, frames) for (b, frames, ...), the
        losses are of t's shape. Hand the same index to several timesteps and they share one noise.
        The model's key (dropout) is folded by the first index: its own on every device, equal
        within a profile. The noise is threefry's whatever the key is; the model's key is of the
        same implementation.
      axis_name: the mapped device axis, or None in the global view.
    """

    at: Callable[[Params, Batch, PerExample, Key, PerExample], PerExample]
    axis_name: AxisName = None

    def __call__(self, params: Params, batch: Batch, t: PerExample, key: Key) -> PerExample:
        """``at`` with this device's global example indices."""
        return self.at(params, batch, t, key, collectives.example_index(t.shape[0], self.axis_name))


def _example_loss(
    predict: PredictFn,
    schedule: NoiseSchedule,
    image: ImageFn,
    axis_name: AxisName,
    terms: Callable,
) -> ExampleLoss:
    """``terms(x0, noise, x_t, output, t) -> (b,)`` on noise drawn by example index."""

    def at(params: Params, batch: Batch, t: PerExample, key: Key, index: PerExample) -> PerExample:
        x0 = as_float(image(batch))
        own = collectives.threefry(key)
        k_noise, k_model = jax.random.split(own)
        if own is not key:  # the model's dropout stays with the generator that was chosen for it
            k_model = key
        keys = collectives.example_keys(k_noise, index)
        noise = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(keys)
        x_t = corrupt(schedule, x0, noise, t)
        output = predict(params, x_t, t, batch, jax.random.fold_in(k_model, index[0]))
        same_shapes(t, model_output=output, x0=x0)
        return terms(x0, noise, x_t, as_float(output, "model output"), t)

    return ExampleLoss(at, axis_name)


def denoising_loss(
    predict: PredictFn,
    schedule: NoiseSchedule,
    *,
    prediction: str = "eps",
    image: ImageFn | None = None,
    image_key: str = "image",
    axis_name: AxisName = None,
) -> ExampleLoss:
    """Per-example mean squared error in the prediction's own space, in float32.

    Args:
      predict: (params, x_t, t, batch, key) -> (b, ...), the model; t as the loss gets it.
      schedule: the noise schedule.
      prediction: what the model predicts: "eps", "x0", "v" or "flow".
      image: batch -> (b, ...) float images; None for ``batch[image_key]``.
      image_key: such as "latents", "pixel_values".
      axis_name: the mapped device axis, inside ``shard_map`` or ``pmap``.

    Returns: An ``ExampleLoss``, usable wherever a ``LossFn`` is.
    Raises: ValueError: an unknown prediction, image and image_key both; at trace time, integer
      images, a wrong shape, or a batch without them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> loss = ats.denoising_loss(lambda p, x, t, batch, key: p * x, ats.schedules.cosine())
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> loss(0.5, batch, jnp.arange(4), jax.random.key(0)).shape
      (4,)

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 14.
    """
    known(prediction, PREDICTIONS, "prediction")
    image = image_reader(image, image_key)

    def terms(x0, noise, x_t, output, t):
        error = output - prediction_target(schedule, prediction, x0, noise, t)
        return _mean(error**2, t.ndim)

    return _example_loss(predict, schedule, image, axis_name, terms)


def vlb_terms(
    schedule: NoiseSchedule,
    x0: jax.Array,
    noise: jax.Array,
    eps_hat: jax.Array,
    t: PerExample,
    *,
    variance: str = "fixed_large",
    decoder_nll: bool = False,
) -> PerExample:
    """The VLB term of timestep t, in bits/dim, given the noise and its prediction.

    With D = posterior - model log-variance (both clipped at t = 0, as in the paper's code),

      KL_t = [beta^2 / (2 e^mlv (1 - beta)(1 - abar)) MSE_eps + (e^D - 1 - D) / 2] / ln 2,

    both coefficients tabulated in float64. ``decoder_nll`` puts the 8-bit discretised
    Gaussian likelihood at t = 0 instead (logistic-like tanh CDF, floor 1e-12, as in DDPM).

    Args:
      schedule: on T timesteps, its last beta below 1.
      x0, noise, eps_hat: (b, ...) float.
      t: (b,) int32 in [0, T), or a time for each of more leading axes.
      variance: "fixed_large" or "fixed_small".

    Returns: of t's shape, at least float32, bits/dim.
    Raises: ValueError: an unknown variance, a schedule that is continuous or ends at an SNR of 0,
      or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> bits = ats.diffusion.vlb_terms(ats.schedules.linear(), x, x, 0.5 * x, jnp.array([0, 500]))
      >>> [round(float(v), 4) for v in bits]
      [0.3307, 0.002]

    Source: Ho et al. 2020, Eqs. 5, 12, 13; Kim et al., arXiv 2411.09998, compute_kl_divergence.
    """
    return _vlb_bits(_vlb_tables(schedule, variance), x0, noise, eps_hat, t, decoder_nll)


class _VlbTables(NamedTuple):
    """bits = slope MSE_eps + offset, (T,) each; at t = 0 what the decoder's likelihood needs."""

    slope: np.ndarray
    offset: np.ndarray
    ratio: float
    log_scale: float


def _vlb_tables(schedule: NoiseSchedule, variance: str) -> _VlbTables:
    tables = posterior_tables(_bounded(schedule), variance)
    betas, noise_variance = discrete_betas(schedule), noise_variance_table(schedule)
    gap = tables.posterior_log_variance_clipped - tables.model_log_variance
    per_mse = betas**2 / (2 * np.exp(tables.model_log_variance) * (1 - betas) * noise_variance)
    return _VlbTables(
        slope=per_mse / math.log(2),
        offset=0.5 * (np.expm1(gap) - gap) / math.log(2),
        # The model's mean at t = 0 is its x0, off by sigma / alpha times the error in eps.
        ratio=math.sqrt(noise_variance[0] / (1 - betas[0])),
        log_scale=0.5 * tables.model_log_variance[0],
    )


def _vlb_bits(
    tables: _VlbTables,
    x0: jax.Array,
    noise: jax.Array,
    eps_hat: jax.Array,
    t: PerExample,
    decoder_nll: bool,
) -> PerExample:
    same_shapes(t, x0=x0, noise=noise, eps_hat=eps_hat)
    noise = as_float(noise, "noise")
    dtype = noise.dtype
    x0, eps_hat = as_float(x0).astype(dtype), as_float(eps_hat, "eps_hat").astype(dtype)
    mse = _mean((eps_hat - noise) ** 2, t.ndim)
    bits = lookup(tables.slope, t, dtype) * mse + lookup(tables.offset, t, dtype)
    if not decoder_nll:
        return bits
    nll = _decoder_bits(x0, tables.ratio * (eps_hat - noise), tables.log_scale, t.ndim)
    return jnp.where(t == 0, nll, bits)


def _decoder_bits(x0: jax.Array, error: jax.Array, log_scale: float, leading: int) -> PerExample:
    """-log2 of the Gaussian mass of each pixel's 8-bit bin; error = x0 - mean."""
    flip = jnp.where(error > 0, -1.0, 1.0).astype(error.dtype)
    # Both ends on the left of the mean, where a difference of CDFs does not cancel.
    ends = [flip * (error + side / 255) * math.exp(-log_scale) for side in (1.0, -1.0)]
    upper, lower = (jax.nn.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)) for z in ends)
    inner = flip * (upper - lower)
    below = jnp.where(flip > 0, upper, 1 - upper)
    above = jnp.where(flip > 0, 1 - lower, lower)
    mass = jnp.where(x0 < -0.999, below, jnp.where(x0 > 0.999, above, inner))
    return _mean(-jnp.log(jnp.maximum(mass, 1e-12)), leading) / math.log(2)


def vlb_loss(
    predict: PredictFn,
    schedule: NoiseSchedule,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    decoder_nll: bool = False,
    image: ImageFn | None = None,
    image_key: str = "image",
    axis_name: AxisName = None,
) -> ExampleLoss:
    """The VLB term of timestep t per example, in bits/dim (``vlb_terms``), in float32.

    Args, returns and errors as for ``denoising_loss``; variance, decoder_nll and the schedules
    allowed as for ``vlb_terms``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> loss = ats.vlb_loss(lambda p, x, t, batch, key: p * x, ats.schedules.quad())
      >>> loss(0.9, {"image": jnp.zeros((4, 8, 8, 1))}, jnp.arange(4), jax.random.key(0)).shape
      (4,)

    Source: Kim et al., CVPR 2025, arXiv 2411.09998, Sec. 3.
    """
    known(prediction, PREDICTIONS, "prediction")
    tables, image = _vlb_tables(schedule, variance), image_reader(image, image_key)

    def terms(x0, noise, x_t, output, t):
        eps_hat = predicted_eps(schedule, prediction, output, x_t, t)
        return _vlb_bits(tables, x0, noise, eps_hat, t, decoder_nll)

    return _example_loss(predict, schedule, image, axis_name, terms)


def prior_bits_per_dim(schedule: NoiseSchedule, x0: jax.Array) -> PerExample:
    """The bound's last term, KL(q(x_T | x_0) || N(0, 1)), in bits/dim.

      (abar_T mean(x_0^2) - abar_T - log(1 - abar_T)) / (2 ln 2)

    Args: x0: (b, ...) float.
    Returns: (b,) at least float32, bits/dim.
    Raises: ValueError: integer images, or a continuous schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bits = ats.diffusion.prior_bits_per_dim(ats.schedules.linear(), jnp.ones((2, 8, 8, 1)))
      >>> [round(float(b) * 1e5, 2) for b in bits]
      [2.91, 2.91]

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 5 (L_T).
    """
    x0 = as_float(x0)
    last = log_alphas_bar(discrete_betas(schedule))[-1]
    abar, noise = math.exp(last), -math.expm1(last)
    constant = -abar - math.log(noise) if noise < 0.5 else -abar - math.log1p(-abar)
    return (abar * _mean(x0**2) + constant) / (2 * math.log(2))


def total_bits_per_dim(
    loss: ExampleLoss,
    schedule: NoiseSchedule,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    timesteps: jax.Array | None = None,
    chunk: int = 100,
    image: ImageFn | None = None,
    image_key: str = "image",
) -> PerExample:
    """The whole bound in bits/dim: sum_t L_t + prior, one fresh noise per example and timestep.

    With ``timesteps`` the sum is T times their mean: unbiased if each is drawn uniformly in
    its stratum. t = 0 alone is often half of the bound, so with few strata it is noisy.

    Args:
      loss: a ``vlb_loss``.
      params, batch: handed to ``loss``.
      key: folded by timestep.
      timesteps: (k,) int32, or None for all T.
      chunk: timesteps evaluated at once; memory is that of a batch of b * chunk.
      image, image_key: as for ``denoising_loss``, for the prior.

    Returns: (b,) float32, bits/dim.
    Raises: ValueError: chunk below 1, timesteps not (k,), or a continuous schedule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> schedule, batch = ats.schedules.linear(20), {"image": jnp.zeros((4, 8, 8, 1))}
      >>> loss = ats.vlb_loss(lambda p, x, t, batch, key: 0.9 * x, schedule)
      >>> ats.diffusion.total_bits_per_dim(loss, schedule, None, batch, jax.random.key(0)).shape
      (4,)

    Source: Ho, Jain & Abbeel 2020, arXiv 2006.11239, Eq. 5.
    """
    total = discrete_betas(schedule).size
    t_all = jnp.arange(total, dtype=jnp.int32) if timesteps is None else timesteps
    if t_all.ndim != 1 or t_all.size == 0 or chunk < 1:
        raise ValueError(f"timesteps {t_all.shape}, chunk {chunk}: need (k,) and chunk >= 1")
    x0, key = image_reader(image, image_key)(batch), collectives.threefry(key)

    def term(t: jax.Array) -> PerExample:
        full = jnp.broadcast_to(t, x0.shape[:1])
        return loss(params, batch, full, jax.random.fold_in(key, t))

    terms = jax.lax.map(term, t_all, batch_size=min(chunk, t_all.size))
    return jnp.sum(terms, axis=0) * (total / t_all.size) + prior_bits_per_dim(schedule, x0)
