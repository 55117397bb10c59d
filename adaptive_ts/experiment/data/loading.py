"""Images or latents in memory, and batches of them whose only state is the step.

A set is decoded once and kept beside its records as one ``.npz`` file; later starts read that and
import neither tensorflow-datasets nor an image decoder. Batch k is a pure function of (seed, k):
one permutation of the records per epoch, drawn from the Philox generator, whose stream NumPy
promises never to change. grain carries the step. (grain's own ``shuffle().repeat().batch()``
works record by record in Python: 28 thousand indices per second against millions of images here.)
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data import catalogue
from adaptive_ts.experiment.data import records as record_files
from adaptive_ts.experiment.data.decoding import (
    Dataset,
    Records,
    as_stored,
    as_uint8,
    decode,
    fingerprint,
    is_latent,
    pad,
    read_cache,
    read_records,
    select,
    shrink,
    write_cache,
)
from adaptive_ts.experiment.errors import Log, UserError, quiet

RAM_LIMIT = 4 * 2**30
_HELD_OUT = 50  # of a set without a test split, every 50th record is in it
_MAX_THREADS = 16


def load(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    source_dir: str | None = None,
    downsample: int = 1,
    image_size: int | None = None,
    ram_limit: int = RAM_LIMIT,
    keep: bool = True,
    log: Log = print,
) -> Dataset:
    """Loads a split, preparing the set and decoding the split when that was not done before.

    Args:
        name: see ``catalogue.prepare``.
        split: a split of the set, such as ``"train"`` or ``"test"``. Where there is no test split,
            that of the name ``validation`` is taken; a set with neither has every 50th of its
            records held out as ``"test"``.
        data_dir: folder of prepared sets; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        source_dir: folder with the raw files, for the sets that need one.
        downsample: averages squares of this many pixels on a side, before any padding.
        image_size: pads height and width to this many pixels with the darkest value, centred; a
            folder of images is cropped and resized to it instead.
        ram_limit: in bytes; a larger set is read from its record files batch by batch.
        keep: write what was decoded beside the records.
        log: receives one line for each slow thing done.

    Returns:
        The data set.

    Raises:
        UserError: for an unknown name or split, missing sources, or images that are no images.
    """
    if name.startswith("folder/") and image_size is not None and downsample > 1:
        raise UserError(
            f"--data.downsample: {downsample} means nothing to a folder of images, which is "
            "resized to --data.image_size: leave it out"
        )
    folder = catalogue.prepare(
        name, data_dir=data_dir, source_dir=source_dir, image_size=image_size, log=log
    )
    stored, kept = _locate(name, split, record_files.split_sizes(folder))
    cache = folder / f"decoded-{split}.npz"
    dataset = read_cache(cache, name, len(kept), log)
    if dataset is None or isinstance(dataset.images, Records) or dataset.images.nbytes > ram_limit:
        records, classes = _open(name, folder, stored, kept)
        if np.prod(records.shape, dtype=np.int64) * records.dtype.itemsize > ram_limit:
            mark = _mark(split, records, folder)
            dataset = Dataset(name, records, np.zeros(0, np.int32), classes, mark)
        else:
            log(f"decoding {name}/{split} once: {len(kept)} images")
            images, labels = decode(records, name)
            dataset = from_arrays(images, labels, name=name, num_classes=classes, latents=True)
            if keep:
                write_cache(cache, dataset, log)
    images = shrink(dataset.images, downsample, name)
    return dataset._replace(images=pad(images, image_size, name))


def load_split(config: DataConfig, split: str, log: Log = print, *, keep: bool = True) -> Dataset:
    """`load` of what a config names.

    Raises:
        UserError: as by `load`; mirrored latents.
    """
    dataset = load(
        config.name,
        split=split,
        data_dir=config.dir,
        source_dir=config.source_dir,
        downsample=config.downsample,
        image_size=config.image_size,
        keep=keep,
        log=log,
    )
    if config.flip and is_latent(dataset.images.dtype):
        raise UserError(
            f"--data.flip: {config.name} holds latents, and a mirrored latent is not that of the "
            "mirrored image: leave it out, and encode the images with --flip"
        )
    return dataset


def _locate(name: str, split: str, sizes: Mapping[str, int]) -> tuple[str, np.ndarray]:
    """The split as stored, and which of its records are meant."""
    stored = split
    if split == "test" and "test" not in sizes:
        stored = "validation" if "validation" in sizes else "train"
    if stored not in sizes:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(sorted(sizes))}")
    kept = np.arange(sizes[stored])
    if stored == "train" and not {"test", "validation"} & {*sizes}:
        kept = kept[(kept % _HELD_OUT == 0) == (split == "test")]
    if not len(kept):
        raise UserError(f"{name} holds {sizes[stored]} images: too few to hold out some of them")
    return stored, kept


def _open(name: str, folder: Path, stored: str, kept: np.ndarray) -> tuple[Records, int]:
    """The records that are meant, and how many classes they have."""
    source, features = record_files.open_split(folder, stored)
    classes = getattr(features.get("label"), "num_classes", None)
    get = functools.partial(read_records, name, source, folder, classes is not None)
    with quiet():  # the first record brings a warning; later ones may come from threads
        first, _ = get(np.arange(1))
    records = Records((len(source), *first.shape[1:]), get, first.dtype)
    return select(records, kept) if len(kept) < len(source) else records, classes or 1


def _mark(split: str, records: Records, folder: Path) -> str:
    """A fingerprint of what is too large to read for one."""
    text = f"{split} {records.shape} ".encode() + (folder / "dataset_info.json").read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    name: str = "arrays",
    num_classes: int | None = None,
    image_size: int | None = None,
    latents: bool = False,
) -> Dataset:
    """Makes a data set of arrays, checking them.

    Args:
        images: (N, H, W, C), or (N, H, W) for grey ones; integers in [0, 255] or floats in [-1, 1],
            which become ``round((x + 1) * 127.5)``.
        labels: integers (N,); all 0 if left out.
        name: for messages.
        num_classes: one more than the largest label allowed; by default than the largest present.
        image_size: as in ``load``.
        latents: floats are latents, of any range, and stay as they are.

    Returns:
        The data set, in memory.

    Raises:
        UserError: for another rank or range, no images, or labels that don't fit.
    """
    images = (as_stored if latents else as_uint8)(np.asarray(images), name)
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
    mark = fingerprint(images, labels)
    return Dataset(name, pad(images, image_size, name), labels, classes, mark)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
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

    Returns:
        A grain iterator over ``{"image": (B/n, H, W, C), "label": int32 (B/n,)}``, images in the
        set's own type, uint8 or of latents; its ``get_state()`` is ``{"next_index": step}``.

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
    records = isinstance(dataset.images, Records)

    def batch(step: int) -> dict:
        index = _indices(dataset.images.shape[0], seed, step * batch_size + offset, local)
        images, labels = dataset.rows(index)
        return {"image": images, "label": labels}

    # Gathering from memory is faster than handing a batch from thread to thread.
    threads = min(os.cpu_count() or 2, _MAX_THREADS) if records else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    steps = grain.MapDataset.range(2**62).map(batch).to_iter_dataset(options)
    iterator = iter(steps)
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
