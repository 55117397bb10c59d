"""Images of a trained model, batch by batch over all devices, and as pictures."""

import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import pictures, sharding
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.factory import Built
from adaptive_ts.experiment.solvers import make_generator
from adaptive_ts.types import Key, Params

AT_ONCE = 256
_SMALL = 16  # pixels: squares this large hide the shape, so the picture is interpolated


def image_key(seed: int) -> Key:
    """The randomness of the images that a run of this seed makes at its end."""
    _, key = jax.random.split(jax.random.key(seed))
    return jax.random.split(jax.random.fold_in(key, 2**31 - 1))[1]


def image_batches(
    config: Config,
    built: Built,
    shape: tuple[int, ...],
    mesh: Mesh,
    *,
    batch_size: int = AT_ONCE,
    spacing: str = "linear",
) -> Callable[[Params, Key], Iterator[np.ndarray]]:
    """(params, key) -> the images of ``config.generate``, in order, float32 in [-1, 1].

    Image i is the same whatever the batch size and the number of devices, up to how the compiler
    rounds for each.

    Args:
      config: of the run; its ``generate`` and its ``model.variance`` are used.
      built: the run's parts.
      shape: (H, W, C) of one image.
      mesh: the devices, which share each batch.
      batch_size: images at once, rounded up to a multiple of the devices; a batch that is not
        full is padded, and what is too many thrown away.
      spacing: of the timesteps, ``"linear"`` or ``"quadratic"``.

    Raises:
      ValueError: options that don't go together, as ``make_generator`` says.
    """
    c = config.generate
    generate = make_generator(
        built.eps_fn,
        built.schedule,
        tuple(shape),
        solver=c.solver,
        steps=c.steps,
        eta=c.eta,
        variance=config.model.variance,
        spacing=spacing,
    )
    at_once = -(-min(c.num_images, batch_size) // mesh.size) * mesh.size

    def batches(params: Params, key: Key) -> Iterator[np.ndarray]:
        for start in range(0, c.num_images, at_once):
            index = np.arange(start, start + at_once, dtype=np.int32)
            made = sharding.fetch(generate(params, key, sharding.put_whole(index, mesh)))
            yield made[: c.num_images - start]

    return batches


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as pixels: 0 to 255, to the nearest."""
    return np.round((images.astype(np.float32).clip(-1, 1) + 1) / 2 * 255).astype(np.uint8)


def save_grid(path: str | os.PathLike[str], images: np.ndarray) -> None:
    """Writes images (N, H, W, C), uint8 or in [-1, 1], as one picture."""
    small = max(images.shape[1:3]) < _SMALL
    pictures.save_image_grid(path, images, smooth=small)
