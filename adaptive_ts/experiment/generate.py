"""Images of a trained run: as many as wanted, by any solver, from any of its checkpoints.

``python -m adaptive_ts.experiment.generate RUN [--num_images N] [--batch_size B] [--solver NAME]
[--steps N] [--eta X] [--spacing NAME] [--seed S] [--step K] [--data_dir DIR] [--out DIR]
[--no_png]``

RUN is a folder of ``train.py``; what is not given is as in the run. Its averaged weights make
image i from the seed and from i alone, so a longer row of images begins with the shorter one, and
without options the first are those that the run made at its end. Leaves in OUT: ``000000.png``,
.., ``images.npz`` (``images``, uint8 (N, H, W, C)), ``grid.png``, and last ``info.json``.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.cli import run_cli
from adaptive_ts.experiment.config import Config, replace, validate
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.files import atomic, write_json
from adaptive_ts.experiment.images import AT_ONCE, image_batches, image_key, save_grid, to_uint8
from adaptive_ts.experiment.solvers import SPACINGS
from adaptive_ts.experiment.trained import load_trained, read_config

_IN_GRID = 100


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="generate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, train.py's --workdir")
    add("--num_images", type=int, help="how many; default: the run's")
    add("--batch_size", type=int, default=AT_ONCE, help=f"images at once; default: {AT_ONCE}")
    add("--solver", help="ddpm, ddim, dpmpp_2m or heun; default: the run's")
    add("--steps", type=int, help="solver steps, at most T; default: the run's")
    add("--eta", type=float, help="DDIM noise, in [0, 1]; default: the run's, 0 for other solvers")
    add("--spacing", choices=SPACINGS, default="linear", help="of the timesteps; default: linear")
    add("--seed", type=int, help="of the noise; default: the run's")
    add("--step", type=int, help="of the checkpoint; default: the newest that is good")
    add("--data_dir", help="folder of prepared datasets, if not the run's")
    add("--out", type=Path, help="folder of the images, new or empty; default: RUN/generated/..")
    add("--no_png", action="store_true", help="no file for each image")
    return parser


def options(run_config: Config, args: argparse.Namespace) -> Config:
    """The run's config with what was asked for instead.

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
    if problems:
        raise UserError("; ".join(problems))
    return config


def main(argv: list[str]) -> int:
    """The command."""
    args = _parser().parse_args(argv)
    run = args.run.expanduser().resolve()
    config = options(read_config(run), args)
    if args.out is not None:
        _check_empty(args.out)  # before anything slow
    mesh = sharding.make_mesh()
    trained = load_trained(run, config, mesh, step=args.step)
    c = config.generate
    try:
        batches = image_batches(
            config,
            trained.built,
            trained.shape,
            mesh,
            batch_size=args.batch_size,
            spacing=args.spacing,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    name = f"step_{trained.step:08d}-{c.solver}-{c.steps}-seed{config.seed}"
    out = args.out or run / "generated" / name
    _check_empty(out)
    info = {
        "run": str(run),
        "step": trained.step,
        "weights": "ema",
        "dataset": config.data.name,
        "schedule": config.schedule.name,
        "num_images": c.num_images,
        "image_shape": trained.shape,
        "solver": c.solver,
        "steps": c.steps,
        "spacing": args.spacing,
        "eta": c.eta if c.solver == "ddim" else None,
        "variance": config.model.variance if c.solver == "ddpm" else None,
        "seed": config.seed,
    }
    with _usable(out):
        out.mkdir(parents=True, exist_ok=True)
        _write(out, batches(trained.state.ema, image_key(config.seed)), info, png=not args.no_png)
    print(f"{c.num_images:,} images of {run} at step {trained.step:,}: {out}")
    return 0


def _check_empty(out: Path) -> None:
    with _usable(out):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out: {out} is not empty: give a new folder")


@contextlib.contextmanager
def _usable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot use {out}: {one_line(error)}") from error


def _write(out: Path, batches: Iterator[np.ndarray], info: dict[str, Any], *, png: bool) -> None:
    from PIL import Image
    from tqdm import tqdm

    images, done = np.empty((info["num_images"], *info["image_shape"]), np.uint8), 0
    with tqdm(total=len(images), unit=" image") as bar:
        for batch in batches:
            if not np.isfinite(batch).all():
                raise UserError(
                    f"there are images that are not finite numbers, the first among {done} to "
                    f"{done + len(batch) - 1}: try an earlier --step",
                    exit_code=1,
                )
            images[done : done + len(batch)] = to_uint8(batch)
            for number in range(done, done + len(batch)) if png else ():
                with atomic(out / f"{number:06d}.png") as file:
                    grey = images.shape[-1] == 1
                    Image.fromarray(images[number, ..., 0] if grey else images[number]).save(
                        file, "PNG"
                    )
            done += len(batch)
            bar.update(len(batch))
    save_grid(out / "grid.png", images[:_IN_GRID])
    with atomic(out / "images.npz") as file:
        np.savez(file, images=images)
    write_json(out / "info.json", {**info, "devices": f"{jax.device_count()} x {_device()}"})


def _device() -> str:
    return jax.devices()[0].device_kind


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "generate"
    run_cli(main)
