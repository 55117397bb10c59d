"""A sampler in a train step that exists: a loss that draws, and what is learned of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_ts.types import (
    Along,
    Batch,
    InitFn,
    Key,
    Metrics,
    Params,
    PerExample,
    Scalar,
    State,
    TimestepSample,
    TimestepSampler,
)


class Drawn(NamedTuple):
    """What a step drew: the auxiliary value of `SampledLoss`'s ``loss``.

    Attributes:
      sample: the timesteps and their weights.
      losses: float32 of the shape of t, unweighted.
      key: for the sampler's update.
      aux: what the user's loss returned beside its losses; None without ``has_aux``.
    """

    sample: TimestepSample
    losses: PerExample
    key: Key
    aux: Any


class SampledLoss(NamedTuple):
    """A sampler and a loss, as three pure functions.

    Attributes:
      init: (key, batch) -> state, the sampler's.
      loss: (params, state, batch, key) -> (scalar, `Drawn`): draws the timesteps, and is what
        ``jax.value_and_grad`` with ``has_aux=True`` takes.
      update: (state, drawn, batch, params, new_params) -> (state, metrics), after the optimizer;
        takes ``opt_state=``, from before the step, and ``probe=`` for samplers that need them.
    """

    init: InitFn
    loss: Callable[[Params, State, Batch, Key], tuple[Scalar, Drawn]]
    update: Callable[..., tuple[State, Metrics]]


def sampled_loss(
    sampler: TimestepSampler,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    shape: tuple[int, ...] = (),
    along: Along = "independent",
) -> SampledLoss:
    """A loss that draws its own timesteps, for a train step that has its own optimizer.

    It splits the key, draws, weights, and takes the losses and the key to the sampler's update;
    gradients, their sum over devices, clipping and the optimizer stay as they are.

    Args:
      sampler: draws the timesteps.
      loss_fn: (params, batch, t, key) -> (b, ...), unweighted, not yet averaged over the batch;
        axes after those of ``t`` are averaged here. All that belongs to an example is read from
        the ``batch`` it is given: a probe calls it with other batches, such as one example.
      has_aux: ``loss_fn`` returns a pair, of which the second goes to `Drawn`.
      shape, along: axes of t after b, as of a `GridSample`; losses then are ``(b, *shape, ...)``.

    Returns:
      A `SampledLoss`.

    Raises:
      ValueError: when called, a loss whose leading axes are not those of t.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.loss_second_moment(ats.discrete(10))
      >>> sampled = ats.integrations.sampled_loss(sampler, lambda p, batch, t, key: p * batch)
      >>> batch, key = jnp.ones((4, 2)), jax.random.key(0)
      >>> state = sampled.init(key, batch)
      >>> grad_fn = jax.value_and_grad(sampled.loss, has_aux=True)
      >>> (loss, drawn), grad = grad_fn(3.0, state, batch, key)
      >>> state, metrics = sampled.update(state, drawn, batch, 3.0, 3.0 - 0.1 * grad)
      >>> print(loss, grad, drawn.losses)
      3.0 1.0 [3. 3. 3. 3.]

    Source: ours.
    """

    def split(params: Params, batch: Batch, t: PerExample, key: Key) -> tuple[PerExample, Any]:
        losses, aux = loss_fn(params, batch, t, key), None
        if has_aux:
            losses, aux = losses
        return _per_timestep(losses, t), aux

    def loss(params: Params, state: State, batch: Batch, key: Key) -> tuple[Scalar, Drawn]:
        key_t, key_loss, key_update = jax.random.split(key, 3)
        axes = {"shape": shape, "along": along} if shape else {}  # a user's sampler may have none
        sample = sampler.sample(key_t, state, batch, **axes)
        losses, aux = split(params, batch, sample.t, key_loss)
        mean = jnp.mean(sample.weight.astype(losses.dtype) * losses)
        return mean, Drawn(sample, losses, key_update, aux)

    # A loss whose noise can be chosen by example is more than a function: it is handed on whole.
    whole = hasattr(loss_fn, "at") and not has_aux
    probed = loss_fn if whole else lambda *args: split(*args)[0]

    def update(
        state: State, drawn: Drawn, batch: Batch, params: Params, new_params: Params, **extra: Any
    ) -> tuple[State, Metrics]:
        return sampler.update(
            state,
            drawn.sample,
            drawn.losses,
            key=drawn.key,
            batch=batch,
            loss_fn=probed,
            params=params,
            new_params=new_params,
            **extra,
        )

    return SampledLoss(sampler.init, loss, update)


def _per_timestep(losses: jax.Array, t: PerExample) -> PerExample:
    """Losses of the shape of t, at least float32."""
    losses = jnp.asarray(losses)
    if losses.shape[: t.ndim] != t.shape:
        raise ValueError(
            f"the loss has shape {losses.shape} for timesteps of shape {t.shape}: return it before "
            "its mean over the batch"
        )
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    return jnp.mean(losses, axis=tuple(range(t.ndim, losses.ndim)))
