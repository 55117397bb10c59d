"""Why timesteps differ: the noise of their gradients, and what a step on one buys at the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_ts.learning.response import optimizer_response
from adaptive_ts.types import Batch, IndexedLossFn, Key, Params, PerBucket

_EXAMPLES_AT_ONCE = 16


class GradientNoise(NamedTuple):
    """Attributes:
    variance: (n,) trace of the covariance of one example's gradient, at each timestep.
    mean_square: (n,) unbiased estimate of the squared norm of the mean gradient; it can come
      out below 0 where the noise is much larger.
    """

    variance: PerBucket
    mean_square: PerBucket


def gradient_noise(
    loss_fn: IndexedLossFn,
    params: Params,
    batch: Batch,
    timesteps: PerBucket,
    key: Key,
    *,
    chunk: int = _EXAMPLES_AT_ONCE,
) -> GradientNoise:
    """The variance over examples and noise of the stochastic gradient, timestep by timestep.

    With g_i the gradient of one example's loss (`jax.vmap` of `jax.grad`) and N examples:
    variance = sum_i |g_i - mean g|^2 / (N - 1), and |E g|^2 = |mean g|^2 - variance / N.
    A gradient averaged over a batch of B has variance / B.

    Args:
      loss_fn: per-example loss.
      params: where.
      batch: N >= 2 examples, each with noise of its own, the same at every timestep.
      timesteps: (n,) where to measure.
      key: the noise.
      chunk: examples whose gradients are in memory at once; the largest divisor of N up to it.

    Raises:
      ValueError: fewer than two examples.

    Source: what Kim et al., CVPR 2025 (arXiv 2411.09998) start from.
    """
    num = jax.tree.leaves(batch)[0].shape[0]
    if num < 2:
        raise ValueError(f"a variance needs at least 2 examples, got {num}")
    size = max(d for d in range(1, min(chunk, num) + 1) if num % d == 0)
    index = jnp.arange(num, dtype=jnp.int32)
    chunks = jax.tree.map(lambda x: x.reshape(num // size, size, *x.shape[1:]), (batch, index))

    def gradient(example: Batch, number: jax.Array, t: jax.Array) -> Params:
        one = jax.tree.map(lambda x: x[None], (example, t, number))

        def loss(p: Params) -> jax.Array:
            return loss_fn.at(p, one[0], one[1], key, one[2])[0].astype(jnp.float32)

        return jax.grad(loss)(params)

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Shifted by the first example's gradient, so that the difference below doesn't cancel.
        example, number = jax.tree.map(lambda x: x[0, 0], chunks)
        first = gradient(example, number, t)

        def add(sums: tuple[Params, jax.Array], rows: tuple[Batch, jax.Array]):
            grads = jax.vmap(gradient, (0, 0, None))(*rows, t)
            away = jax.tree.map(lambda g, f: g - f[None], grads, first)
            total = jax.tree.map(lambda s, a: s + a.sum(0), sums[0], away)
            return (total, sums[1] + _square(away)), None

        start = jax.tree.map(jnp.zeros_like, first), jnp.float32(0)
        (total, square), _ = jax.lax.scan(add, start, chunks)
        mean = jax.tree.map(lambda s: s / num, total)
        variance = (square - num * _square(mean)) / (num - 1)
        whole = _square(jax.tree.map(jnp.add, first, mean))
        return variance, whole - variance / num

    return GradientNoise(*jax.lax.map(at, timesteps))


def step_effects(
    loss_fn: IndexedLossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    batch: Batch,
    held_out: Batch,
    timesteps: PerBucket | np.ndarray,
    key: Key,
    *,
    rows: PerBucket | None = None,
) -> jax.Array:
    """(n, n): by how much a step on the loss at timestep i lowers the loss at timestep j.

      effect[i, j] = L_j(params) - L_j(params + (update(g_i) - update(-g_i)) / 2),   g_i = grad L_i

    g_i is the mean gradient over ``batch``, update the optimizer's; L_j is the mean over
    ``held_out`` with the same noise before and after. The odd part of the update leaves out the
    momentum, which belongs to steps taken before.

    Args:
      loss_fn: per-example loss.
      optimizer: the model's.
      params: before the step.
      opt_state: likewise; a fresh one of a warm-up schedule has steps of length 0.
      batch: examples that the step is on.
      held_out: others, on which its effect is measured.
      timesteps: (n,) rows and columns.
      key: the noise.
      rows: (k,) timesteps of the rows alone, for a part of the matrix (k, n).

    Source: what the reward of Kim et al., CVPR 2025 (arXiv 2411.09998) sums, for every pair.
    """
    key_step, key_effect = jax.random.split(key)

    def mean_loss(p: Params, rows: Batch, t: jax.Array, k: Key) -> jax.Array:
        num = jax.tree.leaves(rows)[0].shape[0]
        index = jnp.arange(num, dtype=jnp.int32)
        return jnp.mean(loss_fn.at(p, rows, jnp.full((num,), t), k, index).astype(jnp.float32))

    def losses(p: Params) -> PerBucket:
        return jax.lax.map(lambda t: mean_loss(p, held_out, t, key_effect), timesteps)

    before = losses(params)

    def effect(t: jax.Array) -> PerBucket:
        grads = jax.grad(mean_loss)(params, batch, t, key_step)
        response = optimizer_response(optimizer, grads, opt_state, params)
        return before - losses(optax.apply_updates(params, response))

    return jax.lax.map(effect, timesteps if rows is None else rows)


def _square(tree: Params) -> jax.Array | int:
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree))
