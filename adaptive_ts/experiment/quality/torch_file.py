"""Reads the tensors of a PyTorch file without PyTorch, and without running what is pickled in it.

A file of ``torch.save`` is a pickle that names functions to call. Here three names are known, and
all of them are ours; any other ends the reading before anything is called.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.errors import UserError, one_line

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP = b"PK\x03\x04"
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _Storage:
    """Numbers that tensors are views of; in the older format they come after the tensors."""

    __slots__ = ("dtype", "size", "values")

    def __init__(self, dtype: str, size: int):
        if type(size) is not int or size < 0:
            raise ValueError(f"a storage of {size} numbers")
        self.dtype, self.size = np.dtype(dtype), size
        self.values: np.ndarray | None = None

    def fill(self, raw: bytes) -> None:
        if len(raw) != self.size * self.dtype.itemsize:
            raise ValueError(f"{len(raw)} bytes for {self.size} numbers of {self.dtype}")
        self.values = np.frombuffer(raw, self.dtype)


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A copy of the view. Numbers from outside of the storage are refused."""
        storage, offset, shape, strides = self
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or storage.values is None:
            raise ValueError("a tensor without a storage")
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset}")
        size = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if size > storage.size or (size and last >= storage.size):
            raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size} numbers")
        if not size:
            return np.zeros(shape, storage.dtype)
        strides = [step * storage.dtype.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(storage.values[offset:], shape, strides).copy()


class _Rebuild:
    """Stands for torch's functions that rebuild tensors. Without a ``__dict__``: a pickle may set
    attributes of what it has named."""

    __slots__ = ()


class _RebuildTensor(_Rebuild):
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_unused) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(_Rebuild):
    __slots__ = ()

    def __call__(self, tensor, *_unused) -> _Tensor:
        return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _RefusedError(Exception):
    pass


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storage: Callable[[str, str, int], _Storage]):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or dtype not in _DTYPES.values() or any(v is not None for v in view):
            raise ValueError(f"an unknown reference to {kind!r}")
        return self._storage(str(key), dtype, size)


def read_state_dict(content: bytes, name: str = "the file") -> dict[str, np.ndarray]:
    """The tensors of a state dict that ``torch.save`` wrote, in its zip or its older format.

    Args:
      content: of the file.
      name: of the file, for messages.

    Returns:
      Tensor name -> array, a copy, of the dtype it was saved in. Entries that are no tensors are
      left out.

    Raises:
      UserError: the file is damaged, is no state dict, or names a function other than those that
        a state dict of plain tensors needs; nothing of it is run then.

    Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
    """
    try:
        state = (_read_zip if content.startswith(_ZIP) else _read_stream)(content)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
        tensors = {str(k): v for k, v in state.items() if isinstance(v, _Tensor)}
        return {key: tensor.array() for key, tensor in tensors.items()}
    except _RefusedError as refused:
        raise UserError(
            f"{name} is refused: it asks to run {refused}, which no file of weights needs"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly every kind there is
        raise UserError(f"{name} is no readable PyTorch file ({one_line(error)})") from error


def _read_zip(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        # torch never compresses; a few bytes that unpack to terabytes stay packed.
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed")
        roots = [m.removesuffix("/data.pkl") for m in members if m.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"it holds {len(roots)} files data.pkl")
        (root,) = roots
        order = f"{root}/byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        storages: dict[str, _Storage] = {}

        def storage(key: str, dtype: str, size: int) -> _Storage:
            if key not in storages:
                storages[key] = _Storage(dtype, size)
                storages[key].fill(archive.read(f"{root}/data/{key}"))
            return storages[key]

        return _Reader(io.BytesIO(archive.read(f"{root}/data.pkl")), storage).load()


def _read_stream(content: bytes) -> Any:
    """Five pickles (magic, version, system, state dict, keys of storages), then the storages."""
    file = io.BytesIO(content)
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: str, size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    def load() -> Any:
        return _Reader(file, storage).load()

    if (load(), load()) != (_MAGIC, _PROTOCOL):
        raise ValueError("its first bytes are not those of torch.save")
    if not load().get("little_endian"):
        raise ValueError("its numbers are big-endian")
    state = load()
    for key in load():
        (size,) = struct.unpack("<q", file.read(8))
        target = storages[str(key)]
        if size != target.size:
            raise ValueError(f"a storage of {size} numbers instead of {target.size}")
        target.fill(file.read(size * target.dtype.itemsize))
    return state
