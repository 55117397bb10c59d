"""The reward of a network that computes in bfloat16 is float64's (docs/concepts/probes.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reward_precision import (
    BATCH,
    IMAGES,
    correlations,
    exact_rewards,
    init,
    loss_of,
    rewards,
)

import adaptive_ts as ats

ARGS = {"image": jnp.asarray(IMAGES[:BATCH])}, jax.random.key(3)


def step_of(params, size):
    noise = optax.tree.random_like(jax.random.key(1), params, jax.random.normal)
    return jax.tree.map(lambda p, n: (p + size * n).astype(p.dtype), params, noise)


def test_derivative_keeps_what_a_difference_loses():
    found = correlations(1e-5, jnp.bfloat16, ("difference", "directional"), probes=3, warm_up=20)
    assert found["directional"][0] > 0.99 and found["directional"][1] == 3
    assert found["difference"][0] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("loss_dtype", [jnp.float32, jnp.bfloat16])
def test_table_of_correlations(lr, loss_dtype):
    found = correlations(lr, loss_dtype, ("difference", "directional"))
    print(f"loss in {jnp.dtype(loss_dtype).name}, learning rate {lr:g}: {found}")
    correlation, right = found["directional"]
    assert correlation > 0.99 and right == 20


@pytest.mark.parametrize("network", [jnp.float32, jnp.bfloat16])
def test_auto_takes_the_derivative_where_the_network_computes_low(network):
    params = jax.jit(init)(jax.random.key(0))
    new, loss_fn = step_of(params, 1e-4), loss_of(network, jnp.float32)
    expected = "difference" if network == jnp.float32 else "directional"
    auto, same = (
        jax.jit(lambda p, q, e=e: rewards(loss_fn, e, p, q, *ARGS))(params, new)
        for e in ("auto", expected)
    )
    np.testing.assert_array_equal(auto, same)
    with jax.enable_x64(True):
        truth = np.asarray(jax.jit(exact_rewards)(params, new, *ARGS))
    assert np.corrcoef(auto, truth)[0, 1] > 0.99


def test_bfloat16_parameters_of_which_few_move():
    """The step is what the parameters did, not what the optimizer asked for."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), jax.jit(init)(jax.random.key(0)))
    new = step_of(params, 1e-4)
    pairs = zip(*map(jax.tree.leaves, (params, new)), strict=True)
    still = [np.mean(np.asarray(a == b)) for a, b in pairs]
    assert 0.5 < np.mean(still) < 1
    loss_fn = loss_of(jnp.bfloat16, jnp.bfloat16)
    found = jax.jit(lambda p, q: rewards(loss_fn, "auto", p, q, *ARGS))(params, new)
    with jax.enable_x64(True):
        truth = np.asarray(jax.jit(exact_rewards)(params, new, *ARGS))
    assert np.corrcoef(np.asarray(found), truth)[0, 1] > 0.99


def test_the_sampler_hands_its_estimate_on():
    """One probe of `adaptive` on a bfloat16 network reports the derivative's mean and spread."""
    grid, policy = ats.discrete(1000), ats.learning.conv_beta_policy(channels=(4,), hidden=(4,))
    params = jax.jit(init)(jax.random.key(0))
    new, loss_fn = step_of(params, 1e-5), loss_of(jnp.bfloat16, jnp.float32)
    reports = {}
    for estimate in ("auto", "directional", "difference"):
        sampler = ats.adaptive(grid, policy, optax.adam(1e-3), num_buckets=4, estimate=estimate)
        state = sampler.init(jax.random.key(0), ARGS[0])

        @jax.jit
        def probed(state, sampler=sampler):
            draw = sampler.sample(jax.random.key(2), state, ARGS[0])
            extras = {"params": params, "new_params": new, "loss_fn": loss_fn, "probe": True}
            losses = jnp.zeros((BATCH,))
            return sampler.update(state, draw, losses, key=ARGS[1], batch=ARGS[0], **extras)[1]

        reports[estimate] = float(probed(state)["reward_std"])
    assert reports["auto"] == reports["directional"] != reports["difference"]


def test_bad_estimates_are_refused():
    grid, policy, tx = ats.discrete(10), ats.learning.conv_beta_policy(), optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"estimate must be one of .*'exact'"):
        ats.adaptive(grid, policy, tx, estimate="exact")
    with pytest.raises(ValueError, match=r"common_noise=False.*needs estimate='difference'"):
        ats.adaptive(grid, policy, tx, estimate="directional", common_noise=False)
