"""tensorflow-datasets' folders of array_record files, written and read without TensorFlow.

A set lies in ``DATA_DIR/NAME/VERSION``. tensorflow-datasets writes into ``incomplete.*`` and
renames at the end, so a killed preparation leaves no half-written set and two at once don't mix.
"""

import contextlib
import json
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_ts.experiment.data.built_in import Recipe, Record
from adaptive_ts.experiment.errors import Log, UserError, one_line, quiet

OUR_VERSION = "1.0.0"
OWN_NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a set that a user names
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of features.json; the last is old
_CLASS = re.compile(r"tensorflow_datasets\.core\.features(\.\w+)+")


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of prepared sets; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_name(name: str) -> bool:
    """Whether a set may have this name: no absolute path, no ``..``."""
    return _NAME.fullmatch(name) is not None


def versions(root: Path, name: str) -> dict[Path, str]:
    """The version folders of a set, oldest first, and the file format of each.

    Args:
        root: the folder of prepared sets.
        name: of the set: ``NAME``, ``NAME/CONFIG``, or with the version behind.

    Returns:
        ``{folder: format}``, empty where there are none.

    Raises:
        UserError: if a folder is no complete set.
    """
    if not is_name(name):
        return {}
    folder = root / name
    if (folder / "dataset_info.json").is_file():
        found = [folder]
    else:
        found = [p for p in folder.glob("*") if p.is_dir() and _VERSION.fullmatch(p.name)]
        found.sort(key=lambda p: [int(n) for n in p.name.split(".")])
    return {p: _info(p).get("fileFormat", "tfrecord") for p in found}


def split_sizes(folder: Path) -> dict[str, int]:
    """How many records each split of a prepared set has, read without importing anything heavy.

    Args:
        folder: a version folder.

    Returns:
        ``{split: records}``.
    """
    splits = _info(folder).get("splits", [])
    try:
        return {s["name"]: sum(int(n) for n in s.get("shardLengths", [])) for s in splits}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(_incomplete(folder, e)) from e


