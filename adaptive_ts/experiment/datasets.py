"""Image sets through tensorflow-datasets, written and read without TensorFlow.

Three sets are prepared by code in this file; any other is read from a folder that
tensorflow-datasets prepared as array_record. On disk they are ordinary tensorflow-datasets
folders: ``DATA_DIR/NAME/VERSION``. tensorflow-datasets writes into ``incomplete.*`` and renames at
the end, so a killed preparation leaves no half-written set and two at once don't mix.
"""

import gzip
import hashlib
import json
import os
import re
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive_ts.experiment.errors import UserError, nearest, one_line, quiet

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
Log = Callable[[str], None]

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
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")


class Recipe(NamedTuple):
    """How one data set is made.

    ``shape`` and ``classes`` (class names, or how many) describe the records; ``read`` takes a
    function that downloads a URL and returns arrays ``{split: (images, labels)}``.
    """

    name: str
    shape: tuple[int, int, int]
    classes: Sequence[str] | int
    read: Callable[[Callable[[str], os.PathLike]], Arrays]


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

    def read(_download) -> Arrays:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        images = np.rint(values.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        order = np.random.RandomState(0).permutation(len(images))
        images, labels = images[order], labels[order]
        return {"train": (images[:1500], labels[:1500]), "test": (images[1500:], labels[1500:])}

    return Recipe("digits", (8, 8, 1), 10, read)


def fashion_mnist(source_dir: str | None = None) -> Recipe:
    """Fashion-MNIST, or any set in MNIST's IDX files, gzipped or not.

    Args:
        source_dir: folder with ``train-images-idx3-ubyte`` and the three other files; by default
            the one of Debian's package ``dataset-fashion-mnist``.

    Returns:
        The recipe.

    Raises:
        UserError: if a file is missing or is no IDX file.
    """
    folder = Path(source_dir or FASHION_MNIST_DIR).expanduser()
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
    return Recipe("fashion_mnist", shapes["train"], classes, lambda _download: arrays)


def cifar10(source_dir: str | None = None) -> Recipe:
    """CIFAR-10, downloaded once (163 MB).

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

    def read(download) -> Arrays:
        path = archive or download(CIFAR10_URL)
        wanted = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        rows = {}
        try:
            with tarfile.open(path) as tar:
                members = {os.path.basename(m.name): m for m in tar if m.isfile()}
                for split, names in wanted.items():
                    raw = b"".join(tar.extractfile(members[n]).read() for n in names)
                    rows[split] = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as e:
            raise UserError(f"{path} is not CIFAR-10's binary archive ({one_line(e)})") from e
        return {
            split: (r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), r[:, 0])
            for split, r in rows.items()
        }

    return Recipe("cifar10", (32, 32, 3), CIFAR10_CLASSES, read)


RECIPES = {"cifar10": cifar10, "digits": digits, "fashion_mnist": fashion_mnist}


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    source_dir: str | None = None,
    log: Log = print,
) -> Path:
    """Finds a prepared data set, or prepares it if this file knows how.

    Args:
        name: one of ``RECIPES``, or the name (``NAME``, ``NAME/CONFIG``) of a set in ``data_dir``.
        data_dir: folder of prepared sets; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        source_dir: folder with the raw files. A set made from it is kept apart by its contents.
        log: receives one line when something is prepared.

    Returns:
        The version folder, which holds ``dataset_info.json``.

    Raises:
        UserError: for an unknown name, missing sources, a set in another file format, or a folder
            that cannot be written.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if source_dir is not None:
        if name not in RECIPES:
            raise UserError(f"source_dir is only read for {', '.join(RECIPES)}; got {name!r}")
        root = root / f"source-{_contents(Path(source_dir).expanduser())}"
    found = _versions(root, name)
    if found:
        return found[-1]
    if name not in RECIPES:
        raise UserError(_not_prepared(name, root))
    return _build(RECIPES[name](source_dir), root, log)


def split_sizes(folder: Path) -> dict[str, int]:
    """How many records each split of a prepared set has, read without importing anything heavy.

    Args:
        folder: a version folder as returned by ``prepare``.

    Returns:
        ``{split: records}``.
    """
    splits = _info(folder).get("splits", [])
    return {s["name"]: sum(int(n) for n in s.get("shardLengths", [])) for s in splits}


def open_split(folder: Path, split: str):
    """Opens a prepared split.

    Args:
        folder: a version folder as returned by ``prepare``.
        split: the name of a split.

    Returns:
        ``(source, features)``: a random-access source of decoded records, and the features.

    Raises:
        UserError: if the folder cannot be read.
    """
    try:
        with quiet():
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(folder)
            return builder.as_data_source(split), builder.info.features
    except Exception as e:  # tensorflow-datasets raises a dozen kinds here
        raise UserError(f"cannot read {folder} ({one_line(e)}): remove it and try again") from e


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
            f"no {prefix}-idx* in {folder}: apt-get install dataset-fashion-mnist, or pass "
            "--data.source_dir with a folder of MNIST-like IDX files"
        )
    return found[0]


