"""Images of a trained run: as many as wanted, by any solver, from any of its checkpoints.

``python -m adaptive_ts.experiment.generate RUN [--num_images N] [--batch_size B] [--solver NAME]
[--steps N] [--eta X] [--spacing NAME] [--guidance W] [--labels C [C ...]] [--seed S] [--step K]
[--data_dir DIR] [--out DIR] [--no_png]``

RUN is a folder of ``train.py``; what is not given is as in the run. Its averaged weights make
image i from the seed and from i alone, so a longer row of images begins with the shorter one, and
without options the first are those that the run made at its end. A model that is told classes makes
them in turn, or those given. Leaves in OUT: ``000000.png``, .., ``images.npz`` (``images``, uint8
(N, H, W, C), and ``labels``, int32 (N,), if there are any), ``grid.png``, and last ``info.json``.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.cli import Parser, check_empty, run_cli, usable
from adaptive_ts.experiment.config import Config, replace, validate
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import atomic, write_json
from adaptive_ts.experiment.images import (
    AT_ONCE,
    image_batches,
    label_cycle,
    save_grid,
    to_uint8,
)
from adaptive_ts.experiment.solvers import SPACINGS
from adaptive_ts.experiment.state import final_keys
from adaptive_ts.experiment.trained import Trained, load_trained, read_config

_IN_GRID = 100


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="generate", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, train.py's --workdir")
    add_options(parser)
    add("--out", type=Path, help="folder of the images, new or empty; default: RUN/generated/..")
    add("--no_png", action="store_true", help="no file for each image")
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which images are made, and how; `options` takes their values."""
    add = parser.add_argument
    add("--num_images", type=int, help="how many; default: the run's")
    add("--batch_size", type=int, default=AT_ONCE, help=f"images at once; default: {AT_ONCE}")
    add("--solver", help="ddpm, ddim, dpmpp_2m or heun; default: the run's")
    add("--steps", type=int, help="solver steps, at most T; default: the run's")
    add("--eta", type=float, help="DDIM noise, in [0, 1]; default: the run's, 0 for other solvers")
    add("--spacing", choices=SPACINGS, default="linear", help="of the timesteps; default: linear")
    add("--guidance", type=float, help="classifier-free, 1 for none; default: the run's")
    add("--labels", type=int, nargs="+", metavar="C", help="in turn; default: every class")
    add("--seed", type=int, help="of the noise; default: the run's")
    add("--step", type=int, help="of the checkpoint; default: the newest that is good")
    add("--data_dir", help="folder of prepared datasets, if not the run's")


def options(run_config: Config, args: argparse.Namespace) -> Config:
    """The run's config with what was asked for instead.

    Args:
      run_config: the run's own.
      args: with the values of `add_options`.

    Raises:
      UserError: a value out of range, or two that don't go together.
    """
    given = {
        "seed": args.seed,
        "data.dir": args.data_dir,
        "generate.num_images": args.num_images,
        "generate.solver": args.solver,
        "generate.steps": args.steps,
        "generate.eta": args.eta,
        "generate.guidance": args.guidance,
    }
    if args.solver not in (None, "ddim"):  # the run's eta was meant for the run's solver
        given["generate.eta"] = args.eta or 0.0
    config = replace(run_config, {path: v for path, v in given.items() if v is not None})
    # The rest of the config was the run's own, and is not the user's mistake now.
    problems = [
        problem.replace("--generate.", "--")
        for problem in validate(config)
        if problem.startswith(("--generate.", "--seed"))
    ]
    if args.batch_size < 1:
        problems.append(f"--batch_size: {args.batch_size} is out of range: must be at least 1")
    try:
        label_cycle(config.model.transformer.num_classes, args.labels)
    except ValueError as error:
        problems.append(f"--{error}")
    if problems:
        raise UserError("; ".join(problems))
    return config


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


def main(argv: list[str]) -> int:
    """The command."""
    args = _parser().parse_args(argv)
    run = args.run.expanduser().resolve()
    config = options(read_config(run), args)
    if args.out is not None:
        check_empty(args.out)  # before anything slow
    mesh = sharding.make_mesh()
    trained = load_trained(run, config, mesh, step=args.step)
    images = make_images(config, trained, mesh, args)
    out = args.out or run / "generated" / _folder_name(config, trained, args)
    check_empty(out)
    info = describe(config, trained, args)
    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
        _write(out, images, info, png=not args.no_png)
    print(f"{info['num_images']:,} images of {run} at step {trained.step:,}: {out}")
    return 0


def _folder_name(config: Config, trained: Trained, args: argparse.Namespace) -> str:
    c = config.generate
    name = f"step_{trained.step:08d}-{c.solver}-{c.steps}-seed{config.seed}"
    name += f"-guidance{c.guidance:g}" if c.guidance != 1 else ""
    return name + f"-labels{'_'.join(map(str, args.labels[:20]))}" if args.labels else name


def _write(out: Path, batches: Iterator[np.ndarray], info: dict[str, Any], *, png: bool) -> None:
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
    arrays = {"latents" if latents else "images": images}
    if info["labels"] is not None:
        arrays["labels"] = np.resize(np.asarray(info["labels"], np.int32), len(images))
    with atomic(out / "images.npz") as file:
        np.savez(file, **arrays)
    write_json(out / "info.json", {**info, "devices": f"{jax.device_count()} x {_device()}"})


def _device() -> str:
    return jax.devices()[0].device_kind


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "generate"
    run_cli(main)
