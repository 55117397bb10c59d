"""What the tests of samplers that learn from losses share."""

import jax
import jax.numpy as jnp
import numpy as np

import adaptive_ts as ats
from adaptive_ts.schedules.base import NoiseSchedule

BATCH = {"image": jnp.zeros((8, 8, 8, 1))}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1 - 1e-3),
}
LINEAR = ats.schedules.linear(1000)


def straight_line():
    """alpha = 1 - t, sigma = t."""
    log_snr = lambda t: 2 * (jnp.log1p(-t) - jnp.log(t))  # noqa: E731
    return NoiseSchedule("straight", None, None, lambda t: 1 - t, lambda t: t, log_snr)


def schedule_of(grid):
    return (
        straight_line() if grid.num_timesteps is None else ats.schedules.linear(grid.num_timesteps)
    )


def samples_at(t, grid=None):
    t = jnp.asarray(t)
    u = jnp.full(t.shape, 0.5) if grid is None else grid.to_u(t)
    return ats.TimestepSample(t, u, jnp.ones(t.shape))


def probabilities(sampler, state):
    """p of every timestep of a discrete grid, or of 2000 equal cells."""
    grid = sampler.sample.grid
    if grid.num_timesteps is None:
        t = grid.to_t((jnp.arange(2000) + 0.5) / 2000)
    else:
        t = jnp.arange(grid.num_timesteps)
    return np.exp(np.asarray(sampler.log_density(state, samples_at(t), None))) / len(t)


def learn(sampler, *batches):
    state = sampler.init(jax.random.key(0), BATCH)
    for t, losses in batches:
        state, metrics = sampler.update(state, samples_at(t), jnp.asarray(losses, jnp.float32))
    return state, metrics
