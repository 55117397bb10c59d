"""What the FID's Inception network says of images: its weights, the preprocessing, the features.

The weights are the user's file; without it there is no number, never another one in its place.
"""

import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.files import read_arrays
from adaptive_ts.experiment.quality import inception_network
from adaptive_ts.experiment.quality.inception_network import NUM_CLASSES, NUM_FEATURES, SIDE
from adaptive_ts.experiment.quality.torch_file import read_state_dict

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_EPSILON = 1e-3  # of the batch normalizations

Preprocess = Literal["ref", "tf"]


class Inception(NamedTuple):
    """The network's weights.

    Attributes:
      params: convolution -> (kernel (height, width, in, out), bias (out,)), with its batch
        normalization folded in; ``"fc"`` -> (kernel (2048, 1008),). float32.
      sha256: of the file they come from, 64 hex digits.
    """

    params: dict[str, tuple[np.ndarray, ...]]
    sha256: str


class Activations(NamedTuple):
    """What a network says of N images.

    Attributes:
      features: (N, d) float32; of Inception the last average pool, d = 2048.
      logits: (N, classes) float32; of Inception (N, 1008), without the bias.
    """

    features: np.ndarray
    logits: np.ndarray


def load_inception(
    path: str | os.PathLike[str], *, sha256: str | None = WEIGHTS_SHA256
) -> Inception:
    """Reads the weights.

    Args:
      path: the official ``.pth`` file; or, with another ``sha256``, any ``.pth`` or ``.npz`` of
        its tensors' names and (PyTorch's) shapes.
      sha256: the file's SHA-256, or its first digits; None takes any file.

    Raises:
      UserError: no such file, another file, a damaged one, one that would run code, or one that
        lacks a tensor.

    Source: Szegedy et al. 2016 (arXiv 1512.00567); converted from TensorFlow by pytorch-fid and
    torch-fidelity, who publish the same file.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"no Inception weights at {path}: download {WEIGHTS_URL} and pass the path of that file"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the Inception weights {path}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise UserError(
            f"{path} is not the Inception file expected: its SHA-256 begins with {found[:8]}, not "
            f"with {sha256[:8].lower()}: download {WEIGHTS_URL}"
        )
    read = _read_npz if path.suffix == ".npz" else read_state_dict
    return Inception(_folded(read(content, str(path)), str(path)), found)


def feature_extractor(
    inception: Inception,
    *,
    preprocess: Preprocess = "ref",
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Callable[[np.ndarray], Activations]:
    """images (N, H, W, C) uint8 -> their `Activations`.

    Images are resized to 299 x 299 bilinearly, without antialiasing. ``"ref"``, of the paper's
    code and pytorch-fid: pixel centres at half integers, then (x - 127.5) / 127.5. ``"tf"``, of
    TensorFlow 1 and torch-fidelity: pixels at integers, then (x - 128) / 128. The features of
    small images differ by percents, so a number is to be printed with the name of its
    preprocessing.

    Compiled once for each image size, and once for the network; float32 throughout.

    Args:
      inception: from `load_inception`.
      preprocess: ``"ref"`` or ``"tf"``.
      mesh: its devices share each batch; None is one device. With several processes, each passes
        all images and gets all activations.
      batch_size: images at once, rounded up to a multiple of the devices.

    Returns:
      The function. It raises ValueError for images that `check_images` refuses.

    Raises:
      ValueError: an unknown ``preprocess``, or a ``batch_size`` below 1.

    Source: Heusel et al. 2017 (arXiv 1706.08500).
    """
    if preprocess not in ("ref", "tf"):
        raise ValueError(f'preprocess must be "ref" or "tf", got {preprocess!r}')
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    mesh = sharding.make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    size = -(-batch_size // mesh.size) * mesh.size
    params = _on_all_devices(inception.params, mesh)

    def started(images: np.ndarray) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        for start in range(0, len(images), size):
            part = images[start : start + size]
            # Filled up, the last batch needs no compilation of its own.
            full = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            x = network_input(sharding.put_whole(full, mesh), preprocess)
            yield len(part), inception_network.activations(params, x)

    def extract(images: np.ndarray) -> Activations:
        batches = started(check_images(images))
        done: list[list[np.ndarray]] = []
        count, outputs = next(batches)
        for batch in itertools.chain(batches, [None]):  # one is computed while one is fetched
            done.append([sharding.fetch(x)[:count] for x in outputs])
            if batch is not None:
                count, outputs = batch
        return Activations(*map(np.concatenate, zip(*done, strict=True)))

    return extract


def check_images(images: np.ndarray) -> np.ndarray:
    """The images, if they are uint8 (N, H, W, 1 or 3) and at least one.

    Raises:
      ValueError: they are not.

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.quality.inception import check_images
      >>> check_images(np.zeros((2, 8, 8, 1), np.uint8)).shape
      (2, 8, 8, 1)
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 in [0, 255], got {images.dtype}: if they lie in [-1, 1], pass "
            "np.round((x + 1) * 127.5).clip(0, 255).astype(np.uint8)"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (N, H, W, C) with C = 1 or 3, got {images.shape}")
    return images


