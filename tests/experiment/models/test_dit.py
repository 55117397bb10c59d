"""DiT: the authors' outputs for the same weights, sizes, precision, classes, initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_models import (
    abstract_params,
    assert_bfloat16_is_close,
    assert_remat_changes_nothing,
    seeded,
    shapes_of,
    size_of,
)

from adaptive_ts.experiment.models.convert import from_torch
from adaptive_ts.experiment.models.dit import DiT, position_embedding, split_variance
from adaptive_ts.experiment.models.parts import ClassEmbedding, cos_sin_embedding

SMALL = DiT(hidden_size=48, depth=2, num_heads=4, num_classes=10, learn_sigma=True)
TINY = DiT(hidden_size=4, depth=1, num_heads=1, mlp_ratio=1)


def torch_shapes():
    """name in the authors' state dict -> shape, of SMALL on images of 4 channels."""
    modules = {
        "x_embedder.proj": (48, 4, 2, 2),
        "t_embedder.mlp.0": (48, 256),
        "t_embedder.mlp.2": (48, 48),
        "final_layer.adaLN_modulation.1": (96, 48),
        "final_layer.linear": (32, 48),
    }
    for i in range(2):
        modules |= {
            f"blocks.{i}.adaLN_modulation.1": (288, 48),
            f"blocks.{i}.attn.qkv": (144, 48),
            f"blocks.{i}.attn.proj": (48, 48),
            f"blocks.{i}.mlp.fc1": (192, 48),
            f"blocks.{i}.mlp.fc2": (48, 192),
        }
    shapes = {"y_embedder.embedding_table.weight": (11, 48)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.fixture
def reference(golden):
    """(parameters, (x, t, label), output, the authors' position embedding)"""
    arrays = golden("dit_small")
    state = {**seeded(torch_shapes(), 3, 0.1), "pos_embed": arrays["pos_embed"]}
    x, out = (arrays[name].transpose(0, 2, 3, 1) for name in ("x", "out"))
    inputs = x, *(arrays[name].astype(np.int32) for name in ("t", "y"))
    return from_torch("dit", state), inputs, out, arrays["pos_embed"][0]


def test_equal_to_the_authors_implementation(reference):
    params, inputs, expected, positions = reference
    assert shapes_of(params) == shapes_of(abstract_params(SMALL, inputs[0].shape))
    np.testing.assert_allclose(position_embedding(4, 4, 48), positions, atol=1e-6)
    out = jax.jit(SMALL.apply)({"params": params}, *inputs)
    assert out.dtype == jnp.float32 and 10 in inputs[2]
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(reference):
    params, inputs, expected, _ = reference
    assert_bfloat16_is_close(SMALL, params, inputs, expected)


def test_remat_changes_nothing(reference, quick_compilation):
    params, inputs, *_ = reference
    assert_remat_changes_nothing(SMALL.clone(depth=1, class_dropout=0.5), params, inputs)


@pytest.mark.parametrize(
    ("hidden_size", "depth", "num_heads", "count"),
    [(384, 12, 6, 32_963_360), (768, 12, 12, 130_512_416), (1152, 28, 16, 675_129_632)],
    ids=["S/2", "B/2", "XL/2"],
)
def test_parameter_counts_of_the_paper(hidden_size, depth, num_heads, count):
    model = DiT(2, hidden_size, depth, num_heads, num_classes=1000, learn_sigma=True)
    positions = position_embedding(16, 16, hidden_size)  # the authors count it
    assert size_of(abstract_params(model, (1, 32, 32, 4))) + positions.size == count


def test_initialised_as_the_authors_do(quick_compilation):
    model = SMALL.clone(depth=1)
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 8, 4)), jnp.array([0.25, 999.0])
    label = jnp.array([0, 10])
    params = jax.jit(model.init)(jax.random.key(0), x, t, label)["params"]
    block = params["block_0"]
    for zero in (block["modulation"], params["modulation"], params["out"]):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(zero))
    xavier = [(params["patch_embed"], 16 + 48), (block["attention"]["project_in"], 48 + 144)]
    for module, fans in [*xavier, (block["mlp"]["fc2"], 192 + 48)]:
        bound = np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(module["kernel"]).max() <= bound
        assert np.all(module["bias"] == 0)
    for normal in (params["time_0"]["kernel"], params["class_embed"]["embedding"]):
        assert np.std(normal) == pytest.approx(0.02, rel=0.1)
    out = jax.jit(model.apply)({"params": params}, x, t, label)
    np.testing.assert_array_equal(out, np.zeros((2, 4, 8, 8)))


