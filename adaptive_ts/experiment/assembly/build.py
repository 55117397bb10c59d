"""From a config to what it names: the model, the losses, the sampler and the optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive_ts import diffusion, schedules
from adaptive_ts.experiment.assembly.state import TrainState, abstract, make_init
from adaptive_ts.experiment.assembly.step import StepParts
from adaptive_ts.experiment.config.groups import Config, ModelConfig
from adaptive_ts.experiment.config.methods import SAMPLERS, Setting, make_sampler, make_schedule
from adaptive_ts.experiment.data.decoding import Dataset
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.models.dit import DiT
from adaptive_ts.experiment.models.unet import UNet
from adaptive_ts.experiment.models.uvit import UViT
from adaptive_ts.experiment.solvers.generator import EpsFn
from adaptive_ts.timesteps.grid import discrete
from adaptive_ts.types import Batch, Key, Params

TRANSFORMERS: Mapping[str, Callable[..., nn.Module]] = {"dit": DiT, "uvit": UViT}


class Built(NamedTuple):
    """What a run is made of.

    Attributes:
      parts: of the train step.
      init_params: (key, batch) -> the model's parameters.
      schedule: the noise schedule.
      eps_fn: (params, x_t, t) -> predicted noise, deterministic; with classes, (params, x_t, t,
        label), where num_classes stands for no class.
      eps_loss: the mean squared error in eps, deterministic.
      vlb: the VLB terms in bits/dim, deterministic.
      probe_every: steps from one probe to the next; None for a sampler that does not probe.
      loss: what is trained on, without dropout of units or classes.
      num_classes: that the model is told; None: it is told no classes.
    """

    parts: StepParts
    init_params: Callable[[Key, Batch], Params]
    schedule: schedules.NoiseSchedule
    eps_fn: EpsFn
    eps_loss: diffusion.ExampleLoss
    vlb: diffusion.ExampleLoss
    probe_every: int | None
    loss: diffusion.ExampleLoss
    num_classes: int | None


def build(config: Config, mesh: Mesh) -> Built:
    """Everything of a run but its data and its state.

    Raises:
      UserError: options out of range or that don't go together, as the parts themselves say.
    """
    try:
        return _build(config, mesh)
    except ValueError as error:
        raise UserError(str(error)) from error


def first_state(
    built: Built, shape: tuple[int, ...], key: Key, mesh: Mesh
) -> tuple[Callable[[Key], TrainState], TrainState]:
    """What makes the first state, and its shapes: here a model meets the images it cannot take.

    Args:
      built: the run's parts.
      shape: (b, H, W, C) of the images.
      key: randomness of the state.
      mesh: the devices.

    Raises:
      UserError: the model cannot take them.
    """
    example = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    init = make_init(built.init_params, built.parts.optimizer, built.parts.sampler, example)
    try:
        return init, abstract(init, key, mesh)
    except ValueError as error:
        found, size = " ".join(str(error).split()), "x".join(map(str, shape[1:]))
        raise UserError(
            f"--model: {found}; the images are {size}: choose another --data.image_size, or other "
            "options of --model"
        ) from error


def check_classes(config: Config, dataset: Dataset) -> None:
    """Holds the model's number of classes against the data set's.

    Raises:
      UserError: they differ.
    """
    told, there = config.model.transformer.num_classes, dataset.num_classes
    if told not in (None, there):
        raise UserError(
            f"--model.transformer.num_classes: {told} is not the number of classes of "
            f"{dataset.name}: give {there}, or None for a model without classes"
        )


def _build(config: Config, mesh: Mesh) -> Built:
    model = _model(config.model)
    classes = getattr(model, "num_classes", None)
    schedule = make_schedule(config)
    grid = discrete(config.schedule.num_timesteps, rounding=config.sampler.rounding)
    kind = config.model.prediction

    def label_of(batch: Batch) -> jax.Array | None:
        return None if classes is None else batch["label"]

    def predict(params: Params, x: jax.Array, t: jax.Array, batch: Batch, key: Key) -> jax.Array:
        output: Any = model.apply({"params": params}, x, t, label_of(batch))
        return output

    def predict_with_dropout(
        params: Params, x: jax.Array, t: jax.Array, batch: Batch, key: Key
    ) -> jax.Array:
        label, rngs = label_of(batch), {"dropout": key}
        output: Any = model.apply({"params": params}, x, t, label, train=True, rngs=rngs)
        return output

    def predict_eps(
        params: Params, x: jax.Array, t: jax.Array, batch: Batch, key: Key
    ) -> jax.Array:
        return eps_fn(params, x, t, label_of(batch))

    def eps_fn(
        params: Params, x: jax.Array, t: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        output: Any = model.apply({"params": params}, x, t, label)
        return diffusion.predicted_eps(schedule, kind, output, x, t)

    def init_params(key: Key, batch: Batch) -> Params:
        image, zero = jnp.zeros((1, *batch["image"].shape[1:])), jnp.zeros((1,), jnp.int32)
        return model.init(key, image, zero, label_of({"label": zero}))["params"]

    vlb = diffusion.vlb_loss(
        predict,
        schedule,
        prediction=kind,
        variance=config.model.variance,
        decoder_nll=config.sampler.decoder_nll,
    )
    drops = config.model.dropout > 0
    drops |= classes is not None and config.model.transformer.class_dropout > 0
    plain = diffusion.denoising_loss(predict, schedule, prediction=kind)
    dropping = diffusion.denoising_loss(predict_with_dropout, schedule, prediction=kind)
    optimizer = _optimizer(config)
    shared = sharding.split(mesh) if mesh.size > 1 else None
    setting = Setting(config, grid, schedule, optimizer, vlb, shared)
    # The impact sampler is handed its objective when it is built; it linearises the training loss.
    on_vlb = config.sampler.name == "adaptive" and config.sampler.objective == "vlb"
    parts = StepParts(
        sampler=make_sampler(setting),
        grid=grid,
        loss_fn=dropping if drops else plain,
        probe_loss_fn=vlb if on_vlb else plain,
        optimizer=optimizer,
        ema_decay=config.optimizer.ema_decay,
        flip=config.data.flip,
        mesh=mesh,
        accumulate=config.train.accumulate,
        skip=config.train.max_skipped > 0,
    )
    every = config.sampler.every if SAMPLERS[config.sampler.name].probes else None
    eps_loss = diffusion.denoising_loss(predict_eps, schedule)
    return Built(parts, init_params, schedule, eps_fn, eps_loss, vlb, every, plain, classes)


def _model(c: ModelConfig) -> nn.Module:
    shared = {"dtype": jnp.dtype(c.dtype), "remat": c.remat}
    if c.name in TRANSFORMERS:
        return TRANSFORMERS[c.name](**dataclasses.asdict(c.transformer), **shared)
    return UNet(
        channels=c.channels,
        multipliers=c.multipliers,
        res_blocks=c.res_blocks,
        attention=c.attention,
        dropout=c.dropout,
        groups=c.groups,
        **shared,
    )


def _optimizer(config: Config) -> optax.GradientTransformation:
    c = config.optimizer
    warm_up = optax.linear_schedule(0.0, c.learning_rate, max(c.warmup_steps, 1))
    rate = warm_up if c.warmup_steps else c.learning_rate
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), optax.adam(rate, c.b1, c.b2))
