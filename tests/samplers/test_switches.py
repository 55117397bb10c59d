"""JAX's switches: every family of samplers works under each of them as it does without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats

GRIDS = {
    "discrete": (ats.discrete(50), ats.schedules.linear(50)),
    "continuous": (ats.continuous(20), ats.schedules.vp_cosine()),
}
IMAGES = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
MODEL = optax.adam(1e-3)


def policy_net():
    return ats.learning.conv_beta_policy(channels=(2,), hidden=(3,))


FAMILIES = {
    "uniform": lambda g, s: ats.uniform(g),
    "stratified": lambda g, s: ats.uniform(g, coupling="stratified"),
    "logit_normal": lambda g, s: ats.logit_normal(g),
    "mode": lambda g, s: ats.mode(g),
    "cosmap": lambda g, s: ats.cosmap(g),
    "beta": lambda g, s: ats.beta(g, 1.0, 2.0),
    "log_snr_laplace": ats.log_snr_laplace,
    "log_snr_cauchy": ats.log_snr_cauchy,
    "log_normal_sigma": ats.log_normal_sigma,
    "speed": ats.speed,
    "curriculum": lambda g, s: ats.curriculum(g, steps=10),
    "switch": lambda g, s: ats.curriculum(g, kind="switch", steps=10),
    "loss_second_moment": lambda g, s: ats.loss_second_moment(g),
    "loss_proportional": lambda g, s: ats.loss_proportional(g),
    "entropy_rate": ats.entropy_rate,
    "adaptive": lambda g, s: ats.adaptive(
        g, policy_net(), optax.adam(1e-3), every=1, num_buckets=4, num_selected=2
    ),
    "impact": lambda g, s: ats.impact(g, MODEL, every=1, num_buckets=4, num_examples=2),
    "mixed": lambda g, s: ats.mixed_with_uniform(ats.logit_normal(g), 0.3),
    "weighted": lambda g, s: ats.with_weighting(ats.uniform(g), ats.weightings.min_snr(), s),
    "importance": lambda g, s: ats.importance_weighted(ats.loss_proportional(g)),
    "density": lambda g, s: ats.with_density_of(ats.loss_proportional(g), ats.entropy_rate(g, s)),
}
PROBING = ("adaptive", "impact")
ALL = [pytest.param(g, f, id=f"{g}-{f}") for g in GRIDS for f in FAMILIES]
QUICK = [  # one of each kind, where it is most likely to differ; the others when there is time
    *(("discrete", f) for f in ("uniform", "loss_proportional", "adaptive", "impact", "density")),
    *(("continuous", f) for f in ("speed", "curriculum", "mixed")),
]
TIMES = [p if p.values in QUICK else pytest.param(*p.values, marks=pytest.mark.slow) for p in ALL]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def parts(grid, family):
    """(the sampler, the loss)."""
    grid, schedule = GRIDS[grid]
    loss = ats.denoising_loss(lambda p, x, t, batch, key: p["w"] * x + p["b"], schedule)
    return FAMILIES[family](grid, schedule), loss


def first(sampler, dtype=jnp.float32):
    params = {"w": jnp.asarray(0.5, dtype), "b": jnp.asarray(0.0, dtype)}
    batch = {"image": IMAGES}
    return sampler.init(jax.random.key(1), batch), params, MODEL.init(params)


def taken(sampler, loss, state, params, opt_state, batch, key, *, through_update=False):
    """One training step: (sampler state, params, opt_state), draw, log density and metrics."""
    k_t, k_loss, k_up = jax.random.split(key, 3)

    def update(draw, losses, new):
        return sampler.update(
            state, draw, losses, key=k_up, batch=batch, loss_fn=loss, params=params,
            new_params=new, opt_state=opt_state,
        )  # fmt: skip

    def objective(p):
        draw = sampler.sample(k_t, state, batch)
        losses = loss(p, batch, draw.t, k_loss)
        found = update(draw, losses, jax.tree.map(lambda x: 0.9 * x, p)) if through_update else None
        return jnp.mean(draw.weight.astype(losses.dtype) * losses), (draw, losses, found)

    grads, (draw, losses, found) = jax.grad(objective, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # the caller's own optax
        updates, new_opt = MODEL.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
    new_state, metrics = found or update(draw, losses, new)
    return (new_state, new, new_opt), (draw, sampler.log_density(state, draw, batch), metrics)


def steps(sampler, loss, *, dtype=jnp.float32, wrap=jax.jit, num=3, **options):
    """What some steps give; the state keeps its structure, shapes and dtypes."""
    carry, batch = first(sampler, dtype), {"image": IMAGES.astype(dtype)}
    step = wrap(functools.partial(taken, sampler, loss, **options))
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), carry[0])
    for number in range(num):
        carry, seen = step(*carry, batch, jax.random.key(number))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), carry[0]) == kinds
    return jax.device_get((carry, seen))


@functools.cache
def plain(grid, family):
    return steps(*parts(grid, family))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), found, expected)


@pytest.mark.parametrize(("grid", "family"), ALL)
def test_a_fresh_state_may_be_donated(grid, family):
    sampler, _ = parts(grid, family)
    state = sampler.init(jax.random.key(0), {"image": IMAGES})
    copy = jax.tree.map(jnp.copy, state)
    found = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert_close(found, jax.tree.map(lambda x: x + 1, copy))


def test_an_optimizer_that_holds_the_parameters_may_be_donated():
    optimizer = optax.contrib.schedule_free_sgd(0.1)
    sampler = ats.adaptive(GRIDS["discrete"][0], policy_net(), optimizer)
    state = sampler.init(jax.random.key(0), {"image": IMAGES})
    assert_close(state.opt_state.z, state.policy)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize(("grid", "family"), TIMES)
@pytest.mark.parametrize("dtype", ["float64", "mixed"])
def test_x64(grid, family, dtype):
    (state, _, _), (draw, log_density, _) = plain(grid, family)
    expected = jax.tree.map(lambda x: x.dtype, (state, draw, log_density))
    with jax.enable_x64(True):
        schedule = GRIDS[grid][1]
        sampler = FAMILIES[family](*GRIDS[grid])
        loss = ats.denoising_loss(lambda p, x, t, batch, key: p["w"] * x + p["b"], schedule)
        if dtype == "mixed":  # images and losses in float64, parameters in float32

            def wide(params, batch, t, key, loss=loss):
                batch = {"image": batch["image"].astype(jnp.float64)}
                return loss(params, batch, t, key)

            found = steps(sampler, wide)
        else:
            found = steps(sampler, loss, dtype=jnp.float64)
        (state, params, _), (draw, log_density, metrics) = found
    assert jax.tree.map(lambda x: x.dtype, (state, draw, log_density)) == expected
    assert params["w"].dtype == (np.float64 if dtype == "float64" else np.float32)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, draw, log_density)))
    if "probed" in metrics:
        assert metrics["probed"] == 1 and metrics["reward_mean"] != 0


@pytest.mark.parametrize(("grid", "family"), TIMES)
def test_strict_promotion(grid, family):
    with jax.numpy_dtype_promotion("strict"):
        found = steps(*parts(grid, family))
    assert_close(found, plain(grid, family))


@pytest.mark.parametrize(("grid", "family"), [p for p in TIMES if p.values[1] not in PROBING])
def test_debug_nans_without_jit(grid, family):
    with jax.debug_nans(True):
        found = steps(*parts(grid, family), wrap=lambda f: f, num=1)
    assert_close(found, steps(*parts(grid, family), num=1), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", PROBING)
def test_debug_nans_without_jit_in_a_probe(grid, family):
    with jax.debug_nans(True):
        found = steps(*parts(grid, family), wrap=lambda f: f, num=1)
    (_, _, metrics), (_, _, expected) = found[1], steps(*parts(grid, family), num=1)[1]
    assert_close(metrics, expected, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize(("grid", "family"), TIMES)
def test_a_gradient_through_the_whole_step(grid, family):
    (state, params, _), (_, _, metrics) = steps(*parts(grid, family), through_update=True)
    (_, expected, _), (_, _, known) = plain(grid, family)
    assert metrics.keys() == known.keys()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    if family not in PROBING:  # whose draws depend on the steps judged, which are others here
        assert_close(params, expected)


@pytest.mark.parametrize(("grid", "family"), TIMES)
def test_a_jitted_step_transfers_nothing(grid, family):
    sampler, loss = parts(grid, family)
    step, carry = jax.jit(functools.partial(taken, sampler, loss)), first(sampler)
    batch, keys = {"image": IMAGES}, [jax.random.key(number) for number in range(3)]
    carry, _ = step(*carry, batch, keys[0])
    with jax.transfer_guard("disallow"):
        for key in keys[1:]:
            carry, seen = step(*carry, batch, key)
    assert_close(jax.device_get((carry, seen)), plain(grid, family))
