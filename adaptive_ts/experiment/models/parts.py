"""What DiT and U-ViT share: embeddings of time and class, attention, the MLP, patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def cos_sin_embedding(t: jax.Array, dim: int) -> jax.Array:
    """(b,) timesteps -> (b, dim) float32: cosines, then sines, at 10000 ** -(i / (dim // 2)).

    Not the U-Net's, which has the sines first and whose last frequency is 1 / 10000.
    """
    half = dim // 2
    frequency = np.exp(-np.log(10000) * np.arange(half) / half).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    embedding = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class ClassEmbedding(nn.Module):
    """(b,) labels -> (b, features): one vector per class, and one for no class.

    In training a label becomes the null class, ``num_classes``, with probability ``dropout``.
    A larger label gives NaN.
    """

    num_classes: int
    features: int
    dropout: float
    initializer: Any
    dtype: Any

    @nn.compact
    def __call__(self, label: jax.Array, train: bool) -> jax.Array:
        if train and self.dropout > 0:
            drop = jax.random.bernoulli(self.make_rng("dropout"), self.dropout, label.shape)
            label = jnp.where(drop, self.num_classes, label)
        table = self.param("embedding", self.initializer, (self.num_classes + 1, self.features))
        return jnp.take(table, label, axis=0, mode="fill").astype(self.dtype)


class SelfAttention(nn.Module):
    """(b, n, d) tokens -> (b, n, d), softmax in float32."""

    num_heads: int
    qkv_bias: bool
    initializer: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        dense = {"kernel_init": self.initializer, "dtype": self.dtype}
        qkv = nn.Dense(3 * d, use_bias=self.qkv_bias, name="project_in", **dense)(x)
        qkv = qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return nn.Dense(d, name="project_out", **dense)(h.reshape(b, n, d))


class MLP(nn.Module):
    """(b, n, d) tokens -> (b, n, d): ``width`` hidden units and GELU, exact or by tanh."""

    width: int
    tanh_gelu: bool
    initializer: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = {"kernel_init": self.initializer, "dtype": self.dtype}
        h = nn.gelu(nn.Dense(self.width, name="fc1", **dense)(x), approximate=self.tanh_gelu)
        return nn.Dense(x.shape[-1], name="fc2", **dense)(h)


def image_of_patches(patches: jax.Array, rows: int, columns: int, side: int) -> jax.Array:
    """(b, rows * columns, side * side * c) -> (b, rows * side, columns * side, c)."""
    b = patches.shape[0]
    split = patches.reshape(b, rows, columns, side, side, -1)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * side, columns * side, -1)


def check_inputs(model: Any, x: jax.Array, label: jax.Array | None) -> None:
    """Holds the fields of a DiT or U-ViT, and what it is applied to, against each other.

    Raises:
      ValueError: they don't fit; names the value received and the remedy.
    """
    side, classes = model.patch_size, model.num_classes
    if x.ndim != 4 or x.shape[1] % side or x.shape[2] % side:
        raise ValueError(
            f"images must be (b, H, W, C) with sides divisible by patch_size={side}, "
            f"got shape {x.shape}"
        )
    if model.hidden_size % model.num_heads:
        raise ValueError(
            f"hidden_size must be divisible by num_heads={model.num_heads}, got {model.hidden_size}"
        )
    if not 0 <= model.class_dropout <= 1:
        raise ValueError(f"class_dropout must be in [0, 1], got {model.class_dropout}")
    if classes is None:
        if label is not None:
            raise ValueError(
                f"the model is unconditional (num_classes=None), got label of shape "
                f"{jnp.shape(label)}; pass label=None, or set num_classes"
            )
        return
    if classes < 1:
        raise ValueError(
            f"num_classes must be at least 1, or None for an unconditional model, got {classes}"
        )
    if label is None:
        raise ValueError(
            f"the model has num_classes={classes}, got label=None; pass (b,) integers, "
            f"{classes} where there is no class, or set num_classes=None"
        )
    shape, kind = jnp.shape(label), jnp.result_type(label)
    if shape != x.shape[:1] or not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(f"label must be ({x.shape[0]},) integers, got {kind} of shape {shape}")
