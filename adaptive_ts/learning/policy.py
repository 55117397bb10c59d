"""The policy: an image in, a Beta distribution over (0, 1) out; and that distribution's maths."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln

from adaptive_ts import collectives
from adaptive_ts.diffusion.images import ImageFn, image_reader
from adaptive_ts.types import Batch, Key, Params, PerExample

_TINY = 1e-30  # its inverse, and a hundred million times that, are still float32 numbers
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1
_CONVERGED = 2.5e-7
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


class Policy(NamedTuple):
    """A state-free policy over timesteps.

    Attributes:
      init: (key, batch) -> params; the batch may hold ``jax.ShapeDtypeStruct`` leaves.
      apply: (params, batch) -> (a, b), each (b,) float32 and positive: u ~ Beta(a, b).
    """

    init: Callable[[Key, Batch], Params]
    apply: Callable[[Params, Batch], tuple[PerExample, PerExample]]


def _zeros(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Zeros that the compiler can't know to be zeros.

    In a program that both makes and uses them, jaxlib's CPU backend computes pooling, then a
    product with constants, wrongly (findings/xla_cpu_pooling_times_constants.sh).
    """
    return 0.0 * jax.random.uniform(key, shape, dtype)


def _conv_by_patches(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The 3x3 convolution with a pad of 1, as one matrix product.

    Where the image is smaller than the kernel XLA exchanges the two, and its CPU backend has no
    fast convolution of that kind (findings/xla_cpu_convolution_of_an_image_below_its_kernel.sh):
    one on 2x2 pixels took a third as long as a small U-Net's whole step.
    """
    b, height, width, _channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(b * height * width, -1)
    return (patches @ kernel.reshape(-1, kernel.shape[-1])).reshape(b, height, width, -1)


class _ConvBeta(nn.Module):
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    max_side: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[PerExample, PerExample]:
        factor = -(-max(x.shape[1:3]) // self.max_side)
        if factor > 1:
            window = (factor, factor)
            x = nn.avg_pool(x, window, window, padding="SAME", count_include_pad=False)
        for width in self.channels:
            own = _conv_by_patches if min(x.shape[1:3]) < 3 else None
            x = nn.relu(nn.Conv(width, (3, 3), padding=1, conv_general_dilated=own)(x))
            if min(x.shape[1:3]) >= 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        head = nn.Dense(2, kernel_init=_zeros, bias_init=nn.initializers.constant(0.5))
        out = nn.softplus(head(x)) + 1e-5
        return out[:, 0], out[:, 1]


def conv_beta_policy(
    *,
    image: ImageFn | None = None,
    image_key: str = "image",
    channel_axis: int = -1,
    channels: tuple[int, ...] = (32, 64, 128),
    hidden: tuple[int, ...] = (256, 256),
    max_side: int = 64,
) -> Policy:
    """The paper's policy network, for any image size and channel count.

    Per entry of ``channels``: conv 3x3 (pad 1), ReLU, max-pool 2; then flatten, an MLP with
    ReLU, and (a, b) = softplus(Dense(2)) + 1e-5. The last kernel starts at 0 and its bias at
    0.5: a = b = 0.97408698 for every image, nearly uniform. A pooling step is left out where
    a side would become smaller than 1. An image with a side over ``max_side`` is first
    average-pooled by the smallest integer factor that brings it there (edge windows average
    what they cover), which bounds the first Dense layer. Everything runs in float32.

    Args:
      image: batch -> (b, H, W, C) float in [-1, 1]; None for ``batch[image_key]``.
      image_key: such as "latents", "pixel_values".
      channel_axis: of the images: 1 for (b, C, H, W), 3 or -1 for (b, H, W, C). By -1 images that
        look like the former are refused: 1 or 3 in axis 1, and in axis 3 no number of channels.
      channels: width of each convolution, at least one.
      hidden: width of each hidden layer of the MLP.
      max_side: largest side, in pixels, that the convolutions see.

    Returns:
      A ``Policy``; its params are a flax tree ``Conv_i``, ``Dense_i``.

    Raises:
      ValueError: a width or max_side below 1, another channel_axis, image and image_key both; at
        trace time, images that are not float, or whose channels are elsewhere, or no images.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adaptive_ts.learning import policy
      >>> net = policy.conv_beta_policy()
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> a, b = net.apply(net.init(jax.random.key(0), batch), batch)
      >>> a.shape, round(float(a[0]), 6)
      ((4,), 0.974087)

    Source: Kim et al., CVPR 2025, arXiv 2411.09998; the authors' network.py, ActorNetwork.
    """
    channels, hidden = tuple(channels), tuple(hidden)
    if not channels or min((*channels, *hidden, max_side)) < 1:
        raise ValueError(
            f"channels={channels}, hidden={hidden}, max_side={max_side}: give at least one "
            "channel width, and widths and max_side of at least 1"
        )
    if channel_axis not in (-1, 1, 3):
        raise ValueError(f"channel_axis must be 1 (NCHW), or 3 or -1 (NHWC), got {channel_axis}")
    module = _ConvBeta(channels, hidden, max_side)
    image = image_reader(image, image_key)

    def images(batch: Batch) -> jax.Array:
        x = _check_images(image(batch), channel_axis)
        return jnp.moveaxis(x, 1, -1) if channel_axis == 1 else x

    def init(key: Key, batch: Batch) -> Params:
        shape = jax.eval_shape(images, batch).shape
        return module.init(key, jnp.zeros((1, *shape[1:]), jnp.float32))["params"]

    def apply(params: Params, batch: Batch) -> tuple[PerExample, PerExample]:
        x = images(batch).astype(jnp.float32)
        found: Any = module.apply({"params": params}, x)  # flax knows not what a module returns
        return found

    return Policy(init, apply)


def _check_images(x: jax.Array, channel_axis: int) -> jax.Array:
    if len(x.shape) != 4 or 0 in x.shape:
        raise ValueError(f"images have shape {x.shape}; the policy takes (b, H, W, C), not empty")
    _, first, side, last = x.shape
    plainly = first in (1, 3) and last not in (1, 3) and (last > 4 or last == side)
    if channel_axis == -1 and plainly:
        raise ValueError(
            f"images have shape {x.shape}, which looks like (b, C, H, W): say channel_axis=1; "
            "channel_axis=3 if it is (b, H, W, C) all the same"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"images are {x.dtype}; scale them to float in [-1, 1] first: x / 127.5 - 1"
        )
    return x


def beta_log_prob(a: jax.Array, b: jax.Array, u: jax.Array) -> jax.Array:
    """Log density of Beta(a, b) at u: (a - 1) log u + (b - 1) log(1 - u) - log B(a, b).

    u is clipped to [1e-30, 1 - 2^-24], so that values and gradients are finite at 0 and 1. The
    rounding of log B is 1e-5 for parameters of about 10, and 1e-3 of 1000 (float32).

    Args:
      a, b: (...) float, positive.
      u: (...) float in [0, 1].

    Returns:
      (...) float32, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import policy
      >>> print(policy.beta_log_prob(jnp.float32(2), jnp.float32(5), jnp.float32(0.5)).round(4))
      -0.0645

    Source: Johnson, Kotz & Balakrishnan, Continuous Univariate Distributions, vol. 2, ch. 25.
    """
    u = jnp.clip(u, _TINY, _BELOW_ONE)
    return (a - 1) * jnp.log(u) + (b - 1) * jnp.log1p(-u) - _log_beta(a, b)


def beta_entropy(a: jax.Array, b: jax.Array) -> jax.Array:
    """Differential entropy of Beta(a, b), psi the digamma function.

    log B(a, b) - (a - 1) psi(a) - (b - 1) psi(b) + (a + b - 2) psi(a + b)

    Args:
      a, b: (...) float, positive.

    Returns:
      (...) float32, in nats; 0 for a = b = 1, negative otherwise.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import policy
      >>> print(policy.beta_entropy(jnp.float32(2), jnp.float32(5)).round(4))
      -0.4845

    Source: Johnson, Kotz & Balakrishnan, Continuous Univariate Distributions, vol. 2, ch. 25.
    """
    sides = (a - 1) * digamma(a) + (b - 1) * digamma(b)
    return _log_beta(a, b) - sides + (a + b - 2) * digamma(a + b)


def beta_sample(keys: jax.Array, a: PerExample, b: PerExample) -> PerExample:
    """One draw of Beta(a_i, b_i) per example, each from its own key, in the open (0, 1).

    ``jax.random.beta`` returns exact 0 and 1 for small parameters; they are clipped to the
    nearest float32 inside. No gradient flows through a draw.

    Args:
      keys: (b,) keys, such as ``collectives.example_keys`` gives.
      a, b: (b,) float, positive.

    Returns:
      (b,) float32.

    Raises:
      ValueError: not one key per example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adaptive_ts.learning import policy
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> u = policy.beta_sample(keys, jnp.full(4, 1e-5), jnp.full(4, 0.7))
      >>> bool(jnp.all((u > 0) & (u < 1)))
      True
    """
    if keys.shape[:1] != a.shape:
        raise ValueError(f"keys {keys.shape} and a {a.shape}: give one key per example")

    def draw(key: Key, a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.random.beta(collectives.threefry(key), a, b, dtype=jnp.float32)

    u = jax.vmap(draw)(keys, a, b)
    return jax.lax.stop_gradient(jnp.clip(u, _TINY, _BELOW_ONE))


def beta_log_mass(a: jax.Array, b: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Log of the probability that Beta(a, b) gives to the cell [lo, hi] of (0, 1).

    The cell is cut at (a + 1) / (a + b + 2), about the mean. Each part is, where the tail beyond
    it grows by a factor of e or more across it, a difference of two tail probabilities (as at the
    ends, where the density may be infinite), else Gauss-Legendre quadrature of the density over
    logit u. No reverse-mode gradient.

    Args:
      a, b: (...) float, positive.
      lo, hi: (...) float, 0 <= lo <= hi <= 1, the shape of a.

    Returns:
      (...) float32; -inf for an empty cell.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import policy
      >>> cell = (jnp.float32(x) for x in (1.0, 3.0, 0.0, 0.5))
      >>> print(jnp.exp(policy.beta_log_mass(*cell)).round(4))
      0.875

    Source: Press et al., Numerical Recipes, 3rd ed., 6.4 (the continued fraction).
    """
    cut = jnp.clip((a + 1) / (a + b + 2), lo, hi)
    left, right = lo < cut, cut < hi
    tails = _log_lower_tail(
        jnp.stack([a, a, b, b]),
        jnp.stack([b, b, a, a]),
        jnp.stack(
            [
                jnp.where(left, cut, 0),
                jnp.where(left, lo, 0),
                jnp.where(right, 1 - cut, 0),
                jnp.where(right, 1 - hi, 0),
            ]
        ),
    )
    low, high = jnp.stack([lo, cut]), jnp.stack([cut, hi])
    mass = low < high
    outer, inner = jnp.where(mass, tails[::2], 0), jnp.where(mass, tails[1::2], -1)
    growth = outer - inner
    difference = outer + jnp.log(-jnp.expm1(-jnp.maximum(growth, 0)))
    inside = (low > 0) & (high < 1)
    narrow = inside & ((growth < 1) | jnp.isnan(growth))
    parts = jnp.where(narrow, _log_quadrature(a[None], b[None], low, high, inside), difference)
    parts = jnp.where(mass, parts, -jnp.inf)
    return jnp.minimum(jnp.logaddexp(parts[0], parts[1]), 0)  # rounding may leave it above


def _log_quadrature(
    a: jax.Array, b: jax.Array, low: jax.Array, high: jax.Array, inside: jax.Array
) -> jax.Array:
    """Log of the integral of the density over [low, high], by quadrature over logit u."""
    proper = inside & (low < high)
    low, high = jnp.where(proper, low, 0.25), jnp.where(proper, high, 0.5)
    # The width from (high - low), which is exact, not from two rounded logits.
    width = jnp.log1p((high - low) / low) + jnp.log1p((high - low) / (1 - high))
    start = jnp.log(low) - jnp.log1p(-low)
    column = (-1,) + (1,) * low.ndim
    nodes = (0.5 * (_NODES + 1)).astype(np.float32).reshape(column)
    log_weights = np.log(0.5 * _WEIGHTS).astype(np.float32).reshape(column)
    y = start[None] + width[None] * nodes
    log_u, log_v = jax.nn.log_sigmoid(y), jax.nn.log_sigmoid(-y)
    terms = a[None] * log_u + b[None] * log_v + log_weights
    return jax.nn.logsumexp(terms, axis=0) + jnp.log(width) - _log_beta(a, b)


def _log_lower_tail(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    """log I_x(a, b) for x <= (a + 1) / (a + b + 2), by the continued fraction of Lentz.

    In logs a far tail does not underflow; and ``jax.scipy.special.betainc`` cannot be traced in
    ``shard_map`` (its loop's carry does not vary over devices as its inputs do).
    """
    tiny = 1e-30
    inside = x > 0

    def away(v: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(v) < tiny, tiny, v)

    def factor(term: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        return away(1 + term / c), 1 / away(1 + term * d)

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, c, d, value, change = carry
        going = change > _CONVERGED  # a finished value would gather rounding from the others' terms
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        c, d = factor(even, c, d)
        even_factor = c * d
        c, d = factor(odd, c, d)
        value = jnp.where(going, value * even_factor * (c * d), value)
        return m + 1, c, d, value, jnp.where(going, jnp.abs(c * d - 1), change)

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (carry[0].max() < 2000) & jnp.any(carry[4] > _CONVERGED)

    one = 1 + 0 * (a + b + x)
    start = 1 / away(one - (a + b) * x / (a + 1))
    fraction = jax.lax.while_loop(unfinished, body, (one, one, start, start, one))[3]
    safe_x = jnp.where(inside, x, 0.5)
    power = a * jnp.log(safe_x) + b * jnp.log1p(-safe_x) - _log_beta(a, b)
    return jnp.where(inside, power - jnp.log(a) + jnp.log(fraction), -jnp.inf)


def _log_beta(a: jax.Array, b: jax.Array) -> jax.Array:
    """log B(a, b); the gradient of ``jax.scipy.special.betaln`` is NaN for small parameters."""
    return gammaln(a) + gammaln(b) - gammaln(a + b)
