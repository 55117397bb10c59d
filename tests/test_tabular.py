"""Samplers that learn from losses: against the authors' numbers, NumPy and closed forms."""

from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats
from adaptive_ts.samplers.tabular import entropy_rate, loss_proportional, loss_second_moment
from adaptive_ts.schedules import NoiseSchedule
from adaptive_ts.tabulated import bucket_log_density, draw_from_buckets, strata_of
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.zeros((8, 8, 8, 1))}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1 - 1e-3),
}
LINEAR = ats.linear(1000)


def straight_line():
    """alpha = 1 - t, sigma = t."""
    log_snr = lambda t: 2 * (jnp.log1p(-t) - jnp.log(t))  # noqa: E731
    return NoiseSchedule("straight", None, None, lambda t: 1 - t, lambda t: t, log_snr)


def schedule_of(grid):
    return straight_line() if grid.num_timesteps is None else ats.linear(grid.num_timesteps)


def samples_at(t, grid=None):
    t = jnp.asarray(t)
    u = jnp.full(t.shape, 0.5) if grid is None else grid.to_u(t)
    return ats.TimestepSample(t, u, jnp.ones(t.shape))


def probabilities(sampler, state):
    """p of every timestep of a discrete grid, or of 2000 equal cells."""
    grid = sampler.sample.grid
    if grid.num_timesteps is None:
        t = grid.to_t((jnp.arange(2000) + 0.5) / 2000)
    else:
        t = jnp.arange(grid.num_timesteps)
    return np.exp(np.asarray(sampler.log_density(state, samples_at(t), None))) / len(t)


def learn(sampler, *batches):
    state = sampler.init(jax.random.key(0), BATCH)
    for t, losses in batches:
        state, metrics = sampler.update(state, samples_at(t), jnp.asarray(losses, jnp.float32))
    return state, metrics


# Strata and draws


@pytest.mark.parametrize(("T", "num"), [(1000, 100), (50, 40), (7, 3), (10, 25), (1000, 1)])
def test_strata_of_a_discrete_grid(T, num):
    cells = strata_of(ats.discrete(T), num)
    num = min(num, T)
    expected = [int((t + Fraction(1, 2)) * num / T) for t in range(T)]
    np.testing.assert_array_equal(cells.to_stratum(jnp.arange(T)), expected)
    size = np.bincount(expected)
    assert cells.num == num == len(size) and size.min() >= 1
    np.testing.assert_array_equal(cells.to_stratum(cells.timesteps), np.arange(num))
    np.testing.assert_allclose(cells.share, size / T, rtol=1e-6)
    p = np.random.default_rng(0).dirichlet(np.ones(num)).astype(np.float32)
    np.testing.assert_allclose(cells.spread(p), (p / size)[expected], rtol=1e-6)


def test_strata_of_continuous_time():
    grid = ats.continuous(20, t_min=1.0, t_max=3.0)
    cells = strata_of(grid, 8)
    t = jnp.asarray([1.001, 1.249, 1.251, 2.999])
    np.testing.assert_array_equal(cells.to_stratum(t), [0, 0, 1, 7])
    np.testing.assert_allclose(cells.timesteps, 1.125 + 0.25 * np.arange(8))
    p = np.random.default_rng(0).dirichlet(np.ones(8)).astype(np.float32)
    density = bucket_log_density(grid, cells.spread(p), t)
    np.testing.assert_allclose(np.exp(density), 8 * p[[0, 0, 1, 7]], rtol=1e-6)
    drawn, u = draw_from_buckets(grid, cells.spread(p), jnp.asarray(np.cumsum(p) - p / 2))
    np.testing.assert_array_equal(cells.to_stratum(drawn), np.arange(8))
    np.testing.assert_allclose(drawn, 1 + 2 * u, rtol=1e-6)


