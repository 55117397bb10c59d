"""Images out of their records: decoded once and kept, or read as they are needed.

Pixels are uint8. Floats are latents, and are used as they are.
"""

import contextlib
import dataclasses
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.data.records import file_of
from adaptive_ts.experiment.errors import Log, UserError, one_line
from adaptive_ts.experiment.files import read_arrays
from adaptive_ts.experiment.pictures import to_uint8

_PIXELS = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Records:
    """Images left in their record files; ``records[index]`` reads some.

    Attributes:
        shape: (N, H, W, C).
        read: (n,) positions -> the images and int32 labels there.
        dtype: of the images.
    """

    shape: tuple[int, ...]
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    dtype: np.dtype = _PIXELS

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.read(index)[0]


class Dataset(NamedTuple):
    """A set of images.

    Attributes:
        name: as in the configuration.
        images: (N, H, W, C) in memory, uint8 or, latents, a float type; for a set above the memory
            limit a ``Records``.
        labels: int32 (N,); empty for ``Records``, whose labels come with each batch.
        num_classes: labels lie in [0, num_classes).
        fingerprint: 16 hex digits over the decoded pixels and labels (before padding).
    """

    name: str
    images: np.ndarray | Records
    labels: np.ndarray
    num_classes: int
    fingerprint: str

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images and int32 labels at some positions, in memory or not."""
        if isinstance(self.images, Records):
            return self.images.read(index)
        return self.images[index], self.labels[index]


def is_latent(dtype: Any) -> bool:
    """Whether images of this type are latents, as opposed to pixels."""
    return np.issubdtype(dtype, np.floating)


def as_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Images as pixels (N, H, W, C), if they are integers in [0, 255] or floats in [-1, 1].

    Args:
        images: (N, H, W, C) or (N, H, W).
        name: of the set, for messages.

    Raises:
        UserError: another rank or range, or no images.
    """
    images = _with_channel(images, name)
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if images.dtype.kind in "iu" and low >= 0 and high <= 255:
        return images.astype(np.uint8)
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return to_uint8(images)
    raise UserError(
        f"{name}: {images.dtype} images lie in [{low}, {high}]; wanted uint8 in [0, 255] or floats "
        "in [-1, 1]"
    )


def as_stored(images: np.ndarray, name: str) -> np.ndarray:
    """Floats as latents (N, H, W, C) of at most 32 bits, and all else `as_uint8`.

    Raises:
        UserError: as by `as_uint8`; latents that are not finite.
    """
    if not is_latent(images.dtype):
        return as_uint8(images, name)
    images = _with_channel(images, name)
    if not np.isfinite(images).all():
        raise UserError(f"{name}: there are latents that are not finite numbers")
    return images.astype(np.float32) if images.dtype.itemsize > 4 else images


def _with_channel(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"{name}: images must be (N, H, W, C) and not empty; got {images.shape}")
    return images


def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """16 hex digits over all images and labels."""
    digest = hashlib.sha256(repr(images.shape).encode())
    for array in (images, labels):
        # NumPy's types tell of its buffers from Python 3.12 on; the .data of bfloat16 is refused.
        digest.update(np.ascontiguousarray(array))  # pyrefly: ignore[bad-argument-type]
    return digest.hexdigest()[:16]


def read_records(
    name: str, source: Any, folder: Path, labelled: bool, index: np.ndarray, /
) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels at some positions of an opened split.

    Raises:
        UserError: damaged records, no images in them, or images of different sizes.
    """
    try:
        rows = source.__getitems__([int(i) for i in index])
    except Exception as e:  # the array_record reader and PIL raise many kinds
        raise UserError(_damaged(name, source, folder, index, e), exit_code=1) from e
    if "image" not in rows[0]:
        raise UserError(f"{name} has no feature 'image': it has {', '.join(rows[0])}")
    images = [np.asarray(row["image"]) for row in rows]
    _same_size({image.shape for image in images}, name)
    labels = [row["label"] for row in rows] if labelled else np.zeros(len(rows))
    return as_stored(np.stack(images), name), np.asarray(labels, np.int32)


def _damaged(name: str, source: Any, folder: Path, index: np.ndarray, error: Exception) -> str:
    """Which of the records it was, read again one by one, and in which file."""
    where, cause = str(folder), one_line(error)
    for position in index.tolist():
        try:
            source[position]
        except Exception as e:
            file = file_of(source, position)
            where = f"{file}, record {position} of the split"
            cause = one_line(e) if file.is_file() else "there is no such file any more"
            break
    return (
        f"{name}: damaged records in {where} ({cause}): put the file back as it was, or remove "
        "that folder, then prepare the set again"
    )


def decode(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, in memory.

    Raises:
        UserError: as by `read_records`.
    """
    size = records.shape[0]
    images, labels = np.empty(records.shape, records.dtype), np.empty(size, np.int32)
    for start in range(0, size, 256):
        rows = slice(start, min(start + 256, size))
        part, labels[rows] = records.read(np.arange(rows.start, rows.stop))
        _same_size({part.shape[1:], records.shape[1:]}, name)
        images[rows] = part
    return images, labels


