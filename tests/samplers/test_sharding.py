"""8 devices == 1 device; shard_map and pmap with an axis name == the global view."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE, STEPS, EVERY = 16, 20, 2
IMAGES = np.random.default_rng(0).uniform(-1, 1, (STEPS, SIZE, 8, 8, 1)).astype(np.float32)
SCHEDULE = ats.schedules.linear(1000)


def predict(params, x, t, batch, key):
    """A small network of the noisy image and the noise level."""
    b = x.shape[0]
    level = jnp.stack([SCHEDULE.alpha(t), SCHEDULE.sigma(t)], axis=1)
    h = jnp.concatenate([x.reshape(b, -1), level], axis=1)
    h = jax.nn.silu(h @ params["in"])
    return x * params["skip"] + (h @ params["out"]).reshape(x.shape)


def init_params():
    k1, k2 = jax.random.split(jax.random.key(42))
    return {
        "in": jax.random.normal(k1, (66, 32)) / 8,
        "out": jax.random.normal(k2, (32, 64)) / 20,
        "skip": jnp.float32(0.9),
    }


def make_step(axis_name, bucket_sharding=None):
    """The train step of a user: plain SGD-like Adam on the sampler's timesteps."""
    sampler = ats.adaptive(
        ats.discrete(1000),
        ats.learning.conv_beta_policy(channels=(4, 8), hidden=(16,)),
        optax.adam(1e-3),
        every=EVERY,
        num_buckets=24,
        axis_name=axis_name,
        bucket_sharding=bucket_sharding,
    )
    loss_fn = ats.denoising_loss(predict, SCHEDULE, axis_name=axis_name)
    vlb = ats.vlb_loss(predict, SCHEDULE, axis_name=axis_name)
    optimizer = optax.adam(1e-2)

    def mean(x):
        return x if axis_name is None else jax.lax.pmean(x, axis_name)

    def step(carry, batch, key, probe=None):
        params, opt_state, state = carry
        k_draw, k_loss, k_update = jax.random.split(key, 3)
        draw = sampler.sample(k_draw, state, batch)

        def mean_loss(params):
            losses = loss_fn(params, batch, draw.t, k_loss)
            return mean(jnp.mean(draw.weight * losses)), losses

        grads, losses = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(mean(grads), opt_state, params)
        new = optax.apply_updates(params, updates)
        state, metrics = sampler.update(
            state, draw, losses, key=k_update, batch=batch, loss_fn=vlb,
            params=params, new_params=new, probe=probe,
        )  # fmt: skip
        return (new, opt_state, state), (draw.t, losses, metrics, state.selected)

    params = init_params()
    batch = {"image": jax.ShapeDtypeStruct((SIZE, 8, 8, 1), jnp.float32)}
    first = params, optimizer.init(params), sampler.init(jax.random.key(1), batch)
    return step, first


def train(step, carry, put=lambda x: x):
    history = []
    for i in range(STEPS):
        probe = (i + 1) % EVERY == 0
        batch = put({"image": IMAGES[i]})
        carry, seen = step(carry, batch, jax.random.fold_in(jax.random.key(2), i), probe)
        history.append(jax.tree.map(np.asarray, seen))
    return carry, history


@functools.cache
def on_one_device():  # no fixture of the module, which would not be compiled quickly
    step, first = make_step(None)
    return train(jax.jit(step, static_argnums=3), first)


