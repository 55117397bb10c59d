"""A stand-in with the signatures of maxdiffusion's Stable Diffusion trainer, the page's lines in.

Ours throughout but for names: a linear "U-Net" in bfloat16 on NCHW latents, no autoencoder.
"""

from types import SimpleNamespace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import adaptive_ts as ats

sampler = ats.loss_second_moment(ats.discrete(1000))


class NoiseState(NamedTuple):
    """The noise scheduler's, which lives in the pipeline's parameters."""

    alphas_bar: jax.Array


class Scheduler:
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")

    @staticmethod
    def add_noise(state, latents, noise, timesteps):
        level = state.alphas_bar[timesteps].reshape(-1, 1, 1, 1)
        return jnp.sqrt(level) * latents + jnp.sqrt(1 - level) * noise


class UNet(nn.Module):
    """NCHW in and out; the answer is an object with ``sample``."""

    @nn.compact
    def __call__(self, latents, timesteps, text, train):
        x = jnp.moveaxis(latents, 1, -1)
        seen = nn.Dense(4, dtype=jnp.bfloat16)(jnp.mean(text, axis=1))
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x) + seen[:, None, None, :]
        x = x + (timesteps / 1000).astype(jnp.bfloat16)[:, None, None, None]
        return SimpleNamespace(
            sample=jnp.moveaxis(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x), -1, 1)
        )


PIPELINE = SimpleNamespace(unet=UNet(), scheduler=Scheduler())
PARAMS = {"scheduler": NoiseState(jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000)))}
CONFIG = SimpleNamespace(max_grad_norm=1.0, train_text_encoder=False)


class Trainer:
    """Their order: compiled first, with keys as the last argument; then the loop."""

    def __init__(self, seed, batches):
        self.rng, self.batches = jax.random.key(seed), batches
        first = batches[0]
        params = PIPELINE.unet.init(
            self.rng, first["pixel_values"], jnp.zeros((1,), jnp.int32), first["input_ids"], True
        )["params"]
        self.state = TrainState.create(
            apply_fn=PIPELINE.unet.apply, params=params, tx=optax.adamw(1e-3)
        )
        self.config, self.losses = CONFIG, []

    def get_shaped_batch(self, config, pipeline):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.batches[0])

    def compile_train_step(self, pipeline, params):
        self.rng, train_rngs = jax.random.split(self.rng)
        step = jax.jit(
            lambda *args: _train_step(*args, pipeline=pipeline, params=params, config=self.config),
            in_shardings=(None, None, None, None, None),
            donate_argnums=(0,),
        )
        dummy_batch = self.get_shaped_batch(self.config, pipeline)
        train_rngs = (train_rngs, sampler.init(train_rngs, dummy_batch))
        return step.lower(self.state, None, None, dummy_batch, train_rngs).compile()

    def training_loop(self, p_train_step, pipeline):
        _, train_rngs = jax.random.split(self.rng)
        train_rngs = (train_rngs, sampler.init(train_rngs, self.get_shaped_batch(self.config, pipeline)))  # fmt: skip  # noqa: E501
        for batch in self.batches:
            self.state, _, metrics, train_rngs = p_train_step(
                self.state, None, None, batch, train_rngs
            )
            self.losses.append(float(metrics["scalar"]["learning/loss"]))
        return train_rngs


# fmt: off
def _train_step(unet_state, vae_state, text_encoder_state, batch, train_rng, pipeline, params, config):  # noqa: E501
  train_rng, sampler_state = train_rng
  sample_rng, new_train_rng = jax.random.split(train_rng)
  state_params = {"unet": unet_state.params}

  def losses(state_params, batch, timesteps, sample_rng):
    latents, text = batch["pixel_values"], batch["input_ids"]
    noise = jax.random.normal(sample_rng, latents.shape)
    noisy = pipeline.scheduler.add_noise(params["scheduler"], latents, noise, timesteps)
    variables = {"params": state_params["unet"]}
    output = pipeline.unet.apply(variables, noisy, timesteps, text, train=True)
    loss = (noise - output.sample) ** 2
    return loss

  sampled = ats.integrations.sampled_loss(sampler, losses)
  (loss, drawn), grad = jax.value_and_grad(sampled.loss, has_aux=True)(state_params, sampler_state, batch, sample_rng)  # noqa: E501
  grad, _ = optax.clip_by_global_norm(config.max_grad_norm).update(grad, optax.EmptyState(), None)
  new_state = unet_state.apply_gradients(grads=grad["unet"])
  sampler_state, _ = sampled.update(sampler_state, drawn, batch, state_params, {"unet": new_state.params})  # noqa: E501
  new_text_encoder_state = text_encoder_state
  metrics = {"scalar": {"learning/loss": loss}, "scalars": {}}
  return new_state, new_text_encoder_state, metrics, (new_train_rng, sampler_state)
