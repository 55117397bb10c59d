"""The U-Net: the reference implementation's outputs for the same weights, sizes, precision.

Also what the tests of the other models share.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_ts.experiment.models.convert import from_torch
from adaptive_ts.experiment.models.unet import UNet, conv_of_doubled, timestep_embedding

SMALL = UNet(channels=32, multipliers=(1, 2), res_blocks=1, attention=(False, True))

# The torch state dict of the golden's network: module -> shape of its weight. Biases have the
# length of the first axis.
_RES = {
    "down.0.0": (32, 32),
    "down.1.0.0": (32, 64),
    "middle.0": (64, 64),
    "middle.2": (64, 64),
    "up.0.0": (96, 32),
    "up.0.1": (64, 32),
    "up.1.0.0": (128, 64),
    "up.1.1.0": (96, 64),
}
_ATTENTION = ("down.1.0.1", "middle.1", "up.1.0.1", "up.1.1.1")
_OTHER = {
    "embed.0": (128, 32),
    "embed.2": (128, 128),
    "in_conv": (32, 3, 3, 3),
    "down.0.1.1": (32, 32, 3, 3),
    "up.1.2.1": (64, 64, 3, 3),
    "out_conv.0": (32,),
    "out_conv.2": (3, 32, 3, 3),
}


def torch_shapes():
    """name in the reference's state dict -> shape."""
    modules = dict(_OTHER)
    for name, (inputs, width) in _RES.items():
        modules |= {
            f"{name}.norm1": (inputs,),
            f"{name}.conv1": (width, inputs, 3, 3),
            f"{name}.fc": (width, 128),
            f"{name}.norm2": (width,),
            f"{name}.conv2": (width, width, 3, 3),
        }
        if inputs != width:
            modules[f"{name}.skip"] = (width, inputs, 1, 1)
    for name in _ATTENTION:
        modules |= {
            f"{name}.norm": (64,),
            f"{name}.project_in": (192, 64, 1, 1),
            f"{name}.project_out": (64, 64, 1, 1),
        }
    shapes = {}
    for name, shape in modules.items():
        full = re.sub(r"^(down|up)\.", r"\1samples.level_", name)
        shapes |= {f"{full}.weight": shape, f"{full}.bias": shape[:1]}
    return shapes


