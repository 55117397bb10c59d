"""Running moments of rewards, and the advantages made with them, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adaptive_ts.learning import reinforce


def run(batches):
    """The advantages of the last batch, and its metrics."""
    moments = reinforce.init_moments()
    for reward in (jnp.asarray(b, jnp.float32) for b in batches):
        moments, standard, metrics = reinforce.standardize(moments, reward)
    return np.asarray(reinforce.advantages(reward, standard)), metrics


def exact(batches):
    """The same in float64, from all rewards."""
    values = np.concatenate([np.float32(b).astype(np.float64) for b in batches])
    ages = np.concatenate([np.full(len(b), len(batches) - i) for i, b in enumerate(batches)])
    mean = np.average(values, weights=0.9**ages)
    variance = np.average((values - mean) ** 2, weights=0.9**ages)
    return (np.float32(batches[-1]).astype(np.float64) - mean) / np.sqrt(variance)


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_advantages_are_float64_s(mean):
    rng = np.random.default_rng(0)
    batches = [rng.normal(mean * s, s, 50) for s in (1.0, 10.0, 0.1, 0.1)]
    for number in range(1, 5):
        found, metrics = run(batches[:number])
        np.testing.assert_allclose(found, exact(batches[:number]), rtol=1e-3, atol=1e-4)
        last = batches[number - 1]
        assert metrics["reward_mean"] == pytest.approx(last.mean(), rel=1e-3, abs=1e-5)
        assert metrics["reward_std"] == pytest.approx(last.std(), rel=5e-3)


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-12, 1e8, 0.0])
@pytest.mark.parametrize("probes", [1, 2, 5])
def test_equal_rewards_say_nothing(value, probes):
    found, _ = run([np.full(7, value)] * probes)
    assert np.abs(found).max() < 0.02


def test_rewards_that_all_but_agree_stay_in_bounds():
    """Below what float32 tells apart at first; right once the mean is known."""
    rng = np.random.default_rng(1)
    batches = [rng.normal(1e-3, 1e-7, 128) for _ in range(60)]
    for number in (1, 2, 10, 60):
        found, _ = run(batches[:number])
        assert np.abs(found).max() < np.sqrt(128)
    np.testing.assert_allclose(found, exact(batches), rtol=0.02, atol=0.02)


def test_one_reward_and_none():
    assert run([[0.3]])[0] == pytest.approx(0, abs=1e-3)
    found, metrics = run([[jnp.nan, jnp.inf]])
    assert not found.any() and metrics["nonfinite"] == 2 and metrics["reward_mean"] == 0
    found, _ = run([[1.0, 3.0], [jnp.nan, jnp.nan]])
    assert not found.any()


def test_raw_rewards_stay():
    reward = jnp.asarray([1.0, jnp.nan, -2.0])
    np.testing.assert_array_equal(reinforce.advantages(reward, None), [1, 0, -2])


def test_devices_share_the_moments(mesh8):
    reward = jnp.asarray(np.random.default_rng(2).normal(0.3, 0.1, 32), jnp.float32)

    def local(reward):
        moments, standard, _ = reinforce.standardize(
            reinforce.init_moments(), reward, axis_name="data"
        )
        return moments, reinforce.advantages(reward, standard)

    specs = {"in_specs": P("data"), "out_specs": (P(), P("data"))}
    moments, found = jax.jit(jax.shard_map(local, mesh=mesh8, **specs))(reward)
    np.testing.assert_allclose(found, run([np.asarray(reward)])[0], rtol=1e-4, atol=1e-5)
    assert moments.weight == 32
