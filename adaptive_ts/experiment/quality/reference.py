"""What generated images are compared with: statistics of real ones, computed once, or a file's."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data import catalogue
from adaptive_ts.experiment.data.decoding import Dataset, Records
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log, UserError, one_line
from adaptive_ts.experiment.files import atomic, read_arrays
from adaptive_ts.experiment.quality.inception import Activations
from adaptive_ts.experiment.quality.inception_network import NUM_FEATURES
from adaptive_ts.experiment.quality.metrics import Gaussian, add_features, to_gaussian

KEPT = 10_000  # images whose features are kept
_AT_ONCE = 512  # images whose features are in memory

Batches = Iterable[np.ndarray]
Watch = Callable[[Batches, int], Batches]


class FeatureNetwork(NamedTuple):
    """A network in whose features images are compared.

    Attributes:
      name: ``"inception"`` or ``"classifier"``.
      about: what is printed with its numbers: its preprocessing, or its accuracy.
      mark: of its weights and its preprocessing, for the names of files.
      num_features: d.
      extract: images (N, H, W, C) uint8 -> their `Activations`; a classifier's takes latents too.
      accuracy: of a classifier, on held-out images.
    """

    name: str
    about: str
    mark: str
    num_features: int
    extract: Callable[[np.ndarray], Activations]
    accuracy: float | None = None


class Reference(NamedTuple):
    """What generated images are compared with.

    Attributes:
      gaussian: of the features.
      digest: 16 hex digits of `statistics_digest`, to be printed with every number.
      source: what it was computed of, or the file.
      features: (k, d) float32 of up to 10,000 images, evenly spaced in the split; None where only
        the statistics are known.
    """

    gaussian: Gaussian
    digest: str
    source: str
    features: np.ndarray | None = None


class Summary(NamedTuple):
    """What a set of images is in the eyes of a network.

    Attributes:
      count: N images.
      gaussian: of all their features.
      features: (k, d) of those that were to be kept.
      logits: (N, classes), or None if they were not wanted.
    """

    count: int
    gaussian: Gaussian
    features: np.ndarray
    logits: np.ndarray | None


def statistics_digest(statistics: Gaussian) -> str:
    """16 hex digits of the SHA-256 of mean and covariance (shapes, float64 little-endian bytes).

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.quality.metrics import Gaussian
      >>> from adaptive_ts.experiment.quality.reference import statistics_digest
      >>> statistics_digest(Gaussian(np.zeros(2), np.eye(2)))
      '2649d14bacd51a32'
    """
    digest = hashlib.sha256()
    for part in statistics:
        digest.update(repr(part.shape).encode())
        digest.update(np.ascontiguousarray(part, "<f8").data)
    return digest.hexdigest()[:16]


def summarise(
    batches: Batches,
    extract: Callable[[np.ndarray], Activations],
    *,
    kept: np.ndarray,
    logits: bool = False,
) -> Summary:
    """The moments of the images' features, in float64, with only one batch of them in memory.

    Args:
      batches: of images, as ``extract`` takes them.
      extract: of a `FeatureNetwork`.
      kept: increasing positions of the images whose features are kept.
      logits: whether those are kept, of all images.

    Raises:
      ValueError: images or features that are refused, or fewer than two.
    """
    moments, count, parts, scores = None, 0, [], []
    for batch in batches:
        found = extract(batch)
        moments = add_features(moments, found.features)
        inside = kept[(kept >= count) & (kept < count + len(batch))] - count
        parts.append(found.features[inside])
        scores += [found.logits] if logits else []
        count += len(batch)
    if moments is None:
        raise ValueError("no images")
    features = np.concatenate(parts)
    return Summary(
        count, to_gaussian(moments), features, np.concatenate(scores) if logits else None
    )


def image_chunks(images: np.ndarray | Records) -> Iterator[np.ndarray]:
    """The images in order, 512 at a time, whether in memory or in record files."""
    for start in range(0, images.shape[0], _AT_ONCE):
        yield images[np.arange(start, min(start + _AT_ONCE, images.shape[0]))]


def reference_features(
    data: DataConfig,
    network: FeatureNetwork,
    *,
    split: str = "train",
    watch: Watch | None = None,
    log: Log = print,
) -> Reference:
    """A split of a data set as a network sees it: read from the set's folder, or computed once.

    The file is one of this set's pixels, this preprocessing and these weights. A damaged one is
    computed anew.

    Args:
      data: which set.
      network: see `FeatureNetwork`. With several processes each calls this.
      split: of the set.
      watch: (batches of images, how many images) -> the batches, to show how far it is.
      log: receives one line when something is computed or cannot be kept.

    Raises:
      UserError: the set cannot be loaded.
      ValueError: its images are not such as the network takes.
    """
    dataset = load_split(data, split, log)
    cache = folder_of(data, log) / f"{_key(data, dataset, split, network)}.npz"
    count, *shape = dataset.images.shape
    source = f"{data.name}/{split}, {count:,} images {tuple(shape)}"
    reference = _restore(cache, source)
    if not everywhere(reference is not None) or reference is None:
        log(f"computing the features of {source}, {network.about}, once")
        batches = image_chunks(dataset.images)
        kept = evenly_spaced(count, KEPT)
        found = summarise(watch(batches, count) if watch else batches, network.extract, kept=kept)
        digest = statistics_digest(found.gaussian)
        reference = Reference(found.gaussian, digest, source, found.features.astype(np.float32))
        _save(cache, reference, log)
    return reference


def folder_of(data: DataConfig, log: Log) -> Path:
    """Where a data set lies, and what is kept of it."""
    return catalogue.prepare(
        data.name,
        data_dir=data.dir,
        source_dir=data.source_dir,
        image_size=data.image_size,
        log=log,
    )


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """The positions of ``wanted`` of ``count`` things, or of all, for sets sorted by class.

    Example:
      >>> from adaptive_ts.experiment.quality.reference import evenly_spaced
      >>> evenly_spaced(10, 4).tolist()
      [0, 2, 5, 7]
    """
    wanted = min(count, wanted)
    return np.arange(wanted) * count // wanted


def read_statistics(path: str | Path, num_features: int = NUM_FEATURES) -> Reference:
    """The statistics in a ``.npz`` file with ``mu`` (d,) and ``sigma`` (d, d).

    Published files are such files, for example bioinf.jku.at's ``fid_stats_cifar10_train.npz``;
    so are those that `reference_features` keeps.

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
        arrays = read_arrays(path)
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


