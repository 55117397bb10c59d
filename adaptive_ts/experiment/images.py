"""Images of a trained model, batch by batch over all devices, and as pictures."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import pictures, sharding
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.factory import Built
from adaptive_ts.experiment.solvers import guided, make_generator
from adaptive_ts.types import Key, Params

AT_ONCE = 256
_SMALL = 16  # pixels: squares this large hide the shape, so the picture is interpolated


def label_cycle(num_classes: int | None, labels: Sequence[int] | None = None) -> np.ndarray | None:
    """The labels that images get in turn: image i the one at i modulo their number.

    Args:
      num_classes: that the model is told; None: none.
      labels: those wanted; None: every class.

    Returns:
      (k,) int32, or None without classes.

    Raises:
      ValueError: labels out of range, or for a model without classes.

    Example:
      >>> from adaptive_ts.experiment.images import label_cycle
      >>> label_cycle(10, [7, 1]).tolist(), label_cycle(3).tolist(), label_cycle(None)
      ([7, 1], [0, 1, 2], None)
    """
    if num_classes is None:
        if labels is not None:
            text = " ".join(map(str, labels))
            raise ValueError(
                f"labels: {text} means nothing to a model without classes: leave it out"
            )
        return None
    cycle = np.arange(num_classes) if labels is None else np.asarray(labels)
    wrong = [c for c in cycle.tolist() if c not in range(num_classes)]
    if wrong or not len(cycle):
        got = wrong[0] if wrong else "nothing"
        raise ValueError(f"labels: {got} is out of range: must be in 0..{num_classes - 1}")
    return cycle.astype(np.int32)


def image_batches(
    config: Config,
    built: Built,
    shape: tuple[int, ...],
    mesh: Mesh,
    *,
    batch_size: int = AT_ONCE,
    spacing: str = "linear",
    labels: Sequence[int] | None = None,
    latents: bool = False,
) -> Callable[[Params, Key], Iterator[np.ndarray]]:
    """(params, key) -> the images of ``config.generate``, in order, float32 in [-1, 1].

    Image i is the same whatever the batch size and the number of devices, up to how the compiler
    rounds for each. With ``generate.guidance`` 1 the model is evaluated once, else twice.

    Args:
      config: of the run; its ``generate`` and its ``model.variance`` are used.
      built: the run's parts.
      shape: (H, W, C) of one image.
      mesh: the devices, which share each batch.
      batch_size: images at once, rounded up to a multiple of the devices; a batch that is not
        full is padded, and what is too many thrown away.
      spacing: of the timesteps, ``"linear"`` or ``"quadratic"``.
      labels: that the images get in turn, as `label_cycle` says; None: every class.
      latents: they are latents, of any range: nothing is clipped.

    Raises:
      ValueError: options that don't go together, as ``make_generator`` says.
    """
    c, eps_fn = config.generate, built.eps_fn
    cycle = label_cycle(built.num_classes, labels)
    if c.guidance != 1:
        if cycle is None:
            raise ValueError(
                f"guidance: {c.guidance} means nothing to a model without classes: leave it out"
            )
        eps_fn = guided(eps_fn, c.guidance, built.num_classes)
    generate = make_generator(
        eps_fn,
        built.schedule,
        tuple(shape),
        solver=c.solver,
        steps=c.steps,
        eta=c.eta,
        variance=config.model.variance,
        spacing=spacing,
        clip=not latents,
    )
    at_once = -(-min(c.num_images, batch_size) // mesh.size) * mesh.size

    def batches(params: Params, key: Key) -> Iterator[np.ndarray]:
        for start in range(0, c.num_images, at_once):
            index = np.arange(start, start + at_once, dtype=np.int32)
            rows = (index,) if cycle is None else (index, cycle[index % len(cycle)])
            made = sharding.fetch(generate(params, key, *sharding.put_whole(rows, mesh)))
            yield made[: c.num_images - start]

    return batches


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as pixels: 0 to 255, to the nearest."""
    return np.round((images.astype(np.float32).clip(-1, 1) + 1) / 2 * 255).astype(np.uint8)


def save_grid(path: str | os.PathLike[str], images: np.ndarray) -> None:
    """Writes images (N, H, W, C), uint8 or in [-1, 1], or latents, as one picture."""
    small = max(images.shape[1:3]) < _SMALL
    pictures.save_image_grid(path, _visible(images), smooth=small)


def _visible(images: np.ndarray) -> np.ndarray:
    if images.shape[-1] in (1, 3):
        return images
    # Latents, of variance about 1: three of their channels as colours.
    return images[..., :3] / 3 if images.shape[-1] > 3 else images[..., :1] / 3
