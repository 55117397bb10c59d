"""The layers of the Inception network that FID is measured with.

It is TensorFlow's graph of 2015-12-05, which differs from the published Inception v3 where it
pools: averages leave out the padding, and the last block takes a maximum.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008

# convolution -> (kernel (height, width, in, out), bias (out,)); "fc" -> (kernel (2048, 1008),)
Params: TypeAlias = dict[str, tuple[jax.Array, ...]]


class _Conv(NamedTuple):
    """A convolution, and the rectifier after it."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"


class _Block(NamedTuple):
    """Chains side by side; their channels are concatenated."""

    name: str
    branches: Sequence[Sequence["_Step"]]


_Step: TypeAlias = _Conv | _Block | Callable[[jax.Array], jax.Array]
_Apply: TypeAlias = Callable[[str, _Conv, jax.Array], jax.Array]


@jax.jit
def activations(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(b, 299, 299, 3) -> features (b, 2048), and logits (b, 1008) without the bias."""

    def apply(name: str, conv: _Conv, x: jax.Array) -> jax.Array:
        kernel, bias = params[name]
        return jax.nn.relu(_convolved(conv, x, kernel) + bias[None, None, None])

    features = _run(_NETWORK, x, apply).mean((1, 2))
    return features, jnp.dot(features, params["fc"][0], precision=lax.Precision.HIGHEST)


def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Convolution -> the shape of its kernel (height, width, in, out)."""
    shapes = {}

    def note(name: str, conv: _Conv, x: jax.Array) -> jax.Array:
        shapes[name] = (conv.height, conv.width, x.shape[-1], conv.channels)
        return _convolved(conv, x, jnp.zeros(shapes[name]))

    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    jax.eval_shape(lambda x: _run(_NETWORK, x, note), image)
    return shapes


def _run(chain: Sequence[_Step], x: jax.Array, apply: _Apply, prefix: str = "") -> jax.Array:
    for step in chain:
        if isinstance(step, _Conv):
            x = apply(prefix + step.name, step, x)
        elif isinstance(step, _Block):
            branches = [_run(b, x, apply, prefix + step.name) for b in step.branches]
            x = jnp.concatenate(branches, -1)
        else:
            x = step(x)
    return x


def _convolved(conv: _Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,  # a TPU's default, bfloat16, would shift the distance
    )


def _pool(x: jax.Array, start: float, reduce: Callable, stride: int, padding: str) -> jax.Array:
    return lax.reduce_window(x, start, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _halved(x: jax.Array) -> jax.Array:
    return _pool(x, -jnp.inf, lax.max, 2, "VALID")


def _maximum(x: jax.Array) -> jax.Array:
    return _pool(x, -jnp.inf, lax.max, 1, "SAME")


def _average(x: jax.Array) -> jax.Array:
    """Over the pixels that there are: six at an edge, four in a corner."""
    along = [3.0 - (i == 0) - (i == i[-1]) for i in map(np.arange, x.shape[1:3])]
    count = np.outer(*along).astype(np.float32)
    return _pool(x, 0.0, lax.add, 1, "SAME") / count[None, :, :, None]


def _block_a(name: str, pooled: int) -> _Block:
    double = _Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, 3, 3)
    return _Block(
        f"{name}.",
        (
            (_Conv("branch1x1", 64),),
            (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, 5, 5)),
            (*double, _Conv("branch3x3dbl_3", 96, 3, 3)),
            (_average, _Conv("branch_pool", pooled)),
        ),
    )


def _block_b(name: str) -> _Block:
    double = _Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, 3, 3)
    return _Block(
        f"{name}.",
        (
            (_Conv("branch3x3", 384, 3, 3, 2, "VALID"),),
            (*double, _Conv("branch3x3dbl_3", 96, 3, 3, 2, "VALID")),
            (_halved,),
        ),
    )


def _block_c(name: str, inner: int) -> _Block:
    return _Block(
        f"{name}.",
        (
            (_Conv("branch1x1", 192),),
            (
                _Conv("branch7x7_1", inner),
                _Conv("branch7x7_2", inner, 1, 7),
                _Conv("branch7x7_3", 192, 7, 1),
            ),
            (
                _Conv("branch7x7dbl_1", inner),
                _Conv("branch7x7dbl_2", inner, 7, 1),
                _Conv("branch7x7dbl_3", inner, 1, 7),
                _Conv("branch7x7dbl_4", inner, 7, 1),
                _Conv("branch7x7dbl_5", 192, 1, 7),
            ),
            (_average, _Conv("branch_pool", 192)),
        ),
    )


def _block_d(name: str) -> _Block:
    return _Block(
        f"{name}.",
        (
            (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, 3, 3, 2, "VALID")),
            (
                _Conv("branch7x7x3_1", 192),
                _Conv("branch7x7x3_2", 192, 1, 7),
                _Conv("branch7x7x3_3", 192, 7, 1),
                _Conv("branch7x7x3_4", 192, 3, 3, 2, "VALID"),
            ),
            (_halved,),
        ),
    )


def _block_e(name: str, pool: Callable[[jax.Array], jax.Array]) -> _Block:
    def fork(first: str, second: str) -> _Block:
        return _Block("", ((_Conv(first, 384, 1, 3),), (_Conv(second, 384, 3, 1),)))

    return _Block(
        f"{name}.",
        (
            (_Conv("branch1x1", 320),),
            (_Conv("branch3x3_1", 384), fork("branch3x3_2a", "branch3x3_2b")),
            (
                _Conv("branch3x3dbl_1", 448),
                _Conv("branch3x3dbl_2", 384, 3, 3),
                fork("branch3x3dbl_3a", "branch3x3dbl_3b"),
            ),
            (pool, _Conv("branch_pool", 192)),
        ),
    )


_NETWORK: tuple[_Step, ...] = (
    _Conv("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"),
    _Conv("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
    _Conv("Conv2d_2b_3x3", 64, 3, 3),
    _halved,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
    _halved,
    _block_a("Mixed_5b", 32),
    _block_a("Mixed_5c", 64),
    _block_a("Mixed_5d", 64),
    _block_b("Mixed_6a"),
    _block_c("Mixed_6b", 128),
    _block_c("Mixed_6c", 160),
    _block_c("Mixed_6d", 160),
    _block_c("Mixed_6e", 192),
    _block_d("Mixed_7a"),
    _block_e("Mixed_7b", _average),
    _block_e("Mixed_7c", _maximum),
)
