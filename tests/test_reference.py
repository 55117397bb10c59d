"""Reference statistics: what they are of, their cache, and published files."""

import numpy as np
import pytest

from adaptive_ts.experiment import reference
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import Records, load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.image_metrics import Gaussian, gaussian
from adaptive_ts.experiment.inception import Activations, Inception


def pixels(images):
    """A stand-in for the network: four numbers per image."""
    x = np.asarray(images, np.float32).reshape(len(images), -1)
    features = np.stack([x.mean(1), x.std(1), x[:, 5], x[:, 10]], 1)
    return Activations(features, features)


@pytest.fixture
def extractions(monkeypatch):
    """The options of each extractor that is made; the extractor is ``pixels``."""
    made = []

    def make(network, **options):
        made.append(options)
        return pixels

    monkeypatch.setattr(reference, "feature_extractor", make)
    return made


def test_statistics_are_computed_once_for_the_data_the_preprocessing_and_the_weights(
    run_data, extractions
):
    data, said = DataConfig(name="digits", dir=str(run_data)), []
    network = Inception({}, "ab" * 32)

    def get(data=data, network=network, **options):
        return reference.reference_statistics(data, network, log=said.append, **options)

    first = get(split="test")
    images = load_split(data, "test").images
    expected = gaussian(pixels(images).features)
    np.testing.assert_allclose(first.gaussian.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(first.gaussian.covariance, expected.covariance, rtol=1e-9)
    assert first.source == "digits/test, 297 images (8, 8, 1), ref"
    assert said == [f"computing the Inception statistics of {first.source}, once"]
    assert extractions == [{"preprocess": "ref", "mesh": None, "batch_size": 64}]

    again = get(split="test")
    assert len(extractions) == 1 and again.digest == first.digest
    np.testing.assert_array_equal(again.gaussian.covariance, first.gaussian.covariance)

    found = {first.digest}
    for changes in (
        {"preprocess": "tf"},
        {"network": Inception({}, "ac" * 32)},
        {"split": "train"},
        {"data": data.__class__(name="digits", dir=str(run_data), downsample=2)},
        {"data": data.__class__(name="digits", dir=str(run_data), image_size=10)},
    ):
        before = len(extractions)
        found.add(get(**{"split": "test", **changes}).digest)
        assert len(extractions) == before + 1, changes
    assert len(found) == 4, "pixels do not depend on the preprocessing or the weights"

    cache = next(run_data.rglob(f"inception-test-8x8x1-1-*-ref-{'ab' * 8}.npz"))
    for damage in (lambda raw: raw[:200], lambda raw: b"", lambda raw: b"PK" + raw[5:]):
        before = len(extractions)
        cache.write_bytes(damage(cache.read_bytes()))
        assert get(split="test").digest == first.digest and len(extractions) == before + 1
    changed = dict(np.load(cache))
    np.savez(cache, **(changed | {"mu": changed["mu"] + 1}))
    assert get(split="test").digest == first.digest, "not what was written"
    assert reference.read_statistics(cache, 4).digest == first.digest
    for kept in run_data.rglob("inception-*.npz"):
        kept.unlink()


def test_statistics_that_cannot_be_kept(run_data, extractions, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "atomic", full)
    data, said = DataConfig(name="digits", dir=str(run_data)), []
    network = Inception({}, "ad" * 32)
    found = reference.reference_statistics(data, network, split="test", log=said.append)
    assert found.gaussian.mean.shape == (4,)
    assert "not kept" in said[-1] and "No space left on device" in said[-1]


def test_images_in_record_files_come_in_parts():
    images = np.random.default_rng(0).integers(0, 256, (2500, 6, 6, 1), np.uint8)
    records = Records(images.shape, lambda index: (images[index], np.zeros(len(index))))
    for source in (images, records):
        parts = list(reference.image_chunks(source))
        assert [len(part) for part in parts] == [1024, 1024, 452]
        np.testing.assert_array_equal(np.concatenate(parts), images)
        found, expected = (
            reference.image_statistics(source, pixels),
            gaussian(pixels(images).features),
        )
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9)
    with pytest.raises(ValueError, match="no images"):
        reference.image_statistics(images[:0], pixels)
    with pytest.raises(ValueError, match="two images or more, got 1"):
        reference.image_statistics(images[:1], pixels)


def test_the_digest_is_of_every_number():
    statistics = gaussian(np.random.default_rng(0).normal(size=(9, 3)))
    digest = reference.statistics_digest(statistics)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert reference.statistics_digest(Gaussian(*(x.copy() for x in statistics))) == digest
    for part in (0, 1):
        changed = [x.copy() for x in statistics]
        changed[part].flat[-1] += 1e-12
        assert reference.statistics_digest(Gaussian(*changed)) != digest
    turned = statistics.covariance[::-1]
    assert reference.statistics_digest(statistics._replace(covariance=turned)) != digest


def test_a_published_file(tmp_path):
    statistics = gaussian(np.random.default_rng(0).normal(size=(20, 6)))
    path = tmp_path / "fid_stats.npz"
    np.savez(
        path, mu=statistics.mean, sigma=statistics.covariance.astype(np.float32), activations=0
    )
    found = reference.read_statistics(path, num_features=6)
    assert found.gaussian.covariance.dtype == np.float64 and found.source == str(path)
    np.testing.assert_allclose(found.gaussian.covariance, statistics.covariance, rtol=1e-6)
    with pytest.raises(
        UserError, match=r"of 2048 features: mu has shape \(6,\) and sigma \(6, 6\)"
    ):
        reference.read_statistics(path)


MEAN, COVARIANCE = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": MEAN}, "holds no sigma: it holds mu"),
        ({"m": MEAN, "s": COVARIANCE}, "holds no mu and no sigma: it holds m, s"),
        ({"mu": MEAN, "sigma": MEAN}, r"mu has shape \(3,\) and sigma \(3,\)"),
        ({"mu": np.zeros(4), "sigma": COVARIANCE}, r"mu has shape \(4,\)"),
        ({"mu": MEAN + np.nan, "sigma": COVARIANCE}, "some are not finite"),
        ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "mu is int64"),
        ({"mu": MEAN, "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": MEAN, "sigma": -COVARIANCE}, "diagonal >= 0"),
        ({"mu": np.array([{}] * 3), "sigma": COVARIANCE}, "no readable .npz file .*pickle"),
    ],
)
def test_files_that_are_no_statistics(arrays, words, tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=words) as error:
        reference.read_statistics(path, 3)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_that_are_no_archives(tmp_path):
    path = tmp_path / "statistics.npz"
    with pytest.raises(UserError, match=r"no reference statistics at .*mu and sigma"):
        reference.read_statistics(path)
    for content in (b"", b"PK\x03\x04 and no more", b"\x80\x04N.", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is no readable \.npz file"):
            reference.read_statistics(path)
    with path.open("wb") as file:
        np.save(file, COVARIANCE)  # one array, not an archive
    with pytest.raises(UserError, match=r"is no readable \.npz file"):
        reference.read_statistics(path)