@functools.partial(jax.jit, static_argnames="preprocess")
def network_input(images: jax.Array, preprocess: Preprocess) -> jax.Array:
    """uint8 (b, H, W, 1 or 3) -> (b, 299, 299, 3) float32 about [-1, 1]; grey in all channels."""
    shift = 0.5 if preprocess == "ref" else 0.0
    rows, columns = (_resizing(n, shift) for n in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum("oh,bhwc->bowc", rows, x, precision=lax.Precision.HIGHEST)
    x = jnp.einsum("ow,bhwc->bhoc", columns, x, precision=lax.Precision.HIGHEST)
    x = (x - 127.5) / 127.5 if preprocess == "ref" else (x - 128) / 128
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def _resizing(size: int, shift: float | np.floating) -> np.ndarray:
    """(299, size): the weights of the pixels in each resized one. In float32, as the originals."""
    scale, shift = np.float32(size / SIDE), np.float32(shift)
    out = np.arange(SIDE)
    at = ((out.astype(np.float32) + shift) * scale - shift).clip(0)
    low = at.astype(int)
    part = at - low.astype(np.float32)
    weights = np.zeros((SIDE, size), np.float32)
    weights[out, low] = 1 - part
    weights[out, np.minimum(low + 1, size - 1)] += part
    return weights


def _on_all_devices(tree, mesh: Mesh):
    whole = sharding.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), tree
    )


def _read_npz(content: bytes, name: str) -> dict[str, np.ndarray]:
    try:
        return read_arrays(io.BytesIO(content))
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{name} is no readable .npz file ({one_line(error)})") from error


def _folded(tensors: dict[str, np.ndarray], name: str) -> dict[str, tuple[np.ndarray, ...]]:
    """Each convolution with its batch normalization in it: kernel and bias, in JAX's layout."""

    def tensor(key: str, *shape: int) -> np.ndarray:
        value = tensors.get(key)
        if value is None:
            raise UserError(f"{name} holds no FID-Inception weights: there is no tensor {key!r}")
        if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
            raise UserError(
                f"{name} holds no FID-Inception weights: {key!r} is {value.dtype} {value.shape}; "
                f"expected finite floats {shape}"
            )
        return value.astype(np.float64)

    params = {}
    for conv, (height, width, inputs, outputs) in inception_network.kernel_shapes().items():
        kernel = tensor(f"{conv}.conv.weight", outputs, inputs, height, width)
        names = ("weight", "bias", "running_mean", "running_var")
        scale, shift, mean, variance = (tensor(f"{conv}.bn.{n}", outputs) for n in names)
        factor = scale / np.sqrt(variance + _EPSILON)
        folded = kernel.transpose(2, 3, 1, 0) * factor, shift - mean * factor
        params[conv] = tuple(np.ascontiguousarray(x, np.float32) for x in folded)
    params["fc"] = (tensor("fc.weight", NUM_CLASSES, NUM_FEATURES).T.astype(np.float32),)
    return params
