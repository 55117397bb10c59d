"""Coupled draws against the published ones; their marginals; any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy import stats

import adaptive_ts as ats
from adaptive_ts.timesteps import draws
from adaptive_ts.timesteps.draws import Coupling, check_coupling, unit_draws

pytestmark = pytest.mark.usefixtures("quick_compilation")
COUPLINGS = Coupling.__args__


def test_lattice_is_that_of_vdm(golden, monkeypatch):
    arrays = golden("vdm_low_discrepancy")
    shift = jnp.asarray(arrays["t0"][0])
    monkeypatch.setattr(jax.random, "uniform", lambda key, **options: shift)
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.arange(n))
    found = unit_draws(jax.random.key(0), 8, coupling="low_discrepancy")
    np.testing.assert_allclose(found, arrays["t_vdm_n8"], atol=2e-7)
    shift = arrays["hackable_stratified_unpermuted_n8"][0].astype(np.float32)
    found = unit_draws(jax.random.key(0), 8, coupling="low_discrepancy")
    np.testing.assert_allclose(found, arrays["hackable_stratified_unpermuted_n8"], atol=2e-7)


def test_strata_are_those_of_k_diffusion(golden, monkeypatch):
    arrays = golden("vdm_low_discrepancy")
    given = jnp.asarray(arrays["kdiff_U_n8"], jnp.float32)
    monkeypatch.setattr(draws, "_uniform", lambda key, index: given[index])
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.arange(n))
    found = unit_draws(jax.random.key(0), 8, coupling="stratified")
    np.testing.assert_allclose(found, arrays["kdiff_stratified_n8"], atol=1e-7)


def test_pairs_are_those_of_ddim(golden, monkeypatch):
    arrays = golden("vdm_low_discrepancy")
    given = jnp.asarray((arrays["ddim_antithetic_first"] + 0.25) / 1000, jnp.float32)
    monkeypatch.setattr(draws, "_uniform", lambda key, index: given[index])
    v = unit_draws(jax.random.key(0), 9, coupling="antithetic")
    np.testing.assert_array_equal(ats.discrete(1000).to_t(v), arrays["ddim_antithetic_n9"])


@pytest.mark.parametrize("size", [49, 98, 103])  # where arange(0, 1, 1 / n) has n + 1 items
def test_lattice_has_one_draw_per_example(size):
    assert len(np.arange(0, 1, 1 / size)) == size + 1
    v = np.sort(unit_draws(jax.random.key(1), size, coupling="low_discrepancy"))
    assert v.shape == (size,)
    gaps = np.append(np.diff(v), v[0] + 1 - v[-1])
    np.testing.assert_allclose(gaps, 1 / size, atol=3e-7)


@pytest.mark.parametrize("size", [1 << 16, 50_000])
def test_strata_hold_one_draw_each_in_large_batches(size, monkeypatch):
    jitter = jnp.full((size,), 1 - 2.0**-24)  # the largest draw, which would round up
    monkeypatch.setattr(draws, "_uniform", lambda key, index: jitter)
    v = np.asarray(unit_draws(jax.random.key(0), size, coupling="stratified"))
    assert sorted(np.floor(v * size)) == list(range(size))


def test_pairs_mirror_each_other():
    v = np.asarray(unit_draws(jax.random.key(2), 64, coupling="antithetic"))
    np.testing.assert_allclose(v[:32] + v[32:], 1, atol=1e-7)
    assert len(np.unique(v[:32])) == 32


def test_strata_have_a_jitter_of_their_own_and_the_lattice_does_not():
    jitters = {}
    for coupling in ("stratified", "low_discrepancy"):
        v = np.sort(unit_draws(jax.random.key(3), 64, coupling=coupling))
        jitters[coupling] = np.mod(v * 64, 1)
    assert stats.kstest(jitters["stratified"], "uniform").pvalue > 1e-3
    assert np.ptp(jitters["low_discrepancy"]) < 1e-4


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_place_in_the_batch_is_uniform(coupling):
    def draw(key):
        return unit_draws(key, 6, coupling=coupling)

    v = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(4), 2000)))
    assert v.dtype == np.float32 and v.min() > 0 and v.max() < 1
    for place in range(6):
        assert stats.kstest(v[:, place], "uniform").pvalue > 1e-4  # 24 tests: 1 in 400 by chance


def test_coupled_draws_vary_less_on_average():
    def spread(coupling):
        keys = jax.random.split(jax.random.key(5), 500)
        v = jax.jit(jax.vmap(lambda key: unit_draws(key, 16, coupling=coupling)))(keys)
        return np.asarray(v).mean(1).std()

    assert spread("independent") == pytest.approx(1 / np.sqrt(12 * 16), rel=0.15)
    assert spread("stratified") == pytest.approx(1 / np.sqrt(12 * 16**3), rel=0.15)
    assert spread("low_discrepancy") == pytest.approx(1 / np.sqrt(12 * 16**2), rel=0.15)
    assert spread("antithetic") < 1e-6


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_eight_devices_draw_as_one(coupling, mesh8):
    key = jax.random.key(6)

    def local(key):
        return unit_draws(key, 4, coupling=coupling, axis_name="data")

    spec = PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=PartitionSpec(), out_specs=spec))(
        key
    )
    np.testing.assert_array_equal(sharded, unit_draws(key, 32, coupling=coupling))


def test_strict_dtype_promotion_and_float32_under_x64(strict):
    for coupling in COUPLINGS:
        with strict():
            narrow = unit_draws(jax.random.key(7), 8, coupling=coupling)
        with jax.enable_x64(True):
            wide = unit_draws(jax.random.key(7), 8, coupling=coupling)
        assert wide.dtype == narrow.dtype == jnp.float32


def test_unknown_coupling_is_named():
    with pytest.raises(ValueError, match="got 'sobol'"):
        check_coupling("sobol")
