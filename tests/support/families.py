"""The families of samplers on a tiny model, and some training steps of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_ts as ats
from adaptive_ts import collectives

GRIDS = {
    "discrete": (ats.discrete(50), ats.schedules.linear(50)),
    "continuous": (ats.continuous(20), ats.schedules.vp_cosine()),
}
IMAGES = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
MODEL = optax.adam(1e-3)


def policy_net():
    return ats.learning.conv_beta_policy(channels=(2,), hidden=(3,))


FAMILIES = {
    "uniform": lambda g, s: ats.uniform(g),
    "stratified": lambda g, s: ats.uniform(g, coupling="stratified"),
    "logit_normal": lambda g, s: ats.logit_normal(g),
    "mode": lambda g, s: ats.mode(g),
    "cosmap": lambda g, s: ats.cosmap(g),
    "beta": lambda g, s: ats.beta(g, 1.0, 2.0),
    "log_snr_laplace": ats.log_snr_laplace,
    "log_snr_cauchy": ats.log_snr_cauchy,
    "log_normal_sigma": ats.log_normal_sigma,
    "speed": ats.speed,
    "curriculum": lambda g, s: ats.curriculum(g, steps=10),
    "switch": lambda g, s: ats.curriculum(g, kind="switch", steps=10),
    "loss_second_moment": lambda g, s: ats.loss_second_moment(g),
    "loss_proportional": lambda g, s: ats.loss_proportional(g),
    "entropy_rate": ats.entropy_rate,
    "adaptive": lambda g, s: ats.adaptive(
        g, policy_net(), optax.adam(1e-3), every=1, num_buckets=4, num_selected=2
    ),
    "impact": lambda g, s: ats.impact(g, MODEL, every=1, num_buckets=4, num_examples=2),
    "mixed": lambda g, s: ats.mixed_with_uniform(ats.logit_normal(g), 0.3),
    "weighted": lambda g, s: ats.with_weighting(ats.uniform(g), ats.weightings.min_snr(), s),
    "importance": lambda g, s: ats.importance_weighted(ats.loss_proportional(g)),
    "density": lambda g, s: ats.with_density_of(ats.loss_proportional(g), ats.entropy_rate(g, s)),
}
PROBING = ("adaptive", "impact")


@functools.cache
def parts(grid, family):
    """(the sampler, the loss)."""
    grid, schedule = GRIDS[grid]
    loss = ats.denoising_loss(lambda p, x, t, batch, key: p["w"] * x + p["b"], schedule)
    return FAMILIES[family](grid, schedule), loss


def first(sampler, dtype=jnp.float32):
    params = {"w": jnp.asarray(0.5, dtype), "b": jnp.asarray(0.0, dtype)}
    batch = {"image": IMAGES}
    return sampler.init(jax.random.key(1), batch), params, MODEL.init(params)


def taken(sampler, loss, state, params, opt_state, batch, key, *, through_update=False, axis=None):
    """One training step: (sampler state, params, opt_state), draw, log density and metrics."""
    k_t, k_loss, k_up = jax.random.split(key, 3)

    def update(draw, losses, new):
        return sampler.update(
            state, draw, losses, key=k_up, batch=batch, loss_fn=loss, params=params,
            new_params=new, opt_state=opt_state,
        )  # fmt: skip

    def objective(p):
        draw = sampler.sample(k_t, state, batch)
        losses = loss(p, batch, draw.t, k_loss)
        found = update(draw, losses, jax.tree.map(lambda x: 0.9 * x, p)) if through_update else None
        mean = jnp.mean(draw.weight.astype(losses.dtype) * losses)
        return collectives.pmean(mean, axis), (draw, losses, found)

    grads, (draw, losses, found) = jax.grad(objective, has_aux=True)(params)
    grads = collectives.pmean(grads, axis)
    with jax.numpy_dtype_promotion("standard"):  # the caller's own optax
        updates, new_opt = MODEL.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
    new_state, metrics = found or update(draw, losses, new)
    return (new_state, new, new_opt), (draw, sampler.log_density(state, draw, batch), metrics)


def steps(sampler, loss, *, dtype=jnp.float32, batch_dtype=None, wrap=jax.jit, num=3, **options):
    """What some steps give; the state keeps its structure, shapes and dtypes."""
    carry, batch = first(sampler, dtype), {"image": IMAGES.astype(batch_dtype or dtype)}
    step = wrap(functools.partial(taken, sampler, loss, **options))
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), carry[0])
    for number in range(num):
        carry, seen = step(*carry, batch, jax.random.key(number))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), carry[0]) == kinds
    return jax.device_get((carry, seen))


@functools.cache
def plain(grid, family):
    return steps(*parts(grid, family))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), found, expected)
