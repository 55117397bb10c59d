"""A folder of images as a data set: what is read, how it is cropped, what is refused."""

import itertools

import numpy as np
import pytest
from PIL import Image

from adaptive_ts.experiment.data import folder
from adaptive_ts.experiment.data.folder import in_threads, list_images, read_image, square
from adaptive_ts.experiment.data.loading import load
from adaptive_ts.experiment.errors import UserError


def mute(_line):
    pass


def random_images(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def pairs(dataset):
    """(label, pixels), in an order of their own: tensorflow-datasets has one too."""
    return sorted(
        (int(y), x.tobytes()) for x, y in zip(dataset.images, dataset.labels, strict=True)
    )


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """(source folder, data_dir, images, classes): train and val, two classes, one size."""
    root = tmp_path_factory.mktemp("cats")
    images, labels = random_images(12), np.arange(12) % 2
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        split, deeper = ("train", "b") if number < 8 else ("val", "")
        save(root / "raw" / split / ("manx", "siam")[label] / deeper / f"{number}.png", pixels)
    (root / "raw" / "train" / ".DS_Store").write_text("hidden files are passed over")
    options = {"data_dir": root / "data", "source_dir": str(root / "raw")}
    load("folder/cats", split="train", log=mute, **options)
    return root / "raw", root / "data", images, labels


def test_two_splits_and_their_classes(cats):
    source, data_dir, images, labels = cats
    for split, rows in (("train", slice(0, 8)), ("test", slice(8, 12))):
        found = load("folder/cats", split=split, data_dir=data_dir, log=mute)
        expected = zip(labels[rows], images[rows], strict=True)
        assert pairs(found) == sorted((int(y), x.tobytes()) for y, x in expected)
        assert found.num_classes == 2 and found.images.shape[1:] == (8, 8, 3)
    assert list_images(source).classes == ["manx", "siam"]
    assert "manx" in (data_dir / "folder/cats/1.0.0/label.labels.txt").read_text()


def test_a_prepared_folder_is_found_by_its_name(cats, tmp_path):
    source, data_dir, *_ = cats
    with pytest.raises(UserError, match=r"folder/dogs is not in .*give --data.source_dir"):
        load("folder/dogs", data_dir=data_dir)
    other = tmp_path / "other"
    for number, pixels in enumerate(random_images(3)):
        save(other / f"{number}.png", pixels)
    with pytest.raises(UserError, match=r"made from other files than those in .*another name"):
        load("folder/cats", data_dir=data_dir, source_dir=str(other))
    load("folder/cats", data_dir=data_dir, source_dir=str(source), log=mute)
    for name, words in (("folder", "give it a name"), ("folder/My-Cats", "small letters")):
        with pytest.raises(UserError, match=words):
            load(name, data_dir=data_dir, source_dir=str(source))
    with pytest.raises(UserError, match="is not a folder"):
        load("folder/cats", data_dir=data_dir, source_dir=str(tmp_path / "none"))


def test_one_folder_holds_out_every_50th(tmp_path):
    images = random_images(101, (4, 4))
    for number, pixels in enumerate(images):
        save(tmp_path / "raw" / "train" / f"{number:03}.png", pixels)
    listing = list_images(tmp_path / "raw")
    assert [p.name for p, _ in listing.splits["test"]] == ["000.png", "050.png", "100.png"]
    assert len(listing.splits["train"]) == 98 and listing.classes is None
    said = []
    options = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw")}
    train = load("folder/grey", log=said.append, **options)
    test = load("folder/grey", split="test", log=said.append, **options)
    assert "images without classes, 98 in train and 3 in test" in said[0]
    assert test.images.shape == (3, 4, 4, 1) and test.num_classes == 1 and not test.labels.any()
    expected = sorted(x.tobytes() for x in images[[0, 50, 100]])
    assert sorted(x.tobytes() for x in test.images) == expected
    assert sorted(x.tobytes() for x in np.concatenate([train.images, test.images])) == sorted(
        x.tobytes() for x in images
    )
    left_in_files = load("folder/grey", ram_limit=100, log=mute, **options)
    np.testing.assert_array_equal(left_in_files.images[np.arange(98)], train.images)
    assert len(left_in_files.images) == 98


def test_sizes_become_one(tmp_path):
    big, small = random_images(1, (64, 32, 3))[0], random_images(1, (20, 30, 3))[0]
    save(tmp_path / "raw" / "a.png", big)
    save(tmp_path / "raw" / "b.png", small)
    options = {"data_dir": tmp_path / "d", "source_dir": str(tmp_path / "raw"), "log": mute}
    with pytest.raises(UserError, match=r"differ in size: 30x20 \(.*b.png\), 32x64 .*a.png") as e:
        load("folder/two", **options)
    assert "give --data.image_size" in str(e.value) and e.value.exit_code == 2
    for side in (8, 16):
        found = load("folder/two", split="test", image_size=side, **options)
        assert found.images.shape == (1, side, side, 3)
        expected = np.asarray(square(Image.fromarray(big), side))
        np.testing.assert_array_equal(found.images[0], expected)
        assert (tmp_path / "d" / "folder" / f"two_{side}").is_dir()
    with pytest.raises(UserError, match=r"--data\.downsample: 2 means nothing to a folder"):
        load("folder/two", image_size=8, downsample=2, **options)


def test_square_is_the_middle_averaged():
    pixels = random_images(1, (64, 32, 3))[0]
    middle = pixels[16:48].reshape(8, 4, 8, 4, 3).mean((1, 3))
    for image, expected in (
        (pixels, middle),
        (pixels.transpose(1, 0, 2), middle.transpose(1, 0, 2)),
    ):
        found = np.asarray(square(Image.fromarray(image), 8), float)
        assert np.abs(found - expected).max() < 2  # rounded along each axis of each halving
    ramp = np.tile(np.arange(0, 240, 6, np.uint8), (30, 1))  # antialiased: no pixel is left out
    np.testing.assert_allclose(
        np.asarray(square(Image.fromarray(ramp), 12))[:, 1:-1].mean(), 117, atol=1
    )
    assert square(Image.fromarray(ramp), 100).size == (100, 100)


def test_modes(tmp_path):
    grey = random_images(1, (6, 5))[0]
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    Image.fromarray(grey).convert("LA").save(tmp_path / "alpha.png")
    for name in ("grey", "deep", "alpha"):
        path = tmp_path / f"{name}.png"
        np.testing.assert_array_equal(read_image(path, None, grey=True)[..., 0], grey)
        np.testing.assert_array_equal(read_image(path, None), np.repeat(grey[..., None], 3, 2))
    sizes, all_grey = folder._look(list_images(tmp_path))
    assert list(sizes) == [(6, 5)] and all_grey
    red = np.zeros((6, 5, 4), np.uint8)
    red[..., 0], red[..., 3] = 255, 9
    save(tmp_path / "red.webp", red, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "red.webp", None), red[..., :3])
    assert not folder._look(list_images(tmp_path))[1]


