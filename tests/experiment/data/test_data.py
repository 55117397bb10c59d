"""Data: preparing, decoding, caching, and batches whose only state is the step."""

import gzip
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from adaptive_ts.experiment.data import built_in, catalogue
from adaptive_ts.experiment.data.loading import batches, from_arrays, load
from adaptive_ts.experiment.errors import UserError, nearest, one_line

ROOT = pathlib.Path(__file__).parents[3]


def mute(_line):
    pass


def write_idx(path, array, compress):
    head = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def idx_folder(folder, *, size=28, compress=True, seed=0):
    """A folder like Debian's dataset-fashion-mnist, with 40 and 12 random images."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    arrays = {}
    for prefix, n in (("train", 40), ("t10k", 12)):
        images = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        suffix = ".gz" if compress else ""
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels, compress)
        arrays[prefix] = images[..., None], labels
    return arrays


def same_records(dataset, images, labels):
    """tensorflow-datasets stores records in an order of its own."""
    want = sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))
    pairs = zip(dataset.images, dataset.labels, strict=True)
    return want == sorted((int(y), x.tobytes()) for x, y in pairs)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data_dir with digits prepared and both splits decoded."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        load("digits", split=split, data_dir=folder, log=mute)
    return folder


@pytest.fixture(scope="session")
def tiny():
    return from_arrays(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10))


def order(dataset, steps, **options):
    """The records of the first batches; ``tiny``'s pixels and labels are its indices."""
    it = batches(dataset, **options)
    rows = [next(it) for _ in range(steps)]
    assert all((b["image"][:, 0, 0, 0] == b["label"]).all() for b in rows)
    return [b["label"].tolist() for b in rows]


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def test_digits_are_scikit_learns(prepared):
    train = load("digits", split="train", data_dir=prepared, log=mute)
    test = load("digits", split="test", data_dir=prepared, log=mute)
    assert (train.images.shape, test.images.shape) == ((1500, 8, 8, 1), (297, 8, 8, 1))
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.num_classes == 10 and set(train.labels) == set(range(10))
    values, labels = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    chosen = np.random.RandomState(0).permutation(1797)
    assert same_records(train, images[chosen[:1500]], labels[chosen[:1500]])
    assert same_records(test, images[chosen[1500:]], labels[chosen[1500:]])
    assert len(train.fingerprint) == 16 and train.fingerprint != test.fingerprint


