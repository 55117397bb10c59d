"""JAX's switches: every family of samplers works under each of them as it does without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import (
    FAMILIES,
    GRIDS,
    IMAGES,
    PROBING,
    assert_close,
    first,
    parts,
    plain,
    policy_net,
    steps,
    taken,
)

import adaptive_ts as ats

ALL = [pytest.param(g, f, id=f"{g}-{f}") for g in GRIDS for f in FAMILIES]
QUICK = [  # one of each kind, where it is most likely to differ; the others when there is time
    *(("discrete", f) for f in ("uniform", "loss_proportional", "adaptive", "impact", "density")),
    *(("continuous", f) for f in ("speed", "curriculum", "mixed")),
]
TIMES = [p if p.values in QUICK else pytest.param(*p.values, marks=pytest.mark.slow) for p in ALL]
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
