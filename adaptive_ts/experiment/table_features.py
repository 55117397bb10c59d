"""What a table compares images in: Inception's features, or a classifier's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import is_latent, load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.frechet import classifier_features
from adaptive_ts.experiment.image_metrics import Gaussian
from adaptive_ts.experiment.images import to_uint8
from adaptive_ts.experiment.quality import inception_network
from adaptive_ts.experiment.reference import reference_features

Log = Callable[[str], None]


class FeatureChoice(NamedTuple):
    """Attributes:
    network: ``"inception"``, ``"classifier"`` or None: Inception for colour images.
    weights: Inception's file; None: what ``evaluate`` takes by default.
    preprocess: of Inception's images.
    """

    network: str | None = None
    weights: str | None = None
    preprocess: str = "ref"


class ImageFeatures(NamedTuple):
    """Attributes:
    about: what is kept with every distance.
    extract: images (n, H, W, C) float32 in [-1, 1] -> (n, d).
    reference: of the training images.
    """

    about: str
    extract: Callable[[np.ndarray], np.ndarray]
    reference: Gaussian


def image_features(
    data: DataConfig, choice: FeatureChoice, mesh: Any = None, log: Log = print
) -> ImageFeatures:
    """The features of a data set's images, those of its training images computed once.

    Raises:
      UserError: Inception without its weights, or latents, or weights that mean nothing.
    """
    test = load_split(data, "test", log).images
    colour = test.shape[-1] == 3 and not is_latent(test.dtype)
    if (choice.network or ("inception" if colour else "classifier")) == "classifier":
        if choice.weights is not None:
            raise UserError(
                "--inception_weights: means nothing to a classifier: add --features inception"
            )
        found = classifier_features(data, log)
        about = f"classifier, accuracy {found.accuracy:.4f}"
        return ImageFeatures(about, found.extract, found.reference)
    if is_latent(test.dtype):
        raise UserError(f"--features inception: {data.name} holds latents: take classifier")
    network = inception_network(choice.weights, preprocess=choice.preprocess, mesh=mesh)
    reference = reference_features(data, network, log=log)
    about = f"{network.about}, statistics {reference.digest}"
    return ImageFeatures(about, lambda x: network.extract(to_uint8(x)).features, reference.gaussian)