def _contents(folder: Path) -> str:
    """A name for the raw files in a folder, so that two folders never share a prepared set."""
    if not folder.is_dir():
        raise UserError(f"source_dir {folder} is not a folder")
    digest = hashlib.sha256()
    patterns = ("train-*", "t10k-*", "cifar-10-binary*")
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file()):
        with path.open("rb") as f:
            digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:12]


def _info(folder: Path) -> dict:
    try:
        return json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(
            f"{folder} is no complete data set ({one_line(e)}): remove it and try again"
        ) from e


def _versions(root: Path, name: str) -> list[Path]:
    """Version folders readable without TensorFlow, oldest first."""
    if not _NAME.fullmatch(name):
        return []
    folder = root / name
    if (folder / "dataset_info.json").is_file():
        candidates = [folder]
    else:
        candidates = [p for p in folder.glob("*") if p.is_dir() and _VERSION.fullmatch(p.name)]
        candidates.sort(key=lambda p: [int(n) for n in p.name.split(".")])
    formats = {p: _info(p).get("fileFormat", "tfrecord") for p in candidates}
    readable = [p for p in candidates if formats[p] == "array_record"]
    if candidates and not readable and name not in RECIPES:
        raise UserError(
            f"{candidates[-1]} was prepared as {formats[candidates[-1]]}, which needs TensorFlow "
            f"to read: prepare it again with {_remedy(name)}"
        )
    return readable


def _remedy(name: str) -> str:
    return (
        f"tfds.builder({name!r}, file_format='array_record').download_and_prepare() where "
        "TensorFlow is installed, then copy the folder"
    )


def _not_prepared(name: str, root: Path) -> str:
    here = root.iterdir() if root.is_dir() else ()
    folders = {p.name for p in here if re.fullmatch(r"[a-z]\w*", p.name) and p.is_dir()}
    known = nearest(name, {*RECIPES, *folders} - {"downloads"})
    text = f"unknown data set {name!r}: {known}"
    if known.startswith("did you mean") or not _NAME.fullmatch(name):
        return text
    return f"{text}; to use one of tensorflow-datasets, put it under {root} with {_remedy(name)}"


def _download(url: str, dl_manager, root: Path) -> os.PathLike:
    # tensorflow-datasets tries an unreachable server for three minutes without a word.
    if not any(root.glob(f"downloads/**/*{url.rsplit('/', 1)[1][:10]}*.gz")):
        urllib.request.urlopen(url, timeout=20).close()
    return dl_manager.download(url)


def _builder(recipe: Recipe, root: Path):
    """The one tensorflow-datasets builder; what differs between the sets is in the recipe."""
    import PIL.Image
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    named = {"num_classes": recipe.classes}
    if not isinstance(recipe.classes, int):
        named = {"names": recipe.classes}

    # Not registered: tensorflow-datasets has sets of these names that need TensorFlow.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = recipe.name
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {  # noqa: RUF012 (a classproperty in the base class)
            CIFAR10_URL: tfds.download.checksums.UrlInfo(
                size=170052171, checksum=CIFAR10_SHA256, filename=CIFAR10_URL.rsplit("/", 1)[1]
            )
        }

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=recipe.shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(**named),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            arrays = recipe.read(lambda url: _download(url, dl_manager, root))
            return {split: self._generate_examples(*pair) for split, pair in arrays.items()}

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                pixels = np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)
                # An array would be encoded by TensorFlow; a PIL image is not.
                yield i, {"image": PIL.Image.fromarray(pixels), "label": int(label)}

    return Builder(data_dir=root, file_format="array_record")


def _build(recipe: Recipe, root: Path, log: Log) -> Path:
    folder = root / recipe.name / "1.0.0"
    log(f"preparing {recipe.name} once in {folder}")
    try:
        with quiet():
            _builder(recipe, root).download_and_prepare()
    except UserError:
        raise
    except Exception as e:
        # Another process may have finished first: the rename then fails on its complete folder.
        if not (folder / "dataset_info.json").is_file():
            raise UserError(_build_failed(recipe.name, root, e)) from e
    _info(folder)
    return folder


def _build_failed(name: str, root: Path, error: Exception) -> str:
    if name == "cifar10" and not isinstance(error, PermissionError | FileNotFoundError):
        return (
            f"cannot prepare cifar10 ({one_line(error)}): it is downloaded from {CIFAR10_URL}; "
            "offline, pass --data.source_dir with a folder that holds that file"
        )
    remedy = "pass another --data.dir or $TFDS_DATA_DIR, or free the disk"
    return f"cannot prepare {name} in {root} ({one_line(error)}): {remedy}"
