"""What one optimizer step bought, by timestep: differences of losses."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.learning.derivative import computes_low, derivative_along, midpoint
from adaptive_ts.learning.over_timesteps import is_indexed, over_buckets, per_example, unrolled
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LossFn,
    Params,
    PerBucket,
    PerExample,
    Selected,
)

_TINY = 1e-30  # floor of a loss whose logarithm is taken

Estimate: TypeAlias = Literal["auto", "difference", "directional"]


def check_estimate(estimate: str, common_noise: bool) -> None:
    """Raises ValueError for an unknown estimate, or one that the noise does not go with."""
    if estimate not in get_args(Estimate):
        raise ValueError(f"estimate must be one of {get_args(Estimate)}, got {estimate!r}")
    if estimate == "directional" and not common_noise:
        raise ValueError(
            "estimate='directional' sees one noise: fresh noise before and after the step "
            "(common_noise=False) needs estimate='difference'"
        )


def decrease_on_batch(
    loss_fn: LossFn,
    params: Params,
    new_params: Params,
    batch: Batch,
    timesteps: Selected,
    key: Key,
    *,
    estimate: Estimate = "auto",
    common_noise: bool = True,
    relative: bool = False,
    size: int | None = None,
    axis_name: AxisName = None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """delta[k, i] = L(params; x_i, tau_k) - L(new_params; x_i, tau_k).

    With common random numbers (the default) both losses of a difference see the same noise and
    the same dropout key, so that the noise cancels to first order in the size of the step. What
    is left of two nearly equal losses in bfloat16 is rounding; the derivative along
    new_params - params at their midpoint is the same to third order, and keeps its digits.

    Args:
      loss_fn: per-example loss; the objective whose decrease is wanted.
      params: before the step.
      new_params: after it.
      batch: leaves lead with axis b.
      timesteps: (s,) the tau_k.
      key: one key; the same on every device.
      estimate: ``"difference"`` of two losses, ``"directional"`` derivative at the midpoint of the
        parameters (1.5 times the cost), or ``"auto"``: the derivative where a product or
        convolution of the loss computes in less than float32.
      common_noise: False draws fresh noise for each evaluation, as the published code does.
      relative: decrease of log L instead of L.
      size: b, for a batch that has leaves without axis b; None: all leaves lead with it.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
      sharding: in global view, the sharding of axis b: the timesteps then follow one another.
        A vmapped convolution merges axes s and b, which the devices can't share in this order:
        each would evaluate all examples.

    Returns:
      (s, b) decreases, in the units of ``loss_fn``; positive where the step helped.

    Raises:
      ValueError: an unknown estimate, or a derivative of fresh noise; at trace time, a loss that
        is not one number per example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> def loss_fn(params, batch, t, key):
      ...     return (params - batch["x"]) ** 2 + 0.0 * t
      >>> batch = {"x": jnp.asarray([0.0, 1.0])}
      >>> args = jnp.float32(1.0), jnp.float32(0.5), batch, jnp.asarray([3]), jax.random.key(0)
      >>> print(ats.learning.decrease_on_batch(loss_fn, *args))
      [[ 0.75 -0.25]]

    Source: Kim et al., CVPR 2025 (arXiv 2411.09998), Eq. 14 (before its mean over S).
    """
    check_estimate(estimate, common_noise)
    key = collectives.threefry(key)
    size = collectives.batch_size(batch) if size is None else size
    index = collectives.example_index(size, axis_name)

    def losses(p: Params, t: jax.Array, k: Key) -> PerExample:
        t = jnp.broadcast_to(t, (size,))
        if is_indexed(loss_fn):
            values = loss_fn.at(p, batch, t, k, index)
        else:
            values = loss_fn(p, batch, t, collectives.device_key(k, axis_name))
        return per_example(values, size)

    how = _How(estimate, common_noise, relative)
    decrease = _decrease(losses, params, new_params, (timesteps[0], key), how)
    over_timesteps = jax.vmap if sharding is None else unrolled
    if common_noise:
        return over_timesteps(lambda t: decrease(t, key, key))(timesteps)
    before, after = jax.random.split(key, (2, timesteps.shape[0]))
    return over_timesteps(decrease)(timesteps, before, after)


def decrease_profile(
    loss_fn: LossFn,
    params: Params,
    new_params: Params,
    example: Batch,
    timesteps: PerBucket,
    key: Key,
    *,
    estimate: Estimate = "auto",
    common_noise: bool = True,
    relative: bool = False,
    chunk: int | None = None,
    axis_name: AxisName = None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> PerBucket:
    """The profile delta[k] = L(params; x, tau_k) - L(new_params; x, tau_k) of one example x.

    ``jax.vmap`` over the timestep buckets. One profile uses one noise and one dropout key, for
    all buckets and for before and after (unless ``common_noise=False``).

    Args:
      loss_fn: per-example loss.
      params: before the step.
      new_params: after it.
      example: a batch of one, the same on every device.
      timesteps: (n,) one timestep per bucket.
      key: one key; the same on every device.
      estimate: as for `decrease_on_batch`.
      common_noise: False draws fresh noise for each of the 2 n evaluations.
      relative: decrease of log L instead of L.
      chunk: how many buckets are evaluated at once; None for all.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``: the devices share the buckets.
      sharding: in global view, the sharding of an axis of buckets, for the same purpose. Without
        it every device evaluates all of them.

    Returns:
      (n,) decreases, the same on every device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> def loss_fn(params, batch, t, key):
      ...     return params * batch["x"] * t
      >>> args = jnp.float32(1.0), jnp.float32(0.5), {"x": jnp.asarray([2.0])}
      >>> t, key = jnp.asarray([1.0, 3.0]), jax.random.key(0)
      >>> print(ats.learning.decrease_profile(loss_fn, *args, t, key))
      [1. 3.]

    Source: Kim et al., CVPR 2025 (arXiv 2411.09998), delta_{k,tau}.
    """
    check_estimate(estimate, common_noise)

    def losses(p: Params, t: jax.Array, k: Key) -> jax.Array:
        if is_indexed(loss_fn):  # index 0 on every device: one noise for the whole profile
            value = loss_fn.at(p, example, t[None], k, jnp.zeros((1,), jnp.int32))
        else:
            value = loss_fn(p, example, t[None], k)
        return per_example(value, 1)[0]

    key = collectives.threefry(key)
    how = _How(estimate, common_noise, relative)
    decrease = _decrease(losses, params, new_params, (timesteps[0], key), how)
    fresh = jax.random.split(key)

    def at_bucket(t: jax.Array, index: jax.Array) -> jax.Array:
        if common_noise:
            return decrease(t, key, key)
        return decrease(t, *jax.vmap(jax.random.fold_in, (0, None))(fresh, index))

    return over_buckets(at_bucket, timesteps, chunk, axis_name, sharding)


class _How(NamedTuple):
    estimate: Estimate
    common_noise: bool
    relative: bool


def _decrease(
    losses: Callable[[Params, jax.Array, Key], jax.Array],
    params: Params,
    new_params: Params,
    example: tuple[jax.Array, Key],
    how: _How,
) -> Callable[[jax.Array, Key, Key], jax.Array]:
    """(t, key before, key after) -> what the step bought at t; ``example`` is such a (t, key)."""
    estimate, common_noise, relative = how
    if estimate == "auto":
        low = common_noise and computes_low(lambda p: losses(p, *example), params)
        estimate = "directional" if low else "difference"
    if estimate == "difference":

        def value(p: Params, t: jax.Array, key: Key) -> jax.Array:
            loss = losses(p, t, key)
            loss = loss.astype(jnp.promote_types(loss.dtype, jnp.float32))
            return jnp.log(jnp.maximum(loss, _TINY)) if relative else loss

        def difference(t: jax.Array, before: Key, after: Key) -> jax.Array:
            return (value(params, t, before) - value(new_params, t, after)).astype(jnp.float32)

        return difference
    middle, step = midpoint(params, new_params)

    def derivative(t: jax.Array, key: Key, _: Key) -> jax.Array:
        loss, slope = derivative_along(lambda p: losses(p, t, key), middle, step)
        loss, slope = loss.astype(jnp.float32), slope.astype(jnp.float32)
        found = -slope / jnp.maximum(loss, _TINY) if relative else -slope
        return jnp.where(jnp.isfinite(loss), found, jnp.nan)

    return derivative
