import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats
from adaptive_ts.learning.statistics import fill_unseen, init_history, push_history


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
        return ats.learning.update_statistics(stats, bucket, loss, decay=decay, axis_name="data")

    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh8, in_specs=(P(), P("data"), P("data")), out_specs=P())
    )
    one = many = ats.learning.init_statistics(7)
    for bucket, loss in zip(buckets, losses, strict=True):
        one = ats.learning.update_statistics(
            one, jnp.asarray(bucket), jnp.asarray(loss), decay=decay
        )
        many = sharded(many, bucket, loss)
    count, total, square = _reference(buckets, losses, 7, decay)
    for stats in (one, many):
        np.testing.assert_allclose(stats.count, count, rtol=1e-5)
        np.testing.assert_allclose(ats.learning.loss_mean(stats), total / count, rtol=1e-5)
        expected = np.sqrt(square / count - (total / count) ** 2)
        np.testing.assert_allclose(ats.learning.loss_std(stats), expected, rtol=1e-4)


def test_empty_buckets_and_bad_input():
    assert np.isnan(ats.learning.loss_mean(ats.learning.init_statistics(3))).all()
    with pytest.raises(ValueError, match="got 0"):
        ats.learning.init_statistics(0)


def _fifo(stream, n, size):
    """One loss after the other: n queues, oldest first."""
    queues = [collections.deque(maxlen=size) for _ in range(n)]
    for buckets, losses in stream:
        for bucket, loss in zip(buckets, losses, strict=True):
            if np.isfinite(loss):
                queues[bucket].append(loss)
    return queues


def _oldest_first(history):
    """The rings unrolled."""
    losses, count = np.asarray(history.losses), np.asarray(history.count)
    size = losses.shape[1]
    return [
        row[np.arange(c - min(c, size), c) % size] for row, c in zip(losses, count, strict=True)
    ]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (2, 10), (40, 1)])
def test_history_is_a_fifo_on_one_and_eight_devices(n, size, mesh8):
    rng = np.random.default_rng(size)
    buckets = rng.integers(0, n, (6, 64)).astype(np.int32)  # with n = 2: about 32 of each at once
    losses = rng.random((6, 64)).astype(np.float32)
    losses[1, 3], losses[2, 60:], losses[3, 0] = np.nan, np.inf, -np.inf

    def local(history, bucket, loss):
        return push_history(history, bucket, loss, axis_name="data")

    push = jax.jit(push_history)
    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh8, in_specs=(P(), P("data"), P("data")), out_specs=P())
    )
    one = many = init_history(n, size)
    for step, (bucket, loss) in enumerate(zip(buckets, losses, strict=True), 1):
        one, many = push(one, bucket, loss), sharded(many, bucket, loss)
        expected = _fifo(zip(buckets[:step], losses[:step], strict=True), n, size)
        for found, queue in zip(_oldest_first(one), expected, strict=True):
            np.testing.assert_array_equal(found, np.asarray(queue, np.float32))
        chex.assert_trees_all_equal(one, many)
    assert one.count.sum() == np.isfinite(losses).sum()


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_history_equals_the_published_one(golden, batch):
    reference = golden("iddpm_loss_second_moment_small")
    t, losses = reference["update_t"], reference["update_loss"].astype(np.float32)
    history, push = init_history(8, 3), jax.jit(push_history)
    for i in range(0, 64, batch):
        history = push(history, t[i : i + batch], losses[i : i + batch])
    np.testing.assert_allclose(_oldest_first(history), reference["history_final"], rtol=1e-6)


def test_history_pushes_under_vmap_and_scan():
    rng = np.random.default_rng(0)
    bucket, losses = rng.integers(0, 4, (2, 5, 9)).astype(np.int32), rng.random((2, 5, 9))
    losses = losses.astype(np.float32)

    def run(bucket, losses):
        def step(history, batch):
            return push_history(history, *batch), None

        return jax.lax.scan(step, init_history(4, 2), (bucket, losses))[0]

    both = jax.jit(jax.vmap(run))(bucket, losses)
    for i in range(2):
        found = _oldest_first(jax.tree.map(lambda x, i=i: x[i], both))
        expected = _fifo(zip(bucket[i], losses[i], strict=True), 4, 2)
        for row, queue in zip(found, expected, strict=True):
            np.testing.assert_array_equal(row, np.asarray(queue))


def test_history_errors():
    for n, size in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"got {n} and {size}"):
            init_history(n, size)


def test_unseen_buckets_are_interpolated():
    rng = np.random.default_rng(0)
    fill = jax.jit(fill_unseen)
    for share in (0.1, 0.5, 1.0):
        values = rng.random(30).astype(np.float32)
        seen = rng.random(30) < share
        seen[rng.integers(30)] = True
        expected = np.interp(np.arange(30), np.flatnonzero(seen), values[seen])
        found = fill(np.where(seen, values, np.nan), seen)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(fill(np.full(30, np.nan, np.float32), np.zeros(30, bool)), 0)
