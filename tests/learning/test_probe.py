"""The probe against closed forms, loops, and itself on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)}
OLD, NEW = jnp.asarray([0.3, -0.2, 0.5]), jnp.asarray([0.2, -0.1, 0.1])


def noisy_loss(params, batch, t, key):
    """A caller's own loss: noise from the one key, by the shape of the batch."""
    noise = jax.random.normal(key, batch["x"].shape)
    level = (1 + t.astype(jnp.float32))[:, None] / 10
    return jnp.mean((params[None] * batch["x"] - level * noise) ** 2, axis=1)


def indexed_loss(axis_name=None):
    """A loss in the manner of the library's own, folding by example index."""

    def at(params, batch, t, key, index):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))(keys)
        level = (1 + t.astype(jnp.float32))[:, None] / 10
        return jnp.mean((params[None] * batch["x"] - level * noise) ** 2, axis=1)

    return ats.ExampleLoss(at, axis_name)


def test_decrease_on_batch_closed_form():
    key, taus = jax.random.key(1), jnp.asarray([2, 7])
    found = ats.learning.decrease_on_batch(noisy_loss, OLD, NEW, BATCH, taus, key)
    noise, x = np.asarray(jax.random.normal(key, (16, 3))), np.asarray(BATCH["x"])
    for row, tau in zip(np.asarray(found), [2, 7], strict=True):
        level = (1 + tau) / 10
        before = ((np.asarray(OLD) * x - level * noise) ** 2).mean(1)
        after = ((np.asarray(NEW) * x - level * noise) ** 2).mean(1)
        np.testing.assert_allclose(row, before - after, rtol=1e-4, atol=1e-6)


def test_relative_decrease_is_of_the_logarithm():
    key, taus = jax.random.key(1), jnp.asarray([4])
    found = ats.learning.decrease_on_batch(noisy_loss, OLD, NEW, BATCH, taus, key, relative=True)
    t = jnp.full((16,), 4)
    before, after = (noisy_loss(p, BATCH, t, key) for p in (OLD, NEW))
    np.testing.assert_allclose(found[0], np.log(before / after), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_fn", [noisy_loss, indexed_loss()])
@pytest.mark.parametrize("common_noise", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_profile_is_a_loop_over_buckets(loss_fn, common_noise, chunk):
    example = {"x": BATCH["x"][3:4]}
    taus, key = jnp.arange(0, 50, 5), jax.random.key(2)
    options = {"common_noise": common_noise}
    found = ats.learning.decrease_profile(
        loss_fn, OLD, NEW, example, taus, key, chunk=chunk, **options
    )
    whole = ats.learning.decrease_profile(loss_fn, OLD, NEW, example, taus, key, **options)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    if common_noise:
        for value, tau in zip(found, taus, strict=True):
            before, after = (loss_fn(p, example, tau[None], key)[0] for p in (OLD, NEW))
            np.testing.assert_allclose(value, before - after, rtol=1e-5, atol=1e-5)
    else:
        assert (
            np.std(found - ats.learning.decrease_profile(loss_fn, OLD, NEW, example, taus, key))
            > 1e-2
        )


@pytest.mark.parametrize("num", [8, 10, 3])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_devices_share_the_buckets(mesh8, num, chunk):
    example, key = {"x": BATCH["x"][3:4]}, jax.random.key(2)
    taus = jnp.arange(num) * 7
    expected = ats.learning.decrease_profile(indexed_loss(), OLD, NEW, example, taus, key)

    def local(example):
        return ats.learning.decrease_profile(
            indexed_loss("data"), OLD, NEW, example, taus, key, chunk=chunk, axis_name="data"
        )

    mapped = jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=P(), out_specs=P()))
    np.testing.assert_allclose(mapped(example), expected, rtol=1e-5, atol=1e-5)

    sharding = NamedSharding(mesh8, P("data"))
    constrained = jax.jit(
        lambda example: ats.learning.decrease_profile(
            indexed_loss(), OLD, NEW, example, taus, key, chunk=chunk, sharding=sharding
        )
    )
    np.testing.assert_allclose(constrained(example), expected, rtol=1e-5, atol=1e-5)


def test_sharing_in_global_view_divides_the_work(mesh8):
    weights = jnp.ones((256, 256))

    def loss_fn(params, batch, t, key):
        h = batch["x"] + t.astype(jnp.float32)[:, None]
        for _ in range(4):
            h = h @ params
        return jnp.mean(h, axis=1)

    example, taus = {"x": jnp.ones((1, 256))}, jnp.arange(64)

    def flops(sharding):
        whole = NamedSharding(mesh8, P())
        profile = jax.jit(
            lambda p, q, x: ats.learning.decrease_profile(
                loss_fn, p, q, x, taus, jax.random.key(0), sharding=sharding
            ),
            in_shardings=whole,
            out_shardings=whole,
        )
        compiled = profile.lower(weights, 2 * weights, example).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(NamedSharding(mesh8, P("data"))) < flops(None) / 7


def test_batch_on_eight_devices(mesh8):
    taus, key = jnp.asarray([1, 30]), jax.random.key(5)
    expected = ats.learning.decrease_on_batch(indexed_loss(), OLD, NEW, BATCH, taus, key)

    def local(loss_fn, batch):
        return ats.learning.decrease_on_batch(loss_fn, OLD, NEW, batch, taus, key, axis_name="data")

    specs = {"mesh": mesh8, "in_specs": P("data"), "out_specs": P(None, "data")}
    mapped = jax.jit(jax.shard_map(lambda b: local(indexed_loss("data"), b), **specs))
    np.testing.assert_allclose(mapped(BATCH), expected, rtol=1e-5, atol=1e-5)

    seen = []

    def recording(params, batch, t, key):
        seen.append(jax.random.normal(key, ()))
        return noisy_loss(params, batch, t, key) + seen[-1]

    own = jax.jit(jax.shard_map(lambda b: local(recording, b), **specs))(BATCH)
    assert own.shape == (2, 16)
    same = {"x": jnp.tile(BATCH["x"][:2], (8, 1))}
    rows = np.asarray(jax.jit(jax.shard_map(lambda b: local(noisy_loss, b), **specs))(same)[0])
    # A plain normal(key, x.shape) must differ from device to device.
    assert len(np.unique(rows[::2].round(6))) == 8


def test_loss_that_is_not_per_example_is_refused():
    def mean_loss(params, batch, t, key):
        return jnp.mean(batch["x"])

    args = mean_loss, OLD, NEW, BATCH, jnp.asarray([1]), jax.random.key(0)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(16,\), got \(\)"):
        ats.learning.decrease_on_batch(*args)
