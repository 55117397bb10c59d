"""U-ViT, the transformer with a U-Net's long skip connections (Bao et al. 2023)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive_ts.experiment.models.parts import (
    MLP,
    ClassEmbedding,
    SelfAttention,
    check_inputs,
    cos_sin_embedding,
    image_of_patches,
)

_NORMAL = nn.initializers.normal(0.02)
# The authors leave convolutions and the class embedding at PyTorch's defaults.
_CONV = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_UNIT_NORMAL = nn.initializers.normal(1.0)


def _conv_bias(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default bias of a convolution: uniform, as wide as the kernel's."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class UViTBlock(nn.Module):
    """Attention, then the MLP, each after its norm; first merges the skip connection, if any."""

    num_heads: int
    mlp_width: int
    qkv_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        if skip is not None:
            merge = nn.Dense(x.shape[-1], kernel_init=_NORMAL, dtype=self.dtype, name="skip")
            x = merge(jnp.concatenate([x, skip], axis=-1))
        attention = SelfAttention(
            self.num_heads, self.qkv_bias, _NORMAL, self.dtype, name="attention"
        )
        x = x + attention(nn.LayerNorm(1e-5, dtype=jnp.float32, name="norm1")(x))
        mlp = MLP(self.mlp_width, False, _NORMAL, self.dtype, name="mlp")
        return x + mlp(nn.LayerNorm(1e-5, dtype=jnp.float32, name="norm2")(x))


class UViT(nn.Module):
    """(x (b, H, W, C), t (b,), label (b,) or None) -> (b, H, W, C) float32.

    The tokens are the class, if any, the timestep and the patches; they learn one position
    embedding, which ties the parameters to H and W. The defaults are the authors' CIFAR-10 model.

    Attributes:
      patch_size: side of the square that becomes one token.
      hidden_size: width of the tokens; a multiple of num_heads.
      depth: blocks besides the middle one, half of them before it; even.
      num_heads: of the attention.
      mlp_ratio: hidden units of the MLPs, in widths.
      qkv_bias: whether queries, keys and values have one.
      mlp_time_embed: an MLP on the timestep's sines and cosines, which else are the token.
      num_classes: K; labels are 0 .. K - 1, and K is the null class: K + 1 embeddings, which the
        authors call num_classes (1001 for ImageNet). None: unconditional, label must be None.
      class_dropout: probability that training sees the null class instead, by the rng "dropout".
        The authors' data pipeline does that, with 0.1 or 0.15.
      conv: a 3 x 3 convolution over the image that the patches make.
      dtype: of the matrix products and tokens; parameters, norms and softmax are float32.
      remat: keep only the blocks' inputs for the backward pass and compute the rest again.

    Raises:
      ValueError: fields, images and label that don't fit.

    Source: Bao et al. 2023 (arXiv 2209.12152), section 3.
    """

    patch_size: int = 2
    hidden_size: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int | None = None
    class_dropout: float = 0.1
    conv: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        check_inputs(self, x, label)
        if self.depth % 2:
            raise ValueError(
                f"depth counts the blocks besides the middle one and must be even, got {self.depth}"
            )
        _, height, width, channels = x.shape
        side = self.patch_size
        tokens = jnp.concatenate(
            [*self._condition_tokens(t, label, train), self._patch_tokens(x)], axis=1
        )
        self._check_positions(tokens.shape[1:])
        position = self.param("position", _NORMAL, (1, *tokens.shape[1:]))
        h = tokens + position.astype(self.dtype)

        block = nn.remat(UViTBlock) if self.remat else UViTBlock
        sizes = (self.num_heads, int(self.hidden_size * self.mlp_ratio), self.qkv_bias, self.dtype)
        skips = []
        for i in range(self.depth // 2):
            h = block(*sizes, name=f"in_{i}")(h)
            skips.append(h)
        h = block(*sizes, name="middle")(h)
        for i in range(self.depth // 2):
            h = block(*sizes, name=f"out_{i}")(h, skips.pop())

        h = nn.LayerNorm(1e-5, dtype=jnp.float32, name="norm")(h)
        rows, columns = height // side, width // side
        h = self._dense(side * side * channels, "out")(h[:, -rows * columns :])
        out = image_of_patches(h, rows, columns, side)
        if self.conv:
            bias = _conv_bias(9 * channels)
            options = {"kernel_init": _CONV, "bias_init": bias, "dtype": self.dtype}
            out = nn.Conv(channels, (3, 3), name="out_conv", **options)(out)
        return out.astype(jnp.float32)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=_NORMAL, dtype=self.dtype, name=name)

    def _condition_tokens(
        self, t: jax.Array, label: jax.Array | None, train: bool
    ) -> list[jax.Array]:
        """The tokens of the class, if any, and of the timestep, each (b, 1, d)."""
        time = cos_sin_embedding(t, self.hidden_size).astype(self.dtype)
        if self.mlp_time_embed:
            time = self._dense(4 * self.hidden_size, "time_0")(time)
            time = self._dense(self.hidden_size, "time_1")(nn.silu(time))
        if self.num_classes is None or label is None:
            return [time[:, None]]
        embed = ClassEmbedding(
            self.num_classes,
            self.hidden_size,
            self.class_dropout,
            _UNIT_NORMAL,
            self.dtype,
            name="class_embed",
        )
        return [embed(label, train)[:, None], time[:, None]]

    def _patch_tokens(self, x: jax.Array) -> jax.Array:
        """(b, H, W, C) images -> (b, H W / patch_size^2, d)."""
        side = self.patch_size
        patch_embed = nn.Conv(
            self.hidden_size,
            (side, side),
            strides=side,
            padding="VALID",
            kernel_init=_CONV,
            bias_init=_conv_bias(side * side * x.shape[-1]),
            dtype=self.dtype,
            name="patch_embed",
        )
        return patch_embed(x).reshape(x.shape[0], -1, self.hidden_size)

    def _check_positions(self, needed: tuple[int, ...]) -> None:
        if not self.has_variable("params", "position"):
            return
        have = self.get_variable("params", "position").shape[1:]
        if have != needed:
            raise ValueError(
                f"the parameters are for {have[0]} tokens, of images of another size; "
                f"got images and label of {needed[0]}"
            )