def test_draws_are_the_inverse_cdf_and_pass_over_empty_buckets():
    rng = np.random.default_rng(0)
    p = rng.random(1000).astype(np.float32) * (rng.random(1000) < 0.3)
    cdf = np.cumsum(p, dtype=np.float64) / p.sum(dtype=np.float64)
    draw = jax.jit(lambda v: draw_from_buckets(ats.discrete(1000), p, v))
    v = rng.random(4000).astype(np.float32)
    clear = np.abs(v[:, None] - cdf).min(1) > 1e-5
    t, u = draw(v)
    np.testing.assert_array_equal(t[clear], np.searchsorted(cdf, v[clear], side="right"))
    np.testing.assert_array_equal(np.floor(u * 1000), t)
    # A sum in parallel rises by rounding errors in empty buckets: v right there.
    rough = np.asarray(jnp.cumsum(p) / jnp.cumsum(p)[-1])
    near = [np.clip(np.nextafter(rough, side), 1e-7, 1 - 1e-7) for side in (0, 1)]
    for v in (*near, np.clip(rough, 1e-7, 1 - 1e-7)):
        assert np.all(p[draw(v.astype(np.float32))[0]] > 0)


def test_tabulated_errors():
    for num in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"got {num}"):
            strata_of(ats.discrete(10), num)
    for call in (draw_from_buckets, bucket_log_density):
        with pytest.raises(ValueError, match=r"need \(10,\)"):
            call(ats.discrete(10), jnp.ones(9), jnp.asarray([0]))


# The contract

