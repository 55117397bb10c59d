"""The U-Net of DDPM (Ho et al. 2020), as the paper's code configures it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_ZERO = nn.initializers.zeros_init()


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """(b,) timesteps -> (b, dim) float32: sines, then cosines, of t at geometric frequencies."""
    half = dim // 2
    frequency = np.exp(-np.log(10000) / max(half - 1, 1) * np.arange(half)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def conv_of_doubled(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The 3x3 convolution, padded as "SAME", of an image of doubled pixels, which is never made.

    Of the nine pixels under a kernel several are the same: an even row sees two rows of ``x`` with
    the weights k0 and k1 + k2, an odd one with k0 + k1 and k2, and columns likewise. Four ninths of
    the arithmetic is left, rounded otherwise.

    Args:
      x: (b, H, W, c).
      kernel: (3, 3, c, features).

    Returns:
      (b, 2 H, 2 W, features).
    """

    def halves(k: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        k0, k1, k2 = jnp.split(k, 3, axis)
        joined = (k0, k1 + k2), (k0 + k1, k2)
        even, odd = (jnp.concatenate(pair, axis) for pair in joined)
        return even, odd

    def phase(k: jax.Array, row: int, column: int) -> jax.Array:
        padding = ((1 - row, row), (1 - column, column))
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    b, height, width, _channels = x.shape
    rows = [
        jnp.stack([phase(k, row, column) for column, k in enumerate(halves(of_row, 1))], 3)
        for row, of_row in enumerate(halves(kernel, 0))
    ]
    return jnp.stack(rows, 2).reshape(b, 2 * height, 2 * width, -1)


class Norm(nn.Module):
    """Group normalisation in float32; as many groups as divide both the wish and the channels."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = int(np.gcd(self.groups, x.shape[-1]))
        return nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name="group")(x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, plus the embedded timestep, norm, SiLU, dropout, conv, plus the input."""

    channels: int
    dropout: float
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        conv = {"kernel_size": (3, 3), "dtype": self.dtype}
        h = nn.silu(Norm(self.groups, name="norm1")(x))
        h = nn.Conv(self.channels, kernel_init=_INIT, name="conv1", **conv)(h)
        shift = nn.Dense(self.channels, kernel_init=_INIT, dtype=self.dtype, name="fc")
        h = h + shift(nn.silu(embedding))[:, None, None, :]
        h = nn.silu(Norm(self.groups, name="norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.Conv(self.channels, kernel_init=_ZERO, name="conv2", **conv)(h)
        if x.shape[-1] != self.channels:
            skip = nn.Conv(self.channels, (1, 1), kernel_init=_INIT, dtype=self.dtype, name="skip")
            x = skip(x)
        return x.astype(h.dtype) + h


class Attention(nn.Module):
    """Self-attention over the pixels, one head, softmax in float32."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        project = nn.Conv(3 * c, (1, 1), kernel_init=_INIT, dtype=self.dtype, name="project_in")
        qkv = project(Norm(self.groups, name="norm")(x)).reshape(b, height * width, 3, 1, c)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        out = nn.Conv(c, (1, 1), kernel_init=_ZERO, dtype=self.dtype, name="project_out")
        return x + out(h.reshape(b, height, width, c))


class UNet(nn.Module):
    """(x (b, H, W, C), t (b,)) -> (b, H, W, C) float32; unconditional, label must be None.

    Attributes:
      channels: width of the first level.
      multipliers: of the width, per level; the resolution halves from level to level.
      res_blocks: residual blocks per level on the way down; one more on the way up.
      attention: whether a level's blocks are followed by attention.
      dropout: rate inside the residual blocks.
      groups: of the normalisation; a group of one channel forgets how strong the noise is.
      dtype: of the convolutions and matrix products; parameters, norms and softmax are float32.
      remat: keep only the inputs of blocks and attention for the backward pass and compute the
        rest again.

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    res_blocks: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    dropout: float = 0.0
    groups: int = 32
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        self._check(x, label)
        widths = [self.channels * m for m in self.multipliers]
        last = len(widths) - 1
        shared = {"groups": self.groups, "dtype": self.dtype}
        # Of a ResBlock's arguments, self among them, the third is the flag ``train``.
        block_class = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention_class = nn.remat(Attention) if self.remat else Attention
        res_block = functools.partial(block_class, dropout=self.dropout, **shared)
        attention = functools.partial(attention_class, **shared)
        embedding = timestep_embedding(t, self.channels)
        for name in ("embed_0", "embed_1"):
            dense = nn.Dense(4 * self.channels, kernel_init=_INIT, dtype=self.dtype, name=name)
            embedding = dense(embedding if name == "embed_0" else nn.silu(embedding))

        def block(h: jax.Array, level: int, width: int, name: str) -> jax.Array:
            h = res_block(width, name=name)(h, embedding, train)
            if self.attention[level]:
                h = attention(name=f"{name}_attention")(h)
            return h

        def conv(width: int, name: str, **options: Any) -> nn.Conv:
            return nn.Conv(width, (3, 3), dtype=self.dtype, name=name, **options)

        h = conv(self.channels, "in_conv", kernel_init=_INIT)(x)
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.res_blocks):
                h = block(h, level, width, f"down_{level}_{i}")
                skips.append(h)
            if level < last:
                h = conv(width, f"down_{level}_conv", strides=2, kernel_init=_INIT)(h)
                skips.append(h)

        h = res_block(widths[-1], name="middle_0")(h, embedding, train)
        h = attention(name="middle_1")(h)
        h = res_block(widths[-1], name="middle_2")(h, embedding, train)

        for level in reversed(range(last + 1)):
            for i in range(self.res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, level, widths[level], f"up_{level}_{i}")
            if level > 0:
                doubling = conv(
                    *(widths[level], f"up_{level}_conv"),
                    kernel_init=_INIT,
                    conv_general_dilated=conv_of_doubled,
                )
                h = doubling(h)

        h = nn.silu(Norm(self.groups, name="out_norm")(h))
        return conv(x.shape[-1], "out_conv", kernel_init=_ZERO)(h).astype(jnp.float32)

    def _check(self, x: jax.Array, label: jax.Array | None) -> None:
        if label is not None:
            raise ValueError(
                f"the U-Net is unconditional, got a label of shape {jnp.shape(label)}; pass "
                "label=None, or take a DiT or U-ViT with num_classes"
            )
        if len(self.attention) != len(self.multipliers):
            raise ValueError(
                f"attention needs one entry per level, {len(self.multipliers)}, "
                f"got {self.attention}"
            )
        factor = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images must be (b, H, W, C) with sides divisible by {factor} "
                f"({len(self.multipliers)} levels), got shape {x.shape}"
            )
