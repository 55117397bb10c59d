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
        on_device: compiled, for each shape; or by NumPy. By default NumPy for a CPU's own arrays.

    Returns:
        ``{path: checksum}``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    raw = [_raw(x) for _, x in leaves]
    device = [not _on_cpu(x) if on_device is None else on_device for x in raw]
    sums = [_checksum(x) if d else _host_checksum(x) for d, x in zip(device, raw, strict=True)]
    sums = jax.device_get(sums)
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


def _host_checksum(x) -> int:
    x = _on_host(x).reshape(-1)
    bits = x.view(f"u{min(x.itemsize, 4)}").astype(np.uint32)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


def _on_cpu(x) -> bool:
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    return here and all(d.platform == "cpu" for d in getattr(x, "devices", set)())
