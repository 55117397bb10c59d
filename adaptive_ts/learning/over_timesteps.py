"""A per-example loss at many timesteps: over the buckets, on all devices."""

from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.types import (
    AxisName,
    IndexedLossFn,
    LossFn,
    PerBucket,
    PerExample,
)


def over_buckets(
    at_bucket: Callable[[jax.Array, jax.Array], jax.Array],
    timesteps: PerBucket,
    chunk: int | None,
    axis_name: AxisName,
    sharding: jax.sharding.NamedSharding | None,
) -> PerBucket:
    """``at_bucket(t, index)`` of every bucket, vmapped in chunks, shared by the devices."""
    num = timesteps.shape[0]
    devices = _devices_sharing(axis_name, sharding)
    local = -(-num // devices)  # buckets per device, rounded up to whole chunks
    size = min(chunk or local, local)
    local = -(-local // size) * size

    index = jnp.minimum(jnp.arange(local * devices, dtype=jnp.int32), num - 1)
    if axis_name is not None:
        start = collectives.axis_index(axis_name) * local
        index = jax.lax.dynamic_slice_in_dim(index, start, local)

    def evaluate(index: jax.Array) -> jax.Array:
        if sharding is not None:
            index = jax.lax.with_sharding_constraint(index, sharding)
        values = jax.vmap(at_bucket)(timesteps[index], index)
        # Or else the compiler gathers what the values are made of, to make them on each device.
        return values if sharding is None else jax.lax.with_sharding_constraint(values, sharding)

    if local == size:
        profile = evaluate(index)
    else:
        profile = jax.lax.map(evaluate, index.reshape(local // size, -1)).reshape(-1)
    return collectives.replicate(collectives.all_gather(profile, axis_name), sharding)[:num]


def unrolled(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jax.vmap`, one after the other."""
    return lambda *xs: jnp.stack([f(*row) for row in zip(*xs, strict=True)])


def per_example(losses: PerExample, size: int) -> PerExample:
    if losses.shape != (size,):
        remedy = "leave the mean over the batch to the caller"
        if losses.ndim == 1:
            remedy = (
                "a probe also calls it with one example of the batch, so what belongs to each "
                "example comes in `batch`, not by its closure"
            )
        raise ValueError(
            f"loss_fn must return one loss per example, shape ({size},), got {losses.shape}; "
            f"{remedy}"
        )
    return losses


def is_indexed(loss_fn: LossFn) -> TypeGuard[IndexedLossFn]:
    """Whether the loss folds its key by explicit example indices, as this library's losses do."""
    return hasattr(loss_fn, "at")


def _devices_sharing(axis_name: AxisName, sharding: jax.sharding.NamedSharding | None) -> int:
    if axis_name is not None:
        return collectives.axis_size(axis_name)
    return 1 if sharding is None else collectives.parts(sharding)
