"""Images in memory, and batches of them whose only state is the step.

A set is decoded once and kept beside its records as one ``.npz`` file; later starts read that and
import neither tensorflow-datasets nor an image decoder. Batch k is a pure function of (seed, k):
one permutation of the records per epoch, drawn from the Philox generator, whose stream NumPy
promises never to change. grain carries the step. (grain's own ``shuffle().repeat().batch()``
works record by record in Python: 28 thousand indices per second against millions of images here.)
"""

import contextlib
import functools
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive_ts.experiment import datasets
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.errors import UserError, one_line, quiet

Log = Callable[[str], None]
RAM_LIMIT = 4 * 2**30


class Dataset(NamedTuple):
    """A set of images.

    Attributes:
        name: as in the configuration.
        images: uint8 (N, H, W, C) in memory; for a set above the memory limit a ``Records``.
        labels: int32 (N,); empty for ``Records``, whose labels come with each batch.
        num_classes: labels lie in [0, num_classes).
        fingerprint: 16 hex digits over the decoded pixels and labels (before padding).
    """

    name: str
    images: "np.ndarray | Records"
    labels: np.ndarray
    num_classes: int
    fingerprint: str


class Records(NamedTuple):
    """Images left in their record files: ``shape`` (N, H, W, C) and ``read(indices)``."""

    shape: tuple[int, int, int, int]
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    source_dir: str | None = None,
    downsample: int = 1,
    image_size: int | None = None,
    ram_limit: int = RAM_LIMIT,
    log: Log = print,
) -> Dataset:
    """Loads a split, preparing the set and decoding the split when that was not done before.

    Args:
        name: see ``datasets.prepare``.
        split: a split of the set, such as ``"train"`` or ``"test"``.
        data_dir: folder of prepared sets; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        source_dir: folder with the raw files, for the sets that need one.
        downsample: averages squares of this many pixels on a side, before any padding.
        image_size: pads height and width to this many pixels with the darkest value, centred.
        ram_limit: in bytes; a larger set is read from its record files batch by batch.
        log: receives one line for each slow thing done.

    Returns:
        The data set.

    Raises:
        UserError: for an unknown name or split, missing sources, or images that are no images.
    """
    folder = datasets.prepare(name, data_dir=data_dir, source_dir=source_dir, log=log)
    sizes = datasets.split_sizes(folder)
    if split not in sizes:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(sorted(sizes))}")
    cache = folder / f"decoded-{split}.npz"
    dataset = _read_cache(cache, name, sizes[split], log)
    if dataset is None or dataset.images.nbytes > ram_limit:
        source, features = datasets.open_split(folder, split)
        classes = getattr(dict(features).get("label"), "num_classes", None)
        get = functools.partial(_records, name, source, folder, classes is not None)
        with quiet():  # the first record brings a warning; later ones may come from threads
            first, _ = get(np.arange(1))
        records = Records((len(source), *first.shape[1:]), get)
        if np.prod(records.shape, dtype=np.int64) > ram_limit:
            mark = (
                f"{split} {records.shape} ".encode() + (folder / "dataset_info.json").read_bytes()
            )
            mark = hashlib.sha256(mark).hexdigest()[:16]
            dataset = Dataset(name, records, np.zeros(0, np.int32), classes or 1, mark)
        else:
            log(f"decoding {name}/{split} once: {len(source)} images")
            images, labels = _decode(records, name)
            dataset = from_arrays(images, labels, name=name, num_classes=classes or 1)
            _write_cache(cache, dataset, log)
    images = _shrink(dataset.images, downsample, name)
    return dataset._replace(images=_pad(images, image_size, name))


