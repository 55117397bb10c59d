"""Against diffusers itself, where it is installed: ``pip install -e '.[latents]'``."""

import numpy as np
import pytest
from PIL import Image

from adaptive_ts.experiment.data import latents
from adaptive_ts.experiment.data.loading import load
from adaptive_ts.experiment.data.vae import load_vae
from adaptive_ts.experiment.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(its folder, an autoencoder of Stable Diffusion's shape with random weights)."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path, model


def test_encoding_and_decoding_are_theirs(saved):
    path, model = saved
    vae = load_vae(str(path), "cpu")
    assert (vae.factor, vae.scale) == (8, 0.18215)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 24, 3), dtype=np.uint8)
    mean, deviation = vae.encode(images)
    assert mean.shape == deviation.shape == (3, 4, 3, 4) and mean.dtype == np.float32
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # torchvision's ToTensor
        law = model.encode((x - 0.5) / 0.5).latent_dist  # and Normalize, as in DiT's train.py
        expected = law.mean.mul(0.18215), law.std.mul(0.18215)
        decoded = model.decode(torch.from_numpy(mean).permute(0, 3, 1, 2) / 0.18215).sample
        pixels = torch.clamp(127.5 * decoded + 128.0, 0, 255).to(torch.uint8)  # DiT's sample_ddp.py
    for found, value in zip((mean, deviation), expected, strict=True):
        np.testing.assert_allclose(found, value.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    there = pixels.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(vae.decode(mean).astype(int) - there).max() <= 1


def test_from_a_folder_and_back(saved, tmp_path):
    path, _ = saved
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    data_dir, out = tmp_path.parent / "data", tmp_path.parent / "out"
    argv = ["encode", str(tmp_path), str(data_dir), "--name", "mine", "--image_size", "32"]
    assert latents.main([*argv, "--vae", str(path), "--device", "cpu", "--batch_size", "2"]) == 0
    train = load("mine", data_dir=data_dir, log=lambda line: None)
    assert train.images.shape == (4, 4, 4, 4) and train.images.dtype == np.float16
    np.savez(tmp_path.parent / "z.npz", latents=train.images)
    argv = ["decode", str(tmp_path.parent / "z.npz"), str(out), "--vae", str(path)]
    assert latents.main(argv) == 0
    with np.load(out / "images.npz") as file:
        assert file["images"].shape == (4, 32, 32, 3) and file["images"].dtype == np.uint8
        assert len(np.unique(file["images"])) > 10


def test_what_cannot_be_loaded(saved, tmp_path):
    with pytest.raises(UserError, match=r"--vae: cannot load .*: give a folder of diffusers'"):
        load_vae(str(tmp_path), "cpu")
    with pytest.raises(UserError, match=r"--device: cannot use 'abacus'"):
        load_vae(str(saved[0]), "abacus")
