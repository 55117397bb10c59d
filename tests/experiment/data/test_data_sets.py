"""Data sets by name: a user's IDX files, no test split, tensorflow-datasets, latents."""

import shutil
import types

import numpy as np
import pytest
from test_data import idx_folder, mute, same_records

from adaptive_ts.experiment.assembly.step import prepare
from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data import catalogue, records
from adaptive_ts.experiment.data.built_in import Recipe
from adaptive_ts.experiment.data.decoding import Records
from adaptive_ts.experiment.data.loading import batches, from_arrays, load, load_split
from adaptive_ts.experiment.errors import UserError

LATENT = (2, 2, 4)


def latents(count, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (count, *LATENT)).astype(np.float16)


def build(root, name, splits, **options):
    """Prepares arrays: ``{split: images}``; their labels count up."""

    def read(_download):
        return {split: zip(x, range(len(x)), strict=True) for split, x in splits.items()}

    images = next(iter(splits.values()))
    recipe = Recipe(name, images.shape[1:], 200, read, dtype=images.dtype, **options)
    return records.build(recipe, root, mute)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with ``plain`` (one split), ``valid`` (train and validation) and ``latent``."""
    root = tmp_path_factory.mktemp("sets")
    pixels = np.arange(120, dtype=np.uint8).reshape(120, 1, 1, 1)
    build(root, "plain", {"train": pixels})
    build(root, "valid", {"train": pixels, "validation": pixels[:7]})
    build(root, "latent", {"train": latents(20), "test": latents(6, 1)}, metadata={"scale": 0.18})
    build(root, "one", {"train": pixels[:1]})
    return root


def test_idx_files_of_ones_own(tmp_path):
    arrays = idx_folder(tmp_path / "raw")
    source = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw"), "log": mute}
    assert same_records(load("idx/kmnist", **source), *arrays["train"])
    by_name = load("idx/kmnist", split="test", image_size=32, data_dir=tmp_path / "d", log=mute)
    assert by_name.images.shape == (12, 32, 32, 1) and by_name.num_classes == 10
    idx_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made from other files"):
        load("idx/kmnist", **{**source, "source_dir": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"only read for cifar10, .* idx/NAME; got 'mnist': files"):
        load("mnist", **source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train-images-idx.* in .*four IDX files"):
        load("idx/x", **{**source, "source_dir": str(tmp_path / "empty")})


def test_a_set_without_a_test_split_holds_some_out(prepared):
    train, test = (load("plain", split=s, data_dir=prepared, log=mute) for s in ("train", "test"))
    assert (len(train.images), len(test.images)) == (117, 3)
    assert sorted([*train.labels, *test.labels]) == list(range(120))
    in_files = load("plain", split="test", data_dir=prepared, ram_limit=1, log=mute)
    assert isinstance(in_files.images, Records)
    images, labels = in_files.images.read(np.array([2, 0]))
    np.testing.assert_array_equal(images, test.images[[2, 0]])
    np.testing.assert_array_equal(labels, test.labels[[2, 0]])
    assert load("valid", split="train", data_dir=prepared, log=mute).images.shape[0] == 120
    assert load("valid", split="test", data_dir=prepared, log=mute).images.shape[0] == 7
    with pytest.raises(UserError, match="plain has no split 'validation': it has train"):
        load("plain", split="validation", data_dir=prepared)
    with pytest.raises(UserError, match="one holds 1 images: too few to hold out"):
        load("one", split="train", data_dir=prepared)


def test_tensorflow_prepares_what_is_not_there(prepared, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def builder(name, data_dir, file_format):
        assert file_format == "array_record"
        if name == "nowhere":
            raise ValueError("Dataset nowhere not found")
        path = data_dir / name / "1.0.0"

        def download_and_prepare():
            if name == "by_hand":
                raise AssertionError("put\n x.tar there")
            shutil.copytree(prepared / "valid" / "1.0.0", path)

        return types.SimpleNamespace(data_path=path, download_and_prepare=download_and_prepare)

    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tfds, "builder", builder)
    said = []
    assert len(load("theirs", split="test", data_dir=tmp_path, log=said.append).images) == 7
    assert "preparing theirs once by tensorflow-datasets" in said[0]
    with pytest.raises(UserError, match=r"cannot prepare by_hand in .*: put x.tar there"):
        load("by_hand", data_dir=tmp_path, log=mute)
    with pytest.raises(UserError, match="unknown data set 'nowhere'"):
        load("nowhere", data_dir=tmp_path)


def test_latents_stay_what_they_are(prepared):
    train = load("latent", data_dir=prepared, log=mute)
    assert train.images.dtype == np.float16 and train.num_classes == 200
    np.testing.assert_array_equal(train.images, latents(20)[train.labels])
    again = load("latent", data_dir=prepared, log=pytest.fail)
    np.testing.assert_array_equal(again.images, train.images)
    in_files = load("latent", data_dir=prepared, ram_limit=100, log=mute)
    assert in_files.images.dtype == np.float16
    batch, other = (next(batches(d, batch_size=4, seed=0, start_step=3)) for d in (train, in_files))
    np.testing.assert_array_equal(batch["image"], other["image"])
    assert batch["image"].dtype == other["image"].dtype == np.float16
    ready = prepare(batch, None)["image"]
    assert ready.dtype == np.float32
    np.testing.assert_array_equal(ready, batch["image"].astype(np.float32))
    assert records.read_metadata(prepared / "latent" / "1.0.0") == {"scale": 0.18}


def test_what_means_nothing_to_latents(prepared):
    for option, words in (
        ({"flip": True}, "--data.flip: latent holds latents, .*encode the images with --flip"),
        ({"downsample": 2}, r"--data.downsample: latent holds latents \(2, 2, 4\)"),
        ({"image_size": 8}, r"--data.image_size: latent holds latents \(2, 2, 4\)"),
    ):
        with pytest.raises(UserError, match=words):
            load_split(DataConfig(name="latent", dir=str(prepared), **option), "train", mute)
    assert from_arrays(np.full((1, *LATENT), 7.5), latents=True).images.dtype == np.float32
    with pytest.raises(UserError, match=r"lie in .7.5, 7.5.; wanted"):
        from_arrays(np.full((1, *LATENT), 7.5))
    with pytest.raises(UserError, match="latents that are not finite"):
        from_arrays(np.full((1, *LATENT), np.inf), latents=True)
