"""What ``generate`` leaves behind: PNG files, arrays, a grid, and what they depend on."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.files import atomic, write_json
from adaptive_ts.experiment.generate.making import save_grid
from adaptive_ts.experiment.generate.trained import Trained

_IN_GRID = 100


def folder_name(config: Config, trained: Trained, args: argparse.Namespace) -> str:
    """The folder of the images that were asked for, unless another is named."""
    c = config.generate
    name = f"step_{trained.step:08d}-{c.solver}-{c.steps}-seed{config.seed}"
    name += f"-guidance{c.guidance:g}" if c.guidance != 1 else ""
    return name + f"-labels{'_'.join(map(str, args.labels[:20]))}" if args.labels else name


def write_images(
    out: Path, batches: Iterator[np.ndarray], info: dict[str, Any], *, png: bool
) -> None:
    """Writes images, batch by batch, with a grid of the first and what they depend on."""
    from PIL import Image
    from tqdm import tqdm

    latents = info["latents"]
    shape = (info["num_images"], *info["image_shape"])
    images, done = np.empty(shape, np.float32 if latents else np.uint8), 0
    with tqdm(total=len(images), unit=" image") as bar:
        for batch in batches:
            images[done : done + len(batch)] = batch
            for number in range(done, done + len(batch)) if png and not latents else ():
                with atomic(out / f"{number:06d}.png") as file:
                    grey = images.shape[-1] == 1
                    Image.fromarray(images[number, ..., 0] if grey else images[number]).save(
                        file, "PNG"
                    )
            done += len(batch)
            bar.update(len(batch))
    save_grid(out / "grid.png", images[:_IN_GRID])
    arrays: dict[str, Any] = {"latents" if latents else "images": images}
    if info["labels"] is not None:
        arrays["labels"] = np.resize(np.asarray(info["labels"], np.int32), len(images))
    with atomic(out / "images.npz") as file:
        np.savez(file, **arrays)
    write_json(out / "info.json", {**info, "devices": f"{jax.device_count()} x {_device()}"})


def _device() -> str:
    return jax.devices()[0].device_kind
