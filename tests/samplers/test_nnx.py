"""Flax NNX: `nnx.Optimizer` and `nnx.jit` learn what plain functions with optax learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS, EVERY = 7, 2
GRID, SCHEDULE = ats.discrete(50), ats.schedules.linear(50)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)), jnp.float32)}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
SAMPLERS = {
    "impact": lambda: ats.impact(GRID, TX, every=EVERY, num_buckets=10, smooth=1),
    "adaptive": lambda: ats.adaptive(
        GRID,
        ats.learning.conv_beta_policy(channels=(2,), hidden=(4,)),
        optax.adam(1e-1),
        every=EVERY,
        num_buckets=10,
    ),
}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(17, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 16, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(0.3))  # not a parameter

    def __call__(self, x, t):
        level = SCHEDULE.log_snr(t)[:, None] / 10
        h = nnx.silu(self.inner(jnp.concatenate([x.reshape(x.shape[0], -1), level], axis=1)))
        return (self.scale[...] * self.outer(h)).reshape(x.shape)


def losses_of(model, batch, t, key):
    noise = jax.random.normal(key, batch["image"].shape)
    x_t = ats.corrupt(SCHEDULE, batch["image"], noise, t)
    return jnp.mean((model(x_t, t) - noise) ** 2, axis=(1, 2, 3))


def params_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def train_nnx(sampler, state, static_probe):
    """As on docs/tutorial/nnx.md."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit(static_argnames="probe")
    def train_step(model, optimizer, state, key, probe=None):
        k_t, k_loss, k_up = jax.random.split(key, 3)
        draw = sampler.sample(k_t, state, BATCH)
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch, t, key):
            return losses_of(nnx.merge(graphdef, params, rest), batch, t, key)

        def mean_loss(model):
            losses = losses_of(model, BATCH, draw.t, k_loss)
            return jnp.mean(draw.weight * losses), losses

        params, opt_state = params_of(model), nnx.as_pure(optimizer.opt_state)
        if static_probe:
            (_, losses), grads = nnx.value_and_grad(mean_loss, has_aux=True)(model)
        else:
            grads, losses = nnx.grad(mean_loss, has_aux=True)(model)
        optimizer.update(model, grads)
        state, metrics = sampler.update(
            state, draw, losses, key=k_up, batch=BATCH, loss_fn=loss_fn, params=params,
            new_params=params_of(model), opt_state=opt_state, probe=probe,
        )  # fmt: skip
        return state, (draw, losses, metrics)

    seen = []
    for step in range(STEPS):
        probe = (step + 1) % EVERY == 0 if static_probe else None
        key = jax.random.fold_in(jax.random.key(2), step)
        state, told = train_step(model, optimizer, state, key, probe)
        seen.append(told)
    return params_of(model), state, seen


def train_plainly(sampler, state):
    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    params, opt_state = nnx.as_pure(params), TX.init(nnx.as_pure(params))

    def loss_fn(params, batch, t, key):
        return losses_of(nnx.merge(graphdef, params, rest), batch, t, key)

    @jax.jit
    def train_step(params, opt_state, state, key):
        k_t, k_loss, k_up = jax.random.split(key, 3)
        draw = sampler.sample(k_t, state, BATCH)

        def mean_loss(params):
            losses = loss_fn(params, BATCH, draw.t, k_loss)
            return jnp.mean(draw.weight * losses), losses

        grads, losses = jax.grad(mean_loss, has_aux=True)(params)
        updates, new_opt_state = TX.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        state, metrics = sampler.update(
            state, draw, losses, key=k_up, batch=BATCH, loss_fn=loss_fn, params=params,
            new_params=new, opt_state=opt_state,
        )  # fmt: skip
        return new, new_opt_state, state, (draw, losses, metrics)

    seen = []
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(2), step)
        params, opt_state, state, told = train_step(params, opt_state, state, key)
        seen.append(told)
    return params, state, seen


@pytest.mark.parametrize("static_probe", [False, True], ids=["counted", "chosen"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_nnx_learns_what_plain_optax_learns(name, static_probe):
    sampler = SAMPLERS[name]()
    state = sampler.init(jax.random.key(1), BATCH)
    found = train_nnx(sampler, state, static_probe)
    expected = train_plainly(sampler, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected
    )
    probed = [float(metrics["probed"]) for _, _, metrics in found[2]]
    assert probed == [0, 1, 0, 1, 0, 1, 0]
    first, last = (ats.effective_density(sampler, state=s, batch=BATCH) for s in (state, found[1]))
    assert float(jnp.abs(last - first).sum()) > 0.02  # it has learned something


def test_a_state_that_is_not_pure_arrays_is_not_what_optax_takes():
    """The plain states are changed in place by the update; the pure ones are optax's own."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    own = jax.tree.structure(TX.init(params_of(model)))
    assert jax.tree.structure(nnx.as_pure(optimizer.opt_state)) == own
    assert jax.tree.structure(optimizer.opt_state) != own
    sampler = SAMPLERS["impact"]()
    state = sampler.init(jax.random.key(1), BATCH)
    draw = sampler.sample(jax.random.key(2), state, BATCH)
    rest = {"key": jax.random.key(3), "batch": BATCH, "loss_fn": losses_of}
    own_params, own_state = nnx.state(model, nnx.Param), optimizer.opt_state
    for params, opt_state, name in (
        (own_params, nnx.as_pure(own_state), r"params holds NNX variables \(a Param\)"),
        (params_of(model), own_state, r"opt_state holds NNX variables \(a Opt\w+\)"),
    ):
        with pytest.raises(ValueError, match=f"{name}, which are changed in place: .*nnx.as_pure"):
            sampler.update(state, draw, draw.u, params=params, opt_state=opt_state, **rest)
    adaptive = SAMPLERS["adaptive"]()
    state = adaptive.init(jax.random.key(1), BATCH)
    with pytest.raises(ValueError, match="new_params holds NNX variables"):
        adaptive.update(state, draw, draw.u, params=params_of(model), new_params=own_params, **rest)
    # Pure arrays stay what they were when the update changes the model in place.
    before, moments = params_of(model), nnx.as_pure(optimizer.opt_state)
    copies = jax.tree.map(jnp.copy, (before, moments))
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, (before, moments), copies)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, params_of(model))
    assert all(jax.tree.leaves(moved))
