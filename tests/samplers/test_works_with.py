"""The table of docs/concepts/works_with.md: families of samplers, and what they are used under.

JAX's other switches are in test_switches.py, optimizers in learning/test_optimizers.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import ROOT, read
from families import IMAGES, MODEL, assert_close, first, policy_net, steps, taken
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats
from adaptive_ts.collectives import threefry

pytestmark = pytest.mark.usefixtures("quick_compilation")
GRID, SCHEDULE = ats.discrete(50), ats.schedules.linear(50)
NUM = 3


def fixed(axis):
    return ats.logit_normal(GRID, coupling="stratified", axis_name=axis)


def learned(axis):
    return ats.loss_second_moment(GRID, history=2, axis_name=axis)


def adaptive(axis):
    options = {"every": 2, "num_buckets": 4, "num_selected": 2, "axis_name": axis}
    return ats.adaptive(GRID, policy_net(), optax.sgd(0.1), **options)


def impact(axis):
    return ats.impact(GRID, MODEL, every=2, num_buckets=4, num_examples=2, axis_name=axis)


def wrapped(axis):
    table = ats.loss_proportional(GRID, axis_name=axis)
    mixed = ats.mixed_with_uniform(table, 0.3, axis_name=axis)
    weighted = ats.with_weighting(mixed, ats.weightings.min_snr(), SCHEDULE)
    return ats.importance_weighted(weighted)


MAKERS = {f.__name__: f for f in (fixed, learned, adaptive, impact, wrapped)}
FAMILIES = pytest.mark.parametrize("family", MAKERS)


def predict(params, x, t, batch, key):
    return params["w"] * x + params["b"]


def low(params, x, t, batch, key):
    """A product in bfloat16, of parameters in whatever they are."""
    w = params["w"].astype(jnp.bfloat16) * jnp.eye(x.shape[-1], dtype=jnp.bfloat16)
    return x.astype(jnp.bfloat16) @ w + params["b"].astype(jnp.bfloat16)


@functools.cache
def parts(family, axis=None, model=predict):
    return MAKERS[family](axis), ats.denoising_loss(model, SCHEDULE, axis_name=axis)


@functools.cache
def plain(family):
    return steps(*parts(family), num=NUM)


def keys(impl=None):
    return [jax.random.key(number, impl=impl) for number in range(NUM)]


@FAMILIES
def test_jit_with_donation(family):
    step = jax.jit(functools.partial(taken, *parts(family)), donate_argnums=(0, 1, 2))
    carry = jax.tree.map(jnp.copy, first(parts(family)[0]))
    for key in keys():
        old, (carry, seen) = carry, step(*carry, {"image": IMAGES}, key)
        assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.size)
    assert_close(jax.device_get((carry, seen)), plain(family))


@FAMILIES
def test_scan_over_steps(family):
    step = functools.partial(taken, *parts(family))

    def body(carry, key):
        return step(*carry, {"image": IMAGES}, key)

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.stack(keys())))
    carry, seen = run(first(parts(family)[0]))
    assert_close(jax.device_get((carry, jax.tree.map(lambda x: x[-1], seen))), plain(family))


@FAMILIES
def test_vmap_over_seeds(family):
    sampler, _ = parts(family)
    step = functools.partial(taken, *parts(family))
    batch = {"image": IMAGES}

    def run(seed):
        _, params, opt_state = first(sampler)
        carry = sampler.init(jax.random.fold_in(jax.random.key(7), seed), batch), params, opt_state
        for number in range(2):
            carry, seen = step(*carry, batch, jax.random.fold_in(jax.random.key(number), seed))
        return carry, seen

    both, alone = jax.jit(jax.vmap(run))(jnp.arange(2)), jax.jit(run)
    for seed in range(2):
        assert_close(jax.tree.map(lambda x: x[seed], both), alone(seed), rtol=1e-4, atol=1e-5)


def mapped_steps(family, mapped, spread, join):
    """Steps of a sampler that knows its axis, as the global view has them."""
    step = functools.partial(taken, *parts(family, "data"))

    def local(carry, batch, key):
        carry, (draw, log_density, metrics) = step(*carry, batch, key, axis="data")
        return carry, (draw, log_density), metrics

    run, carry = mapped(local), spread(first(parts(family)[0]))
    for key in keys():
        carry, (draw, log_density), metrics = run(carry, {"image": IMAGES}, key)
    (carry, draw, log_density, metrics) = join(carry, draw, log_density, metrics)
    expected, (draw0, log_density0, metrics0) = plain(family)
    assert_close((draw, log_density), (draw0, log_density0), rtol=1e-4, atol=1e-5)
    assert_close((carry, metrics), (expected, metrics0), rtol=1e-3, atol=1e-5)


@FAMILIES
def test_shard_map(mesh8, family):
    rows, whole = P("data"), P()

    def mapped(local):
        specs = {"in_specs": (whole, rows, whole), "out_specs": (whole, rows, whole)}
        return jax.jit(jax.shard_map(local, mesh=mesh8, **specs))

    mapped_steps(family, mapped, lambda x: x, lambda *found: found)


@FAMILIES
def test_pmap(family):
    def mapped(local):
        run = jax.pmap(local, axis_name="data", in_axes=(0, 0, None))
        return lambda carry, batch, key: run(
            carry, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch), key
        )

    def join(carry, draw, log_density, metrics):
        carry, metrics = jax.tree.map(lambda x: x[0], (carry, metrics))
        draw, log_density = jax.tree.map(lambda x: x.reshape(-1), (draw, log_density))
        return carry, draw, log_density, metrics

    mapped_steps(family, mapped, lambda x: jax.tree.map(lambda x: jnp.stack([x] * 8), x), join)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["compute", "parameters"])
@FAMILIES
def test_bfloat16(family, dtype):
    """Rounded to three digits, the same is learned; what learns it stays in float32."""
    (state, params, _), (draw, log_density, metrics) = steps(
        *parts(family, None, low), dtype=dtype, num=NUM, batch_dtype=jnp.float32
    )
    (state0, _, _), (draw0, log_density0, metrics0) = plain(family)
    assert params["w"].dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, state0)
    near = np.abs(draw.u - draw0.u) < 0.02  # a Beta's draw may be another of its proposals
    assert near.mean() >= (0.8 if family == "adaptive" else 1)
    assert_close(log_density[near], log_density0[near], rtol=0.2, atol=0.1)
    assert metrics.keys() == metrics0.keys()
    if "reward_mean" in metrics:
        assert np.sign(metrics["reward_mean"]) == np.sign(metrics0["reward_mean"])


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@FAMILIES
def test_prngs(family, impl):
    sampler, loss = parts(family)
    step = jax.jit(functools.partial(taken, sampler, loss))
    other, same = first(sampler), first(sampler)
    for key in keys(impl):
        k_t = jax.random.split(key, 3)[0]
        batch = {"image": IMAGES}
        drawn = sampler.sample(k_t, other[0], batch)
        assert_close(drawn, sampler.sample(threefry(k_t), same[0], batch))
        other, same = step(*other, batch, key)[0], step(*same, batch, key)[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(other))


def test_the_page_names_what_is_tested():
    """Each row of the page says which test holds it, and that test exists."""
    page = read("docs/concepts/works_with.md")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 12
    for file, test in named:
        found = list((ROOT / "tests").rglob(file))
        assert found and f"def {test}(" in found[0].read_text(), (file, test)
