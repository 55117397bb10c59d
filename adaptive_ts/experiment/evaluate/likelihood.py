"""What a model is worth on held-out images: loss and VLB, by timestep and in all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts import diffusion
from adaptive_ts.experiment.assembly.build import Built
from adaptive_ts.experiment.assembly.step import prepare
from adaptive_ts.experiment.data.decoding import Dataset
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.types import Batch, IndexedLossFn, Key, Params

_MAX_IMAGES = 256
_STRATA = 24  # from each end of the time axis


class Strata(NamedTuple):
    """Runs of timesteps, short at both ends, where the VLB's terms change fast.

    Attributes:
      timesteps: (k,) int32, the middle of each.
      sizes: (k,) how many timesteps each stands for; they sum to T.
    """

    timesteps: np.ndarray
    sizes: np.ndarray


def geometric_strata(num_timesteps: int, num: int = _STRATA) -> Strata:
    """Strata that grow geometrically from both ends: t = 0 and t = T - 1 stand for themselves.

    The first timestep alone is often a third of the VLB, which equal strata would pass over.

    Args:
      num_timesteps: T; up to 2 num of them each stand for themselves.
      num: about how many strata reach from each end to the middle.
    """
    half = num_timesteps // 2
    left = np.unique(np.round(np.geomspace(1, half + 1, num + 1)).astype(int) - 1)
    if num_timesteps <= 2 * num:
        left = np.arange(half + 1)
    edges = np.unique(np.concatenate([left, num_timesteps - left]))
    return Strata(((edges[:-1] + edges[1:] - 1) // 2).astype(np.int32), np.diff(edges))


class Evaluation(NamedTuple):
    """Attributes:
    num_images: held-out images used.
    timesteps: (n,) the middles of `geometric_strata`.
    loss: (n,) mean training loss at each.
    vlb: (n,) mean VLB term at each, bits/dim.
    total_loss: mean over timesteps.
    total_vlb: sum of the VLB terms over all T timesteps, and the prior: bits/dim.
    vlb_error: (n,) half the 95% interval of ``vlb``, from its spread over images and their noise.
    total_vlb_error: the same of ``total_vlb``.
    """

    num_images: int
    timesteps: np.ndarray
    loss: np.ndarray
    vlb: np.ndarray
    total_loss: float
    total_vlb: float
    vlb_error: np.ndarray
    total_vlb_error: float


def evaluate(
    built: Built,
    params: Params,
    dataset: Dataset,
    batch_size: int,
    key: Key,
    mesh: Mesh,
    *,
    max_images: int = _MAX_IMAGES,
    tell: Callable[[int], Any] = lambda count: None,
) -> Evaluation:
    """Held-out loss and VLB, at the middle of each stratum, each image with its own noise.

    Nothing is dropped, neither units nor classes.

    The intervals are those of the mean over independent images (normal approximation). That a
    stratum's middle stands for the rest of it is not in them: at most 2 x 24 strata of T = 1000.

    Args:
      built: the run's parts.
      params: the (averaged) weights.
      dataset: held-out images; used in whole batches where there are some.
      batch_size: images at once, a multiple of the devices.
      key: randomness of the noise.
      mesh: the devices.
      max_images: the first of them that are used.
      tell: receives how many images are begun with.
    """
    strata = geometric_strata(built.parts.grid.num_buckets)
    timesteps = jnp.asarray(strata.timesteps)
    count = min(dataset.images.shape[0], max_images)
    size = min(batch_size, count // mesh.size * mesh.size) or mesh.size
    sums: list[np.ndarray] = []
    seen = 0
    sizes = jnp.asarray(strata.sizes, jnp.float32)
    run = jax.jit(lambda p, batch, index: _terms(built, p, batch, index, timesteps, sizes, key))
    for start in range(0, max(count - size, 0) + 1, size):
        index = np.arange(start, start + size, dtype=np.int32)
        tell(size)
        images, labels = dataset.rows(index % dataset.images.shape[0])
        batch = {"image": images, "label": labels}
        batch, index = sharding.put_whole((batch, index), mesh)
        terms = [np.asarray(x, np.float64) for x in run(params, prepare(batch, None), index)]
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
        seen += size
    loss, vlb, vlb_square, prior, total_square = (x / seen for x in sums)
    total = float(strata.sizes @ vlb + prior)
    return Evaluation(
        num_images=seen,
        timesteps=strata.timesteps,
        loss=loss,
        vlb=vlb,
        total_loss=float(strata.sizes @ loss / strata.sizes.sum()),
        total_vlb=total,
        vlb_error=_half_interval(vlb, vlb_square, seen),
        total_vlb_error=float(_half_interval(total, total_square, seen)),
    )


class _Sums(NamedTuple):
    """Over images: (n,) losses, VLB terms and their squares; () prior and total VLB squared."""

    loss: jax.Array
    vlb: jax.Array
    vlb_square: jax.Array
    prior: jax.Array
    total_square: jax.Array


def _half_interval(mean: np.ndarray | float, mean_square: np.ndarray, count: int) -> np.ndarray:
    """Half the 95% interval of a mean of ``count``; NaN of fewer than two."""
    if count < 2:
        return np.full_like(mean, np.nan)
    variance = np.maximum(mean_square - mean**2, 0) * count / (count - 1)
    return 1.96 * np.sqrt(variance / count)


def _terms(
    built: Built,
    params: Params,
    batch: Batch,
    index: jax.Array,
    timesteps: jax.Array,
    sizes: jax.Array,
    key: Key,
) -> _Sums:
    def at(loss_fn: IndexedLossFn, t: jax.Array) -> jax.Array:
        return loss_fn.at(params, batch, jnp.full(index.shape, t), key, index)

    loss, vlb = jax.lax.map(lambda t: (jnp.sum(at(built.loss, t)), at(built.vlb, t)), timesteps)
    prior = diffusion.prior_bits_per_dim(built.schedule, batch["image"])
    total = sizes @ vlb + prior
    return _Sums(loss, vlb.sum(1), (vlb**2).sum(1), prior.sum(), (total**2).sum())
