"""The numbers of generated images: those of image_metrics, under either kind of features."""

import numpy as np
import pytest
from classified import classified_digits
from inception_weights import random_tensors

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.quality import classifier, metrics, reference, scores
from adaptive_ts.experiment.quality.inception import (
    WEIGHTS_URL,
    Activations,
    Inception,
    load_inception,
)

PROJECTION = np.random.default_rng(5).normal(size=(48, 6)) / 300


def extract(images):
    features = (images.reshape(len(images), -1) @ PROJECTION).astype(np.float32)
    return Activations(features, 3 * features[:, :4])


def stub(name):
    return reference.FeatureNetwork(name, "a stub", "stub", 6, extract, accuracy=0.75)


def images_of(count, seed, high=256):
    return np.random.default_rng(seed).integers(0, high, (count, 4, 4, 3), np.uint8)


def reference_of(images, source="some images"):
    features = extract(images).features
    statistics = metrics.gaussian(features)
    return reference.Reference(
        statistics, reference.statistics_digest(statistics), source, features
    )


@pytest.mark.parametrize("name", ["inception", "classifier"])
def test_the_numbers_are_those_of_the_metrics(name):
    made, real = images_of(130, 1, high=200), images_of(300, 2)
    batches = [made[:64], made[64:100], made[100:]]
    against = reference_of(real)
    found = scores.image_quality(iter(batches), stub(name), against)
    x, y = extract(made), extract(real).features

    distance = metrics.frechet_distance(metrics.gaussian(x.features), against.gaussian)
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-9) and distance > 0.1
    kid = metrics.kid(x.features, y, subset_size=130, subsets=100)
    assert (found["kid"], found["kid_std"], found["kid_subset_size"]) == (*kid, 130)
    as_many = y[np.arange(130) * 300 // 130]
    both = metrics.precision_recall(as_many, x.features)
    assert (found["precision"], found["recall"], found["num_compared"]) == (*both, 130)
    assert 0 < both[0] <= 1 and both[0] != both[1]
    score = metrics.inception_score(x.logits) if name == "inception" else (None, None)
    assert (found["inception_score"], found["inception_score_std"]) == score
    assert (found["num_images"], found["num_real"], found["accuracy"]) == (130, 300, 0.75)
    assert found["reference"] == "some images" and found["reference_digest"] == against.digest
    assert (found["network"], found["features"], found["num_features"]) == (name, "a stub", 6)

    said = scores.quality_lines(found)
    assert said[0] == "features: a stub"
    assert said[1] == f"reference: some images, statistics {against.digest}"
    title = "FID" if name == "inception" else "Frechet distance"
    assert said[2].split("  ")[1] == title and f"{distance:.4g} " in said[2] and "n=130" in said[2]
    assert f"{kid[0]:.4g} ± {kid[1]:.4g}" in said[3] and "n=130 against 300" in said[3]
    assert f"{both[0]:.4f}" in said[4] and f"{both[1]:.4f}" in said[5]
    assert len(said) == 6 + (name == "inception")
    assert name == "classifier" or f"{score[0]:.4g} ± {score[1]:.4g}" in said[6]


def test_of_mu_and_sigma_alone_there_is_but_a_distance():
    against = reference_of(images_of(300, 2))
    batches, alone = [images_of(40, 1)], against._replace(features=None)
    whole = scores.image_quality(batches, stub("classifier"), against)
    found = scores.image_quality(batches, stub("classifier"), alone)
    assert found["frechet_distance"] == whole["frechet_distance"]
    names = ("kid", "kid_std", "kid_subset_size", "precision", "recall", "num_compared", "num_real")
    assert [found[name] for name in names] == [None] * 7
    said = scores.quality_lines(found)
    assert said[3:] == ["no KID, precision or recall: the reference is but mu and sigma"]


def test_few_images_and_references_of_other_networks():
    against = reference_of(images_of(50, 2))
    found = scores.image_quality([images_of(5, 1)], stub("inception"), against)
    assert found["inception_score_splits"] == 2 and found["kid_subset_size"] == 5
    assert "n=5, too few for 6 features: biased upwards" in scores.quality_lines(found)[2]
    with pytest.raises(ValueError, match="3 images: 4 or more are needed"):
        scores.image_quality([images_of(3, 1)], stub("classifier"), against)
    other = against._replace(gaussian=metrics.gaussian(against.features[:, :5]))
    with pytest.raises(ValueError, match="6 features per image against 5"):
        scores.image_quality([images_of(5, 1)], stub("classifier"), other)


def test_of_many_images_all_count_for_the_distance_and_the_first_for_the_rest(monkeypatch):
    monkeypatch.setattr(scores, "KEPT", 50)
    made, real = images_of(130, 1), images_of(300, 2)
    against = reference_of(real)
    found = scores.image_quality([made[:64], made[64:]], stub("classifier"), against)
    statistics = metrics.gaussian(extract(made).features)
    distance = metrics.frechet_distance(statistics, against.gaussian)
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-9)
    kid = metrics.kid(extract(made[:50]).features, against.features, subset_size=50)
    assert (found["kid"], found["kid_std"]) == kid and found["num_compared"] == 50
    assert "n=50 against 300" in scores.quality_lines(found)[3]


