"""How the data sets that need no TensorFlow are made from their original files."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.errors import UserError, one_line

# (image, label): uint8 or float (H, W, C), or a PNG file's bytes; the label None if there is none.
Record = tuple[np.ndarray | bytes, int | None]
Download = Callable[[str], str | os.PathLike[str]]

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


class Recipe(NamedTuple):
    """How one data set is made.

    Attributes:
        name: its folder below that of the prepared sets, such as ``digits`` or ``folder/cats``.
        shape: (H, W, C) of every image.
        classes: their names, or how many; None: no labels.
        read: takes a function that downloads a URL; returns each split's records, which may be
            made one by one as they are asked for.
        dtype: uint8 for pixels; a float type for latents.
        urls: what may be downloaded -> (bytes, sha256).
        metadata: kept beside the records.
        about: what is told when the set is made.
    """

    name: str
    shape: tuple[int, ...]
    classes: Sequence[str] | int | None
    read: Callable[[Download], Mapping[str, Iterable[Record]]]
    dtype: Any = np.uint8
    urls: Mapping[str, tuple[int, str]] = {}
    metadata: Mapping[str, Any] = {}
    about: str = ""


def digits(source_dir: str | None = None) -> Recipe:
    """scikit-learn's 1797 handwritten digits: 8x8, 17 grey levels, no download.

    The levels 0..16 become ``round(v * 255 / 16)``. ``train`` is the first 1500 images in the order
    ``numpy.random.RandomState(0).permutation(1797)``, ``test`` the other 297.

    Args:
        source_dir: must be None: the images come with scikit-learn.

    Returns:
        The recipe.

    Raises:
        UserError: if a source folder is given.
    """
    if source_dir is not None:
        raise UserError(f"digits comes with scikit-learn: leave out source_dir ({source_dir!r})")

    def read(_download: Download) -> dict[str, Iterable[Record]]:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        images = np.rint(values.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        order = np.random.RandomState(0).permutation(len(images))
        images, labels = images[order], labels[order]
        return {
            "train": _records(images[:1500], labels[:1500]),
            "test": _records(images[1500:], labels[1500:]),
        }

    return Recipe("digits", (8, 8, 1), 10, read)


def fashion_mnist(source_dir: str | None = None) -> Recipe:
    """Fashion-MNIST, from Debian's package ``dataset-fashion-mnist``.

    Args:
        source_dir: another folder of its IDX files.

    Returns:
        The recipe.

    Raises:
        UserError: if a file is missing or is no IDX file.
    """
    return idx("fashion_mnist", Path(source_dir or FASHION_MNIST_DIR).expanduser())


def idx(name: str, folder: Path) -> Recipe:
    """A set in MNIST's IDX files, gzipped or not: MNIST itself, KMNIST, EMNIST's parts and such.

    Args:
        name: the recipe's.
        folder: with ``train-images-idx3-ubyte`` and the three other files.

    Returns:
        The recipe.

    Raises:
        UserError: if a file is missing or is no IDX file.
    """
    files = {
        split: (_idx_file(folder, f"{prefix}-images"), _idx_file(folder, f"{prefix}-labels"))
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    arrays = {split: (read_idx(x)[..., None], read_idx(y)) for split, (x, y) in files.items()}
    for split, (images, labels) in arrays.items():
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise UserError(
                f"{folder}: {split} has images {images.shape[:-1]} and labels {labels.shape}; "
                "wanted (N, H, W) and (N,)"
            )
    shapes = {split: images.shape[1:] for split, (images, _) in arrays.items()}
    if shapes["train"] != shapes["test"]:
        raise UserError(f"{folder}: train and test images differ in size: {shapes}")
    classes = 1 + max(int(labels.max()) for _, labels in arrays.values())

    def read(_download: Download) -> dict[str, Iterable[Record]]:
        return {split: _records(*pair) for split, pair in arrays.items()}

    return Recipe(name, shapes["train"], classes, read)


def cifar10(source_dir: str | None = None) -> Recipe:
    """CIFAR-10, downloaded once (170 MB).

    Args:
        source_dir: a folder that holds ``cifar-10-binary.tar.gz``, for machines that are offline.

    Returns:
        The recipe.

    Raises:
        UserError: if ``source_dir`` is given and the file is not in it.
    """
    archive = None
    if source_dir is not None:
        archive = Path(source_dir).expanduser() / CIFAR10_URL.rsplit("/", 1)[1]
        if not archive.is_file():
            raise UserError(f"{archive} does not exist: download it from {CIFAR10_URL}")

    def read(download: Download) -> dict[str, Iterable[Record]]:
        path = archive or download(CIFAR10_URL)
        wanted = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        rows = {}
        try:
            with tarfile.open(path) as tar:
                members = {os.path.basename(m.name): m for m in tar if m.isfile()}
                for split, names in wanted.items():
                    raw = b"".join(f.read() for n in names if (f := tar.extractfile(members[n])))
                    rows[split] = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as e:
            raise UserError(f"{path} is not CIFAR-10's binary archive ({one_line(e)})") from e
        return {
            split: _records(r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), r[:, 0])
            for split, r in rows.items()
        }

    urls = {CIFAR10_URL: (170052171, CIFAR10_SHA256)}
    return Recipe("cifar10", (32, 32, 3), CIFAR10_CLASSES, read, urls=urls)


def _records(images: np.ndarray, labels: np.ndarray) -> Iterable[Record]:
    return zip(images, (int(label) for label in labels), strict=True)


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    Args:
        path: the file.

    Returns:
        The array.

    Raises:
        UserError: if the file is not such a file or is cut off.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of unsigned bytes")
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {one_line(e)}") from e


def _idx_file(folder: Path, prefix: str) -> Path:
    found = sorted(folder.glob(f"{prefix}[-.]idx*")) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"no {prefix}-idx* in {folder}: give --data.source_dir, a folder of four IDX files as "
            "MNIST has them (Fashion-MNIST's: apt-get install dataset-fashion-mnist)"
        )
    return found[0]
