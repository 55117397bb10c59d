"""Times of any shape: their law along the added axes, their weights, and any number of devices."""

import functools

import jax
import jax.numpy as jnp
import learned_laws
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats
from static_laws import GRIDS

import adaptive_ts as ats
from adaptive_ts.learning.statistics import check_losses
from adaptive_ts.testing import check_sampler
from adaptive_ts.timesteps.draws import Coupling

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.zeros((8, 4, 4, 1))}
SCHEDULES = {"T1000": ats.schedules.linear(1000), "continuous": ats.schedules.vp_cosine()}
FIXED = {
    "uniform": lambda grid, schedule: ats.uniform(grid),
    "stratified": lambda grid, schedule: ats.uniform(grid, stratified=True),
    "antithetic": lambda grid, schedule: ats.beta(grid, 2.0, coupling="antithetic"),
    "beta": lambda grid, schedule: ats.beta(grid, 0.8),
    "logit_normal": lambda grid, schedule: ats.logit_normal(grid, shift=3.0),
    "log_normal_sigma": ats.log_normal_sigma,
    "speed": ats.speed,
    "published": lambda grid, schedule: ats.speed(grid, schedule, as_published=True),
    "curriculum": lambda grid, schedule: ats.curriculum(grid, kind="switch"),
    "mixed": lambda grid, schedule: ats.importance_weighted(
        ats.mixed_with_uniform(ats.beta(grid, 3.0), 0.3)
    ),
    "weighted": lambda grid, schedule: ats.with_density_of(
        ats.with_weighting(ats.beta(grid, 2.0), ats.weightings.min_snr(), schedule),
        ats.beta(grid, 1.0, 2.0),
    ),
}
ALONG = ("independent", "equal", "increasing")


CASES = [
    *[(name, "T1000") for name in FIXED],
    ("log_normal_sigma", "continuous"),
    ("mixed", "continuous"),
]


def _draws(sampler, state, along, num=300, shape=(3,), batch=BATCH):
    """Leaves (num, b, *shape) of independent batches."""
    draw = jax.jit(
        jax.vmap(lambda key: sampler.sample(key, state, batch, shape=shape, along=along))
    )
    return draw(jax.random.split(jax.random.key(3), num))


def _p_value(sampler, state, t):
    """Of the times against the law that ``log_density`` says, by ten cells of about equal mass."""
    grid = sampler.sample.grid
    num = grid.num_timesteps or 4000
    u = (np.arange(num) + 0.5) / num
    steps = jnp.arange(num) if grid.num_timesteps else grid.to_t(jnp.asarray(u, jnp.float32))
    at = jax.vmap(lambda t: sampler.log_density(state, _at(t), BATCH)[0])
    p = np.exp(np.asarray(at(steps), np.float64)) / num
    assert p.sum() == pytest.approx(1, abs=0.02)
    cell = np.minimum((np.cumsum(p) / p.sum() * 10 - 1e-9).astype(int), 9)
    place = t if grid.num_timesteps else (np.asarray(grid.to_u(t)) * num).astype(int)
    found = np.bincount(cell[np.clip(place, 0, num - 1).ravel()], minlength=10)
    expected = np.bincount(cell, p / p.sum(), minlength=10) * t.size
    return stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue


def _at(t):
    return ats.TimestepSample(*(jnp.full((8,), x) for x in (t, jnp.float32(0.5), jnp.float32(1))))


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_times_along_the_added_axis(name, grid):
    sampler = FIXED[name](GRIDS[grid], SCHEDULES[grid])
    state = sampler.init(jax.random.key(0), BATCH)
    by_way = {along: _draws(sampler, state, along) for along in ALONG}
    for draw in by_way.values():
        assert draw.t.shape == draw.u.shape == draw.weight.shape == (300, 8, 3)
        assert draw.t.dtype == sampler.sample(jax.random.key(0), state, BATCH).t.dtype
        assert draw.r is None
        # Weights are those of the times that they stand beside.
        flat = jax.tree.map(lambda x: x.reshape(-1, 8), draw)
        factor = jax.vmap(lambda s: sampler.sample.factor(state, s, BATCH))(flat)
        np.testing.assert_allclose(flat.weight, factor, rtol=1e-5)
    t = {along: np.asarray(draw.t) for along, draw in by_way.items()}
    assert np.all(t["equal"] == t["equal"][..., :1])
    assert np.all(np.diff(t["increasing"]) >= 0) and np.any(np.diff(t["increasing"]) > 0)
    # The same draws in order: what is random about them is the law's.
    np.testing.assert_array_equal(np.sort(t["independent"]), t["increasing"])
    assert _p_value(sampler, state, t["independent"]) > 1e-3
    for k in range(3):  # each position follows the law
        assert _p_value(sampler, state, t["independent"][..., k]) > 1e-3
    assert _p_value(sampler, state, t["equal"][..., 0]) > 1e-3
    order = stats.rankdata(t["independent"].reshape(-1, 3), axis=0)
    assert np.all(np.abs(np.corrcoef(order.T)[np.triu_indices(3, 1)]) < 4 / np.sqrt(len(order)))


