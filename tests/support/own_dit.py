"""A train step as many have one, of a very small DiT: what docs/howto/own_dit.md changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

T = 1000
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
alphas_bar = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, T))


class DiT(nn.Module):
    """Patches of 4 x 4, one block, modulated by time and class; bfloat16 inside."""

    @nn.compact
    def __call__(self, x, t, labels):
        b, h, w, c = x.shape
        patches = x.reshape(b, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
        tokens = nn.Dense(16, dtype=jnp.bfloat16)(patches.reshape(b, -1, 16 * c))
        condition = nn.Embed(T, 16)(t) + nn.Embed(11, 16)(labels)
        shift = nn.Dense(16, dtype=jnp.bfloat16)(nn.silu(condition))[:, None]
        attend = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)
        tokens = tokens + attend(nn.LayerNorm(dtype=jnp.bfloat16)(tokens) + shift)
        out = nn.Dense(16 * c, dtype=jnp.bfloat16)(tokens)
        out = out.reshape(b, h // 4, w // 4, 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(x.shape)


model = DiT()


def loss_fn(params, images, labels, key):
    t_key, noise_key, drop_key = jax.random.split(key, 3)
    t = jax.random.randint(t_key, (images.shape[0],), 0, T)
    labels = jnp.where(jax.random.bernoulli(drop_key, 0.1, labels.shape), 10, labels)
    noise = jax.random.normal(noise_key, images.shape)
    level = alphas_bar[t].reshape(-1, 1, 1, 1)
    output = model.apply(params, jnp.sqrt(level) * images + jnp.sqrt(1 - level) * noise, t, labels)
    return jnp.mean((output - noise) ** 2)


@jax.jit
def train_step(state, images, labels, key):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], images, labels, key)
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    ema = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, state["ema"], params)
    new = {"params": params, "ema": ema, "opt_state": opt_state}
    return new, loss
