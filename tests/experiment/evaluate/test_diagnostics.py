"""Gradient noise and the effects of steps: a linear model whose gradients NumPy knows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats
from adaptive_ts.diffusion.losses import ExampleLoss
from adaptive_ts.experiment.evaluate import diagnostics

N, D = 5, 4
FEATURES = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
PARAMS = jnp.asarray([0.3, -1.2, 0.5, 0.9])


def at(params, batch, t, key, index):
    """(features[t] . params - x)^2 / 2, without noise: the gradient is residual * features[t]."""
    return 0.5 * (jnp.asarray(FEATURES)[t] @ params - batch["x"]) ** 2


LOSS = ExampleLoss(at)


def values(count, seed=1):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def residuals(x, params=PARAMS):
    """(N, count) in float64."""
    return (FEATURES.astype(np.float64) @ np.asarray(params, np.float64))[:, None] - x


@pytest.mark.parametrize(("count", "chunk"), [(12, 16), (12, 5), (7, 4)])
def test_gradient_noise_is_numpy_s_covariance(count, chunk):
    x, t = values(count), jnp.arange(N)
    found = jax.jit(
        lambda p: diagnostics.gradient_noise(
            LOSS, p, {"x": jnp.asarray(x)}, t, jax.random.key(0), chunk=chunk
        )
    )(PARAMS)
    grads = residuals(x)[:, :, None] * FEATURES[:, None]  # (N, count, D)
    variance = np.array([np.trace(np.cov(g, rowvar=False)) for g in grads])
    np.testing.assert_allclose(found.variance, variance, rtol=1e-4)
    square = (grads.mean(1) ** 2).sum(1) - variance / count
    np.testing.assert_allclose(found.mean_square, square, rtol=1e-3, atol=1e-4)


def test_a_small_spread_about_a_large_gradient_is_not_lost():
    """Mean 1e4 times the deviation: naive float32 sums of squares would give noise."""
    x = 1e4 + values(8)
    batch, key = {"x": jnp.asarray(x)}, jax.random.key(0)
    found = diagnostics.gradient_noise(LOSS, PARAMS, batch, jnp.arange(N), key)
    kept = np.asarray(x, np.float64)  # as float32 has it
    expected = kept.var(ddof=1) * (FEATURES.astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(found.variance, expected, rtol=5e-3)


def test_gradient_noise_of_the_library_s_own_loss():
    """Each example has its own noise, the same at every chunk size; against a loop of jax.grad."""
    schedule = ats.schedules.linear(100)
    loss = ats.denoising_loss(lambda p, x, t, batch, key: p[None] * x, schedule)
    batch = {"image": jax.random.normal(jax.random.key(1), (6, 3, 2, 1))}
    key, params, t = jax.random.key(2), jnp.full((3, 2, 1), 0.4), jnp.asarray([3, 60])
    found = diagnostics.gradient_noise(loss, params, batch, t, key, chunk=2)
    for k in range(2):
        grads = [
            jax.grad(
                lambda p, i=i: loss.at(
                    p, {"image": batch["image"][i : i + 1]}, t[k : k + 1], key, jnp.asarray([i])
                )[0]
            )(params)
            for i in range(6)
        ]
        expected = np.var(np.asarray(grads, np.float64), axis=0, ddof=1).sum()
        np.testing.assert_allclose(found.variance[k], expected, rtol=1e-4)


def test_one_example_has_no_variance():
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        diagnostics.gradient_noise(
            LOSS, PARAMS, {"x": jnp.zeros(1)}, jnp.arange(N), jax.random.key(0)
        )


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)])
def test_effects_of_steps(optimizer):
    """Of a quadratic: exact; momentum has built up, and is left out."""
    opt_state = optimizer.init(PARAMS)
    for _ in range(3):
        _, opt_state = optimizer.update(jnp.ones(D), opt_state, PARAMS)
    x, y = values(6), values(9, seed=2)
    found = diagnostics.step_effects(
        LOSS, optimizer, PARAMS, opt_state, {"x": jnp.asarray(x)}, {"x": jnp.asarray(y)},
        jnp.arange(N), jax.random.key(0),
    )  # fmt: skip
    steps = -0.1 * residuals(x).mean(1)[:, None] * FEATURES
    before = 0.5 * (residuals(y) ** 2).mean(1)
    after = [0.5 * (residuals(y, np.asarray(PARAMS) + s) ** 2).mean(1) for s in steps]
    np.testing.assert_allclose(found, before - np.asarray(after), rtol=1e-3, atol=1e-5)
    assert (np.diag(np.asarray(found)) > 0).sum() >= N - 1, "a step lowers mostly its own loss"