def test_second_load_needs_no_decoder(prepared):
    code = (
        "import sys; from adaptive_ts.experiment.data.loading import load; "
        f"d = load('digits', split='train', data_dir={str(prepared)!r}); "
        "print(d.fingerprint, {'tensorflow_datasets', 'PIL', 'sklearn'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    train = load("digits", split="train", data_dir=prepared, log=mute)
    assert (run.stdout, run.stderr) == (f"{train.fingerprint} set()\n", "")


def test_preparing_says_one_line_and_nothing_else(tmp_path, capfd):
    log = []
    load("digits", split="test", data_dir=tmp_path, log=log.append)
    assert [line.split()[0] for line in log] == ["preparing", "decoding"]
    assert capfd.readouterr() == ("", "")


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("harm", ["cut", "flip", "count", "text"])
def test_damaged_cache_is_made_again(prepared, tmp_path, harm):
    shutil.copytree(prepared, tmp_path / "d")
    cache = tmp_path / "d" / "digits" / "1.0.0" / "decoded-test.npz"
    content = bytearray(cache.read_bytes())
    if harm == "cut":
        cache.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        content[len(content) // 2] ^= 4
        cache.write_bytes(content)
    elif harm == "count":
        shutil.copy(cache.with_name("decoded-train.npz"), cache)
    else:
        cache.write_text("no archive")
    log = []
    again = load("digits", split="test", data_dir=tmp_path / "d", log=log.append)
    assert again.fingerprint == load("digits", split="test", data_dir=prepared).fingerprint
    assert len(log) == 2 and "is damaged" in log[0] and "\n" not in log[0]
    log.clear()
    load("digits", split="test", data_dir=tmp_path / "d", log=log.append)
    assert not log and not list(tmp_path.rglob("*.tmp"))


def test_damaged_records(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    folder = tmp_path / "d" / "digits" / "1.0.0"
    (folder / "decoded-test.npz").unlink()
    records = next(folder.glob("*test.array_record*"))
    content = bytearray(records.read_bytes())
    content[2000:2064] = bytes(64)  # the second half is padding
    records.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged records in .*remove that folder"):
        load("digits", split="test", data_dir=tmp_path / "d", log=mute)


def test_unfinished_folder(tmp_path):
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no complete data set.*remove it"):
        load("digits", data_dir=tmp_path, log=mute)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_folder_padded_to_32(tmp_path, compress):
    arrays = idx_folder(tmp_path / "raw", compress=compress)
    options = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw"), "log": mute}
    plain = load("fashion_mnist", split="test", **options)
    assert same_records(plain, *arrays["t10k"])
    padded = load("fashion_mnist", split="test", image_size=32, **options)
    assert padded.images.shape == (12, 32, 32, 1)
    np.testing.assert_array_equal(padded.images[:, 2:30, 2:30], plain.images)
    assert padded.images.sum() == plain.images.sum()
    small = load("fashion_mnist", split="test", downsample=4, image_size=8, **options)
    means = plain.images.reshape(12, 7, 4, 7, 4, 1).mean((2, 4))
    assert small.images.shape == (12, 8, 8, 1)
    np.testing.assert_array_equal(small.images[:, :7, :7], np.rint(means))
    assert padded.fingerprint == plain.fingerprint
    with pytest.raises(UserError, match=r"\(28, 28\) are not divisible by downsample 3"):
        load("fashion_mnist", split="test", downsample=3, **options)
    with pytest.raises(UserError, match=r"image_size 16 is smaller than the images \(28, 28\)"):
        load("fashion_mnist", split="test", image_size=16, **options)


def test_two_source_folders_are_two_sets(tmp_path):
    for seed in (0, 1):
        arrays = idx_folder(tmp_path / f"raw{seed}", size=6 + seed, seed=seed)
        source = str(tmp_path / f"raw{seed}")
        found = load("fashion_mnist", data_dir=tmp_path / "d", source_dir=source, log=mute)
        assert same_records(found, *arrays["train"])


def test_cifar10_archive(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    rows = {n: rng.integers(0, 256, (4, 3073), dtype=np.uint8) for n in names}
    for r in rows.values():
        r[:, 0] %= 10
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, r in rows.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = r.size
            tar.addfile(info, io.BytesIO(r.tobytes()))
    options = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw"), "log": mute}
    train = load("cifar10", **options)
    want = np.concatenate([rows[n] for n in names[:5]])
    images = np.stack([r[1:].reshape(3, 32, 32) for r in want]).transpose(0, 2, 3, 1)
    assert same_records(train, images, want[:, 0])
    assert train.num_classes == 10

    monkeypatch.setattr(built_in, "CIFAR10_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(
        UserError, match=r"cannot prepare cifar10 .*offline, pass --data.source_dir"
    ):
        load("cifar10", data_dir=tmp_path / "e", log=mute)


def test_set_above_the_memory_limit(tmp_path):
    arrays = idx_folder(tmp_path / "raw")
    options = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw"), "log": mute}
    options |= {"downsample": 2, "image_size": 16}
    inside = load("fashion_mnist", **options)
    outside = load("fashion_mnist", ram_limit=100, **options)
    assert outside.images.shape == inside.images.shape == (40, 16, 16, 1)
    assert outside.num_classes == 10 and len(arrays) == 2
    a, b = (batches(d, batch_size=16, seed=3, start_step=2) for d in (inside, outside))
    for _ in range(5):
        x, y = next(a), next(b)
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])
        assert y["image"].dtype == np.uint8 and y["label"].dtype == np.int32


def test_a_set_of_another_name(prepared, tmp_path):
    for version in ("1.0.0", "1.0.10", "1.0.9"):
        shutil.copytree(prepared / "digits" / "1.0.0", tmp_path / "my_set" / "config" / version)
    (tmp_path / "my_set" / "config" / "1.0.9" / "decoded-test.npz").write_text("not looked at")
    found = load("my_set/config", split="test", data_dir=tmp_path, log=mute)
    assert found.images.shape == (297, 8, 8, 1)
    info = tmp_path / "other" / "3.0.1" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"fileFormat": "tfrecord", "splits": []}))
    with pytest.raises(UserError, match=r"as tfrecord, .*file_format='array_record'"):
        load("other", data_dir=tmp_path)


