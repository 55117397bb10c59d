"""Against torch-fidelity itself, where it is installed: ``pip install -e '.[parity]'``."""

import numpy as np
import pytest
from inception_weights import IMAGES, golden_images, random_tensors, relative

from adaptive_ts.experiment.quality import inception, metrics

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Random weights as torch.save writes them, in both formats."""
    state = {name: torch.from_numpy(value) for name, value in random_tensors().items()}
    for name in [name for name in state if name.endswith("running_var")]:
        state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    paths = [tmp_path_factory.mktemp("weights") / f"{kind}.pth" for kind in ("zip", "stream")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    return paths


def test_weights_of_both_formats_are_those_saved(saved):
    one, other = (inception.load_inception(path, sha256=None).params for path in saved)
    assert len(one) == 95
    for name, arrays in one.items():
        for a, b in zip(arrays, other[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("preprocess", ["tf", "ref"])
def test_features(saved, preprocess, golden, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    def half_pixel(x, size, align_corners):
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        return (x - 127.5) / 127.5 * 128 + 128  # they take (x - 128) / 128 of it

    if preprocess == "ref":
        monkeypatch.setattr(theirs, "interpolate_bilinear_2d_like_tensorflow1x", half_pixel)
    network = theirs.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(saved[1])
    )
    extract = inception.feature_extractor(
        inception.load_inception(saved[0], sha256=None), preprocess=preprocess, batch_size=2
    )
    for name in IMAGES:
        images = golden_images(name)
        with torch.no_grad():
            expected = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        for found, value, kind in zip(
            extract(images), expected, ("features", "logits"), strict=True
        ):
            assert relative(found, value.numpy()) < 5e-6
            golden_value = golden("inception_features")[f"{preprocess}_{name}_{kind}"]
            assert relative(value.numpy(), golden_value) < 5e-6


def test_metrics():
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    rng = np.random.default_rng(0)
    real = np.abs(rng.normal(size=(400, 24))).astype(np.float32)
    made = np.abs(rng.normal(size=(300, 24)) * 1.1 + 0.1).astype(np.float32)
    x, y = torch.from_numpy(made), torch.from_numpy(real)
    fid = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(f) for f in (x, y)), verbose=False
    )["frechet_inception_distance"]
    found = metrics.frechet_distance(metrics.gaussian(made), metrics.gaussian(real))
    assert found == pytest.approx(fid, rel=1e-6)
    kid = metric_kid.kid_features_to_metric(
        x, y, kid_subset_size=100, kid_subsets=20, verbose=False
    )
    assert metrics.kid(made, real, subset_size=100, subsets=20) == pytest.approx(
        (kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]), rel=1e-4
    )
    score = metric_isc.isc_features_to_metric(x)
    assert metrics.inception_score(made) == pytest.approx(
        (score["inception_score_mean"], score["inception_score_std"])
    )
    prc = metric_prc.prc_features_to_metric(x, y, verbose=False)
    assert metrics.precision_recall(real, made) == pytest.approx(
        (prc["precision"], prc["recall"]), abs=1e-6
    )
