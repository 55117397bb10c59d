"""Per-timestep statistics of the losses: decayed sums, and the last few losses of each bucket."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.types import AxisName, PerBucket, PerExample, Scalar

_LIMIT = 1e15  # the squares of 1e8 such numbers have a finite sum in float32


def summable(values: jax.Array) -> jax.Array:
    """Whether each number can enter a sum of squares in float32: neither NaN nor above 1e15.

    What a diverging model's losses are compares with nothing, long before they are infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning.statistics import summable
      >>> print(summable(jnp.asarray([2.0, jnp.nan, -jnp.inf, 1e30])))
      [ True False False False]
    """
    return jnp.abs(values) < _LIMIT


def check_losses(losses: jax.Array, times: jax.Array) -> None:
    """Raises ValueError unless there is one loss per time (or per bucket of a time)."""
    if losses.shape != times.shape:
        raise ValueError(
            f"losses {losses.shape} for times {times.shape}: give one loss per time, unweighted, "
            "the mean over all axes after those of t"
        )


class LossStatistics(NamedTuple):
    """Decayed sums over the examples seen at each timestep bucket, each (n,) float32."""

    count: PerBucket
    total: PerBucket
    total_square: PerBucket


def init_statistics(num_buckets: int) -> LossStatistics:
    """Empty statistics over n buckets.

    Raises:
      ValueError: n below 1.

    Example:
      >>> import adaptive_ts as ats
      >>> print(ats.learning.init_statistics(3).count)
      [0. 0. 0.]
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1, got {num_buckets}")
    return LossStatistics(*(jnp.zeros((num_buckets,), jnp.float32) for _ in range(3)))


def update_statistics(
    statistics: LossStatistics,
    bucket: PerExample,
    losses: PerExample,
    *,
    decay: float = 1.0,
    axis_name: AxisName = None,
) -> LossStatistics:
    """Adds one batch; under an axis name the sums of all devices, the same on each.

    Args:
      statistics: from `init_statistics`.
      bucket: (b,) int32, from ``grid.to_bucket(t)``; any axes may come after b.
      losses: of the shape of ``bucket``; those that are not `summable` are left out.
      decay: factor on the past per call, in (0, 1]; 1 keeps plain totals.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Raises:
      ValueError: losses of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> stats = ats.learning.update_statistics(ats.learning.init_statistics(3), bucket, losses)
      >>> print(stats.count, stats.total)
      [1. 0. 2.] [1. 0. 6.]
    """
    check_losses(losses, bucket)
    known = summable(losses)
    kept = jnp.where(known, losses, 0.0).astype(jnp.float32)
    zeros = jnp.zeros(statistics.count.shape, jnp.float32)
    added = LossStatistics(
        zeros.at[bucket].add(known.astype(jnp.float32)),
        zeros.at[bucket].add(kept),
        zeros.at[bucket].add(kept * kept),
    )
    added = collectives.psum(added, axis_name)
    return LossStatistics(*(decay * old + new for old, new in zip(statistics, added, strict=True)))


def loss_mean(statistics: LossStatistics, *, unseen: float = jnp.nan) -> PerBucket:
    """(n,) mean loss per bucket; NaN, or another ``unseen``, where nothing was seen.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> empty = ats.learning.init_statistics(3)
      >>> print(ats.learning.loss_mean(ats.learning.update_statistics(empty, bucket, losses)))
      [ 1. nan  3.]
    """
    seen = statistics.count > 0
    return jnp.where(seen, statistics.total / jnp.where(seen, statistics.count, 1), unseen)


def loss_std(statistics: LossStatistics) -> PerBucket:
    """(n,) standard deviation of the per-example losses per bucket; NaN where nothing was seen.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> empty = ats.learning.init_statistics(3)
      >>> print(ats.learning.loss_std(ats.learning.update_statistics(empty, bucket, losses)))
      [ 0. nan  1.]
    """
    mean, seen = loss_mean(statistics), statistics.count > 0
    mean_square = statistics.total_square / jnp.where(seen, statistics.count, 1)
    return jnp.sqrt(jnp.maximum(mean_square - mean * mean, 0.0))