def test_increasing_times_are_order_statistics():
    sampler = ats.uniform(ats.continuous())
    u = np.asarray(_draws(sampler, (), "increasing", num=500).u).reshape(-1, 3)
    for k in range(3):
        assert stats.kstest(u[:, k], stats.beta(k + 1, 3 - k).cdf).pvalue > 1e-3
    one = u[np.arange(len(u)), np.arange(len(u)) % 3]  # a time picked without a look at it
    assert stats.kstest(one, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("coupling", Coupling.__args__)
def test_the_coupling_holds_at_each_position(coupling):
    sampler = ats.uniform(ats.continuous(), coupling=coupling)
    u = np.asarray(sampler.sample(jax.random.key(0), (), BATCH, shape=(2, 5)).u).reshape(8, 10).T
    assert len({tuple(row) for row in u.round(6)}) == 10
    if coupling == "stratified":
        assert all(sorted(np.floor(8 * row)) == list(range(8)) for row in u)
    if coupling == "low_discrepancy":
        np.testing.assert_allclose(np.diff(np.sort(u % 0.125), axis=1), 0, atol=1e-5)
    if coupling == "antithetic":
        np.testing.assert_allclose(u[:, :4] + u[:, 4:], 1, atol=1e-6)


def test_increasing_is_along_the_last_axis_and_a_position_keeps_its_draws():
    sampler, key = ats.uniform(ats.discrete(1000)), jax.random.key(1)
    many = sampler.sample(key, (), BATCH, shape=(2, 4), along="increasing").t
    assert np.all(np.diff(many, axis=2) >= 0) and np.any(np.diff(many, axis=1) < 0)
    four, six = (sampler.sample(key, (), BATCH, shape=(n,)).t for n in (4, 6))
    np.testing.assert_array_equal(four, six[:, :4])


@pytest.mark.parametrize("along", ALONG)
def test_without_a_shape_nothing_changes(along):
    sampler = ats.mixed_with_uniform(ats.beta(ats.discrete(1000), 0.8), 0.2)
    plain = sampler.sample(jax.random.key(5), (), BATCH)
    given = sampler.sample(jax.random.key(5), (), BATCH, shape=(), along=along)
    jax.tree.map(np.testing.assert_array_equal, given, plain)
    programs = [
        jax.jit(lambda key, more=more: sampler.sample(key, (), BATCH, **more))
        .lower(jax.random.key(0))
        .as_text()
        for more in ({}, {"shape": (), "along": along})
    ]
    assert programs[0] == programs[1]


def test_a_second_time_moves_with_the_first():
    def draw(key, state, batch):
        u = jax.random.uniform(key, (8,), minval=0.01, maxval=0.99)
        return ats.TimestepSample(u, u, 2 * u, r=1 - u)

    sample = ats.GridSample(ats.continuous(), draw)
    for along in ALONG:
        found = sample(jax.random.key(0), (), BATCH, shape=(5,), along=along)
        np.testing.assert_allclose(found.r, 1 - found.t)
        np.testing.assert_allclose(found.weight, 2 * found.t)
    bare = ats.uniform(ats.continuous())._replace(sample=draw)
    check_sampler(bare, BATCH, grid=ats.continuous())  # neither keyword, and a second time


LEARNED = {
    "loss_second_moment": lambda axis=None: ats.loss_second_moment(
        ats.discrete(8), history=2, axis_name=axis
    ),
    "loss_proportional": lambda axis=None: ats.loss_proportional(
        ats.discrete(8), ats.schedules.linear(8), weighting=ats.weightings.min_snr(), axis_name=axis
    ),
    "entropy_rate": lambda axis=None: ats.entropy_rate(
        ats.continuous(8, t_min=1e-3, t_max=1 - 1e-3), learned_laws.straight_line(),
        importance_weighted=True, coupling="stratified", axis_name=axis,
    ),
}  # fmt: skip


def _learn(sampler, along, steps=6):
    """States, draws and metrics of a few updates with times per frame."""

    def step(state, key, batch):
        draw = sampler.sample(key, state, batch, shape=(3,), along=along)
        losses = jnp.exp(-3 * draw.u) + 0.1 * jnp.arange(3, dtype=jnp.float32)[None]
        state, metrics = sampler.update(state, draw, losses)
        return state, (draw, losses, metrics)

    return lambda state, keys, batch: jax.lax.scan(lambda s, k: step(s, k, batch), state, keys)


@pytest.mark.parametrize("name", LEARNED)
def test_updates_take_the_losses_of_all_times(name):
    sampler = LEARNED[name]()
    keys = jax.random.split(jax.random.key(0), 6)
    state = sampler.init(keys[0], BATCH)
    found, (draw, losses, _) = jax.jit(_learn(sampler, "independent"))(state, keys, BATCH)
    # The same losses, one time per example, of a batch three times as large.
    flat = jax.tree.map(lambda x: x.reshape(6, -1), (draw, losses))
    expected, _ = jax.lax.scan(lambda s, x: (sampler.update(s, *x)[0], None), state, flat)
    # One element is what two sums of about 1e-3 leave of each other: rounding, not of its own size.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    jax.tree.map(near, found, expected)
    density = np.exp(
        np.asarray(sampler.log_density(found, jax.tree.map(lambda x: x[-1], draw), BATCH))
    )
    assert density.shape == (8, 3) and np.ptp(density) > 0.1
    p = learned_laws.probabilities(sampler, found)
    assert p.sum() == pytest.approx(1, abs=1e-3)
    assert _p_value(sampler, found, np.asarray(_draws(sampler, found, "increasing").t)) > 1e-3


def test_eight_devices_equal_one(mesh8):
    batch, keys = {"image": jnp.zeros((16, 4, 4, 1))}, jax.random.split(jax.random.key(0), 6)
    fixed = {
        name: lambda axis=None, coupling=coupling: ats.mixed_with_uniform(
            ats.beta(ats.discrete(1000), 0.8, coupling=coupling, axis_name=axis),
            0.3,
            axis_name=axis,
        )
        for name, coupling in (("free", "independent"), ("strata", "stratified"))
    }
    cases = {
        (name, along): make
        for along, more in (("independent", LEARNED), ("increasing", {}), ("equal", {}))
        for name, make in {**fixed, **more}.items()
    }

    def run(axis):
        samplers = {case: make(axis) for case, make in cases.items()}
        states = {case: s.init(keys[0], batch) for case, s in samplers.items()}
        return lambda keys, batch: {
            case: _learn(s, case[1])(states[case], keys, batch) for case, s in samplers.items()
        }

    expected = jax.jit(run(None))(keys, batch)
    rows = P(None, "data")
    specs = {case: (P(), (ats.TimestepSample(rows, rows, rows), rows, P())) for case in cases}
    mapped = jax.shard_map(run("data"), mesh=mesh8, in_specs=(P(), P("data")), out_specs=specs)
    found = jax.jit(mapped)(keys, batch)
    for case in cases:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
            found[case],
            expected[case],
        )