def seeded(shapes, seed, scale):
    """A golden's weights, by its rule."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * scale).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def shapes_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_params(model, shape, **options):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = label = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    if getattr(model, "num_classes", None) is not None:
        options = {"label": label} | options
    return jax.eval_shape(model.init, jax.random.key(0), x, t, **options)["params"]


def assert_bfloat16_is_close(model, params, inputs, expected):
    """Parameters, softmax and norms stay float32; the output is coarser, and not wrong."""
    model = model.clone(dtype=jnp.bfloat16)
    kept = abstract_params(model, inputs[0].shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
    traced = jax.jit(model.apply).trace({"params": params}, *inputs)
    text = str(traced.jaxpr)
    assert set(re.findall(r":(\w+)\[[^\]]*\] = (?:exp|rsqrt)\b", text)) == {"f32"}
    assert set(re.findall(r":(\w+)\[[^\]]*\] = conv_general_dilated\b", text)) == {"bf16"}
    out = traced.lower().compile()({"params": params}, *inputs)
    assert out.dtype == jnp.float32
    error = np.abs(np.asarray(out) - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < 0.05


def assert_remat_changes_nothing(model, params, inputs):
    """In training, with dropout: the same parameters, outputs and gradients."""
    found = []
    for one in (model, model.clone(remat=True)):

        def loss(params, one=one):
            rngs = {"dropout": jax.random.key(1)}
            out = one.apply({"params": params}, *inputs, train=True, rngs=rngs)
            return jnp.sum(jnp.sin(out)), out

        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
        assert ("remat" in str(traced.jaxpr)) == one.remat
        (_, out), gradient = traced.lower().compile()(params)
        found.append((out, gradient, shapes_of(abstract_params(one, inputs[0].shape))))
    (out, gradient, shapes), (remat_out, remat_gradient, remat_shapes) = found
    assert remat_shapes == shapes
    np.testing.assert_allclose(remat_out, out, atol=1e-5)
    for other, leaf in zip(*map(jax.tree.leaves, (remat_gradient, gradient)), strict=True):
        np.testing.assert_allclose(other, leaf, atol=1e-5 * max(1, np.abs(leaf).max()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-2


@pytest.fixture
def reference(golden):
    arrays = golden("ddpm_unet_small")
    images = {name: arrays[name].transpose(0, 2, 3, 1) for name in ("x", "out")}
    params = from_torch("unet", seeded(torch_shapes(), 1, 0.05))
    return params, {**images, "t": arrays["t"].astype(np.int32)}


def test_the_reference_weights_fill_our_tree(reference):
    params, arrays = reference
    assert shapes_of(params) == shapes_of(abstract_params(SMALL, arrays["x"].shape))


def test_equal_to_the_reference_implementation(reference):
    params, arrays = reference
    out = jax.jit(SMALL.apply)({"params": params}, arrays["x"], arrays["t"])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, arrays["out"], atol=1e-6)
    assert np.abs(arrays["out"]).max() > 0.1


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(reference):
    params, arrays = reference
    assert_bfloat16_is_close(SMALL, params, (arrays["x"], arrays["t"]), arrays["out"])


@pytest.mark.slow
def test_remat_changes_nothing():
    model = UNet(channels=4, multipliers=(1, 1), res_blocks=1, attention=(False, True), dropout=0.5)
    x, t = jnp.ones((2, 4, 4, 1)), jnp.arange(2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.standard_normal(p.shape, np.float32) / 4, abstract_params(model, x.shape)
    )
    assert_remat_changes_nothing(model, params, (x, t))


@pytest.mark.parametrize(
    ("options", "side", "count"),
    [
        ({"multipliers": (1, 2, 2, 2), "attention": (False, True, False, False)}, 32, 35_746_307),
        (
            {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (False,) * 4 + (True, False)},
            256,
            113_673_219,
        ),
    ],
)
def test_parameter_counts_of_the_reference_configurations(options, side, count):
    params = abstract_params(UNet(channels=128, res_blocks=2, **options), (1, side, side, 3))
    assert size_of(params) == count


def test_dropout_needs_train_and_a_key():
    model = UNet(channels=4, multipliers=(1,), res_blocks=1, attention=(True,), dropout=0.5)
    x, t = jnp.ones((2, 3, 5, 1)), jnp.arange(2)  # one level: any size

    @functools.partial(jax.jit, static_argnames="train")
    def apply(params, key, train):
        return model.apply({"params": params}, x, t, train=train, rngs={"dropout": key})

    rng = np.random.default_rng(0)
    params = abstract_params(model, x.shape)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), params)

    def out(key, train=True):
        return np.asarray(apply(params, jax.random.key(key), train))

    np.testing.assert_array_equal(out(0, False), out(1, False))
    np.testing.assert_array_equal(out(0), out(0))
    assert np.abs(out(0) - out(1)).max() > 1e-3 and np.abs(out(0) - out(0, False)).max() > 1e-3


def test_timestep_embedding():
    embedding = np.asarray(timestep_embedding(jnp.array([0, 7]), 5))
    frequency = 10000.0 ** -np.array([0.0, 1.0])
    np.testing.assert_allclose(embedding[0], [0, 0, 1, 1, 0])
    expected = [*np.sin(7 * frequency), *np.cos(7 * frequency), 0]
    np.testing.assert_allclose(embedding[1], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 16, 18, 3), (16, 16, 3)])
def test_sides_that_cannot_be_halved(shape):
    model = UNet(channels=4, multipliers=(1, 1, 1), res_blocks=1, attention=(False,) * 3)
    with pytest.raises(ValueError, match=r"sides divisible by 4 \(3 levels\), got shape"):
        abstract_params(model, shape)


def test_attention_needs_an_entry_per_level():
    model = UNet(channels=4, multipliers=(1, 1), attention=(True,))
    with pytest.raises(ValueError, match="one entry per level, 2"):
        abstract_params(model, (1, 8, 8, 1))


def test_a_label_has_no_use():
    with pytest.raises(ValueError, match=r"unconditional, got a label of shape \(1,\); pass"):
        abstract_params(SMALL, (1, 8, 8, 3), label=jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 1, 5, 2)])
def test_the_convolution_of_doubled_pixels(shape):
    def doubled_first(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        labels = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=labels)

    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (
        jax.random.normal(k, s) for k, s in zip(keys, (shape, (3, 3, shape[-1], 4)), strict=False)
    )
    found, back = jax.vjp(conv_of_doubled, x, kernel)
    right, right_back = jax.vjp(doubled_first, x, kernel)
    assert found.shape == (shape[0], 2 * shape[1], 2 * shape[2], 4)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5)
    along = jax.random.normal(keys[2], found.shape)
    for ours, theirs in zip(back(along), right_back(along), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-5)
