"""Finding a data set by its name, and preparing it once if it is not there.

Three sets are made by recipes of their own; ``folder/NAME`` and ``idx/NAME`` are a user's own
files; any other is tensorflow-datasets': read from a folder that it prepared as array_record, or
prepared by it now, where TensorFlow is installed. On disk all are folders of tensorflow-datasets.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data import built_in
from adaptive_ts.experiment.data import folder as image_folder
from adaptive_ts.experiment.data.built_in import Recipe
from adaptive_ts.experiment.data.records import (
    OWN_NAME,
    build,
    data_root,
    is_name,
    read_metadata,
    versions,
)
from adaptive_ts.experiment.errors import Log, UserError, nearest, quiet

RECIPES = {
    "cifar10": built_in.cifar10,
    "digits": built_in.digits,
    "fashion_mnist": built_in.fashion_mnist,
}


class _Own(NamedTuple):
    """A kind of set of the user's own files: what is recorded of a folder, and how it is read."""

    mark: Callable[[Path], str]
    recipe: Callable[[str, Path, int | None], Recipe]
    resized: bool  # to the image_size asked for, when it is prepared


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    source_dir: str | None = None,
    image_size: int | None = None,
    log: Log = print,
) -> Path:
    """Finds a prepared data set, or prepares it.

    Args:
        name: one of ``RECIPES``; ``folder/NAME`` or ``idx/NAME`` for a folder of images or of
            MNIST's IDX files; or the name (``NAME``, ``NAME/CONFIG``) of one of
            tensorflow-datasets.
        data_dir: folder of prepared sets; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        source_dir: folder with the raw files. A set of ``RECIPES`` made from it is kept apart by
            its contents; one of the user's own is found without it from then on.
        image_size: the side that a folder of images is resized to. Other sets have their own.
        log: receives one line when something is prepared.

    Returns:
        The version folder, which holds ``dataset_info.json``.

    Raises:
        UserError: for an unknown name, missing or damaged sources, a set in another file format or
            made from other files, or a folder that cannot be written.
    """
    root, stored = _place(name, data_dir, source_dir, image_size)
    if name.partition("/")[0] in _OWN:
        return _prepare_own(name, stored, root, source_dir, image_size, log)
    found = versions(root, name)
    readable = [folder for folder, kind in found.items() if kind == "array_record"]
    if readable:
        return readable[-1]
    if name in RECIPES:
        return build(RECIPES[name](source_dir), root, log)
    if found:
        folder, kind = list(found.items())[-1]
        raise UserError(
            f"{folder} was prepared as {kind}, which needs TensorFlow to read: prepare it again "
            f"with {_remedy(name)}"
        )
    return _prepare_theirs(name, root, log)


def is_prepared(config: DataConfig) -> bool:
    """Whether `prepare` finds the set that a config names, and makes nothing."""
    place = _place(config.name, config.dir, config.source_dir, config.image_size)
    return bool(versions(*place))


def _place(
    name: str, data_dir: str | os.PathLike | None, source_dir: str | None, image_size: int | None
) -> tuple[Path, str]:
    """The folder of prepared sets that a set is in, and its name there."""
    root, own = data_root(data_dir), _OWN.get(name.partition("/")[0])
    if own is not None:
        return root, f"{name}_{image_size}" if own.resized and image_size is not None else name
    if source_dir is None:
        return root, name
    if name not in RECIPES:
        raise UserError(
            f"source_dir is only read for {', '.join(_names())}; got {name!r}: files of your "
            "own are of one of the last two kinds, by any NAME"
        )
    return root / f"source-{_contents(Path(source_dir).expanduser())}", name


def _prepare_own(
    name: str, stored: str, root: Path, source_dir: str | None, image_size: int | None, log: Log
) -> Path:
    """A set of the user's own files, found by its name; made from ``source_dir`` the first time."""
    kind, _, own_name = name.partition("/")
    if not OWN_NAME.fullmatch(own_name):
        raise UserError(
            f"data set {name!r}: give it a name of small letters, digits and _: {kind}/NAME"
        )
    own = _OWN[kind]
    found = list(versions(root, stored))
    if source_dir is None:
        if not found:
            raise UserError(
                f"{stored} is not in {root}: give --data.source_dir, the folder of its files"
            )
        return found[-1]
    folder = Path(source_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"source_dir {folder} is not a folder")
    mark = own.mark(folder)
    if not found:
        recipe = own.recipe(stored, folder, image_size if own.resized else None)
        return build(recipe._replace(metadata={"source": mark}), root, log)
    if read_metadata(found[-1]).get("source") != mark:
        raise UserError(
            f"{found[-1]} was made from other files than those in {folder}: choose another name "
            f"than {own_name!r}, leave out --data.source_dir, or remove that folder"
        )
    return found[-1]


def _prepare_theirs(name: str, root: Path, log: Log) -> Path:
    if not is_name(name) or importlib.util.find_spec("tensorflow") is None:
        raise UserError(_not_prepared(name, root))
    try:
        with quiet():
            import tensorflow_datasets as tfds

            builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as e:
        raise UserError(_not_prepared(name, root)) from e
    log(f"preparing {name} once by tensorflow-datasets in {builder.data_path}")
    try:
        builder.download_and_prepare()  # which shows its own progress
    except Exception as e:  # a dozen kinds; where files are to be put by hand, it says which
        text = " ".join(str(e).split())[:600]
        raise UserError(f"tensorflow-datasets cannot prepare {name} in {root}: {text}") from e
    return Path(builder.data_path)


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


_OWN = {
    "folder": _Own(lambda d: image_folder.list_images(d).mark, image_folder.recipe, True),
    "idx": _Own(_contents, lambda name, folder, _size: built_in.idx(name, folder), False),
}


def _names() -> list[str]:
    return [*sorted(RECIPES), *(f"{kind}/NAME" for kind in sorted(_OWN))]


def _remedy(name: str) -> str:
    return (
        f"tfds.builder({name!r}, file_format='array_record').download_and_prepare() where "
        "TensorFlow is installed, then copy the folder"
    )


def _not_prepared(name: str, root: Path) -> str:
    here = root.iterdir() if root.is_dir() else ()
    folders = {p.name for p in here if re.fullmatch(r"[a-z]\w*", p.name) and p.is_dir()}
    known = nearest(name, {*_names(), *folders} - {"downloads", *_OWN})
    text = f"unknown data set {name!r}: {known}"
    if known.startswith("did you mean") or not is_name(name):
        return text
    if "latents" in name:
        encode = f"adaptive-ts encode DIR {root} --name {name}"
        return f"{text}; to make it of a folder of images: {encode}"
    return (
        f"{text}; to use one of tensorflow-datasets, install tensorflow and start this again, or "
        f"put it under {root} with {_remedy(name)}"
    )