def test_wrong_names(prepared, tmp_path):
    for name, words in (
        ("digit", "unknown data set 'digit': did you mean 'digits'\\? known: cifar10, digits, fas"),
        ("celeb_a", "unknown data set 'celeb_a': known: .*tfds.builder\\('celeb_a'"),
        ("../digits", "unknown data set '../digits'"),
        ("", "unknown data set ''"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(name, data_dir=prepared)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split 'val': it has test, train"):
        load("digits", split="val", data_dir=prepared)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", data_dir=tmp_path, source_dir=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is not a folder"):
        load("fashion_mnist", data_dir=tmp_path, source_dir=str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot prepare digits in"):
        load("digits", data_dir=tmp_path / "file", log=mute)


def test_another_process_finishes_first(prepared, tmp_path, monkeypatch):
    """Preparing ends in a rename; it fails where the other's folder already stands."""
    recipe = built_in.digits()
    theirs = prepared / "digits" / "1.0.0"

    def read(download):
        shutil.copytree(theirs, tmp_path / "digits" / "1.0.0")
        return recipe.read(download)

    (tmp_path / "digits" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)  # of a killed process
    monkeypatch.setitem(catalogue.RECIPES, "digits", lambda _source: recipe._replace(read=read))
    log = []
    found = load("digits", split="test", data_dir=tmp_path, log=log.append)
    assert found.fingerprint == load("digits", split="test", data_dir=prepared).fingerprint
    assert len(log) == 1 and "preparing digits once" in log[0]


def test_preparing_fails_in_the_middle(tmp_path, monkeypatch):
    def read(_download):
        raise OSError(28, "No space left on device")

    recipe = built_in.digits()._replace(read=read)
    monkeypatch.setitem(catalogue.RECIPES, "digits", lambda _source: recipe)
    with pytest.raises(UserError, match=r"cannot prepare digits in .*No space left.*--data.dir"):
        load("digits", data_dir=tmp_path, log=mute)
    monkeypatch.undo()
    assert len(load("digits", data_dir=tmp_path, log=mute).images) == 1500


def test_arrays_are_checked():
    grey = from_arrays(np.zeros((3, 5, 4), np.uint8))
    assert grey.images.shape == (3, 5, 4, 1) and grey.num_classes == 1
    ones = np.ones((2, 4, 4, 1), np.float32)
    for images, labels, words in (
        (ones[0, 0], None, r"must be \(N, H, W, C\) and not empty; got \(4, 1\)"),
        (ones[:0], None, r"not empty; got \(0, 4, 4, 1\)"),
        (ones * 255, None, r"float32 images lie in \[255.0, 255.0\]; wanted"),
        (ones * np.nan, None, "lie in .nan, nan."),
        (ones.astype(np.int32) * 256, None, r"int32 images lie in \[256, 256\]"),
        (ones, np.zeros(3, int), r"2 images need as many integer labels; got int64 \(3,\)"),
        (ones, np.zeros(2), "got float64"),
        (ones, np.array([0, -1]), r"labels lie in \[-1, 0\]"),
        (ones, np.array([0, 7]), r"labels lie in \[0, 7\]; wanted \[0, 5\)"),
    ):
        with pytest.raises(UserError, match=words):
            from_arrays(images, labels, num_classes=5)


def test_float_images_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    as_floats = pixels.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(from_arrays(as_floats).images, pixels)


def test_every_record_once_per_epoch(tiny):
    rows = flat(order(tiny, 20, batch_size=5, seed=1))
    epochs = [rows[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 10
    assert rows == flat(order(tiny, 20, batch_size=5, seed=1))
    assert rows != flat(order(tiny, 20, batch_size=5, seed=2))


def test_the_order_never_changes(tiny):
    """Runs go on after an upgrade: NumPy promises Philox's stream, and this holds it to that."""
    assert order(tiny, 2, batch_size=10, seed=0) == [
        [0, 8, 9, 3, 7, 5, 1, 2, 6, 4],
        [3, 7, 4, 2, 9, 8, 1, 6, 5, 0],
    ]


@pytest.mark.parametrize("batch_size", [4, 5, 10, 23])
def test_start_step_goes_on_where_it_stopped(tiny, batch_size):
    whole = order(tiny, 12, batch_size=batch_size, seed=7)
    for k in (0, 1, 5, 11):
        assert order(tiny, 12 - k, batch_size=batch_size, seed=7, start_step=k) == whole[k:]
    it = batches(tiny, batch_size=batch_size, seed=7, start_step=5)
    next(it)
    assert it.get_state() == {"next_index": 6}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch(tiny, count):
    whole = order(tiny, 9, batch_size=8, seed=3)
    parts = [
        order(tiny, 9, batch_size=8, seed=3, process_index=i, process_count=count)
        for i in range(count)
    ]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


def test_batch_larger_than_the_set(tiny):
    (rows,) = order(tiny, 1, batch_size=25, seed=0)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and len(rows) == 25


def test_wrong_batches(tiny):
    for options, words in (
        ({"batch_size": 9, "process_count": 2}, "batch_size 9 must be a positive multiple of the"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 2, "seed": -1}, "seed -1"),
        ({"batch_size": 2, "start_step": -1}, "start_step -1"),
        ({"batch_size": 2, "process_index": 1}, "process_index 1"),
    ):
        with pytest.raises(UserError, match=words):
            batches(tiny, **{"seed": 0, **options})


def test_wording():
    assert (
        nearest("Digts", ["digits", "cifar10"]) == "did you mean 'digits'? known: cifar10, digits"
    )
    assert nearest("xyz", ["digits", "cifar10"]) == "known: cifar10, digits"
    assert nearest("xyz", []) == "known: none"
    assert one_line(ValueError("\n\n  a   b \n c")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 500))) == 120
    assert UserError("x", exit_code=1).exit_code == 1