def load_split(config: DataConfig, split: str, log: Log = print) -> Dataset:
    """`load` of what a config names."""
    return load(
        config.name,
        split=split,
        data_dir=config.dir,
        source_dir=config.source_dir,
        downsample=config.downsample,
        image_size=config.image_size,
        log=log,
    )


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    name: str = "arrays",
    num_classes: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Makes a data set of arrays, checking them.

    Args:
        images: (N, H, W, C), or (N, H, W) for grey ones; integers in [0, 255] or floats in [-1, 1],
            which become ``round((x + 1) * 127.5)``.
        labels: integers (N,); all 0 if left out.
        name: for messages.
        num_classes: one more than the largest label allowed; by default than the largest present.
        image_size: as in ``load``.

    Returns:
        The data set, in memory.

    Raises:
        UserError: for another rank or range, no images, or labels that don't fit.
    """
    images = _as_uint8(np.asarray(images), name)
    labels = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: {len(images)} images need as many integer labels; got {labels.dtype} "
            f"{labels.shape}"
        )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{name}: labels lie in [{labels.min()}, {labels.max()}]; wanted [0, {classes})"
        )
    labels = labels.astype(np.int32)
    print_ = _fingerprint(images, labels)
    return Dataset(name, _pad(images, image_size, name), labels, classes, print_)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    mesh=None,
) -> Iterator[dict]:
    """Endless shuffled batches; every record once per epoch, a new order in each.

    Batch k does not depend on how the iterator got there, nor on the number of processes: process i
    of n gets rows ``[i * B/n, (i+1) * B/n)`` of it. An epoch may end inside a batch.

    Args:
        dataset: from ``load`` or ``from_arrays``.
        batch_size: B, of all processes together; it may exceed the number of images.
        seed: of the order, not negative.
        start_step: the step of the first batch returned.
        process_index: which process this is.
        process_count: how many there are.
        mesh: if given, batches are global arrays split over its ``data`` axis (or its first one)
            instead of this process's NumPy rows.

    Returns:
        A grain iterator over ``{"image": uint8 (B/n, H, W, C), "label": int32 (B/n,)}``; its
        ``get_state()`` is ``{"next_index": step}``.

    Raises:
        UserError: for a batch that cannot be split evenly, or a number out of range.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    if seed < 0 or start_step < 0 or not 0 <= process_index < process_count:
        raise UserError(
            f"seed {seed}, start_step {start_step} and process_index {process_index} must not be "
            f"negative, and process_index below process_count {process_count}"
        )
    with quiet():
        import grain

    local = batch_size // process_count
    offset = process_index * local
    place = _placement(mesh, batch_size)
    records = isinstance(dataset.images, Records)

    def batch(step: int) -> dict:
        index = _indices(dataset.images.shape[0], seed, step * batch_size + offset, local)
        if records:
            images, labels = dataset.images.read(index)
        else:
            images, labels = dataset.images[index], dataset.labels[index]
        return {"image": images, "label": labels}

    # Gathering from memory is faster than handing a batch from thread to thread.
    options = grain.ReadOptions(num_threads=2 * records, prefetch_buffer_size=4 * records)
    steps = grain.MapDataset.range(2**62).map(batch).to_iter_dataset(options)
    iterator = iter(steps if place is None else steps.map(place))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


@functools.lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")


