"""Latents: encoding with a stand-in autoencoder, going on after a kill, decoding, training."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import lines, main, saved_steps, train

from adaptive_ts.experiment.data import latents
from adaptive_ts.experiment.data.folder import read_image
from adaptive_ts.experiment.data.loading import load
from adaptive_ts.experiment.data.records import read_metadata
from adaptive_ts.experiment.data.vae import Vae, load_vae
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.main import command, decode, generate

DEVIATION = 0.25


def mute(_line):
    pass


def stand_in(seen=None, fail_after=None):
    """Latents of 2x2 pixels: their mean colour, and a channel that tells left from right."""
    seen = [] if seen is None else seen

    def encode(images):
        if fail_after is not None and sum(seen) + len(images) > fail_after:
            raise KeyboardInterrupt
        seen.append(len(images))
        n, height, width, _ = images.shape
        mean = images.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4)) / 127.5 - 1
        side = np.broadcast_to(np.linspace(-1, 1, width // 2)[:, None], (*mean.shape[:3], 1))
        mean = np.concatenate([mean, side], axis=-1).astype(np.float32)
        return mean, np.full_like(mean, DEVIATION)

    def decode(z):
        pixels = np.rint((z[..., :3] + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return pixels.repeat(2, 1).repeat(2, 2)

    return Vae("stand-in", encode, decode, 2, 0.5)


def encode(folder, data_dir, vae=None, **options):
    options = {"image_size": 8, "vae_name": "stand-in", "log": mute} | options
    return latents.encode_folder(folder, data_dir, lambda: vae or stand_in(), **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 13 training images in 2 classes, and 4 others."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(17):
        path = folder / ("train" if number < 13 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    """A data_dir with ``plain`` and, mirrored images too, ``both``."""
    data_dir = tmp_path_factory.mktemp("encoded")
    encode(images, data_dir, name="plain")
    encode(images, data_dir, name="both", flip=True, seed=3)
    return data_dir


def rows(dataset):
    return {(int(y), x.tobytes()) for x, y in zip(dataset.images, dataset.labels, strict=True)}


def test_a_latent_is_a_draw_by_seed_and_number(images, encoded):
    train = load("plain", data_dir=encoded, log=mute)
    assert train.images.shape == (13, 4, 4, 4) and train.images.dtype == np.float16
    assert train.num_classes == 2 and load("plain", split="test", data_dir=encoded, log=mute)
    expected = set()
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
        (mean,), _ = stand_in().encode(read_image(path, None)[None])
        noise = np.random.Generator(np.random.Philox([0, number])).standard_normal(
            mean.shape, np.float32
        )
        label = ["a", "b"].index(path.parent.name)
        expected.add((label, (mean + DEVIATION * noise).astype(np.float16).tobytes()))
    assert rows(train) == expected
    assert read_metadata(encoded / "plain" / "1.0.0") == {
        "source": latents.list_images(images).mark,
        "image_size": 8,
        "flip": False,
        "seed": 0,
        "vae": "stand-in",
        "scale": 0.5,
    }


def test_neither_batches_nor_a_kill_change_it(images, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_IN_PART", 5)
    with pytest.raises(KeyboardInterrupt):
        encode(images, tmp_path, stand_in(fail_after=11), name="plain", batch_size=2)
    assert not (tmp_path / "plain").exists()
    (parts,) = tmp_path.glob(".plain-*")
    assert sorted(p.name for p in parts.iterdir()) == ["000000000.npy", "000000005.npy"]
    seen, said = [], []
    encode(images, tmp_path, stand_in(seen), name="plain", batch_size=3, log=said.append)
    assert sum(seen) == 7 and "going on after 2 of 4 parts" in said[0]
    assert "latents 4x4x4, 13 in train and 4 in test" in said[1]
    assert not parts.exists()
    for split in ("train", "test"):
        one, other = (load("plain", split=split, data_dir=d, log=mute) for d in (tmp_path, encoded))
        assert rows(one) == rows(other)


def test_mirrored_images_have_latents_of_their_own(images, encoded):
    train = load("both", data_dir=encoded, log=mute)
    assert len(train.images) == 26
    assert len(load("both", split="test", data_dir=encoded, log=mute).images) == 4
    # The last channel runs from left to right in a latent, whichever way its image lies.
    assert np.all(np.diff(train.images[..., 3].astype(float).mean((0, 1))) > 0.4)
    means = [
        stand_in().encode(pixels[None])[0][0, ..., :3]
        for path in (images / "train").rglob("*.png")
        for pixels in (read_image(path, None), read_image(path, None)[:, ::-1])
    ]
    away = np.abs(train.images[:, None, ..., :3] - np.stack(means)[None]).mean((2, 3, 4))
    assert sorted(away.argmin(1)) == list(range(26)), "each image and its mirror image, once"
    noise = train.images[..., :3] - np.stack(means)[away.argmin(1)]
    assert abs(noise.std() - DEVIATION) < 4 * DEVIATION / np.sqrt(2 * noise.size)  # p 6e-5


def test_what_is_there_is_not_made_again(images, encoded, tmp_path):
    said = []
    encode(images, encoded, stand_in(fail_after=0), name="plain", log=said.append)
    assert len(said) == 1 and "is complete: nothing to do" in said[0]
    with pytest.raises(UserError, match=r"other images or options \(seed: 0 there\)"):
        encode(images, encoded, name="plain", seed=1)
    for options, words in (
        ({"name": "My set"}, "--name: 'My set': give small letters"),
        ({"name": "x", "image_size": 7}, "--image_size: 7 is not divisible by 2"),
    ):
        with pytest.raises(UserError, match=words):
            encode(images, encoded, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        encode(images, tmp_path / "file")


def test_decoding(encoded, tmp_path, monkeypatch):
    (_, z, labels, *_) = load("plain", data_dir=encoded, log=mute)
    np.savez(tmp_path / "images.npz", latents=z, labels=labels)
    (tmp_path / "info.json").write_text(json.dumps({"solver": "ddim", "num_images": 1}))
    monkeypatch.setattr(decode, "load_vae", lambda name, device: stand_in())
    out = tmp_path / "out"
    argv = ["decode", str(tmp_path / "images.npz"), str(out), "--batch_size", "4"]
    assert command.main(argv) == 0
    with np.load(out / "images.npz") as file:
        found = file["images"]
        np.testing.assert_array_equal(file["labels"], labels)
    assert found.shape == (13, 8, 8, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, stand_in().decode(z.astype(np.float32)))
    info = json.loads((out / "info.json").read_text())
    assert info["solver"] == "ddim" and info["vae"] == "stand-in" and info["num_images"] == 13
    assert info["image_shape"] == [8, 8, 3]
    with Image.open(out / "grid.png") as grid:
        assert min(grid.size) > 100
    with pytest.raises(UserError, match="is not empty"):
        command.main(argv)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, "no file .*: give an .npz with latents"),
        ({"images": np.zeros((1, 2, 2, 3))}, "is no .npz file with latents .KeyError"),
        ({"latents": np.zeros((1, 2, 2, 4), np.uint8)}, r"floats \(N, h, w, C\); got uint8"),
        ({"latents": np.full((1, 2, 2, 4), np.nan)}, "not finite"),
    ],
)
def test_what_cannot_be_decoded(arrays, words, tmp_path):
    if arrays is not None:
        np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        latents.decode_file(tmp_path / "x.npz", tmp_path / "out", stand_in)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["encode", ".", ".", "--batch_size", "0"], "--batch_size: 0 is out of range"),
        (["encode", ".", ".", "--seed", "-1"], "--seed: -1 is out of range: must be at least 0"),
        (["encode", ".", ".", "--image_sise", "8"], "unrecognized arguments: --image_sise"),
        (["decode", "x.npz"], "required: OUT"),
    ],
)
def test_mistakes_in_the_command(argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(UserError, match=words) as error:
        command.main(argv)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_without_the_extra_one_line_says_what_installs_it(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs diffusers and torch .*pip install -e .*latents"):
        load_vae()
    with pytest.raises(UserError, match="uv run --extra latents") as error:
        command.main(["encode", str(images), str(tmp_path), "--image_size", "8"])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_on_latents(encoded, tmp_path, run_data):
    extra = "--data.name plain --train.steps 2"
    code, said = train(tmp_path / "run", encoded, extra, "digits_uniform")
    assert code == 0 and "13 images of plain" in " ".join(said)
    assert saved_steps(tmp_path / "run") == [1, 2]
    first, _ = lines(tmp_path / "run")
    assert abs(first["loss"] - 1) < 0.2, "the noise's variance: latents are not rescaled"
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()
    assert generate.main([str(tmp_path / "run"), "--out", str(tmp_path / "made")]) == 0
    with np.load(tmp_path / "made" / "images.npz") as made:
        assert set(made) == {"latents"} and made["latents"].dtype == np.float32
        assert made["latents"].shape == (4, 4, 4, 4) and np.abs(made["latents"]).max() > 1
    assert {p.name for p in (tmp_path / "made").iterdir()} == {
        *("images.npz", "grid.png", "info.json"),
    }
    for option, words in (
        ("--data.flip True", "--data.flip: plain holds latents"),
        ("--sampler.decoder_nll True", "--sampler.decoder_nll: True is of 8-bit pixels"),
        ("--model.name uvit --model.transformer.patch_size 3", "divisible by patch_size=3"),
    ):
        argv = ["digits", "--data.name", "plain", "--data.dir", str(encoded)]
        argv += [*option.split(), "--train.batch_size", str(jax.device_count())]
        with pytest.raises(UserError, match=words):
            main([*argv, "--workdir", str(tmp_path / "other")])
        assert not (tmp_path / "other").exists()
