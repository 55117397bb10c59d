"""Which images are asked for, and how they are to be made: the options, without the making."""

import argparse
from collections.abc import Sequence

import numpy as np

from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.groups import SPACINGS, Config
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.errors import UserError

AT_ONCE = 256


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


def label_cycle(num_classes: int | None, labels: Sequence[int] | None = None) -> np.ndarray | None:
    """The labels that images get in turn: image i the one at i modulo their number.

    Args:
      num_classes: that the model is told; None: none.
      labels: those wanted; None: every class.

    Returns:
      (k,) int32, or None without classes.

    Raises:
      ValueError: labels out of range, or for a model without classes.

    Example:
      >>> from adaptive_ts.experiment.generate.making import label_cycle
      >>> label_cycle(10, [7, 1]).tolist(), label_cycle(3).tolist(), label_cycle(None)
      ([7, 1], [0, 1, 2], None)
    """
    if num_classes is None:
        if labels is not None:
            text = " ".join(map(str, labels))
            raise ValueError(
                f"labels: {text} means nothing to a model without classes: leave it out"
            )
        return None
    cycle = np.arange(num_classes) if labels is None else np.asarray(labels)
    wrong = [c for c in cycle.tolist() if c not in range(num_classes)]
    if wrong or not len(cycle):
        got = wrong[0] if wrong else "nothing"
        raise ValueError(f"labels: {got} is out of range: must be in 0..{num_classes - 1}")
    return cycle.astype(np.int32)
