"""The only cross-device code: every function is the identity, or local, without an axis name.

And what all floors ask of keys, batches and trees.

``axis_name=None`` is the global view (``jit`` over sharded arrays, where sums are already
global). Inside ``jax.shard_map`` or ``jax.pmap`` pass the mapped axis: only sums cross devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.types import AxisName, Batch, Key, PerExample

_THREEFRY = "threefry2x32"


def psum(tree: Any, axis_name: AxisName) -> Any:
    """Sum over devices."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def pmean(tree: Any, axis_name: AxisName) -> Any:
    """Mean over devices."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def axis_size(axis_name: AxisName) -> int:
    """How many devices share the axis (a Python int, 1 without an axis)."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def axis_index(axis_name: AxisName) -> jax.Array:
    """This device's place on the axis, int32 ()."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name).astype(jnp.int32)


def batch_size(batch: Batch) -> int:
    """b (of this device): the leading axis that all leaves which have one agree on.

    Raises:
      ValueError: no leaf of the batch has an axis, or two of them lead with different ones.
    """
    shapes = [(path, np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(batch)]
    shapes = [(jax.tree_util.keystr(path) or "the batch", shape) for path, shape in shapes if shape]
    if not shapes:
        raise ValueError(f"a batch needs an array whose leading axis is the example, got {batch!r}")
    first, size = shapes[0][0], shapes[0][1][0]
    for name, shape in shapes:
        if shape[0] != size:
            raise ValueError(
                f"the batch's leaves don't agree on the number of examples: {first} has shape "
                f"{shapes[0][1]}, {name} {shape}; give `sample` only the leaves that lead with "
                'the example, such as {"image": batch["image"]}, and what the whole batch shares '
                "to the loss in its closure"
            )
    return size


def example_index(num_local: int, axis_name: AxisName) -> PerExample:
    """Global indices of this device's examples, int32 (b,)."""
    return axis_index(axis_name) * num_local + jnp.arange(num_local, dtype=jnp.int32)


def example_keys(key: Key, index: PerExample) -> jax.Array:
    """One threefry key per example, by global index: the draws don't depend on the devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(threefry(key), index)


def threefry(key: Key) -> Key:
    """A threefry key made of the words of a key of any implementation; a threefry key as it is.

    Under ``jax.vmap`` the draws of an "rbg" key depend on its neighbours, and "unsafe_rbg" keys
    can't be told by the order of their folds: what is drawn per example needs neither. The words
    are folded, not hashed by random bits, which would differ between platforms.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    if str(jax.random.key_impl(key)) == _THREEFRY if typed else words.shape == (2,):
        return key
    own = jax.random.wrap_key_data(words[:2], impl=_THREEFRY)
    for word in words[2:]:
        own = jax.random.fold_in(own, word)
    return own


def seed_key(seed: int) -> Key:
    """The key of a seed, the same whatever ``jax_default_prng_impl`` says."""
    return jax.random.key(seed, impl=_THREEFRY)


def device_key(key: Key, axis_name: AxisName) -> Key:
    """A key of this device's own; the key itself without an axis."""
    return key if axis_name is None else jax.random.fold_in(key, axis_index(axis_name))


def detached(tree: Any) -> Any:
    """The tree with no gradient to its arrays; its other leaves as they are."""

    def detach(x: Any) -> Any:
        return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(detach, tree)


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """(k, ...) per device -> (devices * k, ...), the same on every device.

    A scatter into zeros and a psum, not ``lax.all_gather``: ``shard_map`` accepts only the
    former as replicated.
    """
    if axis_name is None:
        return x
    size, rows = axis_size(axis_name), x.shape[0]
    whole = jnp.zeros((size * rows, *x.shape[1:]), x.dtype)
    start = (axis_index(axis_name) * rows, *(jnp.int32(0),) * (x.ndim - 1))
    return jax.lax.psum(jax.lax.dynamic_update_slice(whole, x, start), axis_name)


def take_example(
    batch: Batch,
    index: jax.Array,
    num_local: int,
    axis_name: AxisName,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Batch:
    """The example with a global index, as a batch of one, the same on every device.

    Leaves whose leading axis is ``num_local`` are per-example and are sliced; others, which
    cannot belong to one example, are passed on whole. With ``sharding``, in global view, a slice
    is a sum in which all other examples count as 0: only this one crosses devices. The compiler
    would gather the whole batch on each of them, to slice it there.
    """
    owner, local = index // num_local, index % num_local

    def take(leaf: jax.Array) -> jax.Array:
        if np.shape(leaf)[:1] != (num_local,):
            return leaf
        if sharding is not None and jnp.issubdtype(leaf.dtype, jnp.number):
            mine = (jnp.arange(num_local) == index).reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.sum(jnp.where(mine, leaf, 0), axis=0, keepdims=True, dtype=leaf.dtype)
        row = jax.lax.dynamic_slice_in_dim(leaf, local, 1)
        if axis_name is None:
            return row
        mine = owner == axis_index(axis_name)
        as_sum = row.astype(jnp.int32) if row.dtype == jnp.bool_ else row
        return jax.lax.psum(jnp.where(mine, as_sum, 0), axis_name).astype(row.dtype)

    return jax.tree.map(take, batch)


def take_examples(
    batch: Batch,
    index: jax.Array,
    num_local: int,
    axis_name: AxisName,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Batch:
    """Several examples (m,), each a batch of one as by `take_example`, stacked: (m, 1, ...)."""
    return jax.vmap(lambda i: take_example(batch, i, num_local, axis_name, sharding))(index)


def on_rows(
    f: Callable[..., Any], size: int, sharding: jax.sharding.NamedSharding | None
) -> Callable[..., Any]:
    """``f`` of arrays that lead with axis b, done on each device for its own examples.

    For what is done example by example, in global view. A loop in it then goes on for as long as
    the device's own examples need; the compiler's own split asks all devices at each turn.

    Args:
      f: of arrays of b examples, to such arrays.
      size: b.
      sharding: of axis b; None, or one that does not divide it, leaves f as it is.
    """
    if sharding is None or size % parts(sharding):
        return f
    spec = sharding.spec
    return jax.shard_map(f, mesh=sharding.mesh, in_specs=spec, out_specs=spec)


def replicate(x: jax.Array, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    """The whole of it on every device, in global view; x itself without a sharding."""
    if sharding is None:
        return x
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, whole)


def parts(sharding: jax.sharding.NamedSharding) -> int:
    """Into how many an axis is split."""
    return sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
