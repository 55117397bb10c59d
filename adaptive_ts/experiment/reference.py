"""Inception statistics of real images: computed once and kept, or read from a published file."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from adaptive_ts.experiment import datasets
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import Dataset, Records, load_split
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.files import atomic
from adaptive_ts.experiment.image_metrics import Gaussian, add_features, to_gaussian
from adaptive_ts.experiment.inception import (
    Activations,
    Inception,
    Preprocess,
    feature_extractor,
)
from adaptive_ts.experiment.inception_network import NUM_FEATURES

_AT_ONCE = 1024  # images whose features are in memory

Log = Callable[[str], None]


class Reference(NamedTuple):
    """What generated images are compared with.

    Attributes:
      gaussian: of the features.
      digest: 16 hex digits of `statistics_digest`, to be printed with every number.
      source: what it was computed of, or the file.
    """

    gaussian: Gaussian
    digest: str
    source: str


def statistics_digest(statistics: Gaussian) -> str:
    """16 hex digits of the SHA-256 of mean and covariance (shapes, float64 little-endian bytes).

    Example:
      >>> import numpy as np
      >>> statistics_digest(Gaussian(np.zeros(2), np.eye(2)))
      '2649d14bacd51a32'
    """
    digest = hashlib.sha256()
    for part in statistics:
        digest.update(repr(part.shape).encode())
        digest.update(np.ascontiguousarray(part, "<f8"))
    return digest.hexdigest()[:16]


def image_statistics(
    images: np.ndarray | Records, extract: Callable[[np.ndarray], Activations]
) -> Gaussian:
    """The moments of the images' features, a thousand images at a time.

    Args:
      images: uint8 (N, H, W, C) with N >= 2, or a `Dataset`'s records.
      extract: of `feature_extractor`.

    Raises:
      ValueError: images or features that are refused, or fewer than two.
    """
    moments = None
    for part in image_chunks(images):
        moments = add_features(moments, extract(part).features)
    if moments is None:
        raise ValueError("no images")
    return to_gaussian(moments)


def image_chunks(images: np.ndarray | Records) -> Iterator[np.ndarray]:
    """The images in order, 1024 at a time, whether in memory or in record files."""
    for start in range(0, images.shape[0], _AT_ONCE):
        stop = min(start + _AT_ONCE, images.shape[0])
        if isinstance(images, Records):
            yield images.read(np.arange(start, stop))[0]
        else:
            yield images[start:stop]


def reference_statistics(
    data: DataConfig,
    inception: Inception,
    *,
    split: str = "train",
    preprocess: Preprocess = "ref",
    mesh: Mesh | None = None,
    batch_size: int = 64,
    log: Log = print,
) -> Reference:
    """The statistics of a split of a data set: read from its folder, or computed and kept there.

    The file is one of this set's pixels, this preprocessing and these weights. A damaged one is
    computed anew.

    Args:
      data: which set.
      inception: the network, from `load_inception`.
      split: of the set.
      preprocess: see `feature_extractor`.
      mesh: see `feature_extractor`.
      batch_size: images at once.
      log: receives one line when something is computed or cannot be kept.

    Raises:
      UserError: the set cannot be loaded.
      ValueError: its images are neither grey nor RGB.
    """
    images = load_split(data, split, log)
    folder = datasets.prepare(data.name, data_dir=data.dir, source_dir=data.source_dir, log=log)
    cache = folder / f"{_key(data, images, split, preprocess, inception)}.npz"
    shape = images.images.shape
    source = f"{data.name}/{split}, {shape[0]} images {shape[1:]}, {preprocess}"
    statistics = _restore(cache)
    if not _everywhere(statistics is not None):
        log(f"computing the Inception statistics of {source}, once")
        extract = feature_extractor(
            inception, preprocess=preprocess, mesh=mesh, batch_size=batch_size
        )
        statistics = image_statistics(images.images, extract)
        _save(cache, statistics, log)
    return Reference(statistics, statistics_digest(statistics), source)


def read_statistics(path: str | Path, num_features: int = NUM_FEATURES) -> Reference:
    """The statistics in a ``.npz`` file with ``mu`` (d,) and ``sigma`` (d, d).

    Published files are such files, for example bioinf.jku.at's ``fid_stats_cifar10_train.npz``;
    so are those that `reference_statistics` keeps.

    Args:
      path: the file.
      num_features: d.

    Raises:
      UserError: no such file, no such keys, other shapes, or numbers that are no covariance.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"no reference statistics at {path}: expected a .npz file with mu and sigma"
        )
    try:
        arrays = _arrays(path)
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{path} is no readable .npz file ({one_line(error)})") from error
    missing = [key for key in ("mu", "sigma") if key not in arrays]
    if missing:
        found = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise UserError(f"{path} holds no {' and no '.join(missing)}: it holds {found}")
    problem = _problem(arrays["mu"], arrays["sigma"], num_features)
    if problem:
        raise UserError(f"{path} holds no statistics of {num_features} features: {problem}")
    statistics = Gaussian(*(arrays[key].astype(np.float64) for key in ("mu", "sigma")))
    return Reference(statistics, statistics_digest(statistics), str(path))


def _problem(mean: np.ndarray, covariance: np.ndarray, dim: int) -> str | None:
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        return f"mu has shape {mean.shape} and sigma {covariance.shape}"
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        return f"mu is {mean.dtype} and sigma {covariance.dtype}, not floats"
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return "some are not finite"
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-4 * scale or covariance.diagonal().min() < 0:
        return "sigma is not symmetric with a diagonal >= 0"
    return None


def _key(
    data: DataConfig, images: Dataset, split: str, preprocess: Preprocess, inception: Inception
) -> str:
    # The fingerprint is of the pixels before they were averaged and padded.
    size = "x".join(map(str, images.images.shape[1:]))
    name = f"inception-{split}-{size}-{data.downsample}-{images.fingerprint}"
    return f"{name}-{preprocess}-{inception.sha256[:16]}"


def _everywhere(found: bool) -> bool:
    """Whether all processes found it: they compute it together, or not at all."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.asarray(found))))


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _save(cache: Path, statistics: Gaussian, log: Log) -> None:
    if jax.process_index():
        return
    digest = statistics_digest(statistics)
    try:
        with atomic(cache) as file:
            np.savez(file, mu=statistics.mean, sigma=statistics.covariance, digest=digest)
    except OSError as error:
        log(f"the statistics are not kept: cannot write {cache}: {error.strerror}")


def _restore(cache: Path) -> Gaussian | None:
    """The kept statistics; None where there are none, or not those that were written."""
    try:
        arrays = _arrays(cache)
        statistics = Gaussian(arrays["mu"], arrays["sigma"])
        return statistics if statistics_digest(statistics) == str(arrays["digest"]) else None
    except Exception:  # a damaged file raises nearly anything
        return None
