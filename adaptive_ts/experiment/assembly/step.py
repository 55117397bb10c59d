"""The train step: one jitted function of (state, batch, key), compiled per value of ``probe``."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from adaptive_ts.density import relative_density
from adaptive_ts.experiment.assembly.state import LOSS_BUCKETS, TrainState, shardings
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.learning.statistics import LossStatistics, update_statistics
from adaptive_ts.timesteps.grid import TimeGrid, strata
from adaptive_ts.types import (
    Batch,
    IndexedLossFn,
    Key,
    LossFn,
    Metrics,
    Params,
    PerBucket,
    PerExample,
    Scalar,
    TimestepSample,
    TimestepSampler,
)

_STATISTICS_DECAY = 0.999  # per step: about the last thousand
_DENSITY_STRATA = 100

StepFn = Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]]
Variant = bool | None  # the value of `probe` that a step is compiled for


class Taken(NamedTuple):
    """A step that is under way, or done.

    Attributes:
      number: from 1.
      state: after it; the next step takes it away (donation).
      metrics: of the step.
      batch: that it was taken on, on the devices.
    """

    number: int
    state: TrainState
    metrics: Metrics
    batch: Batch


class StepParts(NamedTuple):
    """What a train step is made of.

    Attributes:
      sampler: draws the timesteps.
      grid: its time grid.
      loss_fn: what is trained on.
      probe_loss_fn: the objective that the sampler's probe measures.
      optimizer: the model's.
      ema_decay: of the average of the weights, after its warm-up.
      flip: mirror half of the images.
      mesh: the devices.
      accumulate: microbatches whose gradients make up one step.
      skip: leave the state as it was where the loss or a gradient is not finite.
    """

    sampler: TimestepSampler
    grid: TimeGrid
    loss_fn: IndexedLossFn
    probe_loss_fn: LossFn
    optimizer: optax.GradientTransformation
    ema_decay: float
    flip: bool
    mesh: Mesh
    accumulate: int = 1
    skip: bool = False


def make_step(parts: StepParts, *, probe: bool | None, state: TrainState | None = None) -> Wrapped:
    """(state, batch as it is stored, key) -> (state, metrics), jitted; the state is donated.

    Args:
      parts: what the step is made of.
      probe: whether the sampler probes in this step; None leaves it to the sampler's own
        counter (slow on the CPU backend, where gradients inside ``lax.cond`` crawl).
      state: placed as `abstract` places it, and as it stays; None: whole on every device.
    """
    whole, rows = sharding.replicated(parts.mesh), sharding.split(parts.mesh)
    placed = whole if state is None else shardings(state)
    add_losses = _sharded_statistics(parts.mesh)
    gather, scatter = _movers(parts.mesh)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
        key_flip, key_sample, key_loss, key_update = keys
        batch = prepare(batch, key_flip if parts.flip else None)
        draw = parts.sampler.sample(key_sample, state.sampler, batch)
        whole_params = gather(state.params)
        loss, losses, grads = _gradient(parts, whole_params, batch, draw, key_loss)
        grads = scatter(grads)
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sampler_state, metrics = parts.sampler.update(
            state.sampler,
            draw,
            losses,
            key=key_update,
            batch=batch,
            loss_fn=parts.probe_loss_fn,
            params=whole_params,
            new_params=gather(params),
            opt_state=state.opt_state,
            probe=probe,
        )
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(parts.ema_decay, (1 + done) / (10 + done))
        bucket = jnp.floor(parts.grid.to_u(draw.t) * LOSS_BUCKETS).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=params,
            ema=optax.incremental_update(params, state.ema, 1 - decay),
            opt_state=opt_state,
            sampler=sampler_state,
            statistics=add_losses(state.statistics, jnp.clip(bucket, 0, LOSS_BUCKETS - 1), losses),
        )
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return (_unless_bad(new, state, metrics) if parts.skip else new), metrics

    return jax.jit(
        step,
        in_shardings=(placed, rows, whole),
        out_shardings=(placed, whole),
        donate_argnums=0,
    )


def variant(number: int, every: int | None) -> Variant:
    """Whether the step of this number (from 1) probes; None for a sampler that never does."""
    return None if every is None else number % every == 0


def train_steps(
    functions: Callable[[Variant], StepFn],
    state: TrainState,
    batches: Iterable[Batch],
    key: Key,
    *,
    start: int = 0,
    stop: int,
    every: int | None,
) -> Iterator[Taken]:
    """The one sequence of training steps: start + 1 to stop, each begun when it is asked for.

    Args:
      functions: variant -> the step, as `make_step` makes it, compiled or not.
      state: after step ``start``; donated to the first step.
      batches: that of step ``start`` + 1 first, on the devices.
      key: of the steps' randomness.
      start: steps taken already.
      stop: the last step.
      every: steps from one probe to the next; None for a sampler that does not probe.
    """
    left = iter(batches)
    for number in range(start + 1, stop + 1):
        batch = next(left)  # there is one for every step: an end would be an error
        state, metrics = functions(variant(number, every))(state, batch, key)
        yield Taken(number, state, metrics, batch)


def _gradient(
    parts: StepParts, params: Params, batch: Batch, draw: TimestepSample, key: Key
) -> tuple[Scalar, PerExample, Params]:
    """(mean weighted loss, loss per example, its gradient), over the microbatches in turn."""

    def mean_loss(
        params: Params, batch: Batch, t: PerExample, weight: PerExample, *index: PerExample
    ) -> tuple[Scalar, PerExample]:
        loss_fn = parts.loss_fn.at if index else parts.loss_fn
        losses = loss_fn(params, batch, t, key, *index)
        return jnp.mean(weight * losses), losses

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    if parts.accumulate == 1:
        (loss, losses), grads = value_and_grad(params, batch, draw.t, draw.weight)
        return loss, losses, grads
    num, devices = parts.accumulate, parts.mesh.size
    micro = NamedSharding(parts.mesh, PartitionSpec(None, sharding.axes(parts.mesh)))

    def cut(x: jax.Array) -> jax.Array:  # (b, ...) -> (num, b / num, ...), rows stay where they are
        x = x.reshape(devices, num, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(num, -1, *x.shape[3:]), micro)

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(num, devices, -1).swapaxes(0, 1).reshape(-1)

    def add(total: tuple[Scalar, Params], part: Any) -> tuple[Any, PerExample]:
        (loss, losses), grads = value_and_grad(params, *part)
        return jax.tree.map(jnp.add, total, (loss, grads)), losses

    # Each example keeps the noise that its place in the whole batch gives it.
    index = jnp.arange(draw.t.shape[0], dtype=jnp.int32)
    cuts = jax.tree.map(cut, (batch, draw.t, draw.weight, index))
    zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    # The CPU's compiler makes a convolution's gradient crawl inside a loop.
    on_cpu = parts.mesh.devices.flat[0].platform == "cpu"
    total, losses = (_unrolled_scan if on_cpu else jax.lax.scan)(add, zero, cuts)
    loss, grads = jax.tree.map(lambda x: x / num, total)
    return loss, join(losses), grads


def _unrolled_scan(f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> Any:
    """`jax.lax.scan`, one turn after the other.

    Which row of xs a turn takes depends on the carry, though nothing is above infinity: or else the
    compiler would keep what all turns need at once.
    """

    def turn(carry: Any, i: int) -> tuple[Any, Any]:
        ends = jnp.stack([x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(carry)])
        row = i + jnp.any(ends > jnp.inf).astype(jnp.int32)
        return f(carry, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, 0, False), xs))

    carry, seen = init, []
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
        carry, y = turn(carry, i)
        seen.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *seen)


def _movers(mesh: Mesh) -> tuple[Callable[[Params], Params], Callable[[Params], Params]]:
    """Parameters to whole ones on every device, and gradients to the parts that devices keep."""
    if "fsdp" not in mesh.axis_names:
        return (lambda tree: tree,) * 2
    place, whole = jax.lax.with_sharding_constraint, sharding.replicated(mesh)
    return (
        lambda tree: jax.tree.map(lambda x: place(x, whole), tree),
        lambda tree: jax.tree.map(lambda x: place(x, sharding.shared(mesh, x.shape)), tree),
    )


def _unless_bad(new: TrainState, old: TrainState, metrics: Metrics) -> TrainState:
    """The new state, or the old one a step later if the loss or a gradient is not finite."""
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)
    return kept._replace(step=new.step)


def make_density(parts: StepParts) -> Callable[[Any, Batch], PerBucket]:
    """(sampler state, batch as it is stored) -> (n,) T p(t), the mean over the batch, jitted."""
    timesteps = density_timesteps(parts.grid)

    def density(state: Any, batch: Batch) -> PerBucket:
        u = parts.grid.to_u(timesteps)
        return relative_density(parts.sampler, state, prepare(batch, None), timesteps, u)[0]

    whole, rows = sharding.replicated(parts.mesh), sharding.split(parts.mesh)
    return jax.jit(density, in_shardings=(whole, rows), out_shardings=whole)


def density_timesteps(grid: TimeGrid) -> PerBucket:
    """(n,) the timesteps at which p(t) is recorded during training."""
    return strata(grid, min(_DENSITY_STRATA, grid.num_buckets))


def prepare(batch: Batch, key: Key | None) -> Batch:
    """uint8 images -> float32 in [-1, 1], latents -> float32; with a key, half of them mirrored."""
    image = batch["image"].astype(jnp.float32)
    if not jnp.issubdtype(batch["image"].dtype, jnp.floating):
        image = image / 127.5 - 1.0
    if key is not None:
        mirror = jax.random.bernoulli(key, shape=(image.shape[0], 1, 1, 1))
        image = jnp.where(mirror, image[:, :, ::-1], image)
    return {**batch, "image": image}


def _sharded_statistics(
    mesh: Mesh,
) -> Callable[[LossStatistics, PerExample, PerExample], LossStatistics]:
    def local(stats: LossStatistics, bucket: PerExample, losses: PerExample) -> LossStatistics:
        return update_statistics(
            stats, bucket, losses, decay=_STATISTICS_DECAY, axis_name=sharding.axes(mesh)
        )

    whole, rows = PartitionSpec(), PartitionSpec(sharding.axes(mesh))
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole)