def test_training_drops_labels_at_the_rate_given():
    embed = ClassEmbedding(7, 8, 0.3, jax.nn.initializers.zeros, jnp.float32)
    label = jnp.arange(4000) % 7
    params = {"params": {"embedding": jnp.eye(8)}}  # a label's vector tells the label

    def seen(train):
        rngs = {"dropout": jax.random.key(5)}
        return np.asarray(embed.apply(params, label, train, rngs=rngs)).argmax(axis=1)

    np.testing.assert_array_equal(seen(False), label)
    kept = seen(True) == np.asarray(label)
    assert np.all(seen(True)[~kept] == 7)
    assert scipy.stats.binomtest(int(np.sum(~kept)), 4000, 0.3).pvalue > 1e-3
    assert np.isnan(embed.apply(params, jnp.array([8]), False)).all(), "no such class"


def test_the_null_class_is_what_training_sees_of_a_dropped_label(reference, quick_compilation):
    params, (x, t, label), *_ = reference
    model = SMALL.clone(depth=1, class_dropout=1.0)

    @functools.partial(jax.jit, static_argnames="train")
    def out(label, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, x, t, label, train=train, rngs=rngs)

    null, given = out(jnp.full(2, 10), False), out(label, False)
    np.testing.assert_allclose(out(label, True), null, atol=1e-5)
    changed = np.abs(null - given).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, label != 10)
    never = SMALL.clone(class_dropout=0.0)  # and needs no key
    jax.eval_shape(functools.partial(never.apply, train=True), {"params": params}, x, t, label)


def test_sizes_are_free_and_without_classes_there_is_no_label():
    params = abstract_params(TINY, (1, 4, 6, 3))
    assert "class_embed" not in params
    assert shapes_of(params) == shapes_of(abstract_params(TINY, (1, 8, 2, 3)))
    x, t = jnp.ones((1, 4, 6, 3)), jnp.array([0.5])
    assert jax.eval_shape(TINY.apply, {"params": params}, x, t).shape == (1, 4, 6, 3)


def test_time_embedding():
    frequency = 10000.0 ** -np.array([0.0, 0.5])
    expected = [*np.cos(7.5 * frequency), *np.sin(7.5 * frequency), 0]
    embedding = cos_sin_embedding(jnp.array([0, 7.5]), 5)
    np.testing.assert_allclose(embedding, [[1, 1, 0, 0, 0], expected], rtol=1e-5)


def test_split_variance():
    output = np.concatenate([np.full((1, 2, 2, 3), 7.0), np.full((1, 2, 2, 3), -1.0)], axis=-1)
    prediction, v = split_variance(jnp.asarray(output), 3)
    np.testing.assert_array_equal(prediction, np.full((1, 2, 2, 3), 7))
    np.testing.assert_array_equal(v, np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match=r"8 channels, got shape \(1, 2, 2, 6\); set learn_sigma"):
        split_variance(jnp.asarray(output), 4)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 8, 9, 3), r"sides divisible by patch_size=2, got shape \(2, 8, 9, 3\)"),
        ({}, (8, 8, 3), r"images must be \(b, H, W, C\)"),
        ({"num_heads": 3}, (1, 8, 8, 3), "hidden_size must be divisible by num_heads=3, got 4"),
        ({"hidden_size": 6}, (1, 8, 8, 3), "hidden_size must be divisible by 4, got 6"),
        ({"class_dropout": 1.5}, (1, 8, 8, 3), r"class_dropout must be in \[0, 1\], got 1.5"),
        ({"num_classes": 0}, (1, 8, 8, 3), "num_classes must be at least 1, or None"),
    ],
)
def test_errors_of_fields_and_images(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(TINY.clone(**fields), shape)


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (None, jnp.zeros(2, jnp.int32), r"unconditional .*shape \(2,\); pass label=None, or set"),
        (5, None, "num_classes=5, got label=None; .*5 where there is no class, or set"),
        (5, jnp.zeros(2), r"label must be \(2,\) integers, got float32 of shape \(2,\)"),
        (5, jnp.zeros((2, 1), jnp.int32), r"label must be \(2,\) integers, got int32 of shape"),
    ],
)
def test_errors_of_labels(classes, label, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(TINY.clone(num_classes=classes), (2, 8, 8, 3), label=label)
