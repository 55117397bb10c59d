"""Images of a trained model, batch by batch over all devices, and as pictures."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import pictures
from adaptive_ts.experiment.assembly.build import Built
from adaptive_ts.experiment.assembly.state import final_keys
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.generate.request import AT_ONCE, label_cycle
from adaptive_ts.experiment.generate.trained import Trained
from adaptive_ts.experiment.pictures import to_uint8
from adaptive_ts.experiment.solvers.generator import guided, make_generator
from adaptive_ts.types import Key, Params

_SMALL = 16  # pixels: squares this large hide the shape, so the picture is interpolated


def image_batches(
    config: Config,
    built: Built,
    shape: tuple[int, ...],
    mesh: Mesh,
    *,
    batch_size: int = AT_ONCE,
    spacing: str = "linear",
    labels: Sequence[int] | None = None,
    latents: bool = False,
) -> Callable[[Params, Key], Iterator[np.ndarray]]:
    """(params, key) -> the images of ``config.generate``, in order, float32 in [-1, 1].

    Image i is the same whatever the batch size and the number of devices, up to how the compiler
    rounds for each. With ``generate.guidance`` 1 the model is evaluated once, else twice.

    Args:
      config: of the run; its ``generate`` and its ``model.variance`` are used.
      built: the run's parts.
      shape: (H, W, C) of one image.
      mesh: the devices, which share each batch.
      batch_size: images at once, rounded up to a multiple of the devices; a batch that is not
        full is padded, and what is too many thrown away.
      spacing: of the timesteps, ``"linear"`` or ``"quadratic"``.
      labels: that the images get in turn, as `label_cycle` says; None: every class.
      latents: they are latents, of any range: nothing is clipped.

    Raises:
      ValueError: options that don't go together, as ``make_generator`` says.
    """
    c, eps_fn = config.generate, built.eps_fn
    cycle = label_cycle(built.num_classes, labels)
    if c.guidance != 1:
        if cycle is None or built.num_classes is None:
            raise ValueError(
                f"guidance: {c.guidance} means nothing to a model without classes: leave it out"
            )
        eps_fn = guided(eps_fn, c.guidance, built.num_classes)
    generate = make_generator(
        eps_fn,
        built.schedule,
        tuple(shape),
        solver=c.solver,
        steps=c.steps,
        eta=c.eta,
        variance=config.model.variance,
        spacing=spacing,
        clip=not latents,
    )
    at_once = -(-min(c.num_images, batch_size) // mesh.size) * mesh.size

    def batches(params: Params, key: Key) -> Iterator[np.ndarray]:
        for start in range(0, c.num_images, at_once):
            index = np.arange(start, start + at_once, dtype=np.int32)
            rows = (index,) if cycle is None else (index, cycle[index % len(cycle)])
            made = sharding.fetch(generate(params, key, *sharding.put_whole(rows, mesh)))
            yield made[: c.num_images - start]

    return batches


def make_images(
    config: Config, trained: Trained, mesh: Mesh, args: argparse.Namespace
) -> Iterator[np.ndarray]:
    """The images that were asked for, batch by batch: uint8 pixels, or float32 latents.

    Args:
      config: by `options`.
      trained: the run at a checkpoint; its averaged weights are used.
      mesh: the devices, which share each batch.
      args: with the values of `add_options`.

    Raises:
      UserError: options that don't go together; images that are not finite numbers.
    """
    try:
        batches = image_batches(
            config,
            trained.built,
            trained.shape,
            mesh,
            batch_size=args.batch_size,
            spacing=args.spacing,
            labels=args.labels,
            latents=trained.latents,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    made = _finite(batches(trained.state.ema, final_keys(config.seed)[1]))
    return made if trained.latents else map(to_uint8, made)


def _finite(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    done = 0
    for batch in batches:
        if not np.isfinite(batch).all():
            raise UserError(
                f"there are images that are not finite numbers, the first among {done} to "
                f"{done + len(batch) - 1}: try an earlier --step",
                exit_code=1,
            )
        yield batch
        done += len(batch)


def describe(config: Config, trained: Trained, args: argparse.Namespace) -> dict[str, Any]:
    """What the images depend on, for info.json.

    Args:
      config: by `options`.
      trained: the run at a checkpoint.
      args: with ``run`` and the values of `add_options`.
    """
    c, cycle = config.generate, label_cycle(trained.built.num_classes, args.labels)
    return {
        "run": str(args.run.expanduser().resolve()),
        "step": trained.step,
        "weights": "ema",
        "dataset": config.data.name,
        "schedule": config.schedule.name,
        "num_images": c.num_images,
        "image_shape": trained.shape,
        "latents": trained.latents,
        "solver": c.solver,
        "steps": c.steps,
        "spacing": args.spacing,
        "eta": c.eta if c.solver == "ddim" else None,
        "variance": config.model.variance if c.solver == "ddpm" else None,
        "guidance": None if cycle is None else c.guidance,
        "labels": None if cycle is None else cycle.tolist(),
        "seed": config.seed,
    }


def save_grid(path: str | os.PathLike[str], images: np.ndarray) -> None:
    """Writes images (N, H, W, C), uint8 or in [-1, 1], or latents, as one picture."""
    small = max(images.shape[1:3]) < _SMALL
    pictures.save_image_grid(path, _visible(images), smooth=small)


def _visible(images: np.ndarray) -> np.ndarray:
    if images.shape[-1] in (1, 3):
        return images
    # Latents, of variance about 1: three of their channels as colours.
    return images[..., :3] / 3 if images.shape[-1] > 3 else images[..., :1] / 3