def test_a_photograph_is_turned(tmp_path):
    pixels = random_images(1, (4, 8, 3))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # lay on its left side
    save(tmp_path / "a.png", pixels, exif=exif)
    save(tmp_path / "b.png", pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", None), np.rot90(pixels, -1))
    assert list(folder._look(list_images(tmp_path))[0]) == [(8, 4)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "raw holds no images"),
        ({"a.png": 1}, "holds one image"),
        ({"a.png": 1, "notes.txt": 0, "old/b.bmp": 0}, "notes.txt and 1 more: no image"),
        ({"a.png": 1, "x/b.png": 1}, "a.png lies beside subfolders with images"),
        ({"train/x/a.png": 1, "test/y/b.png": 1}, r"test has subfolders \['y'\]: wanted the cl"),
        ({"train/x/a.png": 1, "test/b.png": 1}, "test has subfolders none: wanted the classes"),
        ({"train/a.png": 1, "valid/y/b.png": 1}, r"valid has subfolders \['y'\]: wanted no classe"),
        ({"train/a.png": 1, "test/.keep": 0}, "test holds no images"),
        ({"a.png": 1, "b.png": 0}, "b.png is no image, or damaged"),
        ({"a.png": 1, "b.png": -1}, "b.png is no image, or damaged .*truncated"),
    ],
)
def test_what_is_refused(files, words, tmp_path):
    """1: an image; 0: a file that is none; -1: half an image."""
    (tmp_path / "raw").mkdir()
    for name, kind in files.items():
        path = tmp_path / "raw" / name
        if kind == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("text")
            continue
        save(path, random_images(1, (16, 16, 3))[0])
        if kind < 0:
            path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=words) as error:
        load("folder/x", data_dir=tmp_path / "d", source_dir=str(tmp_path / "raw"), log=mute)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert not (tmp_path / "d" / "folder" / "x" / "1.0.0").exists(), "nothing half-made is left"


def test_few_results_are_in_memory_at_a_time():
    begun = []
    results = in_threads(lambda n: begun.append(n) or n, range(10_000))
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    assert len(begun) <= 256
    results.close()
    assert list(in_threads(str, range(600))) == [str(n) for n in range(600)]
