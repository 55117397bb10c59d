"""Models with operations that have a backward rule of their own: the samplers learn the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
GRID, SCHEDULE = ats.discrete(100), ats.schedules.linear(100)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)), jnp.float32)}
OPTIMIZER = optax.adam(1e-2)
PARAMS = {"in": 0.3 * jnp.ones((1, 3)), "out": 0.2 * jnp.ones((3, 1)), "bias": jnp.zeros(())}


@jax.custom_vjp
def fused_norm(x, w):
    return jnp.tanh(x @ w)


def backward(kept, g):
    x, w = kept
    g = g * (1 - jnp.tanh(x @ w) ** 2)
    return g @ w.T, jnp.einsum("bhwi,bhwo->io", x, g)


fused_norm.defvjp(lambda x, w: (fused_norm(x, w), (x, w)), backward)


def loss_of(layer, axis_name=None):
    def predict(params, x, t, batch, key):
        return layer(x, params["in"]) @ params["out"] + params["bias"]

    return ats.denoising_loss(predict, SCHEDULE, axis_name=axis_name)


def sampler_of(name, axis_name=None):
    if name == "impact":
        return ats.impact(GRID, OPTIMIZER, num_buckets=5, axis_name=axis_name)
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=(3,))
    options = {"num_buckets": 5, "estimate": "directional", "axis_name": axis_name}
    return ats.adaptive(GRID, policy, optax.sgd(1.0), **options)


def probed(name, layer, axis_name=None):
    """(first state, batch, ...) -> the state after a probe."""
    sampler, loss_fn = sampler_of(name, axis_name), loss_of(layer, axis_name)

    def update(state, batch):
        draw = sampler.sample(jax.random.key(1), state, batch)
        new = jax.tree.map(lambda p: 0.9 * p + 0.01, PARAMS)
        extras = {"params": PARAMS, "new_params": new, "opt_state": OPTIMIZER.init(PARAMS)}
        losses = jnp.zeros(draw.t.shape)
        return sampler.update(
            state, draw, losses, key=jax.random.key(2), batch=batch, loss_fn=loss_fn, probe=True,
            **extras,
        )[0]  # fmt: skip

    return update, sampler.init(jax.random.key(0), BATCH)


def assert_same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_the_same_is_learned_with_one_warning_that_names_the_operation(name):
    update, state = probed(name, lambda x, w: jnp.tanh(x @ w))
    expected = jax.jit(update)(state, BATCH)
    update, state = probed(name, fused_norm)
    with pytest.warns(UserWarning, match="custom_vjp fused_norm") as said:
        found = jax.jit(update)(state, BATCH)
    assert len({str(w.message) for w in said}) == 1
    assert_same(found, expected)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), found, state)
    assert any(jax.tree.leaves(moved._replace(step=False, report={})))


@pytest.mark.parametrize(
    ("name", "check"), [("adaptive", True), ("adaptive", False), ("impact", False)]
)
def test_inside_shard_map(mesh8, name, check):
    """With the check, reverse mode itself needs a rule that knows of it: so does impact."""
    update, state = probed(name, lambda x, w: jnp.tanh(x @ w))
    expected = jax.jit(update)(state, BATCH)
    update, state = probed(name, fused_norm, "data")
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check}
    mapped = jax.shard_map(update, mesh=mesh8, **specs)
    with pytest.warns(UserWarning, match="fused_norm"):
        assert_same(jax.jit(mapped)(state, BATCH), expected)


def test_without_shortcut_where_forward_mode_goes(recwarn):
    update, state = probed("impact", lambda x, w: jnp.tanh(x @ w))
    jax.jit(update)(state, BATCH)
    assert not [w for w in recwarn.list if "forward-mode" in str(w.message)]
