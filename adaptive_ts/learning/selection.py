"""Which timesteps speak for the whole: a queue of profiles and a masked F-regression."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_ts.learning.statistics import summable
from adaptive_ts.types import PerBucket, Scalar, Selected


class ProfileQueue(NamedTuple):
    """The last ``capacity`` profiles, a FIFO ring.

    Attributes:
      rows: (capacity, n) float32; one row per probe, what the step bought at each bucket.
      count: () int32, rows ever pushed; the next one goes to ``count % capacity``.
    """

    rows: jax.Array
    count: Scalar


def init_queue(capacity: int, n: int) -> ProfileQueue:
    """An empty queue.

    Args:
      capacity: rows kept, at least 1 (the paper keeps 20).
      n: buckets per row, at least 1.

    Returns:
      A ``ProfileQueue`` of zeros.

    Raises:
      ValueError: capacity or n below 1.

    Example:
      >>> from adaptive_ts.learning import selection
      >>> selection.init_queue(20, 100).rows.shape
      (20, 100)

    Source: Kim et al., CVPR 2025, arXiv 2411.09998, Sec. 4 (the queue Q).
    """
    for name, value in (("capacity", capacity), ("n", n)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    return ProfileQueue(jnp.zeros((capacity, n), jnp.float32), jnp.zeros((), jnp.int32))


def push_profile(queue: ProfileQueue, row: PerBucket) -> ProfileQueue:
    """Append a row, over the oldest one when full; a row that is not all `summable` is dropped.

    Args:
      queue: the queue.
      row: (n,) float, a profile.

    Returns:
      The queue with the row, or the same queue.

    Raises:
      ValueError: the row's shape is not (n,).

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import selection
      >>> queue = selection.push_profile(selection.init_queue(2, 3), jnp.array([1.0, 2.0, 3.0]))
      >>> int(queue.count), selection.filled(queue).tolist()
      (1, [True, False])
    """
    capacity, n = queue.rows.shape
    if row.shape != (n,):
        raise ValueError(f"row has shape {row.shape}; this queue takes rows of shape ({n},)")
    usable = jnp.all(summable(row))
    with_row = queue.rows.at[queue.count % jnp.int32(capacity)].set(row.astype(jnp.float32))
    return ProfileQueue(
        jnp.where(usable, with_row, queue.rows), queue.count + usable.astype(jnp.int32)
    )


def filled(queue: ProfileQueue) -> jax.Array:
    """Which rows hold a profile that says something: pushed, and not all zero.

    A profile is all zero after a step of learning rate 0, the first of a warm-up; the paper's
    code drops such rows too.

    Args:
      queue: the queue.

    Returns:
      (capacity,) bool.

    Example:
      >>> from adaptive_ts.learning import selection
      >>> selection.filled(selection.init_queue(3, 2)).tolist()
      [False, False, False]
    """
    place = jnp.arange(queue.rows.shape[0], dtype=jnp.int32)
    return (place < queue.count) & jnp.any(queue.rows != 0, axis=1)


def f_statistic(
    rows: jax.Array,
    target: jax.Array | None,
    mask: jax.Array,
    *,
    precision: str | None = None,
) -> PerBucket:
    """Univariate F statistic of the target on each column, over the masked rows.

    With r the correlation of a column with the target and m the number of masked rows,

      F = (m - 2) r^2 / (1 - r^2),

    where 1 - r^2 comes from explicit residuals. A constant column or target and m <= 2 give 0;
    a perfect fit gives a very large finite value, the same one for every perfect column.
    Elementwise products and sums, not a matrix product: columns that agree must tie exactly.

    Args:
      rows: (capacity, n) float; rows outside the mask may hold anything, NaN too.
      target: (capacity,) float, or None for the row totals, summed at the working precision.
      mask: (capacity,) bool.
      precision: "float64", in a local x64; "float32", for hardware without it; None for
        float32 on TPU and float64 elsewhere.

    Returns:
      (n,) float32.

    Raises:
      ValueError: shapes that do not fit, or an unknown precision.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import selection
      >>> rows = jnp.array([[0.0, 1.0, 5.0], [1.0, -1.0, 5.0], [2.0, 1.5, 5.0], [3.0, 0.0, 5.0]])
      >>> target = jnp.array([0.1, 0.9, 2.1, 2.9])
      >>> f = selection.f_statistic(rows, target, jnp.ones(4, bool))
      >>> [round(float(x), 3) for x in f]
      [288.0, 0.001, 0.0]

    Source: scikit-learn, feature_selection.f_regression; Kim et al., arXiv 2411.09998, Alg. 2.
    """
    if rows.ndim != 2 or mask.shape != rows.shape[:1]:
        raise ValueError(
            f"rows {rows.shape} and mask {mask.shape}: they must be (capacity, n) and (capacity,)"
        )
    if target is not None and target.shape != mask.shape:
        raise ValueError(f"target has shape {target.shape}; it must be {mask.shape}")
    if precision not in (None, "float64", "float32"):
        raise ValueError(f"precision is {precision!r}; it must be 'float64', 'float32' or None")
    if precision is None:
        precision = "float32" if jax.default_backend() == "tpu" else "float64"
    context = jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext()
    with context:
        dtype = jnp.dtype(precision)
        rows = jnp.where(mask[:, None], rows, 0).astype(dtype)
        x = _centred(rows, mask)
        # The totals of the centred columns: a large constant column must not round the rest away.
        if target is None:
            y = _centred(jnp.sum(x, axis=1, keepdims=True), mask)
        else:
            y = _centred(jnp.where(mask, target, 0).astype(dtype)[:, None], mask)
        dof = jnp.sum(mask.astype(dtype)) - 2
        return _f_of_centred(_unit(x), jnp.broadcast_to(_unit(y), x.shape), dof)


def _centred(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Columns minus their mean over the masked rows; a constant column becomes exactly 0."""
    inside = mask[:, None]
    count = jnp.maximum(jnp.sum(mask.astype(x.dtype)), 1)
    low = jnp.min(jnp.where(inside, x, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(inside, x, -jnp.inf), axis=0, keepdims=True)
    for _ in range(2):  # the second pass removes the rounding of the first mean
        x = jnp.where(inside, x - jnp.sum(x, axis=0, keepdims=True) / count, 0)
    return jnp.where(high > low, x, 0)


def _unit(x: jax.Array) -> jax.Array:
    """Columns scaled to a largest magnitude of 1: F has no scale; squares must not underflow."""
    largest = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    return x / jnp.where(largest > 0, largest, 1)


def _f_of_centred(x: jax.Array, y: jax.Array, dof: jax.Array) -> PerBucket:
    """F of centred columns x (capacity, n) and targets y (capacity, n), as float32."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=0, keepdims=True)

    xx, yy, xy = dot(x, x), dot(y, y), dot(x, y)
    safe_xx, safe_yy = jnp.where(xx > 0, xx, 1), jnp.where(yy > 0, yy, 1)
    residual = y
    for _ in range(2):  # the second pass removes what the rounding of the first slope left
        residual = residual - (dot(x, residual) / safe_xx) * x
    unexplained = dot(residual, residual) / safe_yy
    # Below the floor the residual is rounding: scikit-learn's is one ulp of 1, and residuals
    # formed in float32 are a few ulps each, squared.
    eps = jnp.finfo(x.dtype).eps
    floor = eps if x.dtype == jnp.float64 else (4 * eps) ** 2
    f = dof * (xy / safe_xx * (xy / safe_yy)) / jnp.maximum(unexplained, floor)
    return jnp.where((dof > 0) & (xx > 0) & (yy > 0), f, 0)[0].astype(jnp.float32)


def top_timesteps(scores: PerBucket, k: int) -> Selected:
    """Indices of the k largest scores, ascending; ties take the LARGEST index.

    That is the last k of a stable argsort, as in scikit-learn's ``SelectKBest``
    (``jax.lax.top_k`` takes the smallest index). NaN counts as the smallest score.

    Args:
      scores: (n,) float.
      k: how many, 1 <= k <= n.

    Returns:
      (k,) int32.

    Raises:
      ValueError: k out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import selection
      >>> selection.top_timesteps(jnp.array([1.0, 5.0, 1.0, 0.0, 1.0]), 3).tolist()
      [1, 2, 4]

    Source: scikit-learn, feature_selection.SelectKBest._get_support_mask.
    """
    n = scores.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be between 1 and the {n} scores")
    order = jnp.argsort(jnp.where(jnp.isnan(scores), -jnp.inf, scores), stable=True)
    return jnp.sort(order[n - k :]).astype(jnp.int32)


def select_timesteps(
    queue: ProfileQueue,
    k: int,
    current: Selected,
    *,
    min_rows: int = 3,
    precision: str | None = None,
) -> Selected:
    """The k timesteps whose column best predicts the row total.

    Args:
      queue: the queue of profiles.
      k: how many timesteps.
      current: (k,) int32, kept while fewer than ``min_rows`` rows are usable.
      min_rows: usable rows needed. With 2 rows the F test has no degree of freedom: every
        column ties at 0, and the published code then picks the last k timesteps.
      precision: see ``f_statistic``.

    Returns:
      (k,) int32, ascending.

    Raises:
      ValueError: k out of range, min_rows below 1, or current's shape not (k,).

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import selection
      >>> queue = selection.init_queue(20, 10)
      >>> selection.select_timesteps(queue, 3, jnp.array([1, 5, 8], jnp.int32)).tolist()
      [1, 5, 8]

    Source: Kim et al., CVPR 2025, arXiv 2411.09998, Alg. 2.
    """
    if current.shape != (k,):
        raise ValueError(f"current has shape {current.shape}; with k={k} it must be ({k},)")
    if min_rows < 1:
        raise ValueError(f"min_rows is {min_rows}; it must be at least 1 (3 for a sound F test)")
    usable = filled(queue)
    new = top_timesteps(f_statistic(queue.rows, None, usable, precision=precision), k)
    enough = jnp.sum(usable.astype(jnp.int32)) >= min_rows
    return jnp.where(enough, new, current.astype(jnp.int32))
