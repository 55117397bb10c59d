"""The seven lines of README.md and docs/tutorial, as a user writes them: Linen, NNX, shard_map.

Nothing of this package but the lines marked (1) to (7): the noise schedule, the model and the
loss, with a plain ``jax.random.normal(key, x.shape)``, are the user's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats

T, SIZE, STEPS, EVERY = 1000, 16, 60, 6
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T)).astype(np.float32)
PROBED = [(step + 1) % EVERY == 0 for step in range(STEPS)]
METRICS = {
    "probed", "reward_mean", "reward_std", "alpha_mean", "beta_mean", "entropy", "nonfinite",
}  # fmt: skip


def make_images(count, seed):
    """Sheets of stripes: two numbers per image, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
    y, x = np.mgrid[:8, :8] / 8
    waves = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return waves[..., None].astype(np.float32)


IMAGES, HELD_OUT = make_images(512, seed=0), {"image": jnp.asarray(make_images(256, seed=1))}
HELD_OUT_T = jnp.asarray(np.linspace(0, T - 1, 256).astype(np.int32))


def batches():
    order = np.random.default_rng(2).permutation(STEPS * SIZE) % len(IMAGES)
    return [{"image": jnp.asarray(IMAGES[rows])} for rows in order.reshape(STEPS, SIZE)]


def corrupted(x, t, key):
    noise = jax.random.normal(key, x.shape)
    a = jnp.asarray(ALPHA_BAR)[t][:, None, None, None]
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise, noise


def features(x, t):
    """What both models see: the pixels and the noise level."""
    a = jnp.asarray(ALPHA_BAR)[t][:, None]
    return jnp.concatenate([x.reshape(x.shape[0], -1), jnp.sqrt(a), jnp.sqrt(1 - a)], axis=1)


def squared_error(predicted, noise):
    return jnp.mean((predicted.reshape(noise.shape) - noise) ** 2, axis=(1, 2, 3))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        h = features(x, t)
        for width in (128, 128):
            h = nn.silu(nn.Dense(width)(h))
        return nn.Dense(64)(h)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(66, 128, rngs=rngs)
        self.middle = nnx.Linear(128, 128, rngs=rngs)
        self.outer = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x, t):
        h = nnx.silu(self.inner(features(x, t)))
        return self.outer(nnx.silu(self.middle(h)))


LINEN = LinenModel()


@jax.jit
def init_linen():
    return LINEN.init(jax.random.key(0), HELD_OUT["image"], HELD_OUT_T)["params"]


def linen_loss_fn(params, batch, t, key):
    x, noise = corrupted(batch["image"], t, key)
    return squared_error(LINEN.apply({"params": params}, x, t), noise)


def adaptive(**options):
    return ats.adaptive(
        ats.discrete(T),
        ats.learning.conv_beta_policy(channels=(4,), hidden=(8,)),
        optax.adam(1e-2),
        every=EVERY,
        num_buckets=20,
        **options,
    )


pytestmark = pytest.mark.usefixtures("quick_compilation")

# Line 1, and all that is different from one sampler to another.
SAMPLERS = {
    "adaptive": adaptive,
    "uniform": lambda: ats.uniform(ats.discrete(T)),
    "mixed_with_uniform": lambda: ats.mixed_with_uniform(adaptive(), 0.2),
    "importance_weighted": lambda: ats.importance_weighted(ats.mixed_with_uniform(adaptive(), 0.2)),
}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_draws(draw):
    t, u = np.asarray(draw.t), np.asarray(draw.u)
    assert t.dtype == np.int32 and t.shape == (SIZE,) and t.min() >= 0 and t.max() < T
    np.testing.assert_array_equal(t, np.floor(u.astype(np.float64) * T))


def assert_probed(history, states):
    """The sampler looked at the user's step on the right steps, and learned from it then only.

    Args:
      history: the metrics of each step.
      states: the sampler's state before the first step and after each.
    """
    assert all(set(metrics) == METRICS for metrics in history)
    assert [bool(metrics["probed"]) for metrics in history] == PROBED
    assert {repr(shapes(state)) for state in states} == {repr(shapes(states[0]))}
    for probed, old, new in zip(PROBED, states[:-1], states[1:], strict=True):
        learned = not np.array_equal(flat(old.policy), flat(new.policy))
        assert learned == probed
    last = states[-1]
    assert int(last.step) == STEPS and int(last.queue.count) == sum(PROBED)
    rows = np.asarray(last.queue.rows)[: sum(PROBED)]
    # A step that is judged against itself (aliased parameters) has a profile of zeros.
    assert np.all(np.isfinite(rows)) and np.all(np.abs(rows).max(1) > 1e-5)
    assert np.std(rows, axis=1).min() > 1e-6
    reports = [m for m, probed in zip(history, PROBED, strict=True) if probed]
    assert all(m["nonfinite"] == 0 and m["reward_mean"] != 0 for m in reports)
    # Far from converged, steps help: the measured decrease is positive on the whole.
    assert np.mean([m["reward_mean"] for m in reports[:5]]) > 0


