"""Per-timestep statistics of the losses: a scatter on each device, then one psum."""

from typing import NamedTuple

import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.types import AxisName, PerBucket, PerExample


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
      >>> print(ats.init_statistics(3).count)
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
      bucket: (b,) int32, from ``grid.to_bucket(t)``.
      losses: (b,) per-example losses; those that are not finite are left out.
      decay: factor on the past per call, in (0, 1]; 1 keeps plain totals.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> stats = ats.update_statistics(ats.init_statistics(3), bucket, losses)
      >>> print(stats.count, stats.total)
      [1. 0. 2.] [1. 0. 6.]
    """
    finite = jnp.isfinite(losses)
    kept = jnp.where(finite, losses, 0.0).astype(jnp.float32)
    zeros = jnp.zeros(statistics.count.shape, jnp.float32)
    added = LossStatistics(
        zeros.at[bucket].add(finite.astype(jnp.float32)),
        zeros.at[bucket].add(kept),
        zeros.at[bucket].add(kept * kept),
    )
    added = collectives.psum(added, axis_name)
    return LossStatistics(*(decay * old + new for old, new in zip(statistics, added, strict=True)))


def loss_mean(statistics: LossStatistics) -> PerBucket:
    """(n,) mean loss per bucket; NaN where nothing was seen.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> print(ats.loss_mean(ats.update_statistics(ats.init_statistics(3), bucket, losses)))
      [ 1. nan  3.]
    """
    return jnp.where(statistics.count > 0, statistics.total / statistics.count, jnp.nan)


def loss_std(statistics: LossStatistics) -> PerBucket:
    """(n,) standard deviation of the per-example losses per bucket; NaN where nothing was seen.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> bucket, losses = jnp.asarray([0, 2, 2]), jnp.asarray([1.0, 2.0, 4.0])
      >>> print(ats.loss_std(ats.update_statistics(ats.init_statistics(3), bucket, losses)))
      [ 0. nan  1.]
    """
    mean = loss_mean(statistics)
    return jnp.sqrt(jnp.maximum(statistics.total_square / statistics.count - mean * mean, 0.0))