def _same_size(shapes: set, name: str) -> None:
    if len(shapes) > 1:
        raise UserError(f"{name}: images differ in size ({sorted(shapes)[:3]}): resize them first")


def select(records: Records, kept: np.ndarray) -> Records:
    """Some of the records, as a set of their own."""

    def read(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return records.read(kept[index])

    return dataclasses.replace(records, shape=(len(kept), *records.shape[1:]), read=read)


def shrink(images: np.ndarray | Records, factor: int, name: str) -> np.ndarray | Records:
    """The means of squares of ``factor`` pixels on a side.

    Raises:
        UserError: sides that are not divisible, or latents.
    """
    if factor == 1:
        return images
    _only_pixels(images, name, "--data.downsample")
    count, height, width, channels = images.shape
    if height % factor or width % factor:
        raise UserError(f"{name}: images {height, width} are not divisible by downsample {factor}")
    height, width = height // factor, width // factor

    def mean(part: np.ndarray) -> np.ndarray:
        squares = part.reshape(len(part), height, factor, width, factor, channels)
        return np.rint(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)

    return _each(images, (count, height, width, channels), mean)


def pad(images: np.ndarray | Records, image_size: int | None, name: str) -> np.ndarray | Records:
    """Black around the images, to squares of ``image_size``; None: as they are.

    Raises:
        UserError: images that are larger, or latents.
    """
    count, *sides, channels = images.shape
    if image_size is None or sides == [image_size, image_size]:
        return images
    _only_pixels(images, name, "--data.image_size")
    if max(sides) > image_size:
        raise UserError(
            f"{name}: image_size {image_size} is smaller than the images {tuple(sides)}"
        )
    widths = [(0, 0), *(((image_size - n) // 2, (image_size - n + 1) // 2) for n in sides), (0, 0)]
    shape = (count, image_size, image_size, channels)
    return _each(images, shape, lambda part: np.pad(part, widths))


def _only_pixels(images: np.ndarray | Records, name: str, option: str) -> None:
    if is_latent(images.dtype):
        raise UserError(
            f"{option}: {name} holds latents {images.shape[1:]}, whose size is the encoder's: "
            "leave it out"
        )


def _each(
    images: np.ndarray | Records,
    shape: tuple[int, ...],
    change: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray | Records:
    if isinstance(images, np.ndarray):
        return change(images)

    def read(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part, labels = images.read(index)
        return change(part), labels

    return dataclasses.replace(images, shape=shape, read=read)


def read_cache(path: Path, name: str, size: int, log: Log) -> Dataset | None:
    """The decoded split that `write_cache` wrote; None if there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        file = read_arrays(path)
        images, labels, classes = file["images"], file["labels"], int(file["num_classes"])
        mark = str(file["fingerprint"])
        fits = len(images) == size and (labels.shape, labels.dtype) == ((size,), np.int32)
        if not fits or fingerprint(images, labels) != mark:
            raise ValueError("it does not hold what was written")
        return Dataset(name, as_stored(images, name), labels, classes, mark)
    except Exception as e:  # a damaged archive raises nearly anything
        log(f"{path} is damaged ({one_line(e)}): decoding again")
        return None


def write_cache(path: Path, dataset: Dataset, log: Log) -> None:
    """Writes beside the records, whole or not at all; without write permission just says so."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    arrays: dict[str, Any] = {
        key: np.asarray(value) for key, value in dataset._asdict().items() if key != "name"
    }
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as e:
        log(f"cannot keep the decoded images in {path.parent} ({one_line(e)}): decoding each time")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
