"""From a config to the things it names. The dicts here are the only tables of names."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive_ts import diffusion
from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.models.unet import UNet
from adaptive_ts.experiment.step import StepParts
from adaptive_ts.grid import TimeGrid, discrete
from adaptive_ts.policy import conv_beta_policy
from adaptive_ts.samplers import adaptive, importance_weighted, mixed_with_uniform, uniform
from adaptive_ts.types import Batch, Key, Params, TimestepSampler

SCHEDULES: Mapping[str, Callable[[Config], diffusion.NoiseSchedule]] = {
    "cosine": lambda c: diffusion.cosine(c.schedule.num_timesteps),
    "linear": lambda c: diffusion.linear(c.schedule.num_timesteps, rescale=c.schedule.rescale),
    "quad": lambda c: diffusion.quad(c.schedule.num_timesteps, rescale=c.schedule.rescale),
}


class Built(NamedTuple):
    """What a run is made of.

    Attributes:
      parts: of the train step.
      init_params: (key, batch) -> the model's parameters.
      schedule: the noise schedule.
      eps_fn: (params, x_t, t) -> predicted noise, deterministic.
      vlb: the VLB terms in bits/dim, deterministic.
      probe_every: steps from one probe to the next; None for a sampler that does not probe.
    """

    parts: StepParts
    init_params: Callable[[Key, Batch], Params]
    schedule: diffusion.NoiseSchedule
    eps_fn: Callable[[Params, jax.Array, jax.Array], jax.Array]
    vlb: diffusion.ExampleLoss
    probe_every: int | None


def _uniform(config: Config, grid: TimeGrid, mesh: Mesh) -> TimestepSampler:
    return uniform(grid, stratified=config.sampler.stratified)


def _adaptive(config: Config, grid: TimeGrid, mesh: Mesh) -> TimestepSampler:
    c = config.sampler
    return adaptive(
        grid,
        conv_beta_policy(),
        optax.chain(optax.clip_by_global_norm(c.clip_norm), optax.adam(c.learning_rate)),
        every=c.every,
        num_selected=c.num_selected,
        history=c.history,
        entropy_coef=c.entropy_coef,
        common_noise=c.common_noise,
        entropy=c.entropy,
        reduce=c.reduce,
        normalize_reward=c.normalize_reward,
        lagged_selection=c.lagged_selection,
        relative=c.relative,
        num_buckets=c.num_buckets,
        jitter=c.jitter,
        chunk=c.chunk,
        bucket_sharding=sharding.split(mesh) if mesh.size > 1 else None,
    )


SAMPLERS: Mapping[str, Callable[[Config, TimeGrid, Mesh], TimestepSampler]] = {
    "adaptive": _adaptive,
    "uniform": _uniform,
}
_PROBING = ("adaptive",)


def known_names() -> dict[str, tuple[str, ...]]:
    """Field path -> the names it may take, for the fields that are open sets."""
    return {"sampler.name": tuple(SAMPLERS), "schedule.name": tuple(SCHEDULES)}


def build(config: Config, mesh: Mesh) -> Built:
    """Everything of a run but its data and its state.

    Raises:
      ValueError: options that don't go together, from the parts themselves.
    """
    model = UNet(
        channels=config.model.channels,
        multipliers=config.model.multipliers,
        res_blocks=config.model.res_blocks,
        attention=config.model.attention,
        dropout=config.model.dropout,
        groups=config.model.groups,
        dtype=jnp.dtype(config.model.dtype),
    )
    schedule = SCHEDULES[config.schedule.name](config)
    grid = discrete(config.schedule.num_timesteps, rounding=config.sampler.rounding)
    kind = config.model.prediction

    def predict(params: Params, x: jax.Array, t: jax.Array, batch: Batch, key: Key) -> jax.Array:
        return model.apply({"params": params}, x, t)

    def predict_with_dropout(
        params: Params, x: jax.Array, t: jax.Array, batch: Batch, key: Key
    ) -> jax.Array:
        return model.apply({"params": params}, x, t, train=True, rngs={"dropout": key})

    def eps_fn(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        output = model.apply({"params": params}, x, t)
        return diffusion.predicted_eps(schedule, kind, output, x, t)

    def init_params(key: Key, batch: Batch) -> Params:
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        return model.init(key, image, jnp.zeros((1,), jnp.int32))["params"]

    vlb = diffusion.vlb_loss(
        predict,
        schedule,
        prediction=kind,
        variance=config.model.variance,
        decoder_nll=config.sampler.decoder_nll,
    )
    train_predict = predict_with_dropout if config.model.dropout > 0 else predict
    probed = diffusion.denoising_loss(predict, schedule, prediction=kind)
    parts = StepParts(
        sampler=_sampler(config, grid, mesh),
        grid=grid,
        loss_fn=diffusion.denoising_loss(train_predict, schedule, prediction=kind),
        probe_loss_fn=vlb if config.sampler.objective == "vlb" else probed,
        optimizer=_optimizer(config),
        ema_decay=config.optimizer.ema_decay,
        flip=config.data.flip,
        mesh=mesh,
    )
    every = config.sampler.every if config.sampler.name in _PROBING else None
    return Built(parts, init_params, schedule, eps_fn, vlb, every)


def _sampler(config: Config, grid: TimeGrid, mesh: Mesh) -> TimestepSampler:
    sampler = SAMPLERS[config.sampler.name](config, grid, mesh)
    if config.sampler.uniform_prob > 0:
        sampler = mixed_with_uniform(sampler, config.sampler.uniform_prob)
    return importance_weighted(sampler) if config.sampler.importance_weighted else sampler


def _optimizer(config: Config) -> optax.GradientTransformation:
    c = config.optimizer
    warm_up = optax.linear_schedule(0.0, c.learning_rate, max(c.warmup_steps, 1))
    rate = warm_up if c.warmup_steps else c.learning_rate
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), optax.adam(rate, c.b1, c.b2))
