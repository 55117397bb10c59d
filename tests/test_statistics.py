import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats


def _reference(buckets, losses, n, decay):
    count, total, square = np.zeros(n), np.zeros(n), np.zeros(n)
    for bucket, loss in zip(buckets, losses, strict=True):
        count, total, square = count * decay, total * decay, square * decay
        good = np.isfinite(loss)
        np.add.at(count, bucket[good], 1)
        np.add.at(total, bucket[good], loss[good])
        np.add.at(square, bucket[good], loss[good] ** 2)
    return count, total, square


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_equals_numpy_on_one_and_eight_devices(decay, mesh8):
    rng = np.random.default_rng(0)
    buckets = rng.integers(0, 7, (5, 64)).astype(np.int32)
    losses = rng.random((5, 64)).astype(np.float32)
    losses[1, 3], losses[2, 5] = np.nan, np.inf

    def local(stats, bucket, loss):
        return ats.update_statistics(stats, bucket, loss, decay=decay, axis_name="data")

    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh8, in_specs=(P(), P("data"), P("data")), out_specs=P())
    )
    one = many = ats.init_statistics(7)
    for bucket, loss in zip(buckets, losses, strict=True):
        one = ats.update_statistics(one, jnp.asarray(bucket), jnp.asarray(loss), decay=decay)
        many = sharded(many, bucket, loss)
    count, total, square = _reference(buckets, losses, 7, decay)
    for stats in (one, many):
        np.testing.assert_allclose(stats.count, count, rtol=1e-5)
        np.testing.assert_allclose(ats.loss_mean(stats), total / count, rtol=1e-5)
        expected = np.sqrt(square / count - (total / count) ** 2)
        np.testing.assert_allclose(ats.loss_std(stats), expected, rtol=1e-4)


def test_empty_buckets_and_bad_input():
    assert np.isnan(ats.loss_mean(ats.init_statistics(3))).all()
    with pytest.raises(ValueError, match="got 0"):
        ats.init_statistics(0)
