"""What a tree of arrays contains, in a few digits, wherever and however its arrays lie."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any
_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def state_digest(tree: PyTree) -> str:
    """SHA-256 over a whole state: the same digest means the same bits.

    Leaves come in ``jax.tree_util.tree_flatten_with_path`` order, each as path, dtype, shape and
    C-order bytes; typed keys by ``jax.random.key_data``. Device count and sharding don't matter.

    Args:
        tree: arrays, typed keys or numbers, with the step and the data position among them.

    Returns:
        64 hex digits.

    Raises:
        TypeError: for a leaf that is not an array of numbers.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        if array.dtype == object:
            raise TypeError(f"leaf {name} is {type(leaf).__name__}: make it an array of numbers")
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(_on_host(_raw(array)).tobytes())
    return digest.hexdigest()


def checksums(tree: PyTree, *, on_device: bool | None = None) -> dict[str, int]:
    """A 32-bit sum per leaf, computed where the leaf lives.

    The bits of each element, as uint32, times the odd number ``2 * position + 1``, summed modulo
    2^32: exact in any order, so the same for any sharding; any single flipped bit changes it.

    Args:
        tree: arrays of 1, 2, 4 or 8 bytes per element, or typed keys.
        on_device: compiled, for each shape; or by NumPy, each process its own shards. By default
            NumPy for arrays of CPUs.

    Returns:
        ``{path: checksum}``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    raw = [_raw(x) for _, x in leaves]
    device = [not _on_cpu(x) if on_device is None else on_device for x in raw]
    sums = [_checksum(x) if d else _own_sum(x) for d, x in zip(device, raw, strict=True)]
    sums = jax.device_get(sums)
    if not all(d or _is_here(x) for d, x in zip(device, raw, strict=True)):
        parts = multihost_utils.process_allgather(np.asarray(sums, np.uint32))
        shared = np.asarray(np.sum(parts, axis=0, dtype=np.uint32))
        kept = [d or _is_here(x) for d, x in zip(device, raw, strict=True)]
        sums = [own if k else whole for own, whole, k in zip(sums, shared, kept, strict=True)]
    return {jax.tree_util.keystr(p): int(s) for (p, _), s in zip(leaves, sums, strict=True)}


def _raw(x) -> jax.Array | np.ndarray:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _on_host(x) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(x)


@jax.jit
def _checksum(x):
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.lax.bitcast_convert_type(x, _UINT[x.dtype.itemsize]).astype(jnp.uint32)
    # Position from one iota per axis, not from a flattened view: that would gather sharded leaves.
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    weight = jnp.uint32(2) * position + jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _own_sum(x) -> np.uint32:
    """The part of the checksum that is of this process's own shards, each counted once."""
    if _is_here(x):
        return _weighted_sum(np.asarray(x), (), np.shape(x))
    parts = [
        _weighted_sum(np.asarray(shard.data), shard.index, x.shape)
        for shard in x.addressable_shards
        if shard.replica_id == 0
    ]
    return np.sum(parts, dtype=np.uint32)


def _weighted_sum(block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.uint32:
    """Of the elements of a block that is ``[index]`` of an array of this shape."""
    block = np.ascontiguousarray(block).reshape(*block.shape, 1)
    bits = block.view(f"u{min(block.itemsize, 4)}").astype(np.uint32)
    starts = [part.start or 0 for part in index] or [0] * len(shape)
    position, stride = np.zeros((), np.uint32), 1
    for axis, size in reversed(list(enumerate((*shape, bits.shape[-1])))):
        along = np.arange(bits.shape[axis], dtype=np.uint64) + np.uint64((*starts, 0)[axis])
        along = (along * np.uint64(stride)).astype(np.uint32)
        position = position + along.reshape(-1, *(1,) * (bits.ndim - 1 - axis))
        stride = stride * size % 2**32
    return np.sum(bits * (2 * position + np.uint32(1)), dtype=np.uint32)


def _is_here(x) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _on_cpu(x) -> bool:
    return all(d.platform == "cpu" for d in getattr(x, "devices", set)())
