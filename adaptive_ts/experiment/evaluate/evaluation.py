"""An evaluation: what its numbers depend on, and all that it measures."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment.config.groups import Config, fingerprint_fields
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log
from adaptive_ts.experiment.evaluate.inputs import Inputs
from adaptive_ts.experiment.evaluate.measure import (
    Measured,
    diagnose,
    diagnostic_timesteps,
    held_out_likelihood,
)
from adaptive_ts.experiment.files import json_digest
from adaptive_ts.experiment.generate.making import describe, make_images
from adaptive_ts.experiment.generate.trained import Trained
from adaptive_ts.experiment.quality.reference import image_chunks, reference_features
from adaptive_ts.experiment.quality.scores import classifier_network, image_quality


def conditions_of(
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
        images = {k: v for k, v in describe(config, trained, args).items() if k != "run"}
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
        "config_fingerprint": json_digest(fingerprint_fields(own), 16),
        "data_fingerprint": inputs.test.fingerprint,
        "network": inputs.kind,
        "network_mark": inputs.inception and inputs.inception.mark,
        "chosen": args.features is not None,
        "reference_digest": inputs.statistics and inputs.statistics.digest,
        "split": None if inputs.statistics else args.split or "train",
        "num_likelihood": args.num_likelihood,
        "diagnostics": args.diagnostics,
    }


def folder_name(conditions: dict[str, Any]) -> str:
    """Other conditions, another folder; where the run lies is none of them."""
    images = conditions["images"]
    made = "images" if "file" in images else f"{images['solver']}-{images['steps']}"
    rest = {k: v for k, v in conditions.items() if k not in ("run", "chosen")}
    return f"step_{conditions['step']:08d}-{made}-{conditions['network']}-{json_digest(rest, 8)}"


def measure(
    args: argparse.Namespace,
    config: Config,
    trained: Trained,
    inputs: Inputs,
    mesh: Mesh,
    log: Log,
) -> Measured:
    """Everything that was asked for: images, bound and diagnostics."""
    if inputs.images is None:  # first: it refuses what does not go together
        images = make_images(config, trained, mesh, args)
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
