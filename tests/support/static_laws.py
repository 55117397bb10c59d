"""What a sampler with an empty state makes of given draws, and its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats

BATCH = {"image": jnp.zeros((8, 8, 8, 1))}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1.0),
}


def relative_density(sampler, t, batch=BATCH):
    """exp(log_density) at some t."""
    t = jnp.asarray(t)
    sample = ats.TimestepSample(t, jnp.full(t.shape, 0.5), jnp.ones(t.shape))
    found = jax.jit(lambda sample: sampler.log_density((), sample, batch))(sample)
    return np.exp(np.asarray(found, np.float64))


def probabilities(sampler, batch=BATCH):
    """(T,) of a sampler on a discrete grid."""
    T = sampler.sample.grid.num_timesteps
    return relative_density(sampler, np.arange(T), batch) / T


def pull(sampler, v):
    """The sample for these v in place of random ones."""
    v = jnp.asarray(v, jnp.float32)
    batch = {"image": jnp.zeros((v.shape[0], 1))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_ts.timesteps.laws.unit_draws", lambda *_, **__: v)
        draw = jax.jit(lambda key: sampler.sample(key, (), batch))(jax.random.key(0))
    assert np.all((draw.u > 0) & (draw.u < 1))
    return draw
