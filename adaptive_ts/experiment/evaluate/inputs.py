"""What an evaluation is given besides the run: read and checked before anything slow."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset, is_latent
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log, UserError, one_line
from adaptive_ts.experiment.files import read_arrays, read_json
from adaptive_ts.experiment.quality import classifier
from adaptive_ts.experiment.quality.inception import check_images
from adaptive_ts.experiment.quality.inception_network import NUM_FEATURES
from adaptive_ts.experiment.quality.reference import FeatureNetwork, Reference, read_statistics
from adaptive_ts.experiment.quality.scores import LEAST_IMAGES, inception_network


class Inputs(NamedTuple):
    """Attributes:
    kind: of the features, ``"inception"`` or ``"classifier"``.
    inception: that network, if it is the one.
    statistics: of ``--reference``.
    images: of ``--images``, uint8 (N, H, W, C).
    images_info: of these, their file and what made them, where an ``info.json`` beside it says.
    test: the held-out images.
    """

    kind: str
    inception: FeatureNetwork | None
    statistics: Reference | None
    images: np.ndarray | None
    images_info: Mapping[str, Any]
    test: Dataset


def read_inputs(args: argparse.Namespace, config: Config, mesh: Mesh, log: Log) -> Inputs:
    """The files that the options of ``evaluate`` name.

    Raises:
      UserError: one that is missing, damaged or of something else, or options that mean nothing.
    """
    images, info = (None, {}) if args.images is None else read_images(args.images)
    network = _inception(args, mesh) if args.features == "inception" else None
    test = load_split(config.data, "test", log)
    shown = test.images if images is None else images
    colour = shown.shape[-1] == 3 and not is_latent(shown.dtype)
    kind = args.features or ("inception" if colour else "classifier")
    if kind == "inception":
        network = network or _inception(args, mesh)
    for name in ("inception_weights", "preprocess"):
        if kind == "classifier" and getattr(args, name) is not None:
            raise UserError(f"--{name}: means nothing to a classifier: add --features inception")
    statistics = None
    if args.reference is not None:
        size = NUM_FEATURES if kind == "inception" else classifier.NUM_FEATURES
        statistics = read_statistics(args.reference, size)
    _check_shapes(args, kind, test, images)
    return Inputs(kind, network, statistics, images, info, test)


def _inception(args: argparse.Namespace, mesh: Mesh) -> FeatureNetwork:
    preprocess = args.preprocess or "ref"
    return inception_network(args.inception_weights, preprocess=preprocess, mesh=mesh)


def _check_shapes(
    args: argparse.Namespace, kind: str, test: Dataset, images: np.ndarray | None
) -> None:
    own, latent = test.images.shape[1:], is_latent(test.images.dtype)
    what = f"{'latents' if latent else 'images'} {own}"
    if images is None:
        if kind == "inception" and (latent or own[-1] not in (1, 3)):
            raise UserError(
                f"--features inception: {test.name} holds {what}: decode images, and give them "
                "by --images and others' statistics by --reference"
            )
        return
    if args.reference is not None and kind == "inception":
        return  # which sees all images at one size
    if latent or images.shape[1:] != own:
        raise UserError(
            f"--images: {args.images} holds images {images.shape[1:]}, {test.name} {what}: give "
            "--features inception and a --reference of such images"
        )


def read_images(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The images of a file, and what is known of them.

    Args:
      path: an ``.npz`` with ``images``, uint8 (N, H, W, C), as ``generate`` writes it.

    Raises:
      UserError: it is no such file.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"--images: no file {path}: give an images.npz, as generate writes it")
    try:
        images = read_arrays(path)["images"]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(
            f"--images: {path} is no .npz file with images ({one_line(error)})"
        ) from error
    try:
        images = check_images(images)
    except ValueError as error:
        raise UserError(f"--images: {path}: {error}") from error
    if len(images) < LEAST_IMAGES:
        raise UserError(f"--images: {path} holds {len(images)}: {LEAST_IMAGES} or more are needed")
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()[:16]
    info = read_json(path.parent / "info.json")
    known = {k: v for k, v in info.items() if k != "run"} if isinstance(info, dict) else {}
    return images, {**known, "num_images": len(images), "file": str(path), "digest": digest}
