"""Frechet distance against scipy's matrix root; the classifier, its accuracy and its cache."""

import numpy as np
import pytest
from scipy import linalg

from adaptive_ts.experiment import frechet
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import load_split


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


def test_the_classifier_knows_digits_and_is_kept(run_data, monkeypatch):
    data = DataConfig(name="digits", dir=str(run_data))
    first = frechet.classifier_features(data)
    assert first.accuracy > 0.95
    test = load_split(data, "test").images.astype(np.float32) / 127.5 - 1
    held_out = frechet.frechet_distance(frechet.gaussian(first.extract(test)), first.reference)
    noise = np.random.default_rng(0).uniform(-1, 1, test.shape).astype(np.float32)
    far = frechet.frechet_distance(frechet.gaussian(first.extract(noise)), first.reference)
    assert 20 * held_out < far

    monkeypatch.setattr(frechet, "_train", None)  # the second time it is read
    again = frechet.classifier_features(data)
    np.testing.assert_array_equal(again.extract(test), first.extract(test))

    cache = next(run_data.rglob("classifier-*.npz"))
    cache.write_bytes(cache.read_bytes()[:100])
    monkeypatch.undo()
    monkeypatch.setattr(frechet, "_STEPS", 1)
    damaged = frechet.classifier_features(data)  # trained anew, not a traceback
    assert damaged.accuracy < first.accuracy
    cache.unlink()
