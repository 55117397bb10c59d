"""What one optimizer step buys, by timestep: by differences of losses, or by forward mode."""

from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import optax

from adaptive_ts import collectives
from adaptive_ts.types import (
    AxisName,
    Batch,
    IndexedLossFn,
    Key,
    LossFn,
    Metrics,
    Params,
    PerBucket,
    PerExample,
    Selected,
    State,
)

_TINY = 1e-30  # floor of a loss whose logarithm is taken


def decrease_on_batch(
    loss_fn: LossFn,
    params: Params,
    new_params: Params,
    batch: Batch,
    timesteps: Selected,
    key: Key,
    *,
    common_noise: bool = True,
    relative: bool = False,
    axis_name: AxisName = None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """delta[k, i] = L(params; x_i, tau_k) - L(new_params; x_i, tau_k).

    With common random numbers (the default) both losses of a difference see the same noise and
    the same dropout key, so that the noise cancels to first order in the size of the step.

    Args:
      loss_fn: per-example loss; the objective whose decrease is wanted.
      params: before the step.
      new_params: after it.
      batch: leaves lead with axis b.
      timesteps: (s,) the tau_k.
      key: one key; the same on every device.
      common_noise: False draws fresh noise for each evaluation, as the published code does.
      relative: decrease of log L instead of L.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
      sharding: in global view, the sharding of axis b: the timesteps then follow one another.
        A vmapped convolution merges axes s and b, which the devices can't share in this order:
        each would evaluate all examples.

    Returns:
      (s, b) decreases, in the units of ``loss_fn``; positive where the step helped.

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
    size = collectives.batch_size(batch)
    index = collectives.example_index(size, axis_name)

    def losses(p: Params, t: jax.Array, k: Key) -> PerExample:
        t = jnp.broadcast_to(t, (size,))
        if _is_indexed(loss_fn):
            values = loss_fn.at(p, batch, t, k, index)
        else:
            values = loss_fn(p, batch, t, collectives.device_key(k, axis_name))
        return _per_example(values, size)

    decrease = _decrease(losses, params, new_params, relative)
    over_timesteps = jax.vmap if sharding is None else _unrolled
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

    def losses(p: Params, t: jax.Array, k: Key) -> jax.Array:
        if _is_indexed(loss_fn):  # index 0 on every device: one noise for the whole profile
            value = loss_fn.at(p, example, t[None], k, jnp.zeros((1,), jnp.int32))
        else:
            value = loss_fn(p, example, t[None], k)
        return _per_example(value, 1)[0]

    decrease = _decrease(losses, params, new_params, relative)
    fresh = jax.random.split(key)

    def at_bucket(t: jax.Array, index: jax.Array) -> jax.Array:
        if common_noise:
            return decrease(t, key, key)
        return decrease(t, *jax.vmap(jax.random.fold_in, (0, None))(fresh, index))

    return _over_buckets(at_bucket, timesteps, chunk, axis_name, sharding)


def forward_impact(
    loss_fn: LossFn,
    params: Params,
    direction: Params,
    examples: Batch,
    timesteps: PerBucket,
    key: Key,
    *,
    chunk: int | None = None,
    axis_name: AxisName = None,
    sharding: jax.sharding.NamedSharding | None = None,
) -> PerBucket:
    """How much a step along ``direction`` lowers the loss at each timestep, to first order.

      impact[k] = -mean over x of d/ds L(params + s direction; x, tau_k) at s = 0

    By forward mode (``jax.jvp``), ``jax.vmap`` over the timestep buckets: exact derivatives, no
    difference of two noisy losses. With ``direction`` the optimizer's response to the gradient of
    an objective J, update(grad J) - update(0), this is <grad L_tau, P grad J>: by symmetry of P,
    also how much a step on the loss at tau lowers J. All buckets see the same noise.

    Args:
      loss_fn: per-example loss, linearised at ``params``.
      params: where.
      direction: a tangent, of the params' structure.
      examples: m batches of one example, stacked: per-example leaves are (m, 1, ...).
      timesteps: (n,) one timestep per bucket.
      key: one key; the same on every device.
      chunk: how many buckets are evaluated at once; None for all.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``: the devices share the buckets.
      sharding: in global view, the sharding of an axis of buckets, for the same purpose.

    Returns:
      (n,) impacts, in the units of ``loss_fn``, the same on every device; NaN where the loss is
      not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> def loss_fn(params, batch, t, key):
      ...     return (params - batch["x"]) ** 2 * t
      >>> examples = {"x": jnp.asarray([[0.0], [1.0]])}
      >>> args = jnp.float32(2.0), jnp.float32(-0.5), examples, jnp.asarray([1.0, 3.0])
      >>> print(ats.learning.forward_impact(loss_fn, *args, jax.random.key(0)))
      [1.5 4.5]

    Source: this library's own; the reward it approximates: Kim et al., arXiv 2411.09998, Eq. 14.
    """
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    order = jnp.arange(num_examples, dtype=jnp.int32)[:, None]

    def at_bucket(t: jax.Array, _: jax.Array) -> jax.Array:
        def loss(p: Params, example: Batch, index: jax.Array) -> jax.Array:
            if _is_indexed(loss_fn):
                value = loss_fn.at(p, example, t[None], key, index)
            else:
                value = loss_fn(p, example, t[None], jax.random.fold_in(key, index[0]))
            return _per_example(value, 1)[0].astype(jnp.promote_types(value.dtype, jnp.float32))

        def mean(p: Params) -> jax.Array:
            return jnp.mean(jax.vmap(loss, (None, 0, 0))(p, examples, order))

        value, slope = jax.jvp(mean, (params,), (direction,))
        return jnp.where(jnp.isfinite(value), -slope, jnp.nan)

    return _over_buckets(at_bucket, timesteps, chunk, axis_name, sharding)


def optimizer_response(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
) -> Params:
    """What of the optimizer's step is owed to these gradients: update(grads) - update(0).

    It points downhill, as optax's updates do, and leaves out momentum and weight decay, which
    come whatever the gradient is.
    """
    zeros = jax.tree.map(jnp.zeros_like, grads)
    moved, _ = optimizer.update(grads, opt_state, params)
    coasted, _ = optimizer.update(zeros, opt_state, params)
    return jax.tree.map(lambda a, b, p: (a - b).astype(p.dtype), moved, coasted, params)


def probe_when_due(
    state: State,
    probed: Callable[[State], State],
    *,
    every: int,
    probe: bool | None,
) -> tuple[State, Metrics]:
    """Counts an optimizer step, and probes if this is one of each ``every``-th.

    Args:
      state: a NamedTuple with ``step``, optimizer steps seen, and ``report``, metrics.
      probed: what a probe makes of it.
      every: f_S.
      probe: decides at trace time instead of the counter inside ``lax.cond``; None leaves it to
        the counter.

    Returns:
      The state, and its report with ``probed`` (1 where this step probed).
    """
    if probe is None:
        due = (state.step + 1) % every == 0
        new = jax.lax.cond(due, probed, lambda state: state, state)
    else:
        due = jnp.asarray(bool(probe))
        new = probed(state) if probe else state
    return (
        new._replace(step=state.step + 1),
        {"probed": due.astype(jnp.float32), **new.report},
    )


def _over_buckets(
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


def _unrolled(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jax.vmap`, one after the other."""
    return lambda *xs: jnp.stack([f(*row) for row in zip(*xs, strict=True)])


def _decrease(
    losses: Callable[[Params, jax.Array, Key], jax.Array],
    params: Params,
    new_params: Params,
    relative: bool,
) -> Callable[[jax.Array, Key, Key], jax.Array]:
    """(t, key before, key after) -> what the step bought at t."""

    def value(p: Params, t: jax.Array, key: Key) -> jax.Array:
        loss = losses(p, t, key).astype(jnp.float32)
        return jnp.log(jnp.maximum(loss, _TINY)) if relative else loss

    return lambda t, before, after: value(params, t, before) - value(new_params, t, after)


def _per_example(losses: PerExample, size: int) -> PerExample:
    if losses.shape != (size,):
        raise ValueError(
            f"loss_fn must return one loss per example, shape ({size},), got {losses.shape}; "
            "leave the mean over the batch to the caller"
        )
    return losses


def _is_indexed(loss_fn: LossFn) -> TypeGuard[IndexedLossFn]:
    """Whether the loss folds its key by explicit example indices, as this library's losses do."""
    return hasattr(loss_fn, "at")


def _devices_sharing(axis_name: AxisName, sharding: jax.sharding.NamedSharding | None) -> int:
    if axis_name is not None:
        return collectives.axis_size(axis_name)
    return 1 if sharding is None else collectives.parts(sharding)
