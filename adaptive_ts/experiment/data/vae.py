"""The autoencoder of latent diffusion, by the diffusers library: the optional extra ``latents``."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.errors import UserError, one_line, quiet

STABLE_DIFFUSION = "stabilityai/sd-vae-ft-ema"


class Vae(NamedTuple):
    """Between pixels and scaled latents, whose variance is about 1.

    Attributes:
        name: where it came from.
        encode: uint8 (B, H, W, 3) -> (mean, standard deviation) of the latents, float32
            (B, H / factor, W / factor, C) each.
        decode: float32 latents -> uint8 (B, H, W, 3).
        factor: pixels per latent, on a side.
        scale: what the autoencoder's own latents are multiplied by: 0.18215 for Stable
            Diffusion's.
    """

    name: str
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[np.ndarray], np.ndarray]
    factor: int
    scale: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which commands name an autoencoder, its batches and its device."""
    add = parser.add_argument
    add("--vae", default=STABLE_DIFFUSION, help=f"hub or folder; default: {STABLE_DIFFUSION}")
    add("--batch_size", type=int, default=32, help="images at once; default: 32")
    add("--device", help="cpu, cuda, cuda:1, ..; default: cuda where there is one")


def load_vae(name: str = STABLE_DIFFUSION, device: str | None = None) -> Vae:
    """An ``AutoencoderKL`` of diffusers, in float32.

    Args:
        name: a model of the Hugging Face hub, downloaded once, or a folder of ``save_pretrained``.
        device: of PyTorch; None: ``"cuda"`` where there is one, else ``"cpu"``.

    Returns:
        The autoencoder.

    Raises:
        UserError: diffusers or PyTorch is not installed, no such model, or no such device.
    """
    try:
        with quiet():
            import torch
            from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"an autoencoder needs diffusers and torch ({one_line(error)}): pip install -e "
            "'.[train,latents]', or uv run --extra latents"
        ) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet():
            model = AutoencoderKL.from_pretrained(
                name, torch_dtype=torch.float32, low_cpu_mem_usage=False
            )
    except Exception as error:  # diffusers and the hub raise many kinds
        raise UserError(
            f"--vae: cannot load {name!r} ({one_line(error)}): give a folder of diffusers' "
            "save_pretrained, or a model of the hub where there is a network"
        ) from error
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device: cannot use {device!r} ({one_line(error)})") from error
    return _adapt(name, model, device)


def _adapt(name: str, model: Any, device: str) -> Vae:
    import torch

    scale = float(model.config.scaling_factor)
    shift = float(getattr(model.config, "shift_factor", None) or 0.0)
    factor = 2 ** (len(model.config.block_out_channels) - 1)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.transpose(0, 3, 1, 2).astype(np.float32)).to(device)

    def on_host(tensor: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(tensor.cpu().numpy().transpose(0, 2, 3, 1))

    def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode(), _fits(len(images)):
            law = model.encode(on_device(images) / 127.5 - 1).latent_dist
            return on_host((law.mean - shift) * scale), on_host(law.std * scale)

    def decode(latents: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), _fits(len(latents)):
            images = model.decode(on_device(latents) / scale + shift).sample
            return on_host(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))

    return Vae(name, encode, decode, factor, scale)


@contextlib.contextmanager
def _fits(count: int) -> Iterator[None]:
    """Says which option helps when a batch is too large for the device."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise UserError(
            f"--batch_size: {count} images do not fit into the device's memory: give fewer",
            exit_code=1,
        ) from error
