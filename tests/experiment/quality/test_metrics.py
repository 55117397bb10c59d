"""Frechet distance, KID, Inception Score, precision and recall against scipy and scikit-learn."""

import doctest

import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from adaptive_ts.experiment.quality import inception, metrics, reference


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def mixed(seed, count, dim):
    """Features whose covariance is far from a multiple of the identity."""
    return normal(seed, count, dim) @ normal(seed + 100, dim, dim) / dim**0.5 + normal(seed, dim)


@pytest.mark.parametrize(("count_a", "count_b"), [(400, 300), (400, 20), (15, 20)])
def test_frechet_distance_is_that_of_the_matrix_root(count_a, count_b):
    """Also with fewer images than features: sqrtm then keeps about seven digits."""
    a, b = metrics.gaussian(mixed(0, count_a, 40)), metrics.gaussian(mixed(1, count_b, 40))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    rel = 1e-9 if min(count_a, count_b) > 40 else 1e-5
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=rel)
    assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b))


@pytest.mark.parametrize("count", [20, 64, 500])
@pytest.mark.parametrize("decay", [0, 8])
def test_frechet_distance_of_a_set_and_itself_is_zero(count, decay):
    """Singular or nearly so, and with large means; the order of the images is of no account."""
    x = 1000 + 10 * normal(0, count, 64) * np.logspace(0, -decay / 2, 64)
    one, other = metrics.gaussian(x), metrics.gaussian(x[::-1])
    assert 0 <= metrics.frechet_distance(one, other) < 1e-6


def test_frechet_distance_of_singular_gaussians_in_closed_form():
    """Rank one each, along u and v: |u|^2 + |v|^2 - 2 |u.v|."""
    u, v = normal(0, 30), normal(1, 30)
    a, b = (metrics.Gaussian(np.zeros(30), np.outer(w, w)) for w in (u, v))
    assert metrics.frechet_distance(a, b) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), 1e-12)
    point = metrics.Gaussian(np.zeros(30), np.zeros((30, 30)))
    assert metrics.frechet_distance(a, point) == pytest.approx(u @ u, 1e-12)
    assert metrics.frechet_distance(point, point) == 0
    assert np.isnan(metrics.frechet_distance(a, a._replace(mean=np.full(30, np.nan))))


def test_distances_grow_with_noise():
    x, noise = mixed(0, 600, 16), normal(5, 600, 16)
    for distance in (
        lambda y: metrics.frechet_distance(metrics.gaussian(x), metrics.gaussian(y)),
        lambda y: metrics.kid(x, y, subset_size=300, subsets=10)[0],
        lambda y: -sum(metrics.precision_recall(x, y)),
    ):
        values = [distance(x + scale * noise) for scale in (0, 0.5, 1, 2)]
        assert values == sorted(values) and len(set(values)) == 4, values


@pytest.mark.parametrize("sizes", [(50,), (1, 1, 48), (20, 30), (7,) * 7 + (1,)])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_moments_in_parts_are_those_of_the_whole(sizes, offset):
    x = mixed(0, 50, 6) + offset
    moments, start = None, 0
    for size in sizes:
        moments = metrics.add_features(moments, x[start : start + size])
        start += size
    whole, parts = metrics.gaussian(x), metrics.to_gaussian(moments)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, whole.covariance, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov((x - offset).T), rtol=1e-8, atol=1e-9)
    assert moments.count == 50