def assert_learned(before, after):
    assert before > 0.9  # about 1 by predicting no noise at all
    assert after < 0.75 * before


# ---------------------------------------------------------------- a Flax linen TrainState


def linen_train_step(sampler, traces):
    @jax.jit
    def train_step(state, sampler_state, batch, key):
        traces.append(1)
        k_t, k_loss, k_up = jax.random.split(key, 3)  # 3
        draw = sampler.sample(k_t, sampler_state, batch)  # 4

        def mean_loss(params):
            losses = linen_loss_fn(params, batch, draw.t, k_loss)
            return jnp.mean(draw.weight * losses), losses  # 5

        grads, losses = jax.grad(mean_loss, has_aux=True)(state.params)
        new = state.apply_gradients(grads=grads)
        sampler_state, metrics = sampler.update(
            sampler_state, draw, losses, key=k_up, batch=batch,  # 6
            loss_fn=linen_loss_fn, params=state.params, new_params=new.params,  # 7
        )  # fmt: skip
        return new, sampler_state, metrics, draw

    return train_step


@pytest.mark.parametrize(
    "name",
    [
        "adaptive",
        "uniform",
        pytest.param("mixed_with_uniform", marks=pytest.mark.slow),
        "importance_weighted",  # on top of the mixture
    ],
)
def test_linen_train_state_with_any_sampler(name):
    sampler = SAMPLERS[name]()  # 1
    traces = []
    train_step = linen_train_step(sampler, traces)
    data = batches()
    state = TrainState.create(apply_fn=LINEN.apply, params=init_linen(), tx=optax.adam(2e-3))
    sampler_state = jax.jit(sampler.init)(jax.random.key(1), data[0])  # 2

    evaluate = jax.jit(lambda p: linen_loss_fn(p, HELD_OUT, HELD_OUT_T, jax.random.key(3)).mean())
    before, states, history, weights = evaluate(state.params), [sampler_state], [], []
    for step, batch in enumerate(data):
        key = jax.random.fold_in(jax.random.key(2), step)
        state, sampler_state, metrics, draw = train_step(state, sampler_state, batch, key)
        assert_draws(draw)
        weights.append(np.asarray(draw.weight))
        states.append(sampler_state)
        history.append(jax.tree.map(float, metrics))
    assert len(traces) == 1
    assert int(state.step) == STEPS
    assert_learned(float(before), float(evaluate(state.params)))

    weights = np.concatenate(weights)
    assert np.all(np.isfinite(weights)) and np.all(weights >= 0)
    if name == "uniform":
        assert sampler_state == () and history == [{}] * STEPS
    else:
        assert_probed(history, states)
    if name == "importance_weighted":
        assert weights.std() > 1e-2 and abs(weights.mean() - 1) < 0.2
        assert weights.max() <= 1 / 0.2 + 1e-3  # what the mixture is for
    else:
        assert np.all(weights == 1)


# ---------------------------------------------------------------- Flax NNX


def test_nnx_module_and_optimizer():
    sampler = adaptive()  # 1
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    graphdef = nnx.graphdef(model)
    data = batches()
    sampler_state = jax.jit(sampler.init)(jax.random.key(1), data[0])  # 2

    def losses_of(model, batch, t, key):  # what the user's code had before
        x, noise = corrupted(batch["image"], t, key)
        return squared_error(model(x, t), noise)

    def loss_fn(params, batch, t, key):
        return losses_of(nnx.merge(graphdef, params), batch, t, key)

    def params_of(model):
        # Arrays, not Variables: nnx.state alone aliases the model, and the optimizer's update,
        # which is in place, would change the parameters "before" the step too.
        return nnx.as_pure(nnx.state(model, nnx.Param))

    @nnx.jit
    def train_step(model, optimizer, sampler_state, batch, key):
        k_t, k_loss, k_up = jax.random.split(key, 3)  # 3
        draw = sampler.sample(k_t, sampler_state, batch)  # 4

        def mean_loss(model):
            losses = losses_of(model, batch, draw.t, k_loss)
            return jnp.mean(draw.weight * losses), losses  # 5

        params = params_of(model)
        grads, losses = nnx.grad(mean_loss, has_aux=True)(model)
        optimizer.update(model, grads)
        sampler_state, metrics = sampler.update(
            sampler_state, draw, losses, key=k_up, batch=batch,  # 6
            loss_fn=loss_fn, params=params, new_params=params_of(model),  # 7
        )  # fmt: skip
        return sampler_state, metrics, draw

    def held_out():
        return float(losses_of(model, HELD_OUT, HELD_OUT_T, jax.random.key(3)).mean())

    before, first = held_out(), flat(params_of(model))
    states, history = [sampler_state], []
    for step, batch in enumerate(data):
        key = jax.random.fold_in(jax.random.key(2), step)
        sampler_state, metrics, draw = train_step(model, optimizer, sampler_state, batch, key)
        assert_draws(draw)
        states.append(sampler_state)
        history.append(jax.tree.map(float, metrics))
    assert_learned(before, held_out())
    assert not np.array_equal(first, flat(params_of(model)))
    assert_probed(history, states)


