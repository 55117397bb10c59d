"""A small Diffusion of hackable_diffusion's, for its tests; imported where the package is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from hackable_diffusion import hd
from hackable_diffusion.kdiff import core

import adaptive_ts as ats

TIME = ats.continuous(t_min=1e-3, t_max=1 - 1e-3)


class Network(nn.Module):
    @nn.compact
    def __call__(self, time, xt, conditioning, is_training):
        label = jnp.broadcast_to(conditioning["label"][:, None, None, None] / 10, time.shape)
        seen = [jnp.broadcast_to(x, xt.shape) for x in (xt, time, label)]
        h = nn.silu(nn.Conv(8, (3, 3))(jnp.concatenate(seen, axis=-1)))
        return {"velocity": nn.Conv(xt.shape[-1], (3, 3))(h)}


PROCESS = hd.corruption.GaussianProcess(schedule=hd.corruption.CosineSchedule())
LOSS = hd.training.SiD2Loss(schedule=PROCESS.schedule, prediction_type="velocity")
BATCH = {
    "image": jax.random.normal(jax.random.key(1), (8, 8, 8, 1)),
    "label": jnp.arange(8)[:, None],
}


def diffusion(time_sampler):
    return core.Diffusion(
        network=Network(),
        corruption_process=PROCESS,
        time_sampler=time_sampler,
        x0="batch.image",
        cond={"label": "batch.label[:,0]"},
    )


def applied(model, params, batch=BATCH):
    inputs = {"x0": batch["image"], "cond": {"label": batch["label"][:, 0]}}
    streams = {"params": jax.random.key(2), "default": jax.random.key(3)}
    if params is None:
        return model.init(streams, **inputs, is_training_property=True)["params"]
    return model.apply({"params": params}, **inputs, rngs=streams, is_training_property=True)
