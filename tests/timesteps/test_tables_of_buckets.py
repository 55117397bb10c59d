"""Strata of a grid, and draws from tables by the inverse CDF."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts.timesteps.tables import bucket_log_density, draw_from_buckets, strata_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    one, other = (cells.jittered(jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(cells.to_stratum(one), np.arange(8))
    assert not np.array_equal(one, other)
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
