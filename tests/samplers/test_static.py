"""Uniform timesteps, tables, Beta and the truncated normal, against scipy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from static_laws import BATCH, GRIDS, probabilities, pull, relative_density

import adaptive_ts as ats
from adaptive_ts.samplers.static import beta, from_probabilities, uniform
from adaptive_ts.testing import check_sampler
from adaptive_ts.timesteps.laws import Law, tabulated_law, truncated_normal_law
from adaptive_ts.timesteps.tables import cell_edges, draw_from_buckets

pytestmark = pytest.mark.usefixtures("quick_compilation")
SAMPLERS = {
    "table": lambda grid: from_probabilities(
        grid, (1 + np.arange(n := grid.num_buckets)) / (n * (n + 1) / 2)
    ),
    "beta": lambda grid: beta(grid, 0.8),
    "beta_two": lambda grid: beta(grid, 2.0, 1.5, coupling="stratified"),
    "uniform": lambda grid: uniform(grid, coupling="low_discrepancy"),
}


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *[(name, grid) for name in SAMPLERS for grid in ("T1000", "continuous")],
        *[(name, "T50_nearest") for name in ("table", "beta")],
    ],
)
def test_sampler_keeps_the_contract(name, grid):
    report = check_sampler(SAMPLERS[name](GRIDS[grid]), BATCH, num_steps=1, num_draws=256)
    assert report.total_mass == pytest.approx(1, abs=1e-3)


def test_uniform_is_that_of_improved_diffusion(golden):
    arrays, sampler = golden("uniform"), uniform(GRIDS["T1000"])
    np.testing.assert_allclose(probabilities(sampler), arrays["p"], rtol=1e-6)
    draw = sampler.sample(jax.random.key(0), (), BATCH)
    np.testing.assert_array_equal(draw.weight, arrays["loss_weight"][:8])


def test_stratified_is_short_for_the_coupling():
    key, grid = jax.random.key(0), GRIDS["T1000"]
    short = uniform(grid, stratified=True).sample(key, (), BATCH).u
    long = uniform(grid, coupling="stratified").sample(key, (), BATCH).u
    both = uniform(grid, stratified=True, coupling="stratified").sample(key, (), BATCH).u
    np.testing.assert_array_equal(short, long)
    np.testing.assert_array_equal(short, both)
    assert sorted(np.floor(short * 8)) == list(range(8))
    with pytest.raises(ValueError, match="give one of them"):
        uniform(grid, stratified=True, coupling="antithetic")


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("T", [2, 3, 50, 1000, 4096])
def test_cell_edges_are_exact(T, rounding):
    grid = ats.discrete(T, rounding=rounding)
    edges = np.arange(T + 1) / T
    if rounding == "nearest":
        edges = np.clip((np.arange(T + 1) - 0.5) / (T - 1), 0, 1)
    np.testing.assert_array_equal(cell_edges(grid), edges)
    assert jax.jit(lambda: jnp.asarray(cell_edges(grid)[1]))() == np.float32(edges[1])


def test_cell_edges_of_other_grids_are_those_they_name():
    edges = jnp.asarray([0.0, 0.5, 0.75, 1.0])
    grid = ats.discrete(3)._replace(cell=lambda t: (edges[t], edges[t + 1]))
    np.testing.assert_array_equal(cell_edges(grid), edges)
    np.testing.assert_allclose(probabilities(beta(grid, 1.0)), [0.5, 0.25, 0.25], rtol=1e-6)


def test_the_last_cell_of_a_fine_grid_stays_below_one():
    grid = ats.discrete(2**17)
    last = jnp.asarray(np.arange(2**17) == 2**17 - 1, jnp.float32)
    t, u = draw_from_buckets(grid, last, jnp.asarray([0.5, 1 - 2.0**-24]))
    assert np.all(t == 2**17 - 1) and np.all(u < 1)


# Tables.


def test_table_is_drawn_as_given():
    p = np.array([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    sampler = from_probabilities(ats.discrete(6), p)
    np.testing.assert_allclose(probabilities(sampler), p, rtol=1e-6)
    v = (jnp.arange(4096) + 0.5) / 4096
    counts = np.bincount(pull(sampler, v).t, minlength=6)
    np.testing.assert_array_equal(counts, p * 4096)


def test_table_in_continuous_time_has_cells_of_its_own():
    sampler = from_probabilities(ats.continuous(7, t_min=1.0, t_max=5.0), [0.1, 0.2, 0.3, 0.4])
    density = relative_density(sampler, [1.5, 2.5, 3.5, 4.5])
    np.testing.assert_allclose(density, [0.4, 0.8, 1.2, 1.6], rtol=1e-6)
    t = pull(sampler, (jnp.arange(1000) + 0.5) / 1000).t
    np.testing.assert_allclose(np.bincount(np.floor(t).astype(int))[1:], [100, 200, 300, 400])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5, 0.5], r"shape \(2,\); give \(3,\)"),
        ([[1.0, 0.0, 0.0]], r"shape \(1, 3\)"),
        ([1.2, -0.2, 0.0], "got -0.2 at 1"),
        ([1.0, 0.0, np.nan], "got nan at 2"),
        ([1.0, 1.0, 2.0], "sum=4.0; divide"),
        ([0.0, 0.0, 0.0], "sum=0.0"),
        ([0.998, 0.0, 0.0], "sum=0.998"),
    ],
)
def test_table_errors(table, message):
    with pytest.raises(ValueError, match=message):
        from_probabilities(ats.discrete(3), table)


def test_table_may_miss_one_by_a_rounding_error():
    p = np.array([0.25, 0.25, 0.5005])
    found = probabilities(from_probabilities(ats.discrete(3), p))
    np.testing.assert_allclose(found, p / p.sum(), rtol=1e-6)


# Beta.


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize(("a", "b"), [(0.8, 1), (0.5, 3), (2, 5), (0.3, 0.3), (40, 8)])
def test_beta_masses_are_those_of_scipy(a, b, rounding):
    grid = ats.discrete(1000, rounding=rounding)
    expected = np.diff(stats.beta(a, b).cdf(cell_edges(grid)))
    np.testing.assert_allclose(probabilities(beta(grid, a, b)), expected, rtol=1e-5, atol=1e-30)


def test_beta_timesteps_have_the_published_masses():
    floor = probabilities(beta(ats.discrete(1000), 0.8))
    nearest = probabilities(beta(ats.discrete(1000, rounding="nearest"), 0.8))
    np.testing.assert_allclose(floor[[0, 500, 999]], [3.98107e-3, 9.18775e-4, 8.0008e-4], rtol=3e-6)
    np.testing.assert_allclose(nearest[[0, 999]], [2.28836e-3, 4.0042e-4], rtol=3e-6)


@pytest.mark.parametrize(("a", "b"), [(0.8, 1), (1, 1), (0.5, 3), (2, 5), (0.3, 0.3), (300, 500)])
def test_beta_in_continuous_time_is_that_of_scipy(a, b):
    sampler, law = beta(ats.continuous(20), a, b), stats.beta(a, b)
    v = jnp.concatenate([jnp.asarray([2.0**-24]), jnp.linspace(1e-5, 1 - 1e-5, 999)])
    draw = pull(sampler, v)
    u, exact = np.asarray(draw.u, np.float64), law.ppf(np.asarray(v, np.float64))
    np.testing.assert_allclose(u, exact, rtol=1e-5)
    np.testing.assert_allclose(1 - u, 1 - exact, rtol=1e-5, atol=2e-7)
    found = np.log(relative_density(sampler, draw.t))
    np.testing.assert_allclose(found, law.logpdf(u), atol=2e-4 if a > 100 else 2e-5)


def test_beta_with_b_one_is_a_power_of_v():
    v = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(pull(beta(ats.continuous(20), 0.8), v).u, v**1.25, rtol=3e-6)


def test_beta_next_to_zero_has_no_atom_that_float32_can_avoid():
    v = jnp.linspace(0.01, 0.99, 99)
    u = np.asarray(pull(beta(ats.continuous(20), 0.1), v).u)
    assert len(np.unique(u)) == 99 and u[0] < 1e-19


def test_truncated_normal_law_is_that_of_scipy():
    mean, std = 0.3, 0.2
    law = stats.truncnorm((0 - mean) / std, (1 - mean) / std, mean, std)
    grid = ats.discrete(1000, rounding="nearest")
    p = np.exp(truncated_normal_law(grid, mean, std).log_density(jnp.arange(1000))) / 1000
    np.testing.assert_allclose(p, np.diff(law.cdf(cell_edges(grid))), rtol=2e-5, atol=1e-12)
    smooth = truncated_normal_law(ats.continuous(20), mean, std)
    v = np.linspace(1e-4, 1 - 1e-4, 999)
    t, _ = smooth.draw(jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(t, law.ppf(v), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(smooth.log_density(t), law.logpdf(np.asarray(t)), atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda g: beta(g, 0.0),
        lambda g: beta(g, 1.0, -1.0),
        lambda g: beta(g, np.nan),
        lambda g: beta(g, 1.0, coupling="sobol"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call):
    with pytest.raises(ValueError, match=r"got .*(must|one of)|must be one of"):
        call(GRIDS["continuous"])


def test_strict_dtype_promotion(strict):
    with strict():
        for grid in (GRIDS["T1000"], GRIDS["continuous"]):
            for make in SAMPLERS.values():
                sampler = make(grid)
                draw = jax.eval_shape(sampler.sample, jax.random.key(1), (), BATCH)
                assert jax.eval_shape(sampler.log_density, (), draw, BATCH).dtype == jnp.float32


def test_a_law_is_made_inside_jit():
    @jax.jit
    def draw(key):
        return beta(ats.discrete(100), 0.5).sample(key, (), BATCH).t

    expected = beta(ats.discrete(100), 0.5).sample(jax.random.key(1), (), BATCH).t
    np.testing.assert_array_equal(draw(jax.random.key(1)), expected)


def test_densities_integrate_to_one():
    grid = ats.continuous(20)
    t = np.linspace(0, 1, 20_001)[1:-1]
    for make in SAMPLERS.values():
        density = relative_density(make(grid), t.astype(np.float32))
        assert integrate.trapezoid(density, t) == pytest.approx(1, abs=2e-3)


def test_laws_are_plain_tuples():
    law = tabulated_law(ats.discrete(4), [1, 1, 1, 1])
    assert isinstance(law, Law)
    np.testing.assert_allclose(law.log_density(jnp.arange(4)), 0, atol=1e-6)