def _key(data: DataConfig, dataset: Dataset, split: str, network: FeatureNetwork) -> str:
    # The fingerprint is of the pixels before they were averaged and padded.
    size = "x".join(map(str, dataset.images.shape[1:]))
    return f"features-{network.mark}-{split}-{size}-{data.downsample}-{dataset.fingerprint}"


def everywhere(found: bool) -> bool:
    """Whether all processes found it: they compute it together, or not at all."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.asarray(found))))


def _save(cache: Path, reference: Reference, log: Log) -> None:
    if jax.process_index():
        return
    mean, covariance = reference.gaussian
    arrays: dict[str, Any] = {"mu": mean, "sigma": covariance, "features": reference.features}
    try:
        with atomic(cache) as file:
            np.savez(file, digest=reference.digest, **arrays)
    except OSError as error:
        log(f"the features are not kept: cannot write {cache}: {error.strerror}")


def _restore(cache: Path, source: str) -> Reference | None:
    """What was kept; None where there is nothing, or not what was written."""
    try:
        arrays = read_arrays(cache)
        statistics, features = Gaussian(arrays["mu"], arrays["sigma"]), arrays["features"]
        digest = statistics_digest(statistics)
        if digest != str(arrays["digest"]) or features.shape[1:] != statistics.mean.shape:
            return None
        return Reference(statistics, digest, source, features)
    except Exception:  # a damaged file raises nearly anything
        return None
