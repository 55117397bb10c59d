import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats


@pytest.mark.parametrize("T", [2, 3, 10, 1000, 4001])
@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_discrete_grid_equals_numpy(T, rounding):
    u = np.random.default_rng(0).random(20_000, np.float32)
    grid = ats.discrete(T, rounding=rounding)
    wide = u.astype(np.float64)
    expected = np.floor(wide * T) if rounding == "floor" else np.floor(wide * (T - 1) + 0.5)
    t = np.asarray(grid.to_t(jnp.asarray(u)))
    assert t.dtype == np.int32
    off = t != np.minimum(expected, T - 1)
    assert off.mean() < 1e-3  # float32 draws within rounding of an edge
    edge = wide * (T if rounding == "floor" else T - 1) + (0 if rounding == "floor" else 0.5)
    assert np.all(np.abs(edge - np.round(edge))[off] < 1e-3)


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_cells_partition_the_unit_interval(rounding):
    T = 50
    grid = ats.discrete(T, rounding=rounding)
    t = jnp.arange(T)
    lo, hi = map(np.asarray, grid.cell(t))
    assert lo[0] == 0 and hi[-1] == 1
    np.testing.assert_allclose(lo[1:], hi[:-1], atol=1e-6)
    np.testing.assert_array_equal(grid.to_t(grid.to_u(t)), t)
    np.testing.assert_allclose(np.exp(grid.uniform_log_density(t)), T * (hi - lo), rtol=1e-4)
    assert np.exp(grid.uniform_log_density(t)).mean() == pytest.approx(1, abs=1e-5)
    if rounding == "nearest":
        assert (hi - lo)[0] == pytest.approx((hi - lo)[1] / 2, rel=1e-4)


def test_extreme_draws_stay_on_the_grid():
    u = jnp.asarray([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    np.testing.assert_array_equal(ats.discrete(1000).to_t(u), [0, 0, 999, 999])
    np.testing.assert_array_equal(ats.discrete(1000, rounding="nearest").to_t(u), [0, 0, 999, 999])
    t = np.asarray(ats.continuous(10, t_min=1e-3, t_max=1.0).to_t(u))
    assert t.dtype == np.float32 and np.all((t > np.float32(1e-3)) & (t < 1))


def test_continuous_grid():
    grid = ats.continuous(8, t_min=0.5, t_max=2.5)
    u = np.random.default_rng(1).random(1000, np.float32)
    t = grid.to_t(jnp.asarray(u))
    np.testing.assert_allclose(t, 0.5 + 2 * u.astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(grid.to_u(t), u, atol=1e-6)
    np.testing.assert_array_equal(grid.to_bucket(t), np.floor(np.asarray(grid.to_u(t)) * 8))
    lo, hi = grid.cell(t)
    assert np.all((lo <= u + 1e-6) & (u <= hi + 1e-6))


def test_strata():
    grid = ats.discrete(1000)
    np.testing.assert_array_equal(ats.timesteps.strata(grid, 1000), np.arange(1000))
    np.testing.assert_array_equal(
        ats.timesteps.strata(ats.discrete(1000, rounding="nearest"), 1000), np.arange(1000)
    )
    drawn = np.asarray(ats.timesteps.strata(grid, 100, jax.random.key(0)))
    np.testing.assert_array_equal(drawn // 10, np.arange(100))
    assert len(set(drawn % 10)) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ats.discrete(0), "got 0"),
        (lambda: ats.discrete(-5), "got -5"),
        (lambda: ats.discrete(2**22 + 1), "continuous"),
        (lambda: ats.discrete(1000.0), "got 1000.0"),
        (lambda: ats.discrete(True), "got True"),
        (lambda: ats.discrete(10, rounding="ceil"), "'floor' or 'nearest', got 'ceil'"),
        (lambda: ats.continuous(0), "got 0"),
        (lambda: ats.continuous(5, t_min=1.0, t_max=1.0), "t_min must be below t_max"),
        (lambda: ats.continuous(5, t_max=float("nan")), "nan"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
