"""What images are compared with: features of a split, their cache, and published files."""

import numpy as np
import pytest

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.decoding import Records
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.quality import reference
from adaptive_ts.experiment.quality.inception import Activations
from adaptive_ts.experiment.quality.metrics import Gaussian, gaussian


def pixels(images):
    """A stand-in for the network: four numbers per image."""
    x = np.asarray(images, np.float32).reshape(len(images), -1)
    features = np.stack([x.mean(1), x.std(1), x[:, 5], x[:, 10]], 1)
    return Activations(features, features[:, :3])


class Network:
    """It counts the images that it is shown."""

    def __init__(self, mark):
        self.seen = 0
        self.network = reference.FeatureNetwork("stub", "a stub", mark, 4, self.extract)

    def extract(self, images):
        self.seen += len(images)
        return pixels(images)


def test_features_are_computed_once_for_the_data_and_the_network(run_data):
    data, said = DataConfig(dir=str(run_data)), []
    stub = Network("stub-once")

    def get(data=data, stub=stub, **options):
        return reference.reference_features(data, stub.network, log=said.append, **options)

    first = get(split="test")
    images = load_split(data, "test").images
    expected = pixels(images).features
    np.testing.assert_array_equal(first.features, expected)
    np.testing.assert_allclose(first.gaussian.mean, gaussian(expected).mean, rtol=1e-12)
    np.testing.assert_allclose(first.gaussian.covariance, gaussian(expected).covariance, rtol=1e-9)
    assert first.source == "digits/test, 297 images (8, 8, 1)"
    assert said == [f"computing the features of {first.source}, a stub, once"] and stub.seen == 297

    again = get(split="test")
    assert stub.seen == 297 and again.digest == first.digest and again.source == first.source
    np.testing.assert_array_equal(again.gaussian.covariance, first.gaussian.covariance)
    np.testing.assert_array_equal(again.features, first.features)

    found = {first.digest}
    other = Network("stub-other")
    for changes, count in (
        ({"stub": other}, 297),
        ({"split": "train"}, 1500),
        ({"data": DataConfig(dir=str(run_data), downsample=2)}, 297),
        ({"data": DataConfig(dir=str(run_data), image_size=10)}, 297),
    ):
        before = stub.seen + other.seen
        found.add(get(**{"split": "test", **changes}).digest)
        assert stub.seen + other.seen == before + count, changes
    assert len(found) == 4, "the other network is the same but for its mark"

    cache = next(run_data.rglob("features-stub-once-test-8x8x1-1-*.npz"))
    for damage in (lambda raw: raw[:200], lambda raw: b"", lambda raw: b"PK" + raw[5:]):
        before = stub.seen
        cache.write_bytes(damage(cache.read_bytes()))
        assert get(split="test").digest == first.digest and stub.seen == before + 297
    kept = dict(np.load(cache))
    for change in ({"mu": kept["mu"] + 1}, {"features": kept["features"][:, :3]}):
        before = stub.seen
        np.savez(cache, **(kept | change))
        np.testing.assert_array_equal(get(split="test").features, expected)
        assert stub.seen == before + 297, "not what was written"
    assert reference.read_statistics(cache, 4).digest == first.digest
    for path in run_data.rglob("features-stub-*.npz"):
        path.unlink()


def test_features_that_cannot_be_kept(run_data, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "atomic", full)
    data, said = DataConfig(dir=str(run_data)), []
    found = reference.reference_features(data, Network("stub-full").network, log=said.append)
    assert found.features.shape == (1500, 4)
    assert "not kept" in said[-1] and "No space left on device" in said[-1]


def test_of_a_large_split_evenly_spaced_features_are_kept_and_all_count(run_data, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 100)
    data, watched = DataConfig(dir=str(run_data)), []

    def watch(batches, total):
        for batch in batches:
            watched.append((len(batch), total))
            yield batch

    stub = Network("stub-large")
    found = reference.reference_features(data, stub.network, watch=watch, log=lambda line: None)
    every = pixels(load_split(data, "train").images).features
    np.testing.assert_array_equal(found.features, every[::15])
    np.testing.assert_allclose(found.gaussian.covariance, gaussian(every).covariance, rtol=1e-9)
    assert watched == [(512, 1500), (512, 1500), (476, 1500)]
    next(run_data.rglob("features-stub-large-*.npz")).unlink()


def test_images_in_record_files_come_in_parts():
    images = np.random.default_rng(0).integers(0, 256, (1500, 6, 6, 1), np.uint8)
    records = Records(images.shape, lambda index: (images[index], np.zeros(len(index))))
    expected, kept = pixels(images), np.array([0, 511, 512, 1499, 3000])
    for source in (images, records):
        parts = list(reference.image_chunks(source))
        assert [len(part) for part in parts] == [512, 512, 476]
        np.testing.assert_array_equal(np.concatenate(parts), images)
        found = reference.summarise(parts, pixels, kept=kept, logits=True)
        assert found.count == 1500
        np.testing.assert_allclose(
            found.gaussian.covariance, gaussian(expected.features).covariance, rtol=1e-9
        )
        np.testing.assert_array_equal(found.features, expected.features[kept[:-1]])
        np.testing.assert_array_equal(found.logits, expected.logits)
    assert reference.summarise(parts, pixels, kept=kept).logits is None
    with pytest.raises(ValueError, match="no images"):
        reference.summarise([], pixels, kept=kept)
    with pytest.raises(ValueError, match="two images or more, got 1"):
        reference.summarise([images[:1]], pixels, kept=kept)


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
