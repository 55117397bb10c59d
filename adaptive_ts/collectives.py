"""The only cross-device code: every function is the identity, or local, without an axis name.

``axis_name=None`` is the global view (``jit`` over sharded arrays, where sums are already
global). Inside ``jax.shard_map`` or ``jax.pmap`` pass the mapped axis: only sums cross devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive_ts.types import AxisName, Batch, Key, PerExample


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
    """b: the leading axis of the first leaf that has one.

    Raises:
      ValueError: no leaf of the batch has an axis.
    """
    for leaf in jax.tree.leaves(batch):
        if len(leaf.shape) > 0:
            return leaf.shape[0]
    raise ValueError(f"a batch needs an array whose leading axis is the example, got {batch!r}")


def example_index(num_local: int, axis_name: AxisName) -> PerExample:
    """Global indices of this device's examples, int32 (b,)."""
    return axis_index(axis_name) * num_local + jnp.arange(num_local, dtype=jnp.int32)


def example_keys(key: Key, index: PerExample) -> jax.Array:
    """One key per example, by global index: the draws don't depend on the device count."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def device_key(key: Key, axis_name: AxisName) -> Key:
    """A key of this device's own; the key itself without an axis."""
    return key if axis_name is None else jax.random.fold_in(key, axis_index(axis_name))


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


def take_example(batch: Batch, index: jax.Array, num_local: int, axis_name: AxisName) -> Batch:
    """The example with a global index, as a batch of one, the same on every device.

    Leaves whose leading axis is ``num_local`` are per-example and are sliced; others, which
    cannot belong to one example, are passed on whole.
    """
    owner, local = index // num_local, index % num_local

    def take(leaf: jax.Array) -> jax.Array:
        if len(leaf.shape) == 0 or leaf.shape[0] != num_local:
            return leaf
        row = jax.lax.dynamic_slice_in_dim(leaf, local, 1)
        if axis_name is None:
            return row
        mine = owner == axis_index(axis_name)
        as_sum = row.astype(jnp.int32) if row.dtype == jnp.bool_ else row
        return jax.lax.psum(jnp.where(mine, as_sum, 0), axis_name).astype(row.dtype)

    return jax.tree.map(take, batch)


def take_examples(batch: Batch, index: jax.Array, num_local: int, axis_name: AxisName) -> Batch:
    """Several examples (m,), each a batch of one as by `take_example`, stacked: (m, 1, ...)."""
    return jax.vmap(lambda i: take_example(batch, i, num_local, axis_name))(index)
