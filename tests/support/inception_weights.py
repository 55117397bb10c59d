"""Weights and images for the Inception network, re-made from seeds, for its golden and tests."""

import numpy as np

from adaptive_ts.experiment.quality.inception_network import kernel_shapes

RULE = (
    "the tensors of the torch state dict but num_batches_tracked, by sorted name; the i-th (from "
    "0) is drawn by r = numpy.random.default_rng([2015, i]): *.conv.weight "
    "r.standard_normal(shape) * sqrt(2 / fan_in); *.bn.weight and *.bn.running_var "
    "r.uniform(0.5, 1.5, shape); *.bn.bias and *.bn.running_mean r.standard_normal(shape) * 0.1; "
    "fc.weight and fc.bias r.standard_normal(shape) / 45; all as float32"
)


def random_tensors():
    """Name -> float32 array, by ``RULE``."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for conv, (height, width, inputs, outputs) in kernel_shapes().items():
        shapes[f"{conv}.conv.weight"] = (outputs, inputs, height, width)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{conv}.bn.{name}"] = (outputs,)
    return {name: _draw(i, name, shapes[name]) for i, name in enumerate(sorted(shapes))}


def _draw(number, name, shape):
    rng = np.random.default_rng([2015, number])
    if name.endswith(("bn.weight", "running_var")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.1
    if name.startswith("fc."):
        scale = 1 / 45
    elif name.endswith("conv.weight"):
        scale = np.sqrt(2 / np.prod(shape[1:]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


IMAGES = {"square": (2, 32, 32, 3), "wide": (1, 40, 56, 3), "large": (1, 310, 330, 3)}


def golden_images(name):
    number = list(IMAGES).index(name)
    return np.random.default_rng([299, number]).integers(0, 256, IMAGES[name], np.uint8)


def relative(found, expected):
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float32
    return np.abs(found - expected).max() / np.abs(expected).max()
