"""The look-ahead reward of a bfloat16 network beside float64's.

A residual convolutional network with attention, all of it in the precision asked for, is trained
on noisy digits with Adam; at each of some steps the reward is what `decrease_on_batch` says.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import adaptive_ts as ats

SCHEDULE = ats.schedules.linear(1000)
WIDTH, BATCH, DEPTH = 32, 64, 3
TIMESTEPS = np.asarray([50, 300, 700], np.int32)
IMAGES = (load_digits().images[..., None] / 8 - 1).astype(np.float32)


def init(key):
    """Parameters in float32: about 60,000."""
    keys = iter(jax.random.split(key, 99))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(np.prod(shape[:-1]))

    block = lambda: {  # noqa: E731
        "time": normal(2, WIDTH),
        "one": normal(3, 3, WIDTH, WIDTH),
        "two": 0.3 * normal(3, 3, WIDTH, WIDTH),
        "qkv": normal(WIDTH, 3 * WIDTH),
        "out": 0.3 * normal(WIDTH, WIDTH),
    }
    return {
        "first": normal(3, 3, 1, WIDTH),
        "blocks": [block() for _ in range(DEPTH)],
        "last": 0.1 * normal(3, 3, WIDTH, 1),
    }


def network(dtype, params, x, t, batch, key):
    """x_t -> predicted noise, computed in ``dtype``."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def norm(h):
        centred = h - jnp.mean(h, (1, 2), keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, (1, 2, 3), keepdims=True) + 1e-5)

    time = jnp.stack([t / 1000, jnp.log1p(t) / 7], 1).astype(dtype)
    h = conv(x.astype(dtype), params["first"])
    for block in params["blocks"]:
        shift = (time @ block["time"])[:, None, None]
        h = h + conv(jax.nn.silu(conv(norm(h) + shift, block["one"])), block["two"])
        q, k, v = jnp.split(norm(h).reshape(h.shape[0], -1, WIDTH) @ block["qkv"], 3, axis=-1)
        mixed = jax.nn.softmax(q @ k.mT / WIDTH**0.5) @ v
        h = h + (mixed @ block["out"]).reshape(h.shape)
    return conv(norm(h), params["last"])


def loss_of(dtype, loss_dtype):
    """A per-example loss whose network and mean are computed in these types."""

    def at(params, batch, t, key, index):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        noise = jax.vmap(lambda k: jax.random.normal(k, (8, 8, 1), jnp.float32))(keys)
        x_t = ats.corrupt(SCHEDULE, batch["image"], noise, t)
        error = network(dtype, params, x_t, t, batch, key).astype(loss_dtype)
        return jnp.mean((error - noise.astype(loss_dtype)) ** 2, axis=(1, 2, 3))

    return ats.ExampleLoss(at)


def rewards(loss_fn, estimate, params, new_params, batch, key):
    found = ats.learning.decrease_on_batch(
        loss_fn, params, new_params, batch, jnp.asarray(TIMESTEPS), key, estimate=estimate
    )
    return jnp.mean(found, axis=0)


def exact_rewards(params, new_params, batch, key):
    """The difference of two float64 losses."""
    loss_fn, index = loss_of(jnp.float64, jnp.float64), jnp.arange(BATCH, dtype=jnp.int32)

    def at(tau):
        t = jnp.full((BATCH,), tau, jnp.int32)
        before, after = (loss_fn.at(p, batch, t, key, index) for p in (params, new_params))
        return before - after

    return sum(at(tau) for tau in TIMESTEPS) / len(TIMESTEPS)


@functools.partial(jax.jit, static_argnums=0)
def train_step(lr, params, opt_state, batch, key):
    def loss(params):
        t = jax.random.randint(key, (BATCH,), 0, 1000, jnp.int32)
        return jnp.mean(loss_of(jnp.float32, jnp.float32)(params, batch, t, key))

    updates, opt_state = optax.adam(lr).update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def correlations(lr, loss_dtype, estimates, *, probes=20, warm_up=100, every=3):
    """Per estimate: the median correlation over the examples, and how many means have its sign."""
    loss_fn = loss_of(jnp.bfloat16, loss_dtype)
    low = {e: jax.jit(functools.partial(rewards, loss_fn, e)) for e in estimates}
    exact, params = jax.jit(exact_rewards), jax.jit(init)(jax.random.key(0))
    opt_state, rng = optax.adam(lr).init(params), np.random.default_rng(0)
    found = {e: [] for e in estimates}
    for i in range(warm_up + probes * every):
        batch = {"image": jnp.asarray(IMAGES[rng.integers(len(IMAGES), size=BATCH)])}
        key, rate = jax.random.fold_in(jax.random.key(1), i), 1e-3 if i < warm_up else lr
        new, opt_state = train_step(rate, params, opt_state, batch, key)
        if i >= warm_up and i % every == 0:
            with jax.enable_x64(True):
                truth = np.asarray(exact(params, new, batch, key))
            for e in estimates:
                mine = np.asarray(low[e](params, new, batch, key), np.float64)
                right = np.sign(mine.mean()) == np.sign(truth.mean())
                found[e].append((np.corrcoef(mine, truth)[0, 1], right))
        params = new
    return {
        e: (float(np.median([c for c, _ in v])), int(sum(s for _, s in v)))
        for e, v in found.items()
    }
