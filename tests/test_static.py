"""Fixed laws of u against scipy and the goldens: tables, Beta, logit-normal, mode, cosmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

import adaptive_ts as ats
from adaptive_ts.laws import Law, tabulated_law, truncated_normal_law
from adaptive_ts.samplers.logit import cosmap, logit_normal, mode
from adaptive_ts.samplers.static import beta, from_probabilities, uniform
from adaptive_ts.tabulated import cell_edges, draw_from_buckets
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.zeros((8, 8, 8, 1))}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1.0),
}
SAMPLERS = {
    "table": lambda grid: from_probabilities(
        grid, (1 + np.arange(n := grid.num_buckets)) / (n * (n + 1) / 2)
    ),
    "beta": lambda grid: beta(grid, 0.8),
    "beta_two": lambda grid: beta(grid, 2.0, 1.5, coupling="stratified"),
    "logit_normal": lambda grid: logit_normal(grid, 0.5, 1.5, shift=2.0),
    "mode": lambda grid: mode(grid, coupling="antithetic"),
    "cosmap": lambda grid: cosmap(grid, shift=3.0, coupling="low_discrepancy"),
}


def at(t, dtype=jnp.int32):
    t = jnp.asarray(t, dtype)
    return ats.TimestepSample(t, jnp.full(t.shape, 0.5), jnp.ones(t.shape))


def probabilities(sampler):
    T = sampler.sample.grid.num_timesteps
    density = sampler.log_density((), at(np.arange(T)), BATCH)
    return np.exp(np.asarray(density, np.float64)) / T


def pull(sampler, v):
    """What the sampler makes of given v, by a law that was handed them for the random ones."""
    grid = sampler.sample.grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_ts.laws.unit_draws", lambda *_, **__: v)
        draw = sampler.sample(jax.random.key(0), (), {"image": jnp.zeros((v.shape[0], 1))})
    assert grid is not None and np.all((draw.u > 0) & (draw.u < 1))
    return draw


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_keeps_the_contract(name, grid):
    # The inverse of a logit-normal density has no finite variance: no z-scores for it.
    limit = np.inf if name == "logit_normal" else 4.5
    report = check_sampler(
        SAMPLERS[name](GRIDS[grid]), BATCH, num_steps=1, num_draws=256, max_z_score=limit
    )
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
    grid = ats.discrete(2**22)
    last = jnp.zeros((2**22,)).at[-1].set(1.0)
    t, u = draw_from_buckets(grid, last, jnp.asarray([0.5, 1 - 2.0**-24]))
    assert np.all(t == 2**22 - 1) and np.all(u < 1)


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
    density = np.exp(sampler.log_density((), at([1.5, 2.5, 3.5, 4.5], jnp.float32), BATCH))
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
    found = sampler.log_density((), draw, BATCH)
    np.testing.assert_allclose(found, law.logpdf(u), atol=2e-4 if a > 100 else 2e-5)


def test_beta_with_b_one_is_a_power_of_v():
    v = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(pull(beta(ats.continuous(20), 0.8), v).u, v**1.25, rtol=3e-6)


def test_beta_next_to_zero_has_no_atom_that_float32_can_avoid():
    v = jnp.linspace(0.01, 0.99, 99)
    u = np.asarray(pull(beta(ats.continuous(20), 0.1), v).u)
    assert len(np.unique(u)) == 99 and u[0] < 1e-19


# Logit-normal, mode, cosmap.

PAIRS = [(0, 1), (0.5, 1), (-0.5, 1), (0, 0.5), (0.5, 0.6), (-1.2, 1.2)]


@pytest.mark.parametrize(("mean", "std"), PAIRS)
def test_logit_normal_is_that_of_diffusers(mean, std, golden):
    arrays, grid = golden("logit_normal_sd3"), ats.discrete(1000)
    index, name = arrays["index"], f"m{mean}_s{std}__p"
    for sampler, key in (
        (logit_normal(grid, mean, std), f"{name}_index_floor_uT"),
        # The paper's mean favours high noise; in diffusers' descending list it favours low noise.
        (logit_normal(grid, mean, std, diffusers_time=True), f"{name}_by_sigma_ascending"),
    ):
        np.testing.assert_allclose(
            probabilities(sampler)[index], arrays[key], rtol=1e-6, atol=1e-14
        )


def test_the_direction_of_diffusers_is_the_other_one():
    grid = ats.discrete(1000)
    mine, theirs = (logit_normal(grid, 0.5, diffusers_time=d) for d in (False, True))
    mine, theirs = probabilities(mine), probabilities(theirs)
    np.testing.assert_allclose(mine, theirs[::-1], rtol=1e-5, atol=1e-14)
    assert mine[:500].sum() == pytest.approx(stats.norm.cdf(-0.5), abs=1e-6)


@pytest.mark.parametrize("scale", [1.29, 0.81, -0.5])
def test_mode_is_that_of_diffusers(scale, golden):
    arrays = golden("logit_normal_sd3")
    found = probabilities(mode(ats.discrete(1000), scale))[arrays["index"]]
    np.testing.assert_allclose(found, arrays[f"mode_s{scale}__p_index_floor_uT"], rtol=1e-6)


def test_cosmap_is_that_of_diffusers(golden):
    arrays = golden("logit_normal_sd3")
    found = probabilities(cosmap(ats.discrete(1000)))[arrays["index"]]
    np.testing.assert_allclose(found, arrays["cosmap__p_index_floor_uT"], rtol=1e-6)


def test_mode_never_leaves_the_timesteps():
    # The paper's formula gives u = 1, an index out of range, at v = 0.
    ends = jnp.asarray([2.0**-24, 1 - 2.0**-24])
    np.testing.assert_array_equal(pull(mode(ats.discrete(1000)), ends).t, [0, 999])
    assert np.all(pull(mode(ats.continuous(20)), ends).u < 1)


LAWS = {
    "logit_normal": lambda grid, shift: logit_normal(grid, -0.4, 1.3, shift=shift),
    "diffusers": lambda grid, shift: logit_normal(grid, 0.4, 1.3, shift=shift, diffusers_time=True),
    "mode": lambda grid, shift: mode(grid, shift=shift),
    "mode_ends": lambda grid, shift: mode(grid, -0.9, shift=shift),
    "cosmap": lambda grid, shift: cosmap(grid, shift=shift),
}


def oracle(name, v):
    """The laws' draws before the shift, in float64 and in the papers' own form."""
    if name in ("logit_normal", "diffusers"):
        return special.expit(-0.4 + 1.3 * special.ndtri(v))
    if name == "cosmap":
        return 1 - 1 / (np.tan(np.pi * v / 2) + 1)
    scale = 1.29 if name == "mode" else -0.9
    w = 1 - v
    return 1 - w - scale * (np.cos(np.pi * w / 2) ** 2 - 1 + w)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("name", LAWS)
def test_shifted_laws_in_continuous_and_discrete_time(name, shift):
    v = np.linspace(1e-4, 1 - 1e-4, 2001)
    s = oracle(name, v)
    exact = shift * s / (1 + (shift - 1) * s)
    sampler = LAWS[name](ats.continuous(20, t_min=1.0, t_max=3.0), shift)
    draw = pull(sampler, jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(draw.u, exact, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(draw.t, 1 + 2 * exact, rtol=2e-5)
    # The density is the slope of v in u, and its integral the mass of a timestep.
    slope = np.gradient(v, exact)[5:-5]
    found = np.exp(sampler.log_density((), draw, BATCH))[5:-5]
    np.testing.assert_allclose(found, slope, rtol=5e-3)
    p = probabilities(LAWS[name](ats.discrete(10), shift))
    cdf = np.interp(np.arange(1, 10) / 10, exact, v)
    np.testing.assert_allclose(np.cumsum(p)[:-1], cdf, atol=1e-5)


def test_shift_moves_to_more_noise():
    means = [probabilities(LAWS["cosmap"](ats.discrete(100), a)) @ np.arange(100) for a in (1, 3)]
    assert means[1] > means[0] + 15


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
        lambda g: logit_normal(g, np.inf),
        lambda g: logit_normal(g, 0.0, 0.0),
        lambda g: logit_normal(g, shift=-1.0),
        lambda g: mode(g, 1.8),
        lambda g: mode(g, -1.1),
        lambda g: mode(g, shift=0.0),
        lambda g: cosmap(g, shift=np.nan),
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
        density = np.exp(make(grid).log_density((), at(t, jnp.float32), BATCH))
        assert integrate.trapezoid(density, t) == pytest.approx(1, abs=2e-3)


def test_laws_are_plain_tuples():
    law = tabulated_law(ats.discrete(4), [1, 1, 1, 1])
    assert isinstance(law, Law)
    np.testing.assert_allclose(law.log_density(jnp.arange(4)), 0, atol=1e-6)
