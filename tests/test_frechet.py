"""Frechet distance against scipy's matrix root; the classifier, its accuracy and its cache."""

import shutil

import numpy as np
import pytest
from classified import classified_digits
from scipy import linalg

from adaptive_ts.experiment import frechet
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import Records, load_split


@pytest.fixture
def data(run_data, once):
    return DataConfig(dir=str(classified_digits(run_data, once)))


def random_gaussian(seed, dim=12):
    rng = np.random.default_rng(seed)
    return frechet.gaussian(rng.normal(size=(40, dim)) @ rng.normal(size=(dim, dim)))


def test_distance_is_that_of_the_matrix_root():
    a, b = random_gaussian(0), random_gaussian(1)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_of_commuting_gaussians_in_closed_form():
    """Diagonal covariances, one of them singular: sum of squares of the standard deviations."""
    a = frechet.Gaussian(np.zeros(3), np.diag([4.0, 1.0, 0.0]))
    b = frechet.Gaussian(np.array([1.0, 0.0, 2.0]), np.diag([1.0, 9.0, 0.25]))
    assert frechet.frechet_distance(a, b) == pytest.approx(5 + 1 + 4 + 0.25)


def test_the_classifier_knows_digits(data, monkeypatch):
    monkeypatch.setattr(frechet, "_train", None)  # it is there: it is read
    said = []
    features = frechet.classifier_features(data, said.append)
    assert features.accuracy > 0.95 and not said
    train, test = (load_split(data, split) for split in ("train", "test"))
    x = frechet.unit_range(test.images)
    assert x.min() == -1 and x.max() == 1
    latents = np.full((1, 2, 2, 4), 7.5, np.float16)
    np.testing.assert_array_equal(frechet.unit_range(latents), latents)
    held_out = frechet.frechet_distance(frechet.gaussian(features.extract(x)), features.reference)
    noise = np.random.default_rng(0).uniform(-1, 1, x.shape).astype(np.float32)
    far = frechet.frechet_distance(frechet.gaussian(features.extract(noise)), features.reference)
    assert 20 * held_out < far

    expected = frechet.gaussian(features.extract(frechet.unit_range(train.images)))
    np.testing.assert_allclose(features.reference.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(features.reference.covariance, expected.covariance, rtol=1e-9)

    classifier = frechet.load_classifier(data)
    found = classifier.activations(x)
    assert found.features.shape == (297, 32) and found.logits.shape == (297, 10)
    np.testing.assert_array_equal(found.features, features.extract(x))
    assert (found.logits.argmax(1) == test.labels).mean() == classifier.accuracy
    assert (
        classifier.digest == frechet.load_classifier(data).digest and len(classifier.digest) == 16
    )


def test_images_in_record_files_are_classified_too(data, monkeypatch):
    expected = frechet.classifier_features(data)

    def in_files(config, split, log):
        dataset = load_split(config, split, log)
        images, labels = dataset.images, dataset.labels
        records = Records(images.shape, lambda index: (images[index], labels[index]))
        return dataset._replace(images=records, labels=labels[:0])

    monkeypatch.setattr(frechet, "load_split", in_files)
    found = frechet.classifier_features(data)
    assert found.accuracy == expected.accuracy
    np.testing.assert_array_equal(found.reference.covariance, expected.reference.covariance)


def test_a_damaged_classifier_is_trained_anew(data, tmp_path, monkeypatch):
    folder = shutil.copytree(data.dir, tmp_path / "copy")
    cache = next(folder.rglob("classifier-*.npz"))
    cache.write_bytes(cache.read_bytes()[:100])
    monkeypatch.setattr(frechet, "_STEPS", 1)
    said, copy = [], DataConfig(dir=str(folder))
    damaged = frechet.load_classifier(copy, said.append)
    assert said == ["training a classifier of digits, once: 1 steps"]
    good = frechet.load_classifier(data)
    assert damaged.accuracy < good.accuracy and damaged.digest != good.digest
    assert frechet.load_classifier(copy, said.append).digest == damaged.digest and len(said) == 1
