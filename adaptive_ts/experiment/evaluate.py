"""How good a trained run is: its images against real ones, its held-out bound, its diagnostics.

``python -m adaptive_ts.experiment.evaluate RUN [options of generate] [--features NAME]
[--inception_weights PATH] [--preprocess NAME] [--reference FILE] [--split NAME] [--images FILE]
[--num_likelihood N] [--diagnostics] [--out DIR]``

RUN is a folder of ``train.py``. Its images (or those of FILE, an ``images.npz``) are compared with
a split of its data set, in the features of a classifier trained on that set or in Inception's, the
default for colour; then the distance is FID. Leaves in OUT: ``evaluation.npz``, pictures by
timestep and, last, ``evaluation.json``. The same command again prints the numbers that are there.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import generate, sharding
from adaptive_ts.experiment.cli import Parser, check_empty, run_cli, usable
from adaptive_ts.experiment.config import Config, fingerprint_fields
from adaptive_ts.experiment.data import load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.evaluation import (
    Measured,
    diagnose,
    diagnostic_timesteps,
    held_out_likelihood,
)
from adaptive_ts.experiment.evaluation_inputs import Inputs, read_inputs
from adaptive_ts.experiment.evaluation_report import report_lines, write_results
from adaptive_ts.experiment.files import read_json
from adaptive_ts.experiment.quality import LEAST_IMAGES, classifier_network, image_quality
from adaptive_ts.experiment.reference import everywhere, image_chunks, reference_features
from adaptive_ts.experiment.trained import Trained, load_trained, read_config

_LIKELIHOOD_IMAGES = 256
_OF_GENERATED = ("num_images", "solver", "steps", "eta", "spacing", "guidance", "labels")

Log = Callable[[str], None]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, train.py's --workdir")
    generate.add_options(parser)
    add(
        "--features",
        choices=("classifier", "inception"),
        help="what images are compared in; default: inception for colour, else a classifier",
    )
    add("--inception_weights", help="Inception's file; default: $ADAPTIVE_TS_INCEPTION_WEIGHTS")
    add("--preprocess", choices=("ref", "tf"), help="of Inception's images; default: ref")
    add("--reference", type=Path, help=".npz of mu and sigma, instead of the data set's images")
    add("--split", help="of the data set, that images are compared with; default: train")
    add("--images", type=Path, help="images.npz of generate to evaluate, instead of new images")
    add(
        "--num_likelihood",
        type=int,
        default=_LIKELIHOOD_IMAGES,
        help=f"held-out images of the bound; default: {_LIKELIHOOD_IMAGES}",
    )
    add("--diagnostics", action="store_true", help="gradient noise, effects of steps, p(t)")
    add("--out", type=Path, help="folder of the results, new or empty; default: RUN/evaluation/..")
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    parser = _parser()
    args = parser.parse_args(argv)
    run, first = args.run.expanduser().resolve(), jax.process_index() == 0
    log = print if first else lambda line: None
    own = read_config(run)
    config = generate.options(own, args)
    _check(args, parser, config)
    mesh = sharding.make_mesh()
    inputs = read_inputs(args, config, mesh, log)
    trained = load_trained(run, config, mesh, step=args.step, log=log)
    conditions = _conditions(args, run, own, config, trained, inputs)
    out = args.out or run / "evaluation" / _folder_name(conditions)
    with usable(out):
        stored = read_json(out / "evaluation.json")
    if everywhere(stored is not None):
        log(f"{out} has these numbers already; to measure again, give another --out.")
    else:
        measured = _measure(args, config, trained, inputs, mesh, log)
        if first:
            with usable(out):
                stored = write_results(out, run, trained.built.parts.grid, conditions, measured)
    if first:
        print("\n".join(report_lines(stored, out)))
    return 0


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser, config: Config) -> None:
    """Raises UserError for options out of range, or that mean nothing beside others."""
    for name, value, least in (
        ("num_images", config.generate.num_images, LEAST_IMAGES),
        ("num_likelihood", args.num_likelihood, 2),
    ):
        if value < least:
            raise UserError(f"--{name}: {value} is out of range: must be at least {least}")
    if args.images is not None:
        for name in _OF_GENERATED:
            if getattr(args, name, None) != parser.get_default(name):
                raise UserError(f"--{name}: means nothing with --images: leave one of them out")
    if args.reference is not None and args.split is not None:
        raise UserError("--split: means nothing with --reference: leave one of them out")
    if args.out is not None:
        check_empty(args.out)


def _conditions(
    args: argparse.Namespace,
    run: Path,
    own: Config,
    config: Config,
    trained: Trained,
    inputs: Inputs,
) -> dict[str, Any]:
    """What the numbers depend on, and what is printed with them."""
    images = {**inputs.images_info}
    if inputs.images is None:
        images = {k: v for k, v in generate.describe(config, trained, args).items() if k != "run"}
    return {
        "run": str(run),
        "step": trained.step,
        "weights": "ema",
        "ema_decay": config.optimizer.ema_decay,
        "images": images,
        "seed": config.seed,
        "dataset": config.data.name,
        "schedule": config.schedule.name,
        "prediction": config.model.prediction,
        "sampler": config.sampler.name,
        "config_fingerprint": _hash(fingerprint_fields(own)),
        "data_fingerprint": inputs.test.fingerprint,
        "network": inputs.kind,
        "network_mark": inputs.inception and inputs.inception.mark,
        "chosen": args.features is not None,
        "reference_digest": inputs.statistics and inputs.statistics.digest,
        "split": None if inputs.statistics else args.split or "train",
        "num_likelihood": args.num_likelihood,
        "diagnostics": args.diagnostics,
    }


def _folder_name(conditions: dict[str, Any]) -> str:
    """Other conditions, another folder; where the run lies is none of them."""
    images = conditions["images"]
    made = "images" if "file" in images else f"{images['solver']}-{images['steps']}"
    rest = {k: v for k, v in conditions.items() if k not in ("run", "chosen")}
    return f"step_{conditions['step']:08d}-{made}-{conditions['network']}-{_hash(rest)[:8]}"


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _measure(
    args: argparse.Namespace,
    config: Config,
    trained: Trained,
    inputs: Inputs,
    mesh: Mesh,
    log: Log,
) -> Measured:
    if inputs.images is None:  # first: it refuses what does not go together
        images = generate.make_images(config, trained, mesh, args)
        total = config.generate.num_images
    else:
        images, total = image_chunks(inputs.images), len(inputs.images)
    network = inputs.inception or classifier_network(config.data, log)
    reference = inputs.statistics
    if reference is None:
        reference = reference_features(
            config.data, network, split=args.split or "train", watch=_watch("real"), log=log
        )
    quality = image_quality(_watch("generated")(images, total), network, reference)
    count = min(args.num_likelihood, inputs.test.images.shape[0])
    with _bar("held out", count) as bar:
        likelihood = held_out_likelihood(
            config, trained, inputs.test, mesh, num_images=count, tell=bar.update
        )
    diagnosis = None
    if args.diagnostics:
        train = load_split(config.data, "train", log)
        total = 2 * len(diagnostic_timesteps(config.schedule.num_timesteps))
        with _bar("diagnostics", total, unit=" timestep") as bar:
            diagnosis = diagnose(config, trained, train, inputs.test, mesh, tell=bar.update)
    return Measured(quality, likelihood, diagnosis)


def _bar(what: str, total: int | None, unit: str = " image") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, disable=jax.process_index() > 0)


def _watch(what: str) -> Callable[[Iterable[np.ndarray], int], Iterator[np.ndarray]]:
    def watch(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
        with _bar(what, total) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    return watch


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.argv[0] = "evaluate"
    run_cli(main)
