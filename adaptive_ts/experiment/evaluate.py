"""What a model is worth on held-out images: loss and VLB, by timestep and in all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts import diffusion
from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.data import Dataset
from adaptive_ts.experiment.factory import Built
from adaptive_ts.experiment.step import prepare
from adaptive_ts.types import Key, LossFn, Params

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
    """

    num_images: int
    timesteps: np.ndarray
    loss: np.ndarray
    vlb: np.ndarray
    total_loss: float
    total_vlb: float


def evaluate(
    built: Built, params: Params, dataset: Dataset, batch_size: int, key: Key, mesh: Mesh
) -> Evaluation:
    """Held-out loss and VLB, at the middle of each stratum, each image with its own noise.

    Args:
      built: the run's parts.
      params: the (averaged) weights.
      dataset: held-out images; the first 256 are used, in whole batches where there are some.
      batch_size: images at once, a multiple of the devices.
      key: randomness of the noise.
      mesh: the devices.
    """
    strata = geometric_strata(built.schedule.num_timesteps)
    timesteps = jnp.asarray(strata.timesteps)
    count = min(len(dataset.images), _MAX_IMAGES)
    size = min(batch_size, count // mesh.size * mesh.size) or mesh.size
    sums, seen = None, 0
    run = jax.jit(lambda p, batch, index: _terms(built, p, batch, index, timesteps, key))
    for start in range(0, max(count - size, 0) + 1, size):
        index = np.arange(start, start + size, dtype=np.int32)
        images = dataset.images[index % len(dataset.images)]
        batch, index = sharding.put_whole((images, index), mesh)
        terms = run(params, prepare({"image": batch}, None), index)
        terms = [np.asarray(x, np.float64) for x in terms]
        sums = terms if sums is None else [a + b for a, b in zip(sums, terms, strict=True)]
        seen += size
    loss, vlb, prior = (x / seen for x in sums)
    return Evaluation(
        num_images=seen,
        timesteps=strata.timesteps,
        loss=loss,
        vlb=vlb,
        total_loss=float(strata.sizes @ loss / strata.sizes.sum()),
        total_vlb=float(strata.sizes @ vlb + prior),
    )


def _terms(
    built: Built,
    params: Params,
    batch: dict[str, jax.Array],
    index: jax.Array,
    timesteps: jax.Array,
    key: Key,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the batch: (n,) losses, (n,) VLB terms, () prior."""

    def at(loss_fn: LossFn, t: jax.Array) -> jax.Array:
        return jnp.sum(loss_fn.at(params, batch, jnp.full(index.shape, t), key, index))

    loss_fn = built.parts.loss_fn
    loss, vlb = jax.lax.map(lambda t: (at(loss_fn, t), at(built.vlb, t)), timesteps)
    return loss, vlb, jnp.sum(diffusion.prior_bits_per_dim(built.schedule, batch["image"]))
