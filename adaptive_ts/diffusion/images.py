"""Where a batch keeps its images."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax

from adaptive_ts.types import Batch

ImageFn: TypeAlias = Callable[[Batch], jax.Array]


def image_reader(image: ImageFn | None, image_key: str) -> ImageFn:
    """batch -> its images: ``image`` itself, or what the batch holds under ``image_key``.

    Raises:
      ValueError: both were chosen; when called, a batch without that key.
    """
    if image is not None:
        if image_key != "image":
            raise ValueError(f"got image={image!r} and image_key={image_key!r}: give one of them")
        return image

    def read(batch: Batch) -> jax.Array:
        try:
            return batch[image_key]
        except (KeyError, TypeError, IndexError):
            has = (
                f"its keys are {sorted(batch)}" if isinstance(batch, Mapping) else "it has no keys"
            )
            raise ValueError(
                f"the batch, a {type(batch).__name__}, holds no {image_key!r}: {has}; say where "
                "its images are by image_key=, or by image=, a function of the batch"
            ) from None

    return read
