"""Files that appear whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from adaptive_ts.experiment.errors import UserError, one_line


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes its place only when all of it is on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock that a file stands for; the system frees it when the process ends.

    Args:
      path: the file, made if need be; it stays.
      wait: until whoever holds it lets go; False: yields False at once if somebody does.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def to_plain(value: Any) -> Any:
    """The value in JSON's types: arrays as numbers or lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    array = np.asarray(value)
    # bfloat16 knows no Python number of its own.
    return to_plain(array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist())


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes ``obj`` as indented JSON, atomically; NaN and infinities become null."""
    with atomic(path) as file:
        file.write((json.dumps(to_plain(obj), indent=2) + "\n").encode())


def json_digest(content: Any, digits: int = 64) -> str:
    """The first hex digits of the SHA-256 of a content's JSON, its keys in order.

    What JSON does not know counts as its text.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def read_arrays(file: str | os.PathLike[str] | BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file; objects are refused, whose reading would run them.

    Raises:
      Exception: of nearly any kind: it is missing, damaged, or no such file.
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    strange = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if strange:
        raise ValueError(f"{strange[0]} is no array")
    return arrays


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds; None if there is no such file.

    Raises:
      UserError: it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): move it away") from error