def read_metadata(folder: Path) -> dict[str, Any]:
    """What the recipe of a prepared set put beside its records; empty if nothing.

    Args:
        folder: a version folder.
    """
    try:
        found = json.loads((folder / "metadata.json").read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {folder / 'metadata.json'} ({one_line(e)})") from e


def open_split(folder: Path, split: str) -> tuple[Any, Any]:
    """Opens a prepared split.

    Args:
        folder: a version folder.
        split: the name of a split.

    Returns:
        ``(source, features)``: a random-access source of decoded records, and the features by name.

    Raises:
        UserError: if the folder cannot be read, or would have a module imported that is not one of
            tensorflow-datasets' own.
    """
    try:
        # tensorflow-datasets imports whatever module features.json names, the set's own too.
        for name in _class_names(json.loads((folder / "features.json").read_text())):
            if not _CLASS.fullmatch(name):
                raise UserError(
                    f"{folder} is refused: its features.json asks to import {name[:100]!r}, which "
                    "is no feature of tensorflow-datasets: prepare the set again without it"
                )
        with quiet():
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(folder)
            return builder.as_data_source(split), dict(builder.info.features)
    except UserError:
        raise
    except Exception as e:  # tensorflow-datasets raises a dozen kinds here
        raise UserError(f"cannot read {folder} ({one_line(e)}): remove it and try again") from e


def file_of(source: Any, position: int) -> Path:
    """The file that holds a record of an opened split.

    Args:
        source: from `open_split`.
        position: of the record in the split.
    """
    files = source.dataset_info.splits[source.split].file_instructions
    for file in files:
        if position < file.take:
            break
        position -= file.take
    return Path(file.filename)


def _class_names(value: Any) -> Iterator[str]:
    """All that a features.json, in any of its formats, may have imported."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _CLASS_KEYS and isinstance(item, str):
                yield item
            else:
                yield from _class_names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_names(item)
    elif isinstance(value, str):  # which may hold JSON again
        with contextlib.suppress(ValueError):
            yield from _class_names(json.loads(value))


def build(recipe: Recipe, root: Path, log: Log) -> Path:
    """Makes a set, whole or not at all.

    Args:
        recipe: how.
        root: the folder of prepared sets.
        log: receives one line.

    Returns:
        The version folder.

    Raises:
        UserError: damaged or missing sources, or a folder that cannot be written.
    """
    folder = root / recipe.name / OUR_VERSION
    log(f"preparing {recipe.name} once in {folder}{recipe.about and ': '}{recipe.about}")
    try:
        with quiet():
            _builder(recipe, root).download_and_prepare()
    except UserError:
        raise
    except Exception as e:
        # Another process may have finished first: the rename then fails on its complete folder.
        if not (folder / "dataset_info.json").is_file():
            raise UserError(_build_failed(recipe, root, e)) from e
    _info(folder)
    return folder


def _info(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "dataset_info.json").read_text())
        if not isinstance(found, dict):
            raise ValueError("dataset_info.json holds no object")
        return found
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(_incomplete(folder, e)) from e


def _incomplete(folder: Path, error: Exception) -> str:
    return f"{folder} is no complete data set ({one_line(error)}): remove it and try again"


def _download(url: str, dl_manager: Any, root: Path) -> str | os.PathLike[str]:
    # tensorflow-datasets tries an unreachable server for three minutes without a word.
    if not any(root.glob(f"downloads/**/*{url.rsplit('/', 1)[1][:10]}*.gz")):
        urllib.request.urlopen(url, timeout=20).close()
    return dl_manager.download(url)


def _builder(recipe: Recipe, root: Path) -> Any:
    """The one tensorflow-datasets builder; what differs between the sets is in the recipe."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    above, _, own_name = recipe.name.rpartition("/")

    # Not registered: tensorflow-datasets has sets of these names that need TensorFlow.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = own_name
        VERSION = tfds.core.Version(OUR_VERSION)
        url_infos = {  # noqa: RUF012 (a classproperty in the base class)
            url: tfds.download.checksums.UrlInfo(
                size=size, checksum=checksum, filename=url.rsplit("/", 1)[1]
            )
            for url, (size, checksum) in recipe.urls.items()
        }

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(_features(recipe)),
                metadata=tfds.core.MetadataDict(recipe.metadata) if recipe.metadata else None,
            )

        def _split_generators(self, dl_manager):
            splits = recipe.read(lambda url: _download(url, dl_manager, root))
            return {split: self._generate_examples(records) for split, records in splits.items()}

        def _generate_examples(self, records):
            return _examples(records)

    return Builder(data_dir=root / above, file_format="array_record")


def _features(recipe: Recipe) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    if np.issubdtype(recipe.dtype, np.floating):
        # As bytes: a list of floats would take 4 bytes for each number, whatever its type.
        image = tfds.features.Tensor(shape=recipe.shape, dtype=recipe.dtype, encoding="bytes")
    else:
        image = tfds.features.Image(shape=recipe.shape, encoding_format="png")
    if recipe.classes is None:
        return {"image": image}
    how = "num_classes" if isinstance(recipe.classes, int) else "names"
    return {"image": image, "label": tfds.features.ClassLabel(**{how: recipe.classes})}


def _examples(records: Iterable[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (image, label) in enumerate(records):
        yield number, {"image": _encodable(image)} | ({} if label is None else {"label": label})


def _encodable(image: np.ndarray | bytes) -> Any:
    if isinstance(image, bytes) or image.dtype != np.uint8:
        return image
    import PIL.Image

    # An array would be encoded by TensorFlow; a PIL image is not.
    return PIL.Image.fromarray(
        np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)
    )


def _build_failed(recipe: Recipe, root: Path, error: Exception) -> str:
    if recipe.urls and not isinstance(error, PermissionError | FileNotFoundError):
        return (
            f"cannot prepare {recipe.name} ({one_line(error)}): it is downloaded from "
            f"{', '.join(recipe.urls)}; offline, pass --data.source_dir with a folder that holds "
            "that file"
        )
    remedy = "pass another --data.dir or $TFDS_DATA_DIR, or free the disk"
    return f"cannot prepare {recipe.name} in {root} ({one_line(error)}): {remedy}"
