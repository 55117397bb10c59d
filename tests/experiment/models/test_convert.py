"""State dicts that are not of the model; the layouts themselves are held by the goldens."""

import doctest

import numpy as np
import pytest
import test_dit
import test_models
import test_uvit
from flax.traverse_util import flatten_dict

from adaptive_ts.experiment.models import convert, dit
from adaptive_ts.experiment.models.convert import from_torch

MODELS = {
    "unet": (test_models.SMALL, test_models.torch_shapes(), (1, 16, 16, 3)),
    "dit": (test_dit.SMALL, test_dit.torch_shapes(), (1, 8, 8, 4)),
    "uvit": (test_uvit.SMALL, test_uvit.torch_shapes(), (1, 8, 8, 4)),
}


def zeros(name):
    return {key: np.zeros(shape) for key, shape in MODELS[name][1].items()}


def expected(name):
    model, _, shape = MODELS[name]
    return test_models.abstract_params(model, shape)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_checkpoint(name):
    params = flatten_dict(from_torch(name, zeros(name), like=expected(name)), sep="/")
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    assert {k: v.shape for k, v in params.items()} == {
        k: v.shape for k, v in flatten_dict(expected(name), sep="/").items()
    }


def test_layouts():
    dense, conv = np.arange(6.0).reshape(2, 3), np.arange(24.0).reshape(4, 3, 2, 1)
    params = from_torch("unet", {"embed.2.weight": dense, "in_conv.weight": conv})
    np.testing.assert_array_equal(params["embed_1"]["kernel"], dense.T)
    kernel = params["in_conv"]["kernel"]  # OIHW -> HWIO
    assert kernel.shape == (2, 1, 3, 4) and kernel[1, 0, 2, 3] == conv[3, 2, 1, 0]


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("unet", "downsamples.level_10.2.1.weight", "down_10_conv/kernel"),
        ("unet", "upsamples.level_0.12.skip.bias", "up_0_12/skip/bias"),
        ("unet", "upsamples.level_3.1.1.norm.weight", "up_3_1_attention/norm/group/scale"),
        ("dit", "blocks.27.mlp.fc2.weight", "block_27/mlp/fc2/kernel"),
        ("uvit", "out_blocks.13.norm2.weight", "out_13/norm2/scale"),
        ("uvit", "time_embed.2.bias", "time_1/bias"),
        ("uvit", "in_blocks.3.attn.qkv.bias", "in_3/attention/project_in/bias"),
    ],
)
def test_names_of_larger_models(name, theirs, ours):
    assert list(flatten_dict(from_torch(name, {theirs: np.zeros(1)}), sep="/")) == [ours]


def test_unknown_names_are_told_with_the_nearest():
    state = {"blocks.3.attn.qvk.weight": np.zeros(1), "zzz": np.zeros(1)}
    message = (
        r"not of this dit: 2 unexpected: 'blocks.3.attn.qvk.weight' \(did you mean "
        r"'blocks.3.attn.qkv.weight'\?\), 'zzz'; give the model"
    )
    with pytest.raises(ValueError, match=message):
        from_torch("dit", state)


def test_tensors_missing_unexpected_and_wrongly_shaped():
    state = zeros("uvit")
    state["in_blocks.2.norm1.bias"] = state.pop("in_blocks.1.norm1.bias")
    state["mid_block.mlp.fc1.weight"] = np.zeros((128, 30))
    message = (
        r"1 missing: in_1/norm1/bias; "
        r"1 unexpected: 'in_blocks.2.norm1.bias' \(in_2/norm1/bias\); "
        r"1 wrongly shaped: 'mid_block.mlp.fc1.weight' \(middle/mlp/fc1/kernel\) has \(30, 128\), "
        r"needs \(32, 128\) in our layout"
    )
    with pytest.raises(ValueError, match=message):
        from_torch("uvit", state, like=expected("uvit"))


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"31 missing: ([\w/]+, ){5}\.\.\.; give") as raised:
        from_torch("dit", {}, like=expected("dit"))
    assert "\n" not in str(raised.value)


def test_two_names_of_one_tensor():
    state = {f"downsamples.level_0.{i}fc.bias": np.zeros(1) for i in ("0.", "0.0.")}
    with pytest.raises(ValueError, match=r"1 unexpected: 'downsamples.level_0.0.0.fc.bias'"):
        from_torch("unet", state)


def test_dit_positions_are_checked_and_left_out():
    positions = dit.position_embedding(4, 4, 48)[None]
    drifted = positions + np.float32(1e-3)
    assert from_torch("dit", {"pos_embed": drifted}) == {}
    for wrong in (positions[:, ::-1], positions[:, :15], positions[0], positions[..., :47]):
        with pytest.raises(ValueError, match="not DiT's fixed embedding of a square grid"):
            from_torch("dit", {"pos_embed": wrong})


def test_models_without_a_converter():
    with pytest.raises(ValueError, match="'uvt': did you mean 'uvit'"):
        from_torch("uvt", {})


def test_docstring_examples():
    for module in (convert, dit):
        assert doctest.testmod(module).failed == 0