SAMPLERS = {
    "loss_second_moment": lambda grid, **o: loss_second_moment(grid, history=1, **o),
    "loss_proportional": lambda grid, **o: loss_proportional(
        grid, schedule_of(grid), weighting=jax.nn.sigmoid, num_buckets=32, **o
    ),
    "entropy_rate": lambda grid, **o: entropy_rate(grid, schedule_of(grid), num_buckets=32, **o),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
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
    schedule = ats.linear(T)
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
    T, schedule = 100, ats.linear(100)
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


# InfoNoise


def gaussian_losses(log_snr, prediction, variance):
    """The exact losses for x_0 ~ N(0, variance): mmse = variance sigma^2 / (variance + sigma^2)."""
    snr = np.exp(np.asarray(log_snr, np.float64))
    mmse = variance / (variance * snr + 1)
    return mmse * {"eps": snr, "x0": 1, "v": snr + 1, "flow": (1 + np.sqrt(snr)) ** 2}[prediction]


def entropy_lost(log_snr, variance):
    """The integral of mmse / sigma^3 from sigma = 0, plus a constant: H(x_0 | x_t)."""
    sigma = np.exp(-np.asarray(log_snr, np.float64) / 2)
    return np.log(sigma) - np.log(variance + sigma**2) / 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("num_buckets", [1000, 100])
def test_entropy_rate_of_gaussian_data(prediction, num_buckets):
    variance = 0.25
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    sampler = entropy_rate(
        ats.discrete(1000), LINEAR, prediction=prediction, gate=None, num_buckets=num_buckets,
        uniform_prob=0.0, weighting=jnp.ones_like,
    )  # fmt: skip
    losses = gaussian_losses(log_snr, prediction, variance)
    state, _ = learn(sampler, (np.arange(1000), losses))
    middle = (log_snr[1:] + log_snr[:-1]) / 2
    ends = 2 * log_snr[[0, -1]] - middle[[0, -1]]
    entropy = entropy_lost(np.concatenate([ends[:1], middle, ends[1:]]), variance)
    expected = np.diff(entropy)[::1].reshape(num_buckets, -1).sum(1) / np.ptp(entropy)
    found = probabilities(sampler, state).reshape(num_buckets, -1).sum(1)
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=1e-6)
    np.testing.assert_allclose(found[num_buckets // 20 :], expected[num_buckets // 20 :], rtol=2e-3)


def test_entropy_rate_in_continuous_time():
    variance, grid = 0.25, GRIDS["continuous"]
    schedule = straight_line()
    sampler = entropy_rate(
        grid, schedule, prediction="flow", gate=None, num_buckets=200, uniform_prob=0.0,
        weighting=jnp.ones_like,
    )  # fmt: skip
    t = grid.to_t((jnp.arange(20_000, dtype=jnp.float32) + 0.5) / 20_000)
    state, _ = learn(sampler, (t, gaussian_losses(schedule.log_snr(t), "flow", variance)))
    edges = np.linspace(1e-3, 1 - 1e-3, 201)
    entropy = entropy_lost(2 * np.log((1 - edges) / edges), variance)
    found = probabilities(sampler, state).reshape(200, -1).sum(1)
    np.testing.assert_allclose(found, np.diff(entropy) / np.ptp(entropy), rtol=0.01, atol=1e-6)


def test_entropy_rate_divides_by_the_weight_of_the_x0_error_and_gates_low_noise():
    grid, c, n = ats.discrete(1000), 0.3, 2.0
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    sigma = np.exp(-log_snr / 2)
    losses = gaussian_losses(log_snr, "eps", 0.25)

    def law(**options):
        sampler = entropy_rate(grid, LINEAR, num_buckets=1000, uniform_prob=0.0, **options)
        return probabilities(sampler, learn(sampler, (np.arange(1000), losses))[0])

    alone = {"weighting": jnp.ones_like}
    rate = law(gate=None, **alone)
    for options, factor in (
        ({"gate": (c, n), **alone}, sigma**n / (sigma**n + c**n)),
        (alone, sigma**3 / (sigma**3 + 0.15**3)),
        ({"gate": None}, sigma**2),  # the plain loss's own weight on the x_0 error is SNR
        (
            {"gate": None, "weighting": lambda x: jnp.minimum(jnp.exp(x), 5)},
            1 / np.minimum(sigma**-2, 5),
        ),
    ):
        expected = rate * factor
        np.testing.assert_allclose(law(**options), expected / expected.sum(), rtol=1e-4)


def test_entropy_rate_bounds_the_error_by_the_variance_of_the_data():
    """An eps model that has learned nothing: its implied error of x_0 is 1 / SNR without end."""
    grid = ats.discrete(1000)
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    width = np.abs(np.gradient(log_snr))
    for variance in (1.0, 0.3, None):
        sampler = entropy_rate(
            grid, LINEAR, num_buckets=1000, uniform_prob=0.0, gate=None, data_variance=variance
        )
        state, _ = learn(sampler, (np.arange(1000), np.ones(1000)))
        mmse = np.minimum(np.exp(-log_snr), np.inf if variance is None else variance)
        expected = width * mmse
        np.testing.assert_allclose(
            probabilities(sampler, state), expected / expected.sum(), rtol=1e-3
        )
    _, metrics = learn(sampler, ([0, 1], [np.inf, 1.0]))
    assert metrics["nonfinite"] == 1  # a bound does not make it finite


def test_entropy_rate_shifts_the_objective_unless_told_otherwise():
    for importance_weighted in (False, True):
        sampler = entropy_rate(ats.discrete(1000), LINEAR, importance_weighted=importance_weighted)
        state, _ = learn(sampler, (np.arange(1000), np.ones(1000)))
        draw = sampler.sample(jax.random.key(0), state, BATCH)
        p = probabilities(sampler, state)[draw.t]
        expected = 1 / (1000 * p) if importance_weighted else np.ones(8)
        np.testing.assert_allclose(draw.weight, expected, rtol=1e-4)


GRID = ats.discrete(1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loss_second_moment(GRID, history=0), "history .* got 0"),
        (lambda: loss_second_moment(GRID, history=2.0), "history .* got 2.0"),
        (lambda: loss_second_moment(GRID, uniform_prob=1.5), "uniform_prob .* got 1.5"),
        (lambda: loss_second_moment(GRID, coupling="none"), "coupling .* got 'none'"),
        (lambda: loss_proportional(GRID, weighting=jnp.exp), "give the schedule too"),
        (lambda: loss_proportional(GRID, ats.linear(50)), "give both the same"),
        (lambda: loss_proportional(GRID, gamma=-1), "gamma .* got -1"),
        (lambda: loss_proportional(GRID, decay=0.0), "decay .* got 0.0"),
        (lambda: loss_proportional(GRID, uniform_prob=-0.1), "uniform_prob .* got -0.1"),
        (lambda: loss_proportional(GRID, num_buckets=0), "num_buckets .* got 0"),
        (lambda: entropy_rate(GRID, ats.linear(50)), "give both the same"),
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
