"""U-ViT: the authors' outputs for the same weights, sizes, precision, classes, initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import (
    abstract_params,
    assert_bfloat16_is_close,
    assert_remat_changes_nothing,
    seeded,
    shapes_of,
    size_of,
)

from adaptive_ts.experiment.models.convert import from_torch
from adaptive_ts.experiment.models.uvit import UViT

SMALL = UViT(hidden_size=32, depth=4, num_heads=4, num_classes=10)


def torch_shapes():
    """name in the authors' state dict -> shape, of SMALL on images (8, 8, 4)."""
    shapes = {
        "pos_embed": (1, 18, 32),
        "label_emb.weight": (11, 32),
        "patch_embed.proj.weight": (32, 4, 2, 2),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "decoder_pred.weight": (16, 32),
        "decoder_pred.bias": (16,),
        "final_layer.weight": (4, 4, 3, 3),
        "final_layer.bias": (4,),
    }
    for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
        modules = {
            "norm1": (32,),
            "attn.proj": (32, 32),
            "norm2": (32,),
            "mlp.fc1": (128, 32),
            "mlp.fc2": (32, 128),
        }
        if block.startswith("out"):
            modules["skip_linear"] = (32, 64)
        for name, shape in modules.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes[f"{block}.attn.qkv.weight"] = (96, 32)
    return shapes


@pytest.fixture
def reference(golden):
    """(parameters, (x, t, label), output)"""
    arrays = golden("uvit_small")
    x, out = (arrays[name].transpose(0, 2, 3, 1) for name in ("x", "out"))
    inputs = x, arrays["t"], arrays["y"].astype(np.int32)
    return from_torch("uvit", seeded(torch_shapes(), 5, 0.1)), inputs, out


def test_equal_to_the_authors_implementation(reference):
    params, inputs, expected = reference
    assert shapes_of(params) == shapes_of(abstract_params(SMALL, inputs[0].shape))
    out = jax.jit(SMALL.apply)({"params": params}, *inputs)
    assert out.dtype == jnp.float32 and 10 in inputs[2]
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(reference):
    params, inputs, expected = reference
    assert_bfloat16_is_close(SMALL, params, inputs, expected)


def test_remat_changes_nothing(reference, quick_compilation):
    params, inputs, _ = reference
    assert_remat_changes_nothing(SMALL.clone(depth=2, class_dropout=0.5), params, inputs)


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (UViT(), (1, 32, 32, 3), 44_255_328),
        (UViT(2, 1024, 20, 16, num_classes=1000, conv=False), (1, 32, 32, 4), 286_763_024),
    ],
    ids=["CIFAR-10 S/2", "ImageNet L/2"],
)
def test_parameter_counts_of_the_authors_configurations(model, shape, count):
    assert size_of(abstract_params(model, shape)) == count


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"qkv_bias": True}, 5 * 96),
        ({"mlp_time_embed": True}, 2 * 4 * 32 * 32 + 5 * 32),
        ({"conv": False}, -(9 * 4 * 4 + 4)),
        ({"num_classes": None}, -(11 + 1) * 32),
    ],
)
def test_options(fields, more):
    counts = [size_of(abstract_params(m, (1, 8, 8, 4))) for m in (SMALL, SMALL.clone(**fields))]
    assert counts[1] - counts[0] == more


def test_the_null_class_is_what_training_sees_of_a_dropped_label(reference, quick_compilation):
    params, (x, t, label), _ = reference
    model = SMALL.clone(class_dropout=1.0)

    @functools.partial(jax.jit, static_argnames="train")
    def out(label, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, x, t, label, train=train, rngs=rngs)

    null, given = out(jnp.full(2, 10), False), out(label, False)
    np.testing.assert_allclose(out(label, True), null, atol=1e-6)
    changed = np.abs(null - given).max(axis=(1, 2, 3)) > 1e-4
    np.testing.assert_array_equal(changed, label != 10)


def test_initialised_as_the_authors_do(quick_compilation):
    x, t = jnp.ones((1, 8, 8, 4)), jnp.zeros(1, jnp.int32)
    fresh = jax.jit(SMALL.clone(depth=2).init)(jax.random.key(0), x, t, t)["params"]
    block = fresh["out_0"]
    dense = [block["skip"], block["attention"]["project_in"], block["mlp"]["fc1"], fresh["out"]]
    for normal in [fresh["position"], *(module["kernel"] for module in dense)]:
        assert np.std(normal) == pytest.approx(0.02, rel=0.1)
    assert np.std(fresh["class_embed"]["embedding"]) == pytest.approx(1, rel=0.15)
    for module, fan_in in ((fresh["patch_embed"], 16), (fresh["out_conv"], 36)):
        for leaf in jax.tree.leaves(module):
            assert 0.5 < np.abs(leaf).max() * np.sqrt(fan_in) <= 1
        assert np.abs(module["kernel"]).max() * np.sqrt(fan_in) > 0.98


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 8, 9, 4), r"sides divisible by patch_size=2, got shape \(2, 8, 9, 4\)"),
        ({"num_heads": 5}, (1, 8, 8, 4), "hidden_size must be divisible by num_heads=5, got 32"),
        ({"depth": 3}, (1, 8, 8, 4), "depth .*must be even, got 3"),
    ],
)
def test_errors_of_fields_and_images(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(SMALL.clone(**fields), shape)


def test_parameters_are_for_one_size(reference):
    params, (x, t, label), _ = reference
    for images, labels, model in (
        (x[:, :4], label, SMALL),
        (x, None, SMALL.clone(num_classes=None)),
    ):
        with pytest.raises(ValueError, match=r"parameters are for 18 tokens, .*of (10|17)"):
            model.apply({"params": params}, images, t, labels)
    with pytest.raises(ValueError, match="num_classes=10, got label=None"):
        SMALL.apply({"params": params}, x, t)
