"""The Inception network against torch-fidelity's (golden); its weights' file; bad images."""

import hashlib
import re

import jax
import numpy as np
import pytest
from inception_weights import IMAGES, RULE, golden_images, random_tensors, relative

from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.quality import inception
from adaptive_ts.experiment.quality.inception_network import kernel_shapes
from adaptive_ts.experiment.quality.metrics import frechet_distance, gaussian


# One test: the network is compiled once for one device and once for eight, by one worker.
def test_features_are_torch_fidelitys_on_one_device_and_on_eight(golden, mesh8, tmp_path):
    saved = golden("inception_features")
    assert str(saved["weight_rule"]) == RULE
    path = tmp_path / "weights.npz"
    np.savez(path, **random_tensors())
    network = inception.load_inception(path, sha256=None)
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    one = {
        preprocess: inception.feature_extractor(network, preprocess=preprocess, batch_size=2)
        for preprocess in ("ref", "tf")
    }
    for preprocess, extract in one.items():
        other = {"ref": "tf", "tf": "ref"}[preprocess]
        for name in IMAGES:
            found = extract(golden_images(name))
            for kind in ("features", "logits"):
                expected = saved[f"{preprocess}_{name}_{kind}"]
                assert relative(getattr(found, kind), expected) < 5e-6
                assert relative(saved[f"{other}_{name}_{kind}"], expected) > 5e-3

    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    images[:2] = golden_images("square")
    images[8] = images[0]  # in a batch of its own, filled up
    shared = inception.feature_extractor(network, preprocess="tf", mesh=mesh8, batch_size=1)(images)
    assert relative(shared.features[[0, 1]], saved["tf_square_features"]) < 5e-6
    assert relative(shared.logits[[8, 1]], saved["tf_square_logits"]) < 5e-6
    alone = one["tf"](images[:8])
    assert relative(shared.features[:8], alone.features) < 2e-6
    a, b = gaussian(shared.features[:8]), gaussian(alone.features)
    assert frechet_distance(a, b) < 1e-6 * np.trace(a.covariance)
    np.testing.assert_allclose(a.covariance, b.covariance, atol=1e-5 * b.covariance.max())


def resized(images, preprocess):
    """By the definition, pixel by pixel, in float64."""
    size = np.array(images.shape[1:3])
    out = np.arange(299)
    x = images.astype(np.float64)
    for axis in (0, 1):
        scale = size[axis] / 299
        at = (out + 0.5) * scale - 0.5 if preprocess == "ref" else out * scale
        low = np.floor(at).astype(int)
        part = (at - low).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        low, high = (np.clip(i, 0, size[axis] - 1) for i in (low, low + 1))
        x = x.take(low, axis + 1) * (1 - part) + x.take(high, axis + 1) * part
    return (x - 127.5) / 127.5 if preprocess == "ref" else (x - 128) / 128


@pytest.mark.parametrize("preprocess", ["ref", "tf"])
@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 28, 41, 1), (1, 310, 64, 3), (1, 1, 2, 3)])
def test_preprocessing_is_bilinear_without_antialiasing(preprocess, shape):
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    found = np.asarray(inception.network_input(images, preprocess))
    expected = np.broadcast_to(resized(images, preprocess), (shape[0], 299, 299, 3))
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(shape) / 32)


@pytest.mark.parametrize("preprocess", ["ref", "tf"])
def test_preprocessing_of_constant_and_of_full_size_images(preprocess):
    for value in (0, 128, 255):
        found = inception.network_input(np.full((1, 9, 7, 3), value, np.uint8), preprocess)
        expected = (value - 127.5) / 127.5 if preprocess == "ref" else (value - 128) / 128
        np.testing.assert_allclose(found, np.float32(expected), atol=1e-6)
    images = np.random.default_rng(2).integers(0, 256, (1, 299, 299, 3), np.uint8)
    found = inception.network_input(images, preprocess)
    np.testing.assert_allclose(found, resized(images, preprocess), atol=2e-4)


def test_the_tensors_are_those_of_the_official_file():
    """It has 566 entries: six of each convolution, num_batches_tracked with them, and fc's two."""
    shapes = kernel_shapes()
    assert 6 * len(shapes) + 2 == 566
    assert shapes["Mixed_7c.branch3x3dbl_3b"] == (3, 1, 384, 384)


def test_weights_that_are_missing_or_others(tmp_path):
    def error(path, **options):
        with pytest.raises(UserError) as caught:
            inception.load_inception(path, **options)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        return str(caught.value)

    absent = tmp_path / "absent.pth"
    said = error(absent)
    assert str(absent) in said and inception.WEIGHTS_URL in said and "download" in said
    assert inception.WEIGHTS_URL.endswith(f"-{inception.WEIGHTS_SHA256[:8]}.pth")
    assert "Is a directory" in error(tmp_path)

    other = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    other.write_bytes(b"\x80\x02N.")
    found = hashlib.sha256(other.read_bytes()).hexdigest()
    assert f"begins with {found[:8]}, not with 6726825d" in error(other)
    assert "no readable PyTorch file" in error(other, sha256=found[:12].upper())
    assert "no readable PyTorch file" in error(other, sha256=None)

    archive = tmp_path / "weights.npz"
    np.savez(archive, **{"Conv2d_1a_3x3.conv.weight": np.ones((32, 3, 3, 3), np.float32)})
    assert "no tensor 'Conv2d_1a_3x3.bn.weight'" in error(archive, sha256=None)
    np.savez(archive, **{"Conv2d_1a_3x3.conv.weight": np.ones((3, 3, 3, 32), np.float32)})
    assert "(3, 3, 3, 32); expected finite floats (32, 3, 3, 3)" in error(archive, sha256=None)
    np.savez(archive, **{"Conv2d_1a_3x3.conv.weight": np.full((32, 3, 3, 3), np.nan)})
    assert "expected finite floats" in error(archive, sha256=None)
    np.savez(archive, a=np.array([{}], dtype=object))
    assert re.search(r"no readable \.npz file .*allow_pickle=False", error(archive, sha256=None))
    archive.write_bytes(archive.read_bytes()[:50])
    assert "no readable .npz file" in error(archive, sha256=None)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "must be uint8 in .*got float32: .*127.5"),
        (np.zeros((2, 8, 8, 3), np.int64), "got int64"),
        (np.zeros((8, 8, 3), np.uint8), r"\(N, H, W, C\) .* got \(8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"C = 1 or 3, got \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"got \(0, 8, 8, 3\)"),
    ],
)
def test_bad_images(images, words):
    with pytest.raises(ValueError, match=words):
        inception.feature_extractor(inception.Inception({}, ""))(images)


def test_bad_arguments():
    with pytest.raises(ValueError, match="got 'clean'"):
        inception.feature_extractor(inception.Inception({}, ""), preprocess="clean")
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        inception.feature_extractor(inception.Inception({}, ""), batch_size=0)
    assert jax.config.jax_default_matmul_precision is None, "HIGHEST is the network's own"
