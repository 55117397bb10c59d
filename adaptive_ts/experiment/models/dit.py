"""DiT, the transformer over latent patches (Peebles & Xie 2023)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.experiment.models.parts import (
    MLP,
    ClassEmbedding,
    SelfAttention,
    check_inputs,
    cos_sin_embedding,
    image_of_patches,
)

_XAVIER = nn.initializers.xavier_uniform()
# A patch embedding is initialised as the matrix product that it is.
_PATCH = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3)
_NORMAL = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros_init()
_TIME_FEATURES = 256


def position_embedding(rows: int, columns: int, dim: int) -> np.ndarray:
    """The fixed (rows * columns, dim) float32 embedding of a grid's cells, row by row.

    The first half of the features is of the column, the second of the row; each is sines, then
    cosines, at the frequencies 10000 ** -(4 i / dim).
    """
    frequency = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    row, column = np.indices((rows, columns)).reshape(2, -1, 1)
    parts = [wave(cell * frequency) for cell in (column, row) for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def split_variance(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """A learned-sigma model's output as its prediction and its v.

    With v the reverse step's log-variance is v log(beta_t) + (1 - v) log(posterior variance): at
    0 the smallest the true one can be, at 1 the largest. The network gives 2 v - 1, so that an
    output of zero is the middle; v is not clipped to [0, 1].

    Args:
      output: (b, H, W, 2 channels), the prediction's channels first.
      channels: C of the images.

    Returns:
      (prediction (b, H, W, C), v (b, H, W, C)).

    Raises:
      ValueError: the output does not have 2 C channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.experiment.models.dit import split_variance
      >>> prediction, v = split_variance(jnp.zeros((1, 8, 8, 6)), 3)
      >>> prediction.shape, float(v.max())
      ((1, 8, 8, 3), 0.5)

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 15.
    """
    if output.shape[-1] != 2 * channels:
        raise ValueError(
            f"the output must have {2 * channels} channels, got shape {output.shape}; "
            "set learn_sigma=True"
        )
    return output[..., :channels], (output[..., channels:] + 1) / 2


def _modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(b, n, d) tokens, normalised and then scaled and shifted by (b, d), in float32."""
    norm = nn.LayerNorm(1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)
    return norm(x) * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention, then the MLP; the condition shifts, scales and gates each (adaLN-zero)."""

    num_heads: int
    mlp_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        width = 6 * x.shape[-1]
        modulation = nn.Dense(width, kernel_init=_ZERO, dtype=self.dtype, name="modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation(condition), 6, axis=-1)
        attention = SelfAttention(self.num_heads, True, _XAVIER, self.dtype, name="attention")
        x = x + gate1[:, None] * attention(_modulated_norm(x, shift1, scale1))
        mlp = MLP(self.mlp_width, True, _XAVIER, self.dtype, name="mlp")
        return x + gate2[:, None] * mlp(_modulated_norm(x, shift2, scale2))


class DiT(nn.Module):
    """(x (b, H, W, C), t (b,), label (b,) or None) -> (b, H, W, C or 2 C) float32.

    The position embedding is computed, not a parameter: no optimizer, average or weight decay
    touches it, and any H and W will do. The authors count it, H W / patch_size^2 * hidden_size.
    At initialisation the output is zero. The defaults are DiT-S/2 without classes.

    Attributes:
      patch_size: side of the square that becomes one token.
      hidden_size: width of the tokens; a multiple of 4 and of num_heads.
      depth: number of blocks.
      num_heads: of the attention.
      mlp_ratio: hidden units of the MLPs, in widths.
      num_classes: K; labels are 0 .. K - 1, and K is the null class, which has an embedding
        whatever class_dropout is. None: unconditional, label must be None.
      class_dropout: probability that training sees the null class instead, by the rng "dropout".
      learn_sigma: 2 C output channels, see ``split_variance``.
      dtype: of the matrix products and tokens; parameters, norms and softmax are float32.
      remat: keep only the blocks' inputs for the backward pass and compute the rest again.

    Raises:
      ValueError: fields, images and label that don't fit.

    Source: Peebles & Xie 2023 (arXiv 2212.09748), section 3.2.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    class_dropout: float = 0.1
    learn_sigma: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        check_inputs(self, x, label)
        side, width = self.patch_size, self.hidden_size
        if width % 4:
            raise ValueError(f"hidden_size must be divisible by 4, got {width}")
        rows, columns = x.shape[1] // side, x.shape[2] // side

        def dense(features: int, init: Any, name: str) -> nn.Dense:
            return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)

        condition = dense(width, _NORMAL, "time_0")(cos_sin_embedding(t, _TIME_FEATURES))
        condition = dense(width, _NORMAL, "time_1")(nn.silu(condition))
        if self.num_classes is not None and label is not None:
            embed = ClassEmbedding(
                self.num_classes,
                width,
                self.class_dropout,
                _NORMAL,
                self.dtype,
                name="class_embed",
            )
            condition = condition + embed(label, train)
        condition = nn.silu(condition)

        options = {"strides": side, "padding": "VALID", "dtype": self.dtype}
        h = nn.Conv(width, (side, side), kernel_init=_PATCH, name="patch_embed", **options)(x)
        position = jnp.asarray(position_embedding(rows, columns, width), self.dtype)
        h = h.reshape(-1, rows * columns, width) + position[None]
        block = nn.remat(DiTBlock) if self.remat else DiTBlock
        for i in range(self.depth):
            mlp_width = int(width * self.mlp_ratio)
            h = block(self.num_heads, mlp_width, self.dtype, name=f"block_{i}")(h, condition)

        shift, scale = jnp.split(dense(2 * width, _ZERO, "modulation")(condition), 2, axis=-1)
        channels = x.shape[-1] * (2 if self.learn_sigma else 1)
        out = dense(side * side * channels, _ZERO, "out")(_modulated_norm(h, shift, scale))
        return image_of_patches(out.astype(jnp.float32), rows, columns, side)
