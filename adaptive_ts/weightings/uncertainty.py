"""A weighting that is learned with the model: EDM2's uncertainty of each noise level."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.collectives import threefry
from adaptive_ts.types import Key, PerExample
from adaptive_ts.weightings.predictions import clip_log_snr

_NORM_EPS = 1e-4


class UncertaintyParams(NamedTuple):
    """Parameters of ``edm2_uncertainty``, c channels.

    Attributes:
      frequencies, phases: (c,) float32, drawn once; no gradient reaches them.
      weight: (c,) float32, learned; only its direction counts.
    """

    frequencies: jax.Array
    phases: jax.Array
    weight: jax.Array


class Uncertainty(NamedTuple):
    """A learned weighting: three pure functions. See ``edm2_uncertainty``.

    Attributes:
      init: key -> `UncertaintyParams`.
      apply: (params, log_snr (b,)) -> u (b,) float32, the log of the expected weighted loss.
      loss: (params, log_snr (b,), weighted_losses (b,)) -> (b,), to be trained on.
    """

    init: Callable[[Key], UncertaintyParams]
    apply: Callable[[UncertaintyParams, PerExample], PerExample]
    loss: Callable[[UncertaintyParams, PerExample, PerExample], PerExample]


def edm2_uncertainty(*, channels: int = 128) -> Uncertainty:
    """Learns u(sigma), the log of the weighted loss at each noise level, and divides by exp(u).

      loss = exp(-u) weighted_loss + u,  u = <w', sqrt(2) cos(frequencies log(sigma) / 4 + phases)>
      w' = w / (1e-4 + rms(w)) / sqrt(channels),  sigma = 1 / sqrt(SNR)

    It is smallest where exp(u) = E[weighted loss | sigma], so every noise level counts the same.
    ``weighted_losses`` are means over pixels, weighted as by ``weightings.edm``; u is added once
    per example here, which is EDM2's once per pixel, in means. u is not 0 at the start, but
    that of a random head.

    Give ``params`` to the optimizer next to the model's. Its gradients of frequencies and phases
    are 0; keep weight decay off them. The weight is normalised in ``apply``, and not overwritten
    by its normalised value as in EDM2, so it may grow and its steps become relatively smaller.

    Args:
      channels: c, how many frequencies.

    Returns:
      An `Uncertainty`: init, apply, loss.

    Raises:
      ValueError: channels not an integer of at least 1; at trace time, shapes that differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adaptive_ts.weightings.uncertainty import edm2_uncertainty
      >>> uncertainty = edm2_uncertainty()
      >>> params = uncertainty.init(jax.random.key(0))
      >>> log_snr, losses = jnp.asarray([-2.0, 3.0]), jnp.asarray([0.1, 0.7])
      >>> uncertainty.loss(params, log_snr, losses).shape
      (2,)

    Source: Karras et al. 2024 (EDM2), arXiv 2312.02696, and its code; Kendall et al. 2018,
    arXiv 1705.07115.
    """
    if isinstance(channels, bool) or not isinstance(channels, int | np.integer) or channels < 1:
        raise ValueError(f"channels must be an integer of at least 1, got {channels!r}")

    def init(key: Key) -> UncertaintyParams:
        k_frequency, k_phase, k_weight = jax.random.split(threefry(key), 3)
        return UncertaintyParams(
            2 * math.pi * jax.random.normal(k_frequency, (channels,), jnp.float32),
            2 * math.pi * jax.random.uniform(k_phase, (channels,), jnp.float32),
            jax.random.normal(k_weight, (channels,), jnp.float32),
        )

    def apply(params: UncertaintyParams, log_snr: PerExample) -> PerExample:
        frequencies, phases = jax.lax.stop_gradient(params[:2])
        noise_level = -clip_log_snr(log_snr) / 8  # log(sigma) / 4
        row = tuple(range(log_snr.ndim))  # of axes before the channels
        frequencies, phases = jnp.expand_dims(frequencies, row), jnp.expand_dims(phases, row)
        angle = noise_level[..., None] * frequencies + phases
        rms = jnp.linalg.norm(params.weight) / math.sqrt(channels)
        weight = params.weight / ((_NORM_EPS + rms) * math.sqrt(channels))
        return math.sqrt(2) * jnp.sum(jnp.cos(angle) * jnp.expand_dims(weight, row), axis=-1)

    def loss(
        params: UncertaintyParams, log_snr: PerExample, weighted_losses: PerExample
    ) -> PerExample:
        if log_snr.shape != weighted_losses.shape:
            raise ValueError(
                f"log_snr {log_snr.shape} and weighted_losses {weighted_losses.shape}: need one "
                "shape, (b,) or that of t"
            )
        u = apply(params, log_snr)
        return jnp.exp(-u) * weighted_losses + u

    return Uncertainty(init, apply, loss)
