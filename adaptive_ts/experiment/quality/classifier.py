"""Frechet distance of generated images, in the features of a classifier trained on the data.

For sets that Inception has no business with. The classifier is trained once per set (seconds),
and kept beside it; a distance means something only next to others of the same classifier.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.assembly.step import prepare
from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.decoding import Dataset, is_latent
from adaptive_ts.experiment.data.loading import batches, load_split
from adaptive_ts.experiment.errors import Log
from adaptive_ts.experiment.files import atomic, read_arrays
from adaptive_ts.experiment.quality.inception import Activations
from adaptive_ts.experiment.quality.reference import folder_of
from adaptive_ts.types import Params

NUM_FEATURES = 32
_STEPS = 800
_BATCH = 128
_AT_ONCE = 500


class Classifier(NamedTuple):
    """A trained classifier.

    Attributes:
      activations: images (N, H, W, C) float32 in [-1, 1], or latents -> its 32 features and its
        logits.
      accuracy: on held-out images, in [0, 1].
      digest: 16 hex digits of the SHA-256 of its weights.
      train: what it was trained on.
    """

    activations: Callable[[np.ndarray], Activations]
    accuracy: float
    digest: str
    train: Dataset


class _Classifier(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of accelerators' default precision the distances would be those of the accelerator.
        conv, dense = (
            functools.partial(layer, precision=lax.Precision.HIGHEST)
            for layer in (nn.Conv, nn.Dense)
        )
        for channels in (16, 32):
            x = nn.relu(conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(dense(64)(x.reshape(x.shape[0], -1)))
        features = dense(NUM_FEATURES)(x)
        return features, dense(self.num_classes)(nn.relu(features))


def load_classifier(data: DataConfig, log: Log = print) -> Classifier:
    """A small classifier of a data set, trained now or read from its cache."""
    train, test = (load_split(data, split, log) for split in ("train", "test"))
    model = _Classifier(train.num_classes)
    image = jnp.zeros((1, *train.images.shape[1:]))
    params = model.init(seed_key(0), image)["params"]
    folder = folder_of(data, log)
    size = "x".join(map(str, train.images.shape[1:]))
    cache = folder / f"classifier-{size}-{data.downsample}-{train.fingerprint}.npz"
    found = _restore(cache, params)
    if found is None:
        log(f"training a classifier of {data.name}, once: {_STEPS} steps")
        found = _save(cache, _train(model, params, train), log)
    apply = jax.jit(lambda x: model.apply({"params": found}, x))

    def activations(images: np.ndarray) -> Activations:
        parts = [apply(images[i : i + _AT_ONCE]) for i in range(0, len(images), _AT_ONCE)]
        return Activations(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    right = 0
    for images, labels in _parts(test):
        right += int((activations(unit_range(images)).logits.argmax(1) == labels).sum())
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(found):
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return Classifier(activations, right / test.images.shape[0], digest.hexdigest()[:16], train)


def unit_range(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [-1, 1]; latents, which are floats, as they are."""
    images, latent = images.astype(np.float32), is_latent(images.dtype)
    return images if latent else images / 127.5 - 1


def _parts(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels in order, some at a time."""
    for start in range(0, dataset.images.shape[0], _AT_ONCE):
        stop = min(start + _AT_ONCE, dataset.images.shape[0])
        yield dataset.rows(np.arange(start, stop))


def _train(model: _Classifier, params: Params, train: Dataset) -> Params:
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, _STEPS))

    def loss(params: Params, x: jax.Array, label: jax.Array) -> jax.Array:
        found: Any = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(found[1], label).mean()

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(loss)(params, prepare(batch, None)["image"], batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    state = params, optimizer.init(params)
    data = batches(train, batch_size=_BATCH, seed=0)
    for _ in range(_STEPS):
        state = step(state, next(data))
    return state[0]


def _save(cache: Path, params: Params, log: Log) -> Params:
    leaves: dict[str, Any] = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
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
        saved = read_arrays(cache)
        found = [saved[str(i)] for i in range(len(leaves))]
    except Exception:  # a damaged file raises nearly anything
        return None
    if [x.shape for x in found] != [x.shape for x in leaves]:
        return None
    return jax.tree.unflatten(structure, found)
