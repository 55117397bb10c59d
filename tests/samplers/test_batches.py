"""How many examples a batch has, and what of it belongs to none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats
from adaptive_ts import collectives

GRID = ats.discrete(50)
IMAGES = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
CLASSES = jnp.linspace(-1, 1, 40).reshape(10, 4)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGES},
        {"image": np.zeros((8, 2)), "label": jnp.zeros((8,), jnp.int32)},
        {"image": jax.ShapeDtypeStruct((8, 2), jnp.float32)},
        {"scale": 0.5, "step": np.int32(3), "image": IMAGES, "key": jax.random.key(0)},
        IMAGES,
    ],
)
def test_what_all_leaves_agree_on(batch):
    assert collectives.batch_size(batch) == 8


@pytest.mark.parametrize("leaf", [CLASSES, np.zeros((1, 3), np.float32)])
def test_leaves_that_do_not_agree_are_named(leaf):
    batch = {"image": IMAGES, "classes": leaf}
    said = (
        rf"\['classes'\] has shape \({leaf.shape[0]}, {leaf.shape[1]}\), \['image'\] "
        r"\(8, 4, 4, 1\); give `sample` only .* such as \{\"image\": batch\[\"image\"\]\}"
    )
    for sampler in (ats.uniform(GRID), ats.loss_second_moment(GRID), ats.curriculum(GRID)):
        state = sampler.init(jax.random.key(0), batch)
        with pytest.raises(ValueError, match=said):
            sampler.sample(jax.random.key(1), state, batch)
        assert sampler.sample(jax.random.key(1), state, {"image": IMAGES}).t.shape == (8,)


def test_a_batch_without_examples():
    with pytest.raises(ValueError, match="whose leading axis is the example"):
        collectives.batch_size({"scale": 0.5})


def samplers_that_probe():
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=(3,))
    options = {"every": 1, "num_buckets": 4}
    return {
        "adaptive": ats.adaptive(GRID, policy, optax.sgd(0.1), num_selected=2, **options),
        "impact": ats.impact(GRID, optax.sgd(0.1), num_examples=2, **options),
    }


@pytest.mark.parametrize("name", ["adaptive", "impact"])
@pytest.mark.parametrize("jitted", [True, False])
def test_what_the_whole_batch_shares_may_come_to_update(name, jitted):
    """As the batch's, it is what it is in the loss's closure."""
    sampler = samplers_that_probe()[name]

    def loss_of(classes, scale):
        def loss_fn(params, batch, t, key):
            shared, factor = classes(batch), scale(batch)
            level = jnp.sum(shared**2, axis=0)[t % 4]
            return factor * level * jnp.mean((params * batch["image"] - 0.3) ** 2, (1, 2, 3))

        return loss_fn

    images = {"image": IMAGES}
    state = sampler.init(jax.random.key(0), images)
    draw = sampler.sample(jax.random.key(1), state, images)

    def updated(batch, loss_fn):
        return sampler.update(
            state, draw, jnp.ones(8), key=jax.random.key(2), batch=batch, loss_fn=loss_fn,
            params=jnp.float32(1.0), new_params=jnp.float32(0.9),
            opt_state=optax.sgd(0.1).init(jnp.float32(1.0)), probe=True,
        )[0]  # fmt: skip

    wrap = jax.jit if jitted else lambda f: f
    shared = {"classes": CLASSES, "scale": 2.0, "image": IMAGES, "host": np.ones(3, np.float32)}
    own = loss_of(lambda batch: batch["classes"], lambda batch: batch["scale"])
    closed = loss_of(lambda batch: CLASSES, lambda batch: 2.0)
    found = wrap(lambda batch: updated(batch, own))(shared)
    expected = wrap(lambda batch: updated(batch, closed))(images)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).sum()), expected, state)
    assert sum(jax.tree.leaves(moved)) > 1  # the probe has learned something
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), found, expected
    )


def test_on_several_devices_a_batch_is_the_device_s_own(mesh8):
    sampler = ats.uniform(GRID, axis_name="data")
    rows = jax.sharding.PartitionSpec("data")

    def draw(batch):
        assert collectives.batch_size(batch) == 2
        return sampler.sample(jax.random.key(1), (), batch).t

    whole = {"image": jnp.zeros((16, 2))}
    found = jax.shard_map(draw, mesh=mesh8, in_specs=rows, out_specs=rows)(whole)
    np.testing.assert_array_equal(found, ats.uniform(GRID).sample(jax.random.key(1), (), whole).t)


@pytest.mark.parametrize("name", ["adaptive", "impact"])
@pytest.mark.parametrize("shape", [(8,), (8, 4, 4, 1)])
def test_a_loss_that_closes_over_the_batch_is_told(name, shape):
    """A probe hands it a batch of one, which its closure would broadcast to eight."""
    values = jnp.ones(shape)

    def loss_fn(params, batch, t, key):
        error = params * batch["image"] - values.reshape(8, *shape[1:], *(1,) * (4 - len(shape)))
        return jnp.mean(error**2, (1, 2, 3))

    sampler, batch = samplers_that_probe()[name], {"image": IMAGES}
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    said = r"one loss per example, shape \(1,\), got \(8,\); a probe .* `batch`, not by its closure"
    for probe in (True, None):
        with pytest.raises(ValueError, match=said):
            sampler.update(
                state, draw, jnp.ones(8), key=jax.random.key(2), batch=batch, loss_fn=loss_fn,
                params=jnp.float32(1.0), new_params=jnp.float32(0.9),
                opt_state=optax.sgd(0.1).init(jnp.float32(1.0)), probe=probe,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_a_mean_loss_is_refused(name):
    sampler, batch = samplers_that_probe()[name], {"image": IMAGES}
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    with pytest.raises(ValueError, match=r"got \(\); leave the mean over the batch to the caller"):
        sampler.update(
            state, draw, jnp.ones(8), key=jax.random.key(2), batch=batch,
            loss_fn=lambda params, batch, t, key: jnp.mean(params * batch["image"]),
            params=jnp.float32(1.0), new_params=jnp.float32(0.9),
            opt_state=optax.sgd(0.1).init(jnp.float32(1.0)), probe=True,
        )  # fmt: skip