# ---------------------------------------------------------------- the user's own shard_map


def test_inside_the_user_s_own_shard_map(mesh8):
    sampler = adaptive(axis_name="data")  # 1
    optimizer = optax.adam(2e-3)
    data = batches()
    params = init_linen()
    opt_state = optimizer.init(params)
    sampler_state = jax.jit(sampler.init)(jax.random.key(1), data[0])  # 2

    def own(key):  # each device its own noise, as the user's code had it before
        return jax.random.fold_in(key, jax.lax.axis_index("data"))

    def train_step(params, opt_state, sampler_state, batch, key):
        k_t, k_loss, k_up = jax.random.split(key, 3)  # 3
        draw = sampler.sample(k_t, sampler_state, batch)  # 4

        def mean_loss(params):
            losses = linen_loss_fn(params, batch, draw.t, own(k_loss))
            # The gradient of the mean over devices: shard_map sums the gradients of replicated
            # parameters, and of each device's own mean that sum would be 8 times too large.
            return jax.lax.pmean(jnp.mean(draw.weight * losses), "data"), losses  # 5

        grads, losses = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        sampler_state, metrics = sampler.update(
            sampler_state, draw, losses, key=k_up, batch=batch,  # 6
            loss_fn=linen_loss_fn, params=params, new_params=new_params,  # 7
        )  # fmt: skip
        return new_params, opt_state, sampler_state, metrics, draw, grads

    replicated, split = P(), P("data")
    # check_vma is on: what leaves under P() is proved to be equal on all devices.
    mapped = jax.jit(
        jax.shard_map(
            train_step,
            mesh=mesh8,
            in_specs=(replicated, replicated, replicated, split, replicated),
            out_specs=(replicated, replicated, replicated, replicated, split, replicated),
        )
    )
    evaluate = jax.jit(lambda p: linen_loss_fn(p, HELD_OUT, HELD_OUT_T, jax.random.key(3)).mean())
    before, states, history = float(evaluate(params)), [sampler_state], []
    first_params = params
    for step, batch in enumerate(data):
        key = jax.random.fold_in(jax.random.key(2), step)
        params, opt_state, sampler_state, metrics, draw, grads = mapped(
            params, opt_state, sampler_state, batch, key
        )
        assert_draws(draw)
        if step == 0:
            assert_gradient_by_hand(grads, first_params, batch, draw.t, key)
            k_t = jax.random.split(key, 3)[0]
            whole = jax.jit(adaptive().sample)(k_t, states[0], batch)
            np.testing.assert_array_equal(draw.t, whole.t)  # no device count in the draws
        states.append(sampler_state)
        history.append(jax.tree.map(float, metrics))
    assert_learned(before, float(evaluate(params)))
    assert_probed(history, states)


def assert_gradient_by_hand(grads, params, batch, t, key):
    """The mean of eight gradients, each on one device's share with its own noise."""
    k_loss = jax.random.split(key, 3)[1]
    shares = jax.tree.map(lambda x: jnp.reshape(x, (8, SIZE // 8, *x.shape[1:])), batch)
    gradient = jax.jit(jax.grad(lambda p, batch, t, key: linen_loss_fn(p, batch, t, key).mean()))
    each = [
        gradient(
            params,
            {"image": shares["image"][device]},
            jnp.asarray(np.asarray(t).reshape(8, -1)[device]),
            jax.random.fold_in(k_loss, device),
        )
        for device in range(8)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *each)
    jax.tree.map(
        lambda found, leaf: np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-6),
        grads,
        expected,
    )