def test_kid_of_whole_sets_is_the_double_sum():
    x, y = mixed(0, 30, 5), mixed(1, 30, 5)

    def k(p, q):
        return (p @ q / 5 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (30 * 29)
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 900
    value, spread = metrics.kid(x, y, subset_size=30, subsets=3)
    assert value == pytest.approx(expected, rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_kid_of_subsets_is_that_of_scikit_learns_kernel():
    x, y = (mixed(seed, 60, 8).astype(np.float32) for seed in (0, 1))
    draw, expected = np.random.RandomState(7), []
    for _ in range(5):
        a = x[draw.choice(60, 20, replace=False)].astype(np.float64)
        b = y[draw.choice(60, 20, replace=False)].astype(np.float64)
        kaa, kbb, kab = (polynomial_kernel(*pair) for pair in ((a, a), (b, b), (a, b)))
        off = ~np.eye(20, dtype=bool)
        expected.append(kaa[off].mean() + kbb[off].mean() - 2 * kab.mean())
    value = metrics.kid(x, y, subset_size=20, subsets=5, seed=7)
    assert value == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)


def test_kid_of_one_law_is_zero_on_average():
    """Unbiased: within four standard errors of disjoint subsets' mean, p < 1e-4."""
    values = [
        metrics.kid(normal(s, 50, 4), normal(s + 500, 50, 4), subset_size=50, subsets=1)[0]
        for s in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)


def test_inception_score_in_closed_form():
    certain = 200 * np.eye(10)[np.arange(200) % 10]
    assert metrics.inception_score(certain, splits=4, seed=None) == pytest.approx((10, 0))
    assert metrics.inception_score(np.zeros((20, 1008))) == pytest.approx((1, 0))
    assert metrics.inception_score(normal(0, 1, 9).repeat(20, 0) + 5) == pytest.approx((1, 0))


def test_inception_score_is_that_of_scipys_entropy():
    logits = 2 * normal(0, 103, 12)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = []
    for i in range(10):
        part = p[i * 103 // 10 : (i + 1) * 103 // 10]
        expected.append(np.exp(np.mean([stats.entropy(row, part.mean(0)) for row in part])))
    expected = np.mean(expected), np.std(expected)
    assert metrics.inception_score(logits, seed=None) == pytest.approx(expected)
    shuffled = logits[np.argsort(np.random.RandomState(3).permutation(103))]
    assert metrics.inception_score(shuffled, seed=3) == pytest.approx(expected)
    assert metrics.inception_score(logits + 1e4, seed=None) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1024, 32])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(rows, k, monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", rows)
    real = mixed(0, 150, 8) + 100
    made = 1.3 * normal(3, 110, 8) @ normal(100, 8, 8) / 8**0.5 + normal(0, 8) + 100

    def covered(points, centres):
        nearest = NearestNeighbors(n_neighbors=k + 1).fit(centres)
        radii = nearest.kneighbors(centres)[0][:, k]
        distances = np.sqrt(((points[:, None] - centres[None]) ** 2).sum(-1))
        return (distances <= radii).any(1).mean()

    expected = covered(made, real), covered(real, made)
    assert metrics.precision_recall(real, made, k=k) == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0.2 and max(expected) < 0.99


def test_precision_and_recall_at_their_ends():
    x = mixed(0, 60, 8)
    assert metrics.precision_recall(x, x[::-1]) == (1, 1)
    assert metrics.precision_recall(x, x + 1000) == (0, 0)
    collapsed = np.repeat(x[:1], 40, 0)
    precision, recall = metrics.precision_recall(x, collapsed)
    assert precision == 1 and recall <= 1 / 60


GOOD = normal(0, 40, 4)
SPOILT = np.where(np.arange(160).reshape(40, 4) == 5, np.nan, GOOD)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.kid(GOOD, GOOD), "subsets of 1000 .* got 40 and 40: .*subset_size=40"),
        (lambda: metrics.kid(GOOD, GOOD[:, :3], subset_size=9), "4 features per image against 3"),
        (lambda: metrics.kid(GOOD, SPOILT, subset_size=9), "1 of 40 images are not finite"),
        (lambda: metrics.kid(GOOD, GOOD, subset_size=1), "subset_size >= 2"),
        (lambda: metrics.precision_recall(GOOD, SPOILT), "1 of 40 images are not finite"),
        (lambda: metrics.precision_recall(GOOD, GOOD[:3]), "more than k images, got 40 .* 3"),
        (lambda: metrics.precision_recall(GOOD, GOOD, k=0), "k=0"),
        (lambda: metrics.inception_score(GOOD[:19]), "20 images, got 19"),
        (lambda: metrics.inception_score(SPOILT), "logits of 1 of 40"),
        (lambda: metrics.gaussian(GOOD[:1]), "2 images or more are needed, got 1"),
        (lambda: metrics.gaussian(GOOD[0]), r"floats \(images, numbers\), got float64 \(4,\)"),
        (lambda: metrics.gaussian(GOOD.astype(int)), "must be floats"),
        (lambda: metrics.add_features(None, SPOILT), "not finite"),
        (
            lambda: metrics.add_features(metrics.add_features(None, GOOD), GOOD[:, :2]),
            "2 features per image after 4",
        ),
        (lambda: metrics.to_gaussian(metrics.add_features(None, GOOD[:1])), "two images"),
        (
            lambda: metrics.frechet_distance(metrics.gaussian(GOOD), metrics.gaussian(GOOD[:, :3])),
            "4 features per image against 3",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("module", [metrics, inception, reference])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0