def test_the_classifier_s_network(run_data, once):
    data = DataConfig(dir=str(classified_digits(run_data, once)))
    network, trained = scores.classifier_network(data), classifier.load_classifier(data)
    test = load_split(data, "test").images
    np.testing.assert_array_equal(
        network.extract(test).features,
        trained.activations(test.astype(np.float32) / 127.5 - 1).features,
    )
    assert network.accuracy == trained.accuracy and network.num_features == 32
    assert network.about == f"classifier of digits, accuracy {trained.accuracy:.3f}"
    found = reference.reference_features(data, network, log=lambda line: None)
    train = load_split(data, "train").images
    covariance = metrics.gaussian(network.extract(train).features).covariance
    np.testing.assert_allclose(found.gaussian.covariance, covariance, atol=1e-6)
    real = scores.image_quality([test], network, found)
    noise = np.random.default_rng(0).integers(0, 256, test.shape, np.uint8)
    far = scores.image_quality([noise], network, found)
    assert 20 * real["frechet_distance"] < far["frechet_distance"]
    assert real["kid"] < far["kid"] and real["precision"] > 0.5 + far["precision"]


def test_a_set_without_labels_has_no_classifier(run_data, monkeypatch):
    def unlabelled(config, split, log):
        return load_split(config, split, log)._replace(num_classes=1)

    monkeypatch.setattr(scores, "load_split", unlabelled)
    with pytest.raises(UserError, match="--features classifier: digits has no labels"):
        scores.classifier_network(DataConfig(dir=str(run_data)))


def test_without_weights_no_number(monkeypatch, tmp_path):
    monkeypatch.delenv(scores.WEIGHTS_VARIABLE, raising=False)
    for weights in (None, ""):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            scores.inception_network(weights)
        said = str(error.value)
        assert error.value.exit_code == 2 and WEIGHTS_URL in said
        assert "--inception_weights PATH or $ADAPTIVE_TS_INCEPTION_WEIGHTS" in said
    monkeypatch.setenv(scores.WEIGHTS_VARIABLE, str(tmp_path / "named"))
    with pytest.raises(UserError, match=f"no Inception weights at {tmp_path / 'named'}"):
        scores.inception_network(None)
    with pytest.raises(UserError, match=f"no Inception weights at {tmp_path / 'given'}"):
        scores.inception_network(str(tmp_path / "given"))


def test_inception_s_network_is_named_by_its_weights_and_its_preprocessing(monkeypatch):
    monkeypatch.setattr(scores, "load_inception", lambda path: Inception({}, "ab" * 32))
    ref, tf = (scores.inception_network("file", preprocess=name) for name in ("ref", "tf"))
    assert (ref.mark, tf.mark) == ("inception-ref-" + "ab" * 8, "inception-tf-" + "ab" * 8)
    assert tf.about == "Inception, preprocessing tf, weights abababab"
    assert (ref.name, ref.num_features, ref.accuracy) == ("inception", 2048, None)


@pytest.mark.slow
def test_inception_itself(tmp_path, monkeypatch, mesh8):
    """Random weights: another set is farther away, and one device says what eight say."""
    np.savez(tmp_path / "weights.npz", **random_tensors())
    monkeypatch.setattr(scores, "load_inception", lambda path: load_inception(path, sha256=None))
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
    found = []
    for mesh in (None, mesh8):
        network = scores.inception_network(tmp_path / "weights.npz", mesh=mesh, batch_size=8)
        features = network.extract(images[:24]).features
        statistics = metrics.gaussian(features)
        against = reference.Reference(statistics, "0" * 16, "noise", features)
        same = scores.image_quality([images[24:]], network, against)
        dark = scores.image_quality([images[24:] // 8], network, against)
        assert 2 * same["frechet_distance"] < dark["frechet_distance"]
        assert 1 <= same["inception_score"] < 1008
        found.append(same)
    for name in ("frechet_distance", "inception_score"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
