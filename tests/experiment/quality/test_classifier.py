"""Frechet distance against scipy's matrix root; the classifier, its accuracy and its cache."""

import shutil

import numpy as np
import pytest
from classified import classified_digits
from scipy import linalg

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.decoding import Records
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.quality import classifier, scores
from adaptive_ts.experiment.quality.features import FeatureChoice, image_features
from adaptive_ts.experiment.quality.metrics import Gaussian, frechet_distance, gaussian


@pytest.fixture
def data(run_data, once):
    return DataConfig(dir=str(classified_digits(run_data, once)))


def random_gaussian(seed, dim=12):
    rng = np.random.default_rng(seed)
    return gaussian(rng.normal(size=(40, dim)) @ rng.normal(size=(dim, dim)))


def test_distance_is_that_of_the_matrix_root():
    a, b = random_gaussian(0), random_gaussian(1)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_of_commuting_gaussians_in_closed_form():
    """Diagonal covariances, one of them singular: sum of squares of the standard deviations."""
    a = Gaussian(np.zeros(3), np.diag([4.0, 1.0, 0.0]))
    b = Gaussian(np.array([1.0, 0.0, 2.0]), np.diag([1.0, 9.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 4 + 0.25)


def test_the_classifier_knows_digits(data, monkeypatch):
    monkeypatch.setattr(classifier, "_train", None)  # it is there: it is read
    found = classifier.load_classifier(data, log=None)
    assert found.accuracy > 0.95 and len(found.digest) == 16
    test = load_split(data, "test")
    x = classifier.unit_range(test.images)
    assert x.min() == -1 and x.max() == 1
    latents = np.full((1, 2, 2, 4), 7.5, np.float16)
    np.testing.assert_array_equal(classifier.unit_range(latents), latents)
    activations = found.activations(x)
    assert activations.features.shape == (297, 32) and activations.logits.shape == (297, 10)
    assert (activations.logits.argmax(1) == test.labels).mean() == found.accuracy
    assert classifier.load_classifier(data).digest == found.digest


def test_tables_compare_images_as_evaluate_does(data):
    """As pixels: what a table measures of images in [-1, 1] is what they have once saved."""
    compared = image_features(data, FeatureChoice())
    network = scores.classifier_network(data)
    assert compared.about.startswith(f"{network.about}, statistics ")
    train, test = (load_split(data, split) for split in ("train", "test"))
    x = classifier.unit_range(test.images)
    np.testing.assert_array_equal(compared.extract(x), network.extract(test.images).features)
    np.testing.assert_array_equal(compared.extract(x + 0.4 / 127.5), compared.extract(x))
    expected = gaussian(network.extract(train.images).features)
    np.testing.assert_allclose(compared.reference.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(
        compared.reference.covariance, expected.covariance, rtol=1e-5, atol=1e-6
    )
    held_out = frechet_distance(gaussian(compared.extract(x)), compared.reference)
    noise = np.random.default_rng(0).uniform(-1, 1, x.shape).astype(np.float32)
    assert 20 * held_out < frechet_distance(gaussian(compared.extract(noise)), compared.reference)


def test_images_in_record_files_are_classified_too(data, monkeypatch):
    expected = classifier.load_classifier(data)

    def in_files(config, split, log):
        dataset = load_split(config, split, log)
        images, labels = dataset.images, dataset.labels
        records = Records(images.shape, lambda index: (images[index], labels[index]))
        return dataset._replace(images=records, labels=labels[:0])

    monkeypatch.setattr(classifier, "load_split", in_files)
    found = classifier.load_classifier(data)
    assert found.accuracy == expected.accuracy and found.digest == expected.digest


def test_a_damaged_classifier_is_trained_anew(data, tmp_path, monkeypatch):
    folder = shutil.copytree(data.dir, tmp_path / "copy")
    cache = next(folder.rglob("classifier-*.npz"))
    cache.write_bytes(cache.read_bytes()[:100])
    monkeypatch.setattr(classifier, "_STEPS", 1)
    said, copy = [], DataConfig(dir=str(folder))
    damaged = classifier.load_classifier(copy, said.append)
    assert said == ["training a classifier of digits, once: 1 steps"]
    good = classifier.load_classifier(data)
    assert damaged.accuracy < good.accuracy and damaged.digest != good.digest
    assert classifier.load_classifier(copy, said.append).digest == damaged.digest and len(said) == 1