def assert_same(found, expected):
    (carry, history), (carry1, history1) = found, expected
    for (t, losses, metrics, selected), (t1, losses1, metrics1, selected1) in zip(
        history, history1, strict=True
    ):
        np.testing.assert_array_equal(t.ravel(), t1)
        np.testing.assert_array_equal(selected.reshape(-1, selected1.size)[0], selected1)
        np.testing.assert_allclose(losses.ravel(), losses1, rtol=1e-5)
        for name, value in metrics1.items():
            np.testing.assert_allclose(
                np.ravel(metrics[name])[0], value, rtol=1e-3, atol=1e-5, err_msg=name
            )
    probes = sum(int(seen[2]["probed"]) for seen in history1)
    assert probes >= 8 and len({tuple(seen[3]) for seen in history1}) > 3
    chex.assert_trees_all_close(carry[0], carry1[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(False, marks=pytest.mark.slow, id="profile_replicated"),
        pytest.param(True, id="profile_shared"),
    ],
)
def test_global_view_on_eight_devices_equals_one(mesh8, shared):
    rows, whole = NamedSharding(mesh8, P("data")), NamedSharding(mesh8, P())
    step, first = make_step(None, rows if shared else None)
    jitted = jax.jit(step, static_argnums=3)
    found = train(jitted, jax.device_put(first, whole), lambda batch: jax.device_put(batch, rows))
    assert_same(found, on_one_device())


@pytest.mark.slow  # the counter's probes below, and pmap's chosen ones, are of the same functions
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_global_view(mesh8, check_vma):
    step, first = make_step("data")
    specs = {"in_specs": (P(), P("data"), P()), "check_vma": check_vma, "mesh": mesh8}
    rows = (P("data"), P("data"), P(), P())
    variants = {
        probe: jax.jit(
            jax.shard_map(
                lambda c, b, k, probe=probe: step(c, b, k, probe), out_specs=(P(), rows), **specs
            )
        )
        for probe in (True, False)
    }
    assert_same(train(lambda c, b, k, p: variants[p](c, b, k), first), on_one_device())


def test_shard_map_with_the_sampler_s_own_counter(mesh8):
    step, first = make_step("data")
    counted = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh8,
            in_specs=(P(), P("data"), P()),
            out_specs=(P(), (P("data"), P("data"), P(), P())),
        )
    )
    assert_same(train(lambda c, b, k, p: counted(c, b, k), first), on_one_device())


def test_pmap_equals_global_view():
    step, first = make_step("data")
    variants = {
        probe: jax.pmap(
            lambda c, b, k, probe=probe: step(c, b, k, probe),
            axis_name="data",
            in_axes=(0, 0, None),
        )
        for probe in (True, False)
    }
    spread = jax.tree.map(lambda x: jnp.stack([x] * 8), first)

    def split(batch):
        return jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)

    carry, history = train(lambda c, b, k, p: variants[p](c, b, k), spread, split)
    carry = jax.tree.map(lambda x: x[0], carry)
    assert_same((carry, history), on_one_device())


def test_stratified_uses_the_global_batch(mesh8):
    grid = ats.discrete(1600)
    whole = ats.uniform(grid, stratified=True)
    local = ats.uniform(grid, stratified=True, axis_name="data")
    batch = {"image": jnp.zeros((16, 8, 8, 1))}
    mapped = jax.shard_map(
        lambda key, batch: local.sample(key, (), batch).t,
        mesh=mesh8,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    t = mapped(jax.random.key(0), batch)
    np.testing.assert_array_equal(t, whole.sample(jax.random.key(0), (), batch).t)
    assert sorted(np.asarray(t) // 100) == list(range(16))


def test_mixture_and_weights_under_shard_map(mesh8):
    grid, batch = ats.discrete(1000), {"image": jnp.zeros((16, 8, 8, 1))}

    def make(axis_name):
        base = ats.adaptive(
            grid, ats.learning.conv_beta_policy(channels=(4,), hidden=()), optax.adam(1.0),
            axis_name=axis_name,
        )  # fmt: skip
        return ats.importance_weighted(ats.mixed_with_uniform(base, 0.5, axis_name=axis_name))

    state = make(None).init(jax.random.key(0), batch)
    expected = jax.jit(make(None).sample)(jax.random.key(1), state, batch)
    mapped = jax.jit(
        jax.shard_map(
            make("data").sample, mesh=mesh8, in_specs=(P(), P(), P("data")), out_specs=P("data")
        )
    )
    found = mapped(jax.random.key(1), state, batch)
    np.testing.assert_array_equal(found.t, expected.t)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-5)
