"""What `impact` takes for an optimizer's preconditioner, optimizer by optimizer, and `adaptive`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import adaptive_ts as ats
from adaptive_ts.learning.response import memory_scale, optimizer_response

pytestmark = pytest.mark.usefixtures("quick_compilation")
RATE = 1e-3
OPTIMIZERS = {
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE),
    "sgd": optax.sgd(RATE),
    "momentum": optax.sgd(RATE, momentum=0.9),
    "lion": optax.lion(RATE),
    "adafactor": optax.adafactor(RATE),
    "muon": contrib.muon(RATE),
    "schedule_free_adamw": contrib.schedule_free_adamw(RATE),
    "prodigy": contrib.prodigy(),
    "multi_steps": optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
    "masked": optax.masked(optax.adam(RATE), {"w": True, "b": True}),
    "apply_if_finite": optax.apply_if_finite(optax.adam(RATE), 3),
    "clipped": optax.chain(optax.clip_by_global_norm(1e-2), optax.adam(RATE)),
}
SHAPES = {"w": (8, 6), "b": (6,)}


def normal(seed, scale=1.0):
    """Gradients of another size in each column."""
    rng = np.random.default_rng(seed)
    sizes = 0.01 * scale * (1 + np.arange(6))
    return {k: jnp.asarray(rng.normal(size=s) * sizes, jnp.float32) for k, s in SHAPES.items()}


@functools.cache
def after(name, steps, scale=1.0):
    """(params, optimizer state) after some steps on gradients of this scale."""
    tx, params = OPTIMIZERS[name], jax.tree.map(lambda x: 10 * x, normal(0))
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, steps + 1):
        updates, state = update(normal(seed, scale), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def response(name, steps, scale=1.0, *, past=1.0):
    params, state = after(name, steps, past)
    g = normal(-1 % 997, scale)
    found = optimizer_response(OPTIMIZERS[name], g, state, params, memory_scale(state, g))
    return g, flat(found)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def correlation(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("steps", [0, 1, 5, 19])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_points_the_same_way_whatever_the_gradient_s_scale(name, steps):
    if name == "multi_steps":
        steps += (steps + 1) % 2  # before a step that moves
    g, found = response(name, steps)
    assert np.isfinite(found).all() and np.mean(found == 0) < 0.01
    assert correlation(found, -flat(g)) > 0.2  # downhill
    for scale in (1e-3, 1e3):
        assert correlation(response(name, steps, scale)[1], found) > 0.999


@pytest.mark.parametrize("past", [1e-2, 1e2])
@pytest.mark.parametrize("steps", [1, 5, 19])
@pytest.mark.parametrize("name", ["adam", "adamw", "momentum", "lion", "adafactor", "muon"])
def test_it_points_the_same_way_whatever_the_past_s_scale(name, steps, past):
    """As where a loss is scaled, or its gradient clipped, outside the optimizer."""
    assert correlation(response(name, steps, past=past)[1], response(name, steps)[1]) > 0.98


@pytest.mark.parametrize("steps", [1, 5, 19, 200])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_s_is_the_root_of_its_second_moments(name, steps):
    g, found = response(name, steps)
    nu = flat(optax.tree.get(after(name, steps)[1], "nu"))
    nu_hat = 0.999 * nu / (1 - 0.999 ** (steps + 1))
    first = (1 - 0.9) / (1 - 0.9 ** (steps + 1))
    np.testing.assert_allclose(found, -RATE * first * flat(g) / np.sqrt(nu_hat), rtol=0.1)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_gradient_descent_s_is_the_identity(name):
    g, found = response(name, 7)
    np.testing.assert_allclose(found, -RATE * flat(g), rtol=1e-4, atol=1e-9)


def test_lion_s_is_the_sign_and_muon_s_the_orthogonal_factor():
    g, found = response("lion", 19)
    np.testing.assert_array_equal(np.sign(found), -np.sign(flat(g)))
    np.testing.assert_allclose(np.abs(found), np.abs(found[0]), rtol=1e-3)
    tx, params = contrib.muon(RATE), {"w": 100 * normal(0)["w"]}
    _, state = tx.update({"w": normal(1)["w"]}, tx.init(params), params)
    g = {"w": normal(2)["w"]}
    found = optimizer_response(tx, g, state, params, memory_scale(state, g))["w"]
    u, _, v = np.linalg.svd(np.asarray(g["w"]), full_matrices=False)
    assert correlation(flat(found), -flat(u @ v)) > 0.98  # its iteration stops near it


def test_adafactor_s_is_the_root_of_its_second_moments():
    g, found = response("adafactor", 19)
    squares = flat(optax.tree.get(after("adafactor", 19)[1], "v"))
    assert correlation(found[:6], -(flat(g) / np.sqrt(squares))[:6]) > 0.999
    assert correlation(found[6:], -(flat(g) / np.sqrt(squares))[6:]) > 0.999


def test_what_is_frozen_or_accumulates_answers_nothing():
    tx = optax.multi_transform(
        {"train": optax.adam(RATE), "freeze": optax.set_to_zero()}, {"w": "freeze", "b": "train"}
    )
    params, g = normal(0), normal(1)
    _, state = tx.update(normal(2), tx.init(params), params)
    found = optimizer_response(tx, g, state, params, memory_scale(state, g))
    assert not jnp.any(found["w"]) and jnp.all(jnp.sign(found["b"]) == -jnp.sign(g["b"]))
    params, state = after("multi_steps", 2)
    found = optimizer_response(OPTIMIZERS["multi_steps"], g, state, params, memory_scale(state, g))
    assert not flat(found).any()


GRID, SCHEDULE = ats.discrete(50), ats.schedules.linear(50)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 1)), jnp.float32)}


def predict(params, x, t, batch, key):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"] + t[:, None] / 50)
    return (hidden @ params["out"]).reshape(x.shape)


LOSS = ats.denoising_loss(predict, SCHEDULE)


def trained(tx, steps, *, outside=lambda g: g, sampler=None, extra=None):
    """A tiny model; ``outside`` acts on the gradients before ``tx`` sees them."""
    k = jax.random.split(jax.random.key(0))
    params = {"in": 0.2 * jax.random.normal(k[0], (16, 8)), **(extra or {})}
    params["out"] = 0.3 * jax.random.normal(k[1], (8, 16))
    sampler = sampler or ats.impact(GRID, tx, num_buckets=10, num_examples=4, every=steps)

    @jax.jit
    def step(params, opt_state, state, key):
        keys = jax.random.split(key, 3)
        draw = sampler.sample(keys[0], state, BATCH)

        def mean_loss(params):
            losses = LOSS(params, BATCH, draw.t, keys[1])
            return jnp.mean(losses), losses

        grads, losses = jax.grad(mean_loss, has_aux=True, allow_int=True)(params)
        grads = jax.tree.map(
            lambda g, p: jnp.zeros(p.shape) if g.dtype == jax.dtypes.float0 else g, grads, params
        )
        updates, new_opt = tx.update(outside(grads), opt_state, params)
        new = optax.apply_updates(params, updates)
        state, metrics = sampler.update(
            state, draw, losses, key=keys[2], batch=BATCH, loss_fn=LOSS, params=params,
            new_params=new, opt_state=opt_state,
        )  # fmt: skip
        return new, new_opt, state, metrics

    carry = params, tx.init(params), sampler.init(jax.random.key(1), BATCH)
    for i in range(steps):
        *carry, metrics = step(*carry, jax.random.fold_in(jax.random.key(2), i))
    return carry[2], metrics


def scaled(tree):
    return jax.tree.map(lambda g: 100 * g, tree)


def clipped(tree):
    return optax.clip_by_global_norm(1e-3).update(tree, optax.EmptyState())[0]


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
@pytest.mark.parametrize("outside", [scaled, clipped], ids=["scaled", "clipped"])
def test_scaling_and_clipping_outside_the_optimizer_keep_the_law(steps, outside):
    """Adam's steps are all but the same; what it remembers is not."""
    tx = optax.adam(RATE)
    expected, _ = trained(tx, steps)
    found, metrics = trained(tx, steps, outside=outside)
    assert metrics["probed"] == 1
    assert np.corrcoef(found.impact, expected.impact)[0, 1] > 0.99


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_samplers_learn_beside_it(name):
    tx = OPTIMIZERS[name]
    if name == "masked":
        tx = optax.masked(optax.adam(RATE), {"in": True, "out": True})
    state, metrics = trained(tx, 4)
    assert metrics["probed"] == 1 and state.impact_weight == 1
    assert np.std(state.impact) > 0.01 and np.isfinite(state.impact).all()
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=(3,))
    sampler = ats.adaptive(GRID, policy, optax.adam(0.1), every=4, num_buckets=5)
    first = sampler.init(jax.random.key(1), BATCH)
    state, metrics = trained(tx, 4, sampler=sampler)
    assert metrics["probed"] == 1 and metrics["nonfinite"] == 0 and metrics["reward_std"] > 0
    assert not np.array_equal(flat(state.policy), flat(first.policy))


def test_an_optimizer_that_needs_more_is_refused_by_what_it_says():
    with pytest.raises(ValueError, match=r"missing 1 required.*'value'.*or take adaptive"):
        optimizer_response(
            contrib.momo(RATE), normal(1), contrib.momo(RATE).init(normal(0)), normal(0)
        )


def test_parameters_that_are_integers_stay():
    tx, extra = optax.adam(RATE), {"calls": jnp.int32(3)}
    plain, _ = trained(tx, 3)
    found, _ = trained(tx, 3, extra=extra)
    np.testing.assert_allclose(found.impact, plain.impact, rtol=1e-3)
