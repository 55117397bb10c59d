"""How much a step would lower the losses of all timesteps, by forward mode."""

import jax
import jax.numpy as jnp
import optax

from adaptive_ts.collectives import threefry
from adaptive_ts.learning.derivative import derivative_along
from adaptive_ts.learning.over_timesteps import is_indexed, over_buckets, per_example
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LossFn,
    Params,
    PerBucket,
)


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
    key = threefry(key)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    order = jnp.arange(num_examples, dtype=jnp.int32)[:, None]

    def at_bucket(t: jax.Array, _: jax.Array) -> jax.Array:
        def loss(p: Params, example: Batch, index: jax.Array) -> jax.Array:
            if is_indexed(loss_fn):
                value = loss_fn.at(p, example, t[None], key, index)
            else:
                value = loss_fn(p, example, t[None], jax.random.fold_in(key, index[0]))
            return per_example(value, 1)[0].astype(jnp.promote_types(value.dtype, jnp.float32))

        def mean(p: Params) -> jax.Array:
            return jnp.mean(jax.vmap(loss, (None, 0, 0))(p, examples, order))

        value, slope = derivative_along(mean, params, direction)
        return jnp.where(jnp.isfinite(value), -slope, jnp.nan)

    return over_buckets(at_bucket, timesteps, chunk, axis_name, sharding)


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
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies counters by floats
        moved, _ = optimizer.update(grads, opt_state, params)
        coasted, _ = optimizer.update(zeros, opt_state, params)
    return jax.tree.map(lambda a, b, p: (a - b).astype(p.dtype), moved, coasted, params)
