"""Common random numbers: the reward estimate is far less noisy than with fresh noise.

A small model after 200 training steps at its own learning rate, one optimizer step to be judged,
and the reward that the adaptive sampler computes of it: the decrease of the VLB, mean over the
batch and over S, by many noise keys. Run ``pytest -s`` to see the numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE, STEPS, LEARNING_RATE, DRAWS = 64, 200, 1e-3, 256
SCHEDULE = ats.schedules.linear(1000)
BUCKETS = ats.timesteps.strata(ats.discrete(1000), 100)
SELECTIONS = {  # three of the default 100 buckets
    "spread": (16, 50, 83),  # where the adaptive sampler starts
    "low": (0, 1, 2),  # the lowest noise, where the VLB's weights are largest
}


def init_params(key):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(k1, (66, 128)) / np.sqrt(66),
        "middle": jax.random.normal(k2, (128, 128)) / np.sqrt(128),
        "out": jax.random.normal(k3, (128, 64)) / np.sqrt(128) / 4,
        "skip": jnp.float32(0.0),
    }


def predict(params, x, t, batch, key):
    level = jnp.stack([SCHEDULE.alpha(t), SCHEDULE.sigma(t)], axis=1)
    h = jax.nn.silu(jnp.concatenate([x.reshape(len(x), -1), level], axis=1) @ params["in"])
    h = jax.nn.silu(h @ params["middle"]) @ params["out"]
    return (params["skip"] * x) + h.reshape(x.shape)


class Step(NamedTuple):
    params: dict
    new_params: dict
    batch: dict


@pytest.fixture(scope="module")
def judged() -> Step:
    """The 201st step of a plain uniform training run on the handwritten digits."""
    images = (load_digits().images[..., None] / 8 - 1).astype(np.float32)
    sampler, optimizer = ats.uniform(ats.discrete(1000)), optax.adam(LEARNING_RATE)
    loss_fn = ats.denoising_loss(predict, SCHEDULE)

    @jax.jit
    def train_step(params, opt_state, batch, key):
        k_draw, k_loss = jax.random.split(key)
        draw = sampler.sample(k_draw, (), batch)
        grads = jax.grad(lambda p: loss_fn(p, batch, draw.t, k_loss).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = init_params(jax.random.key(0))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for step in range(STEPS + 1):
        batch = {"image": jnp.asarray(images[rng.choice(len(images), SIZE, replace=False)])}
        before = params
        key = jax.random.fold_in(jax.random.key(1), step)
        params, opt_state = train_step(params, opt_state, batch, key)
    return Step(before, params, batch)


@pytest.fixture(scope="module")
def reward_estimates(judged):
    """(selection, common_noise) -> (draws, b): each example's reward under each noise key."""
    vlb = ats.vlb_loss(predict, SCHEDULE)

    @functools.partial(jax.jit, static_argnames="common_noise")
    def rewards(timesteps, keys, common_noise):
        def one(key):
            return ats.learning.decrease_on_batch(
                vlb, judged.params, judged.new_params, judged.batch, timesteps, key,
                common_noise=common_noise,
            ).mean(0)  # fmt: skip

        return jax.lax.map(one, keys, batch_size=16)

    def estimates(selection, common_noise):
        keys = jax.random.split(jax.random.key(2 + common_noise), DRAWS)
        return np.asarray(rewards(BUCKETS[np.asarray(selection)], keys, common_noise), np.float64)

    return estimates


@pytest.mark.parametrize("where", SELECTIONS)
def test_common_noise_is_ten_times_less_noisy_than_fresh(reward_estimates, where):
    common = reward_estimates(SELECTIONS[where], True)
    fresh = reward_estimates(SELECTIONS[where], False)
    report = {}
    for of, pick in {
        "batch": lambda rewards: rewards.mean(1, keepdims=True),
        "example": lambda rewards: rewards,
    }.items():
        std = [float(np.sqrt(pick(r).var(axis=0, ddof=1).mean())) for r in (common, fresh)]
        report[of] = std
        print(
            f"\nreward per {of}, S = {where} {SELECTIONS[where]}:"
            f" mean {common.mean():.2e} bits/dim, std with common noise {std[0]:.2e},"
            f" with fresh noise {std[1]:.2e}, ratio 1/{std[1] / std[0]:.0f}"
        )
    for common_std, fresh_std in report.values():
        assert 0 < common_std <= fresh_std / 10

    # The same thing is estimated: both have one expectation.
    means = [r.mean(1) for r in (common, fresh)]
    error = np.sqrt(sum(m.var(ddof=1) / DRAWS for m in means))
    assert abs(means[0].mean() - means[1].mean()) < 4 * error


def test_both_estimates_cost_the_same(judged):
    """The same number of forward passes: what differs is only the noise."""

    def flops(common_noise):
        vlb = ats.vlb_loss(predict, SCHEDULE)

        def decrease(key):
            return ats.learning.decrease_on_batch(
                vlb, judged.params, judged.new_params, judged.batch, BUCKETS[:3], key,
                common_noise=common_noise,
            )  # fmt: skip

        return str(jax.make_jaxpr(decrease)(jax.random.key(0))).count("dot_general")

    assert flops(True) == flops(False) == 6  # two models of three layers; S by vmap
