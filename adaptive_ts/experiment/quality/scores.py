"""Images against a reference: the numbers, in Inception's features or in a classifier's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log, UserError
from adaptive_ts.experiment.quality import classifier as frechet
from adaptive_ts.experiment.quality import metrics
from adaptive_ts.experiment.quality.inception import (
    WEIGHTS_URL,
    Activations,
    Preprocess,
    feature_extractor,
    load_inception,
)
from adaptive_ts.experiment.quality.inception_network import NUM_FEATURES
from adaptive_ts.experiment.quality.reference import (
    KEPT,
    Batches,
    FeatureNetwork,
    Reference,
    evenly_spaced,
    summarise,
)

WEIGHTS_VARIABLE = "ADAPTIVE_TS_INCEPTION_WEIGHTS"
LEAST_IMAGES = 4  # more than the neighbour of precision and recall
_NEIGHBOUR = 3
_SUBSETS, _SUBSET_SIZE = 100, 1000
_SPLITS = 10


def inception_network(
    weights: str | os.PathLike[str] | None,
    *,
    preprocess: Preprocess = "ref",
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> FeatureNetwork:
    """The FID's network.

    Args:
      weights: the file; None: what ``$ADAPTIVE_TS_INCEPTION_WEIGHTS`` names.
      preprocess: see `feature_extractor`; likewise the rest.
      mesh: the devices that share each batch.
      batch_size: images at once.

    Raises:
      UserError: no file is named, or not the one expected: there is no other network instead.
    """
    weights = weights or os.environ.get(WEIGHTS_VARIABLE)
    if not weights:
        raise UserError(
            f"FID needs the weights of Inception: download {WEIGHTS_URL} and give its path by "
            f"--inception_weights PATH or ${WEIGHTS_VARIABLE}; --features classifier needs none"
        )
    network = load_inception(Path(weights))
    return FeatureNetwork(
        name="inception",
        about=f"Inception, preprocessing {preprocess}, weights {network.sha256[:8]}",
        mark=f"inception-{preprocess}-{network.sha256[:16]}",
        num_features=NUM_FEATURES,
        extract=feature_extractor(network, preprocess=preprocess, mesh=mesh, batch_size=batch_size),
    )


def classifier_network(data: DataConfig, log: Log = print) -> FeatureNetwork:
    """A small classifier of a data set, trained now or read from the set's folder.

    Raises:
      UserError: the set has no labels.
    """
    if load_split(data, "test", log).num_classes < 2:
        raise UserError(
            f"--features classifier: {data.name} has no labels to train one on: use inception"
        )
    classifier = frechet.load_classifier(data, log)

    def extract(images: np.ndarray) -> Activations:
        return classifier.activations(frechet.unit_range(images))

    return FeatureNetwork(
        name="classifier",
        about=f"classifier of {data.name}, accuracy {classifier.accuracy:.3f}",
        mark=f"classifier-{classifier.digest}",
        num_features=frechet.NUM_FEATURES,
        extract=extract,
        accuracy=classifier.accuracy,
    )


def image_quality(images: Batches, network: FeatureNetwork, reference: Reference) -> dict[str, Any]:
    """How close generated images are to real ones; see `metrics` for each number.

    Args:
      images: batches of uint8 (n, H, W, C), four images or more in all. Of more than 10,000 all
        count for the Frechet distance and the Inception Score, the first for the rest.
      network: the features.
      reference: of the same network.

    Returns:
      ``num_images``, ``frechet_distance``; ``kid``, ``kid_std`` (over 100 subsets of
      ``kid_subset_size``), ``precision`` and ``recall`` (of ``num_compared`` images on each side),
      all five None where the reference is but statistics; ``inception_score``,
      ``inception_score_std`` (over ``inception_score_splits``), None for a classifier; and
      ``features``, ``reference``, ``reference_digest``, ``num_real`` and ``accuracy``, which say
      what the numbers are of.

    Raises:
      ValueError: too few images, such as the network refuses, or a reference of another network.
    """
    inception = network.name == "inception"
    found = summarise(images, network.extract, kept=np.arange(KEPT), logits=inception)
    if found.count < LEAST_IMAGES:
        raise ValueError(f"{found.count} images: {LEAST_IMAGES} or more are needed")
    distance = metrics.frechet_distance(found.gaussian, reference.gaussian)
    return {
        "num_images": found.count,
        "frechet_distance": distance,
        **_compared(found.features, reference.features),
        **_score(found.logits),
        "network": network.name,
        "features": network.about,
        "num_features": network.num_features,
        "accuracy": network.accuracy,
        "reference": reference.source,
        "reference_digest": reference.digest,
    }


def _compared(made: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
    names = ("kid", "kid_std", "kid_subset_size", "precision", "recall", "num_compared")
    if real is None:
        return {"num_real": None, **dict.fromkeys(names)}
    size = min(_SUBSET_SIZE, len(made), len(real))
    distance, deviation = metrics.kid(made, real, subset_size=size, subsets=_SUBSETS)
    # Both depend on how many images there are: as many on one side as on the other.
    count = min(len(made), len(real))
    precision, recall = metrics.precision_recall(
        real[evenly_spaced(len(real), count)], made[:count], k=_NEIGHBOUR
    )
    values = (distance, deviation, size, precision, recall, count)
    return {"num_real": len(real), **dict(zip(names, values, strict=True))}


def _score(logits: np.ndarray | None) -> dict[str, Any]:
    names = ("inception_score", "inception_score_std", "inception_score_splits")
    if logits is None:
        return dict.fromkeys(names)
    splits = min(_SPLITS, len(logits) // 2)
    score, deviation = metrics.inception_score(logits, splits=splits)
    return dict(zip(names, (score, deviation, splits), strict=True))


def quality_lines(found: Mapping[str, Any]) -> list[str]:
    """`image_quality` to print: what the numbers are of, and a line for each."""
    inception = found["network"] == "inception"
    title = "FID" if inception else "Frechet distance"
    lines = [
        f"features: {found['features']}",
        f"reference: {found['reference']}, statistics {found['reference_digest']}",
        line(title, _number(found["frechet_distance"]), f"n={found['num_images']:,}"),
    ]
    if found["num_images"] <= found["num_features"]:
        lines[-1] += f", too few for {found['num_features']:,} features: biased upwards"
    if found["kid"] is None:
        lines.append("no KID, precision or recall: the reference is but mu and sigma")
    else:
        spread = f"{_number(found['kid'])} ± {_number(found['kid_std'])}"
        made = min(found["num_images"], KEPT)
        subsets = f"n={made:,} against {found['num_real']:,}, standard deviation over {_SUBSETS}"
        lines.append(line("KID", spread, f"{subsets} subsets of {found['kid_subset_size']:,}"))
        compared = f"n={found['num_compared']:,} against as many, neighbour {_NEIGHBOUR}"
        lines += [line(name, f"{found[name]:.4f}", compared) for name in ("precision", "recall")]
    if inception:
        spread = f"{_number(found['inception_score'])} ± {_number(found['inception_score_std'])}"
        splits = f"standard deviation over {found['inception_score_splits']} splits"
        lines.append(line("Inception Score", spread, f"n={found['num_images']:,}, {splits}"))
    return lines


def line(name: str, value: str, about: str) -> str:
    """A number to print, in columns."""
    return f"  {name:<17} {value:<22} {about}".rstrip()


def _number(x: float | None) -> str:
    return "not a number" if x is None else f"{x:.4g}"