def test_one_time_per_example_or_a_refusal():
    grid = ats.discrete(100)
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=())
    adaptive, impact = (
        ats.adaptive(grid, policy, optax.adam(1.0)),
        ats.impact(grid, optax.adam(1.0)),
    )
    for sampler, name in (
        (adaptive, "adaptive"),
        (impact, "impact"),
        (ats.importance_weighted(ats.mixed_with_uniform(impact, 0.5)), "impact"),
        (ats.with_density_of(adaptive, ats.uniform(grid)), "adaptive"),
        (ats.with_density_of(ats.uniform(grid), impact), "impact"),
    ):
        state = jax.eval_shape(sampler.init, jax.random.key(0), BATCH)
        for along in ALONG:
            with pytest.raises(
                ValueError, match=rf"{name} draws one time per example, got shape=\(8,\)"
            ):
                jax.eval_shape(
                    lambda k, s, n=along, sampler=sampler: sampler.sample(
                        k, s, BATCH, shape=(8,), along=n
                    ),
                    jax.random.key(0),
                    state,
                )
    state = adaptive.init(jax.random.key(0), BATCH)
    times = ats.uniform(grid).sample(jax.random.key(0), (), BATCH, shape=(8,))
    with pytest.raises(ValueError, match=r"got t \(8, 8\) for \(8,\) images"):
        adaptive.log_density(state, times, BATCH)


def test_bad_shapes():
    sampler, key = ats.uniform(ats.discrete(10)), jax.random.key(0)
    for shape in (3, [3], (0,), (2.0,), (True,), (-1, 2)):
        with pytest.raises(ValueError, match="shape must be a tuple of positive integers"):
            sampler.sample(key, (), BATCH, shape=shape)
    with pytest.raises(ValueError, match=r"along must be one of .* got 'sorted'"):
        sampler.sample(key, (), BATCH, shape=(3,), along="sorted")


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("shape", [(8,), (8, 1), (3, 8), ()])
def test_losses_of_another_shape_are_refused(name, shape):
    sampler = LEARNED[name]()
    state = sampler.init(jax.random.key(0), BATCH)
    draw = sampler.sample(jax.random.key(0), state, BATCH, shape=(3,))
    with pytest.raises(
        ValueError, match=r"losses \(.*\) for times \(8, 3\): give one loss per time"
    ):
        sampler.update(state, draw, jnp.ones(shape))
    check_losses(jnp.ones((8, 3)), draw.t)
