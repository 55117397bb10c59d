"""Curricula: the mixture of each step, the published spike, and the count of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy import stats

import adaptive_ts as ats
from adaptive_ts.samplers.curriculum import CurriculumState, curriculum
from adaptive_ts.samplers.logit import logit_normal
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.zeros((8, 8, 8, 1))}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1.0),
}


def probabilities(sampler, step):
    grid = sampler.sample.grid
    t = jnp.arange(grid.num_timesteps)
    sample = ats.TimestepSample(t, jnp.full(t.shape, 0.5), jnp.ones(t.shape))
    density = sampler.log_density(CurriculumState(jnp.int32(step)), sample, BATCH)
    return np.exp(np.asarray(density, np.float64)) / grid.num_timesteps


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["gaussian", "switch"])
def test_sampler_keeps_the_contract(kind, grid):
    # Half-way for the Gaussian, past its end for the switch: the law is uniform there.
    sampler = curriculum(GRIDS[grid], kind=kind, steps=4 if kind == "gaussian" else 1)
    report = check_sampler(sampler, BATCH, num_steps=2, num_draws=256)
    assert report.total_mass == pytest.approx(1, abs=1e-3)


def test_before_the_switch_the_draws_are_logit_normal():
    sampler = curriculum(GRIDS["continuous"], kind="switch", logit_mean=0.5, logit_std=0.8)
    draw = jax.jit(sampler.sample)(
        jax.random.key(0), CurriculumState(jnp.int32(49_999)), {"image": jnp.zeros((2000, 1))}
    )
    u = np.asarray(draw.u, np.float64)
    logit = np.log(u / (1 - u))
    assert stats.kstest(logit, stats.norm(0.5, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_gaussian_grows_out_of_uniform(rounding):
    grid = ats.discrete(1000, rounding=rounding)
    sampler = curriculum(grid, mean=0.3, std=0.1, steps=200)
    edges = np.arange(1001) / 1000
    if rounding == "nearest":
        edges = np.clip((np.arange(1001) - 0.5) / 999, 0, 1)
    law = stats.truncnorm(-3, 7, 0.3, 0.1)
    focus, uniform = np.diff(law.cdf(edges)), np.diff(edges)
    for step, share in ((0, 0), (50, 0.25), (199, 0.995), (200, 1), (10_000, 1)):
        expected = (1 - share) * uniform + share * focus
        np.testing.assert_allclose(probabilities(sampler, step), expected, rtol=3e-5, atol=1e-12)


def test_published_spike():
    sampler = curriculum(GRIDS["T1000"], as_published=True)
    found = {step: probabilities(sampler, step)[300] for step in (25_000, 37_500, 49_999)}
    assert found[25_000] == pytest.approx(1.398e-3, abs=5e-7)
    assert found[37_500] == pytest.approx(2.194e-3, abs=5e-7)
    assert found[49_999] == pytest.approx(0.9523, abs=5e-5)
    np.testing.assert_allclose(probabilities(sampler, 0), 1e-3, rtol=1e-6)
    for step in (50_000, 60_000):  # the code stops with an error at 60,000
        p = probabilities(sampler, step)
        assert p[300] == pytest.approx(1) and np.count_nonzero(p) == 1
        draw = sampler.sample(jax.random.key(0), CurriculumState(jnp.int32(step)), BATCH)
        np.testing.assert_array_equal(draw.t, 300)


def test_published_spike_is_not_the_gaussian():
    mine, theirs = (curriculum(GRIDS["T1000"], as_published=p) for p in (False, True))
    halfway = probabilities(theirs, 25_000)
    assert np.count_nonzero(np.abs(halfway - halfway[0]) > 1e-6) == 1
    assert np.ptp(probabilities(mine, 25_000)) > 5e-4


def test_switch_is_at_once():
    grid = GRIDS["T1000"]
    sampler = curriculum(grid, kind="switch", steps=10, logit_mean=-0.5, logit_std=0.9)
    t = jnp.arange(1000)
    sample = ats.TimestepSample(t, jnp.full(t.shape, 0.5), jnp.ones(t.shape))
    before = logit_normal(grid, -0.5, 0.9).log_density((), sample, BATCH)
    np.testing.assert_allclose(probabilities(sampler, 0), np.exp(before) / 1000, rtol=1e-5)
    np.testing.assert_allclose(probabilities(sampler, 9), np.exp(before) / 1000, rtol=1e-5)
    np.testing.assert_allclose(probabilities(sampler, 10), 1e-3, rtol=1e-6)


def test_draws_follow_the_mixture():
    sampler = curriculum(GRIDS["T1000"], steps=4, mean=0.5, std=0.1)
    state = CurriculumState(jnp.int32(1))
    draw = jax.jit(sampler.sample)(jax.random.key(1), state, {"image": jnp.zeros((8000, 1))})
    p = probabilities(sampler, 1).reshape(20, 50).sum(1)
    observed = np.bincount(np.asarray(draw.t) // 50, minlength=20)
    assert stats.chisquare(observed, p / p.sum() * 8000).pvalue > 1e-3


def test_update_counts_the_steps():
    sampler = curriculum(GRIDS["T1000"], steps=3)
    state = sampler.init(jax.random.key(0), BATCH)
    draw = sampler.sample(jax.random.key(0), state, BATCH)
    for step in range(4):
        assert state == CurriculumState(jnp.int32(step)) and state.step.dtype == jnp.int32
        state, metrics = sampler.update(state, draw, jnp.ones((8,)), key=jax.random.key(0))
        assert metrics == {}


def test_eight_devices_draw_as_one(mesh8):
    state, key = CurriculumState(jnp.int32(2)), jax.random.key(2)

    def local(images, axis_name="data"):
        sampler = curriculum(GRIDS["T1000"], steps=4, axis_name=axis_name)
        return sampler.sample(key, state, {"image": images})

    spec = PartitionSpec("data")
    images = jnp.zeros((16, 8, 8, 1))
    split = jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=spec, out_specs=spec))(images)
    whole = jax.jit(lambda images: local(images, None))(images)
    np.testing.assert_array_equal(split.t, whole.t)


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ("T1000", {"kind": "linear"}, "'linear' is unknown"),
        ("T1000", {"mean": 300}, "mean=300.*share of the time axis"),
        ("T1000", {"std": 0.0}, "std=0.0"),
        ("T1000", {"steps": 0}, "steps=0"),
        ("T1000", {"steps": 1.5}, "steps=1.5"),
        ("T1000", {"kind": "switch", "logit_std": -1.0}, "logit_std=-1.0"),
        ("T1000", {"kind": "switch", "as_published": True}, "kind='switch'"),
        ("continuous", {"as_published": True}, "num_timesteps=None"),
    ],
)
def test_errors_name_the_value_and_the_remedy(grid, options, message):
    with pytest.raises(ValueError, match=message):
        curriculum(GRIDS[grid], **options)


def test_strict_dtype_promotion(strict):
    with strict():
        for options in ({}, {"kind": "switch"}, {"as_published": True}):
            sampler = curriculum(GRIDS["T1000"], **options)
            state = sampler.init(jax.random.key(0), BATCH)
            draw = jax.eval_shape(sampler.sample, jax.random.key(1), state, BATCH)
            density = jax.eval_shape(sampler.log_density, state, draw, BATCH)
            assert density.dtype == jnp.float32
