"""Samplers that learn from losses: against the authors' numbers, NumPy and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from learned_laws import BATCH, GRIDS, LINEAR, learn, probabilities, samples_at, schedule_of

import adaptive_ts as ats
from adaptive_ts.samplers.tabular import entropy_rate, loss_proportional, loss_second_moment
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The contract

SAMPLERS = {
    "loss_second_moment": lambda grid, **o: loss_second_moment(grid, history=1, **o),
    "loss_proportional": lambda grid, **o: loss_proportional(
        grid, schedule_of(grid), weighting=jax.nn.sigmoid, num_buckets=32, **o
    ),
    "entropy_rate": lambda grid, **o: entropy_rate(grid, schedule_of(grid), num_buckets=32, **o),
}


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *[(name, grid) for name in SAMPLERS for grid in ("T50_nearest", "continuous")],
        ("loss_second_moment", "T1000"),
        pytest.param("loss_proportional", "T1000", marks=pytest.mark.slow),
        pytest.param("entropy_rate", "T1000", marks=pytest.mark.slow),
    ],
)
def test_sampler_keeps_the_contract(name, grid):
    """From the first step on; on one grid far from uniform, coupled and weighted."""
    if grid != "T50_nearest":
        report = check_sampler(SAMPLERS[name](GRIDS[grid]), BATCH, num_steps=2)
    else:
        coupled = {"coupling": "low_discrepancy", "importance_weighted": True}
        sampler = SAMPLERS[name](GRIDS[grid], **coupled)
        state, _ = learn(sampler, (np.arange(50), np.linspace(0.1, 3, 50) ** 2))
        assert np.ptp(probabilities(sampler, state)) > 0.01
        warm = sampler._replace(init=lambda key, batch: state)
        report = check_sampler(warm, BATCH, num_steps=2)
    assert report.total_mass == pytest.approx(1, abs=1e-4)


def test_low_discrepancy_draws_share_out_the_batch():
    sampler = SAMPLERS["entropy_rate"](GRIDS["T1000"], coupling="low_discrepancy")
    rng = np.random.default_rng(0)
    state, _ = learn(sampler, (np.arange(1000), rng.exponential(size=1000)))
    p = probabilities(sampler, state)
    t = jax.jit(sampler.sample)(jax.random.key(0), state, {"image": jnp.zeros((500, 1))}).t
    cumulated = np.cumsum(np.bincount(t, minlength=1000))
    assert np.abs(cumulated - 500 * np.cumsum(p)).max() < 1.01


def test_eight_devices_equal_one(mesh8):
    grid, batch = GRIDS["T50_nearest"], {"image": jnp.zeros((128, 1))}
    one, many = (
        {name: make(grid, axis_name=axis) for name, make in SAMPLERS.items()}
        for axis in (None, "data")
    )

    def step(samplers):
        def run(key, state, batch, losses):
            draw = {k: s.sample(key, state[k], batch) for k, s in samplers.items()}
            new = {k: s.update(state[k], draw[k], losses[draw[k].t]) for k, s in samplers.items()}
            return draw, new

        return run

    specs = {"in_specs": (P(), P(), P("data"), P()), "out_specs": (P("data"), P())}
    sharded = jax.jit(jax.shard_map(step(many), mesh=mesh8, **specs))
    whole = jax.jit(step(one))
    losses = jnp.linspace(0.1, 2, 50).at[7].set(jnp.nan)
    state = {name: sampler.init(jax.random.key(0), batch) for name, sampler in one.items()}
    left_out = 0
    for i in range(4):
        draw, new = whole(jax.random.key(i), state, batch, losses)
        draw8, new8 = sharded(jax.random.key(i), state, batch, losses)
        for name in SAMPLERS:
            np.testing.assert_array_equal(draw[name].t, draw8[name].t)
            np.testing.assert_array_equal(draw[name].u, draw8[name].u)
            assert new[name][1]["nonfinite"] == np.sum(draw[name].t == 7)
            left_out += new[name][1]["nonfinite"]
        chex.assert_trees_all_close((draw, new), (draw8, new8), rtol=1e-5)
        state = {name: value[0] for name, value in new.items()}
    assert left_out > 0 and all(metrics["warm"] > 0.9 for _, metrics in new.values())


@pytest.mark.parametrize("name", SAMPLERS)
def test_strict_dtype_promotion(name, strict):
    for grid in (GRIDS["T50_nearest"], GRIDS["continuous"]):
        sampler = SAMPLERS[name](grid, importance_weighted=True)

        def step(key, losses, sampler=sampler):
            state = sampler.init(key, BATCH)
            draw = sampler.sample(key, state, BATCH)
            return draw, sampler.update(state, draw, losses)[1]

        with strict():
            draw, metrics = jax.eval_shape(step, jax.random.key(0), jnp.ones(8, jnp.float32))
        dtypes = {x.dtype for x in (draw.u, draw.weight, *metrics.values())}
        assert dtypes == {np.dtype(np.float32)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", SAMPLERS)
def test_losses_that_are_not_finite_leave_the_last_good_statistics(name, bad):
    sampler = SAMPLERS[name](ats.discrete(10))
    state, metrics = learn(sampler, (np.arange(10), np.arange(1, 11)))
    assert metrics == {"nonfinite": 0, "warm": 1}
    before = probabilities(sampler, state)
    losses = jnp.full(10, bad, jnp.float32)
    state, metrics = sampler.update(state, samples_at(np.arange(10)), losses)
    after = probabilities(sampler, state)
    if name == "loss_second_moment" and bad == 3e38:  # a loss like any other: no overflow
        assert metrics["nonfinite"] == 0
        np.testing.assert_allclose(after, 0.1, rtol=1e-5)
    else:
        assert metrics["nonfinite"] == 10
        np.testing.assert_allclose(after, before, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_p_is_uniform_before_the_first_loss_and_without_any(name):
    sampler = SAMPLERS[name](ats.discrete(10))
    state = sampler.init(jax.random.key(0), BATCH)
    np.testing.assert_allclose(probabilities(sampler, state), 0.1, rtol=1e-6)
    state, metrics = learn(sampler, (np.arange(10), np.zeros(10)))
    assert metrics["warm"] == 1
    np.testing.assert_allclose(probabilities(sampler, state), 0.1, rtol=1e-6)


# IDDPM


def test_second_moment_equals_the_published_sampler(golden):
    """Before, at and after the end of the warm-up; batches hold the same t several times."""
    reference = golden("iddpm_loss_second_moment_small")
    t, losses = reference["update_t"], reference["update_loss"].astype(np.float32)
    sampler = loss_second_moment(ats.discrete(8), history=3)
    update = jax.jit(sampler.update)
    all_t = samples_at(np.arange(8))

    def after(state, start, stop):
        for i in range(start, stop, 8):
            part = slice(i, min(i + 8, stop))
            state, metrics = update(state, samples_at(t[part]), losses[part])
        weight = sampler.sample.factor(state, all_t, None)
        return state, metrics, np.asarray(weight), probabilities(sampler, state)

    state, metrics, weight, p = after(sampler.init(jax.random.key(0), BATCH), 0, 23)
    np.testing.assert_array_equal(np.minimum(state.count, 3), reference["counts_before"])
    assert metrics["warm"] == 7 / 8
    np.testing.assert_allclose(p, 1 / 8, rtol=1e-6)  # every t must have its three losses
    np.testing.assert_allclose(weight, 1, rtol=1e-6)
    state, metrics, weight, p = after(state, 23, 24)
    assert metrics["warm"] == 1
    np.testing.assert_allclose(p, reference["weights_just_warm"], rtol=1e-5)
    state, metrics, weight, p = after(state, 24, 64)
    np.testing.assert_allclose(p, reference["p_final"], rtol=1e-5)
    np.testing.assert_allclose(weight, reference["importance_final"], rtol=1e-5)


def test_second_moment_learns_from_losses_before_their_weights():
    sampler = loss_second_moment(ats.discrete(4), history=1)
    t, losses = jnp.arange(4), jnp.asarray([1.0, 2.0, 3.0, 4.0])
    state = sampler.init(jax.random.key(0), BATCH)
    heavy = samples_at(t)._replace(weight=jnp.asarray([9.0, 1.0, 1.0, 1.0]))
    state, _ = sampler.update(state, heavy, losses)
    expected = 0.999 * np.arange(1, 5) / 10 + 0.001 / 4
    np.testing.assert_allclose(probabilities(sampler, state), expected, rtol=1e-5)


def test_second_moment_weights_draws_by_their_odds():
    T = 6
    sampler = loss_second_moment(ats.discrete(T), history=2, uniform_prob=0.1)
    losses = np.arange(1.0, 13).reshape(2, T)
    state, _ = learn(sampler, *((np.arange(T), row) for row in losses))
    root = np.sqrt(np.mean(losses**2, 0))
    p = 0.9 * root / root.sum() + 0.1 / T
    draw = jax.jit(sampler.sample)(jax.random.key(0), state, {"image": jnp.zeros((200, 1))})
    np.testing.assert_allclose(draw.weight, (1 / (T * p))[draw.t], rtol=1e-5)
    plain = loss_second_moment(ats.discrete(T), history=2, importance_weighted=False)
    np.testing.assert_array_equal(plain.sample(jax.random.key(0), state, BATCH).weight, 1)


# VDM++


@pytest.mark.parametrize("grid", ["T1000", "T50_nearest"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2])
def test_proportional_equals_numpy(grid, gamma):
    """The average, the weighting, the power and strata of unequal size."""
    grid, rng = GRIDS[grid], np.random.default_rng(0)
    T, num = grid.num_timesteps, 40
    schedule = ats.schedules.linear(T)
    sampler = loss_proportional(
        grid, schedule, weighting=lambda log_snr: jnp.exp(-log_snr / 8), gamma=gamma,
        num_buckets=num, decay=0.8, uniform_prob=0.05,
    )  # fmt: skip
    batches = [(rng.integers(0, T, 300), rng.exponential(size=300)) for _ in range(3)]
    state, _ = learn(sampler, *batches)
    stratum = (2 * np.arange(T) + 1) * num // (2 * T)
    w = np.exp(-np.asarray(schedule.log_snr(jnp.arange(T)), np.float64) / 8)
    count, total = np.zeros(num), np.zeros(num)
    for t, losses in batches:
        count, total = 0.8 * count, 0.8 * total
        np.add.at(count, stratum[t], 1)
        np.add.at(total, stratum[t], w[t] * losses)
    assert count.min() > 0
    law = ((total / count) ** gamma)[stratum]
    expected = 0.95 * law / law.sum() + 0.05 / T
    np.testing.assert_allclose(probabilities(sampler, state), expected, rtol=1e-4)


def test_proportional_makes_all_timesteps_contribute_alike():
    T, schedule = 100, ats.schedules.linear(100)
    sampler = loss_proportional(
        ats.discrete(T), schedule, weighting=jax.nn.sigmoid, uniform_prob=0.0
    )
    sampler = ats.samplers.wrappers.with_weighting(sampler, jax.nn.sigmoid, schedule)
    losses = np.random.default_rng(0).exponential(size=T)
    state, _ = learn(sampler, (np.arange(T), losses))
    draw = jax.jit(sampler.sample)(jax.random.key(0), state, {"image": jnp.zeros((500, 1))})
    contribution = np.asarray(draw.weight) * losses[draw.t]
    objective = np.mean(np.asarray(jax.nn.sigmoid(schedule.log_snr(jnp.arange(T)))) * losses)
    np.testing.assert_allclose(contribution, objective, rtol=1e-4)  # no variance over t is left


def test_proportional_fills_strata_without_losses_from_their_neighbours():
    sampler = loss_proportional(ats.discrete(10), uniform_prob=0.0)
    state, metrics = learn(sampler, ([2, 6, 8], [1.0, 3.0, 2.0]))
    value = np.array([1, 1, 1, 1.5, 2, 2.5, 3, 2.5, 2, 2])
    assert metrics["warm"] == pytest.approx(0.3)
    np.testing.assert_allclose(probabilities(sampler, state), value / value.sum(), rtol=1e-5)


def test_proportional_forgets_at_its_decay():
    sampler = loss_proportional(ats.discrete(2), decay=0.5, uniform_prob=0.0)
    state, _ = learn(sampler, ([0, 1], [1, 1]), ([0, 1], [4, 1]))
    assert probabilities(sampler, state)[0] == pytest.approx(0.75)  # (1 / 2 + 4) / 1.5 = 3


def test_proportional_in_continuous_time():
    grid = ats.continuous(7, t_min=0.0, t_max=2.0)  # its own 7 buckets play no part
    sampler = loss_proportional(grid, num_buckets=4, uniform_prob=0.2)
    state, _ = learn(sampler, ([0.1, 0.6, 1.1, 1.6], [1.0, 2.0, 3.0, 4.0]))
    expected = (0.8 * np.arange(1, 5) / 10 + 0.2 / 4) / 500
    np.testing.assert_allclose(probabilities(sampler, state), np.repeat(expected, 500), rtol=1e-5)


GRID = ats.discrete(1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loss_second_moment(GRID, history=0), "history .* got 0"),
        (lambda: loss_second_moment(GRID, history=2.0), "history .* got 2.0"),
        (lambda: loss_second_moment(GRID, uniform_prob=1.5), "uniform_prob .* got 1.5"),
        (lambda: loss_second_moment(GRID, coupling="none"), "coupling .* got 'none'"),
        (lambda: loss_proportional(GRID, weighting=jnp.exp), "give the schedule too"),
        (lambda: loss_proportional(GRID, ats.schedules.linear(50)), "give both the same"),
        (lambda: loss_proportional(GRID, gamma=-1), "gamma .* got -1"),
        (lambda: loss_proportional(GRID, decay=0.0), "decay .* got 0.0"),
        (lambda: loss_proportional(GRID, uniform_prob=-0.1), "uniform_prob .* got -0.1"),
        (lambda: loss_proportional(GRID, num_buckets=0), "num_buckets .* got 0"),
        (lambda: entropy_rate(GRID, ats.schedules.linear(50)), "give both the same"),
        (lambda: entropy_rate(GRID, LINEAR, prediction="epsilon"), "did you mean 'eps'"),
        (lambda: entropy_rate(GRID, LINEAR, gate=(0.0, 3)), "gate .* got"),
        (lambda: entropy_rate(GRID, LINEAR, gate=0.15), "gate .* got 0.15"),
        (lambda: entropy_rate(GRID, LINEAR, data_variance=0.0), "data_variance .* got 0.0"),
        (lambda: entropy_rate(GRID, LINEAR, gate=(1.0, 2.0, 3.0)), "gate .* got"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