def fill_unseen(values: PerBucket, seen: PerBucket) -> PerBucket:
    """(n,) values, those of unseen buckets interpolated linearly between their seen neighbours.

    Beyond the first and the last seen bucket the values are constant; all are 0 where nothing
    was seen.

    Args:
      values: (n,) float32; those of unseen buckets are not looked at.
      seen: (n,) bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning.statistics import fill_unseen
      >>> values = jnp.asarray([jnp.nan, 1.0, jnp.nan, jnp.nan, 4.0])
      >>> print(fill_unseen(values, jnp.isfinite(values)))
      [1. 1. 2. 3. 4.]
    """
    n = values.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    left = jax.lax.cummax(jnp.where(seen, index, -1))
    right = jax.lax.cummin(jnp.where(seen, index, n), reverse=True)
    left, right = jnp.where(left >= 0, left, right), jnp.where(right < n, right, left)
    left, right = jnp.clip(left, 0, n - 1), jnp.clip(right, 0, n - 1)
    between = (index - left).astype(jnp.float32) / jnp.maximum(right - left, 1).astype(jnp.float32)
    known = jnp.where(seen, values, 0.0)
    return known[left] + between * (known[right] - known[left])


def count_nonfinite(losses: PerExample, *, axis_name: AxisName = None) -> Scalar:
    """() float32, how many losses of the global batch are not finite."""
    return collectives.psum(jnp.sum(~jnp.isfinite(losses), dtype=jnp.float32), axis_name)


class LossHistory(NamedTuple):
    """The last H losses of each timestep bucket, in a ring.

    Attributes:
      losses: (n, H) float32; the k-th loss that a bucket was given is in slot k mod H.
      count: (n,) int32, how many losses each bucket was given; it is full from H on.
    """

    losses: jax.Array
    count: PerBucket


def init_history(num_buckets: int, history: int) -> LossHistory:
    """An empty history of H losses for each of n buckets.

    Raises:
      ValueError: n or H below 1.

    Example:
      >>> import adaptive_ts as ats
      >>> print(ats.learning.init_history(2, 3).losses.shape)
      (2, 3)
    """
    if num_buckets < 1 or history < 1:
        raise ValueError(
            f"num_buckets and history must be at least 1, got {num_buckets} and {history}"
        )
    return LossHistory(
        jnp.zeros((num_buckets, history), jnp.float32), jnp.zeros((num_buckets,), jnp.int32)
    )


def push_history(
    history: LossHistory, bucket: PerExample, losses: PerExample, *, axis_name: AxisName = None
) -> LossHistory:
    """Adds one batch, first in, first out, in the order of the (global) batch.

    Args:
      history: from `init_history`.
      bucket: (b,) int32, from ``grid.to_bucket(t)``; any axes may come after b.
      losses: of the shape of ``bucket``; those that are not finite are left out.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``; the history of all devices'
        examples is then the same on each.

    Raises:
      ValueError: losses of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 0, 1, 0]), jnp.asarray([1.0, 2.0, 3.0, 4.0])
      >>> history = ats.learning.push_history(ats.learning.init_history(2, 2), bucket, losses)
      >>> print(history.losses, history.count)
      [[4. 2.]
       [3. 0.]] [3 1]

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), released code, which adds one loss
    after the other.
    """
    n, size = history.losses.shape
    check_losses(losses, bucket)
    bucket = collectives.all_gather(bucket.reshape(-1), axis_name)
    losses = collectives.all_gather(losses.reshape(-1).astype(jnp.float32), axis_name)
    bucket = jnp.where(jnp.isfinite(losses), bucket, n)  # n: left out
    order = jnp.argsort(bucket, stable=True)
    bucket, losses = bucket[order], losses[order]
    place = jnp.arange(bucket.shape[0], dtype=jnp.int32)
    first = jnp.append(True, bucket[1:] != bucket[:-1])
    rank = place - jax.lax.cummax(jnp.where(first, place, 0))
    added = jnp.zeros((n,), jnp.int32).at[bucket].add(1, mode="drop")
    # Of more than H losses of one bucket only the last H stay: no slot is written twice.
    last = rank >= added.at[bucket].get(mode="clip") - size
    slot = (history.count.at[bucket].get(mode="clip") + rank) % size
    row = jnp.where(last, bucket, n)
    return LossHistory(history.losses.at[row, slot].set(losses, mode="drop"), history.count + added)
