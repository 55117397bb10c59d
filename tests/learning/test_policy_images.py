"""Where the policy and the losses find the images of other people's batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts.learning.policy import conv_beta_policy

SCHEDULE = ats.schedules.linear(10)
IMAGES = jax.random.normal(jax.random.key(0), (4, 6, 8, 3))
SMALL = {"channels": (2, 3), "hidden": (4,)}


def scores(net, batch):
    """(a, b) of a policy whose last layer is not at its zeros."""
    params = net.init(jax.random.key(1), batch)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    return np.asarray(net.apply(params, batch))


def losses(**options):
    def predict(params, x, t, batch, key):
        return params * x

    return [make(predict, SCHEDULE, **options) for make in (ats.denoising_loss, ats.vlb_loss)]


@pytest.mark.parametrize("name", ["latents", "pixel_values", "x"])
def test_by_another_name(name):
    found = scores(conv_beta_policy(image_key=name, **SMALL), {name: IMAGES})
    expected = scores(conv_beta_policy(**SMALL), {"image": IMAGES})
    np.testing.assert_array_equal(found, expected)
    args = jnp.arange(4), jax.random.key(2)
    for loss, plain in zip(losses(image_key=name), losses(), strict=True):
        expected = plain(0.5, {"image": IMAGES}, *args)
        np.testing.assert_array_equal(loss(0.5, {name: IMAGES}, *args), expected)
    total = ats.diffusion.total_bits_per_dim(
        losses(image_key=name)[1], SCHEDULE, 0.5, {name: IMAGES}, args[1], image_key=name
    )
    same = ats.diffusion.total_bits_per_dim(
        losses()[1], SCHEDULE, 0.5, {"image": IMAGES}, args[1], image=lambda batch: batch["image"]
    )
    np.testing.assert_array_equal(total, same)


def test_a_batch_without_images_is_told_what_it_has():
    said = r"holds no 'image': its keys are \['label', 'latents'\]; say .* image_key=, or by image="
    batch = {"latents": IMAGES, "label": jnp.zeros(4)}
    net = conv_beta_policy(**SMALL)
    params = net.init(jax.random.key(0), {"image": IMAGES})
    for call in (
        lambda: net.init(jax.random.key(0), batch),
        lambda: net.apply(params, batch),
        *(lambda f=f: f(0.5, batch, jnp.arange(4), jax.random.key(0)) for f in losses()),
        lambda: ats.diffusion.total_bits_per_dim(
            losses()[1], SCHEDULE, 0.5, batch, jax.random.key(0)
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    for other in (IMAGES, (IMAGES,), None):
        with pytest.raises(ValueError, match="holds no 'image': it has no keys"):
            losses()[0](0.5, other, jnp.arange(4), jax.random.key(0))


def test_one_way_to_the_images():
    options = {"image": lambda batch: batch["x"], "image_key": "x"}
    for make in (lambda: conv_beta_policy(**options), lambda: losses(**options)):
        with pytest.raises(ValueError, match="image_key='x': give one of them"):
            make()


@pytest.mark.parametrize("channels", [3, 4, 1])
def test_channels_first(channels):
    last = jax.random.normal(jax.random.key(0), (4, 6, 8, channels))
    first = {"image": jnp.moveaxis(last, -1, 1)}
    found = scores(conv_beta_policy(channel_axis=1, **SMALL), first)
    expected = scores(conv_beta_policy(**SMALL), {"image": last})
    np.testing.assert_array_equal(found, expected)
    assert np.ptp(found) > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_are_plainly_first_are_refused(channels):
    batch = {"image": jnp.zeros((4, channels, 8, 8))}
    said = rf"shape \(4, {channels}, 8, 8\), which looks like \(b, C, H, W\): say channel_axis=1"
    net = conv_beta_policy(**SMALL)
    with pytest.raises(ValueError, match=said):
        net.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=said):
        net.apply(net.init(jax.random.key(0), {"image": jnp.zeros((4, 8, 8, 1))}), batch)
    a, _ = scores(conv_beta_policy(channel_axis=3, **SMALL), batch)  # as the user says
    assert a.shape == (4,)


def test_other_axes_are_refused():
    with pytest.raises(ValueError, match=r"channel_axis must be 1 \(NCHW\), or 3 or -1 .* got 2"):
        conv_beta_policy(channel_axis=2)
