"""Frechet distance of generated images, in the features of a classifier trained on the data.

For sets that Inception has no business with. The classifier is trained once per set (seconds),
and kept beside it; a distance means something only next to others of the same classifier.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_ts.experiment import datasets
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.data import Dataset, batches, load_split
from adaptive_ts.experiment.files import atomic
from adaptive_ts.experiment.image_metrics import Gaussian, frechet_distance, gaussian
from adaptive_ts.types import Params

__all__ = ["Features", "Gaussian", "classifier_features", "frechet_distance", "gaussian"]

NUM_FEATURES = 32
_STEPS = 800
_BATCH = 128
_AT_ONCE = 500

Log = Callable[[str], None]


class Features(NamedTuple):
    """A trained feature extractor.

    Attributes:
      extract: images (N, H, W, C) float32 in [-1, 1] -> (N, 32) float64.
      accuracy: of the classifier on held-out images, in [0, 1].
      reference: of the training images.
    """

    extract: Callable[[np.ndarray], np.ndarray]
    accuracy: float
    reference: Gaussian


class _Classifier(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        features = nn.Dense(NUM_FEATURES)(x)
        return features, nn.Dense(self.num_classes)(nn.relu(features))


def classifier_features(data: DataConfig, log: Log = print) -> Features:
    """The features of a small classifier of a data set, trained now or read from its cache."""
    train, test = (load_split(data, split, log) for split in ("train", "test"))
    model = _Classifier(train.num_classes)
    image = jnp.zeros((1, *train.images.shape[1:]))
    params = model.init(jax.random.key(0), image)["params"]
    folder = datasets.prepare(data.name, data_dir=data.dir, source_dir=data.source_dir, log=log)
    size = "x".join(map(str, train.images.shape[1:]))
    cache = folder / f"classifier-{size}-{data.downsample}-{train.fingerprint}.npz"
    params = _restore(cache, params) or _save(cache, _train(model, params, train), log)
    apply = jax.jit(lambda x: model.apply({"params": params}, x))

    def extract(images: np.ndarray, which: int = 0) -> np.ndarray:
        parts = [apply(images[i : i + _AT_ONCE])[which] for i in range(0, len(images), _AT_ONCE)]
        return np.concatenate(parts).astype(np.float64)

    scores = extract(_unit(test.images), 1)
    accuracy = float((scores.argmax(1) == test.labels).mean())
    return Features(extract, accuracy, gaussian(extract(_unit(train.images))))


def _unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def _train(model: _Classifier, params: Params, train: Dataset) -> Params:
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, _STEPS))

    def loss(params: Params, x: jax.Array, label: jax.Array) -> jax.Array:
        _, logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        x = batch["image"].astype(jnp.float32) / 127.5 - 1
        grads = jax.grad(loss)(params, x, batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    state = params, optimizer.init(params)
    data = batches(train, batch_size=_BATCH, seed=0)
    for _ in range(_STEPS):
        state = step(state, next(data))
    return state[0]


def _save(cache: Path, params: Params, log: Log) -> Params:
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
    try:
        with atomic(cache) as file:
            np.savez(file, **leaves)
    except OSError as error:
        log(f"the classifier is not kept: cannot write {cache}: {error.strerror}")
    return params


def _restore(cache: Path, like: Params) -> Params | None:
    """The cached parameters; None where there are none of this shape."""
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(cache, allow_pickle=False) as saved:
            found = [saved[str(i)] for i in range(len(leaves))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if [x.shape for x in found] != [x.shape for x in leaves]:
        return None
    return jax.tree.unflatten(structure, found)
