"""What a table compares images in: Inception's features, or a classifier's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.decoding import is_latent
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log, UserError
from adaptive_ts.experiment.pictures import to_uint8
from adaptive_ts.experiment.quality.inception import Preprocess
from adaptive_ts.experiment.quality.metrics import Gaussian
from adaptive_ts.experiment.quality.reference import reference_features
from adaptive_ts.experiment.quality.scores import classifier_network, inception_network


class FeatureChoice(NamedTuple):
    """Attributes:
    network: ``"inception"``, ``"classifier"`` or None: Inception for colour images.
    weights: Inception's file; None: what ``evaluate`` takes by default.
    preprocess: of Inception's images.
    """

    network: str | None = None
    weights: str | None = None
    preprocess: Preprocess = "ref"


class ImageFeatures(NamedTuple):
    """Attributes:
    about: what is kept with every distance.
    extract: images (n, H, W, C) float32 in [-1, 1], compared as pixels, or latents -> (n, d).
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
    images = load_split(data, "test", log).images
    latents = is_latent(images.dtype)
    colour = images.shape[-1] == 3 and not latents
    if (choice.network or ("inception" if colour else "classifier")) == "classifier":
        if choice.weights is not None:
            raise UserError(
                "--inception_weights: means nothing to a classifier: add --features inception"
            )
        network = classifier_network(data, log)
    elif latents:
        raise UserError(f"--features inception: {data.name} holds latents: take classifier")
    else:
        network = inception_network(choice.weights, preprocess=choice.preprocess, mesh=mesh)
    reference = reference_features(data, network, log=log)

    def extract(made: np.ndarray) -> np.ndarray:
        return network.extract(made if latents else to_uint8(made)).features

    about = f"{network.about}, statistics {reference.digest}"
    return ImageFeatures(about, extract, reference.gaussian)