def _indices(size: int, seed: int, first: int, count: int) -> np.ndarray:
    """Records at positions [first, first + count) of the endless shuffled sequence."""
    parts = []
    while count:
        epoch, start = divmod(first, size)
        part = _epoch_order(size, seed, epoch)[start : start + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _placement(mesh, batch_size: int):
    if mesh is None:
        return None
    import jax

    axis = "data" if "data" in mesh.axis_names else mesh.axis_names[0]
    if batch_size % mesh.shape[axis]:
        raise UserError(
            f"batch_size {batch_size} is not divisible by the {mesh.shape[axis]} devices of mesh "
            f"axis {axis!r}"
        )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    return lambda batch: {key: put(rows) for key, rows in batch.items()}


def _as_uint8(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"{name}: images must be (N, H, W, C) and not empty; got {images.shape}")
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if images.dtype.kind in "iu" and low >= 0 and high <= 255:
        return images.astype(np.uint8)
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return np.rint((images.astype(np.float32) + 1) * 127.5).astype(np.uint8)
    raise UserError(
        f"{name}: {images.dtype} images lie in [{low}, {high}]; wanted uint8 in [0, 255] or floats "
        "in [-1, 1]"
    )


def _shrink(images, factor: int, name: str):
    if factor == 1:
        return images
    count, height, width, channels = images.shape
    if height % factor or width % factor:
        raise UserError(f"{name}: images {height, width} are not divisible by downsample {factor}")
    height, width = height // factor, width // factor

    def mean(part: np.ndarray) -> np.ndarray:
        squares = part.reshape(len(part), height, factor, width, factor, channels)
        return np.rint(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)

    if isinstance(images, np.ndarray):
        return mean(images)

    def read(index):
        part, labels = images.read(index)
        return mean(part), labels

    return Records((count, height, width, channels), read)


def _pad(images, image_size: int | None, name: str):
    sides = images.shape[1:3]
    if image_size is None or sides == (image_size, image_size):
        return images
    if max(sides) > image_size:
        raise UserError(f"{name}: image_size {image_size} is smaller than the images {sides}")
    widths = [(0, 0), *(((image_size - n) // 2, (image_size - n + 1) // 2) for n in sides), (0, 0)]
    if isinstance(images, np.ndarray):
        return np.pad(images, widths)

    def read(index):
        part, labels = images.read(index)
        return np.pad(part, widths), labels

    return Records((images.shape[0], image_size, image_size, images.shape[3]), read)


def _fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels))
    return digest.hexdigest()[:16]


def _records(name, source, folder, labelled, index, /) -> tuple[np.ndarray, np.ndarray]:
    try:
        rows = source.__getitems__([int(i) for i in index])
        images = [row["image"] for row in rows]
    except KeyError as e:
        raise UserError(f"{name} has no feature 'image': it has {', '.join(rows[0])}") from e
    except Exception as e:  # the array_record reader and PIL raise many kinds
        raise UserError(
            f"{name}: damaged records in {folder} ({one_line(e)}): remove that folder, then "
            "prepare the set again"
        ) from e
    _same_size({image.shape for image in images}, name)
    labels = [row["label"] for row in rows] if labelled else np.zeros(len(rows))
    return _as_uint8(np.stack(images), name), np.asarray(labels, np.int32)


def _decode(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    size = records.shape[0]
    images, labels = np.empty(records.shape, np.uint8), np.empty(size, np.int32)
    for start in range(0, size, 256):
        rows = slice(start, min(start + 256, size))
        part, labels[rows] = records.read(np.arange(rows.start, rows.stop))
        _same_size({part.shape[1:], records.shape[1:]}, name)
        images[rows] = part
    return images, labels


def _same_size(shapes: set, name: str) -> None:
    if len(shapes) > 1:
        raise UserError(f"{name}: images differ in size ({sorted(shapes)[:3]}): resize them first")


def _read_cache(path: Path, name: str, size: int, log: Log) -> Dataset | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels, classes = file["images"], file["labels"], int(file["num_classes"])
            mark = str(file["fingerprint"])
        if len(images) != size or len(labels) != size or _fingerprint(images, labels) != mark:
            raise ValueError("it does not hold what was written")
        return Dataset(name, _as_uint8(images, name), labels, classes, mark)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, UserError) as e:
        log(f"{path} is damaged ({one_line(e)}): decoding again")
        return None


def _write_cache(path: Path, dataset: Dataset, log: Log) -> None:
    """Writes beside the records, whole or not at all; without write permission just says so."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    arrays = {key: np.asarray(value) for key, value in dataset._asdict().items() if key != "name"}
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as e:
        log(f"cannot keep the decoded images in {path.parent} ({one_line(e)}): decoding each time")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
