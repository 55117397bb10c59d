"""The time grid: how a draw u on (0, 1) becomes a timestep t, and which bucket t falls in."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.types import (
    Along,
    Batch,
    Key,
    LogDensityFn,
    PerBucket,
    PerExample,
    SampleFn,
    State,
    TimestepSample,
)

_MAX_TIMESTEPS = 2**22  # float32 draws still reach every timestep
_UNIT_EPS = 2.0**-24  # 1 - 2**-24 is the largest float32 below 1


class TimeGrid(NamedTuple):
    """Pure maps between draws u on (0, 1), timesteps t and buckets.

    Attributes:
      num_buckets: n; T on a discrete grid.
      num_timesteps: T on a discrete grid, None in continuous time.
      to_t: u (b,) float32 -> t (b,): int32 in [0, T), or float32 in (t_min, t_max).
      to_u: t (b,) -> u (b,) float32, the centre of the cell that maps to t (continuous: exact).
      to_bucket: t (b,) -> bucket (b,) int32 in [0, n).
      cell: t (b,) -> (lo, hi), each (b,) float32: the draws that map to t's bucket.
      uniform_log_density: t (b,) -> (b,) float32, log(T * (hi - lo)): what a uniform u gives t,
        relative to uniform over the timesteps (0 but on a grid with ``rounding="nearest"``).
    """

    num_buckets: int
    num_timesteps: int | None
    to_t: Callable[[PerExample], PerExample]
    to_u: Callable[[PerExample], PerExample]
    to_bucket: Callable[[PerExample], PerExample]
    cell: Callable[[PerExample], tuple[PerExample, PerExample]]
    uniform_log_density: Callable[[PerExample], PerExample]


@dataclasses.dataclass(frozen=True, eq=False)  # not a tuple: jit needs weak references to it
class GridSample:
    """A sampler's ``sample`` that names its grid and its weights, for wrappers and plots.

    Called as ``sample(key, state, batch, shape=(), along="independent")``. ``shape`` are axes of
    the times after b, such as (frames,), or (2,) for two modalities; t, u and weight are then
    ``(b, *shape)``. The times of one example are

    * ``"independent"``: each is a draw of its own, and across the batch the draws at a position
      are coupled as those of a batch without a shape are;
    * ``"equal"``: one draw, repeated;
    * ``"increasing"``: independent draws in rising order along the last axis. All of an example's
      times together follow the law. The k-th of them does not, so ``log_density`` and importance
      weights are those of a time picked at random among them: right for a mean over the axis.

    Raises:
      ValueError: a shape that is no tuple of positive integers, an unknown ``along``, or a sampler
        that draws one time per example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler, batch = ats.uniform(ats.discrete(1000)), {"image": jnp.zeros((4, 16, 8, 8, 1))}
      >>> draw = sampler.sample(jax.random.key(0), (), batch, shape=(16,), along="increasing")
      >>> print(draw.t.shape, bool(jnp.all(jnp.diff(draw.t) >= 0)))
      (4, 16) True

    Attributes:
      grid: the time grid.
      draw: (key, state, batch) -> `TimestepSample` of (b,), its weights without the two factors
        below.
      weigh: (state, sample, batch) -> (b,), a factor of the weights; None for 1.
      proposal: the ``log_density`` whose ratio to uniform the weights undo, exp(-log_density);
        None where the draws are not importance weighted. Apart from ``weigh``, so that a wrapper
        that changes the density can change the ratio with it.
      single: the name of a sampler that draws one time per example and has no meaning for more;
        None where times of any shape can be drawn.
    """

    grid: TimeGrid
    draw: SampleFn[...]
    weigh: LogDensityFn | None = None
    proposal: LogDensityFn | None = None
    single: str | None = None

    def factor(self, state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        """The factor of the weights that ``t`` and ``u`` determine, of their shape."""
        factor = jnp.ones(sample.t.shape, jnp.float32)
        if self.weigh is not None:
            factor = factor * self.weigh(state, sample, batch)
        if self.proposal is not None:
            log_density = jax.lax.stop_gradient(self.proposal(state, sample, batch))
            factor = factor * jnp.exp(-log_density)
        return factor

    def __call__(
        self,
        key: Key,
        state: State,
        batch: Batch,
        *,
        shape: tuple[int, ...] = (),
        along: Along = "independent",
    ) -> TimestepSample:
        state, batch = collectives.detached((state, batch))
        sample = self._drawn(collectives.threefry(key), state, batch, shape, along)
        if self.weigh is None and self.proposal is None:
            return sample
        return sample._replace(weight=sample.weight * self.factor(state, sample, batch))

    def _drawn(
        self, key: Key, state: State, batch: Batch, shape: tuple[int, ...], along: Along
    ) -> TimestepSample:
        """``draw`` at each position of the added axes, put in order where that is asked for."""
        _check_axes(shape, along)
        if not shape:
            return self.draw(key, state, batch)
        if self.single is not None:
            raise ValueError(
                f"{self.single} draws one time per example, got shape={shape}: leave it out and "
                "let the loss repeat t along its axes, or take a law that is fixed or learned from "
                "losses"
            )

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x.reshape(x.shape + (1,) * len(shape)), x.shape + shape)

        if along == "equal":
            return jax.tree.map(repeated, self.draw(key, state, batch))
        keys = collectives.example_keys(key, jnp.arange(math.prod(shape), dtype=jnp.int32))
        sample = jax.vmap(lambda key: self.draw(key, state, batch), out_axes=1)(keys)
        sample = jax.tree.map(lambda x: x.reshape(x.shape[0], *shape), sample)
        if along == "independent":
            return sample
        # By t, then u: what belongs to one time stays together.
        columns, fields = jax.tree.flatten(sample)
        return jax.tree.unflatten(fields, jax.lax.sort(columns, dimension=-1, num_keys=2))


def _check_axes(shape: tuple[int, ...], along: Along) -> None:
    if along not in get_args(Along):
        raise ValueError(f"along must be one of {get_args(Along)}, got {along!r}")
    whole = isinstance(shape, tuple) and all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 1
        for size in shape
    )
    if not whole:
        raise ValueError(
            f"shape must be a tuple of positive integers, the axes after the batch's such as "
            f"(16,), got {shape!r}"
        )


def open_unit(u: PerExample) -> PerExample:
    """u moved into the open interval (0, 1), by at most 2**-24."""
    return jnp.clip(u, _UNIT_EPS, 1 - _UNIT_EPS)


def discrete(num_timesteps: int, *, rounding: Literal["floor", "nearest"] = "floor") -> TimeGrid:
    """T integer timesteps: t = floor(u T), or t = round(u (T - 1)).

    With ``"nearest"``, as in the published code of the adaptive sampler, the first and the last
    timestep have half the mass of the others.

    Args:
      num_timesteps: T, from 2 to 2**22.
      rounding: ``"floor"`` (equal cells) or ``"nearest"``.

    Returns:
      A `TimeGrid` with n = T buckets.

    Raises:
      ValueError: T out of range, or an unknown rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> grid = ats.discrete(1000)
      >>> print(grid.to_t(jnp.asarray([0.0004, 0.5, 0.9999])))
      [  0 500 999]

    Source: Kim et al., CVPR 2025 (arXiv 2411.09998), released code, ``sample_timesteps``.
    """
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int | np.integer):
        raise ValueError(f"num_timesteps must be an integer, got {num_timesteps!r}")
    if not 2 <= num_timesteps <= _MAX_TIMESTEPS:
        raise ValueError(
            f"num_timesteps must be from 2 to {_MAX_TIMESTEPS}, got {num_timesteps}; "
            "for more levels use continuous(num_buckets)"
        )
    if rounding not in ("floor", "nearest"):
        raise ValueError(f"rounding must be 'floor' or 'nearest', got {rounding!r}")
    T = int(num_timesteps)
    scale, shift = (T, 0.0) if rounding == "floor" else (T - 1, 0.5)

    def to_t(u: PerExample) -> PerExample:
        return jnp.clip(jnp.floor(u * scale + shift), 0, T - 1).astype(jnp.int32)

    def cell(t: PerExample) -> tuple[PerExample, PerExample]:
        first = t.astype(jnp.float32) - shift
        return jnp.maximum(first / scale, 0.0), jnp.minimum((first + 1) / scale, 1.0)

    def to_u(t: PerExample) -> PerExample:
        lo, hi = cell(t)
        return (lo + hi) / 2

    def uniform_log_density(t: PerExample) -> PerExample:
        if rounding == "floor":
            return jnp.zeros(t.shape, jnp.float32)
        end = (t == 0) | (t == T - 1)
        return jnp.where(
            end, np.float32(np.log(T / (2 * (T - 1)))), np.float32(np.log(T / (T - 1)))
        )

    return TimeGrid(T, T, to_t, to_u, lambda t: t.astype(jnp.int32), cell, uniform_log_density)


def continuous(num_buckets: int = 100, *, t_min: float = 0.0, t_max: float = 1.0) -> TimeGrid:
    """Continuous time: t = t_min + u (t_max - t_min), cut into equal buckets for statistics.

    Args:
      num_buckets: n, at least 1.
      t_min: lower end of the (open) time interval; a margin above 0 where log-SNR diverges.
      t_max: upper end.

    Returns:
      A `TimeGrid` with n buckets and ``num_timesteps=None``.

    Raises:
      ValueError: n below 1, or ends that are not finite and increasing.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> grid = ats.continuous(10, t_min=0.0, t_max=2.0)
      >>> print(grid.to_t(jnp.asarray([0.25])), grid.to_bucket(jnp.asarray([0.5])))
      [0.5] [2]
    """
    if isinstance(num_buckets, bool) or not isinstance(num_buckets, int | np.integer):
        raise ValueError(f"num_buckets must be an integer, got {num_buckets!r}")
    if not 1 <= num_buckets <= _MAX_TIMESTEPS:
        raise ValueError(f"num_buckets must be from 1 to {_MAX_TIMESTEPS}, got {num_buckets}")
    if not (np.isfinite(t_min) and np.isfinite(t_max) and t_min < t_max):
        raise ValueError(f"t_min must be below t_max, both finite, got {t_min} and {t_max}")
    n, low, high = int(num_buckets), np.float32(t_min), np.float32(t_max)
    first, last = np.nextafter(low, high), np.nextafter(high, low)

    def to_t(u: PerExample) -> PerExample:
        return jnp.clip(low + u * (high - low), first, last)

    def to_u(t: PerExample) -> PerExample:
        return (t - low) / (high - low)

    def to_bucket(t: PerExample) -> PerExample:
        return jnp.clip(jnp.floor(to_u(t) * n), 0, n - 1).astype(jnp.int32)

    def cell(t: PerExample) -> tuple[PerExample, PerExample]:
        lo = to_bucket(t).astype(jnp.float32) / n
        return lo, lo + 1 / n

    def uniform_log_density(t: PerExample) -> PerExample:
        return jnp.zeros(t.shape, jnp.float32)

    return TimeGrid(n, None, to_t, to_u, to_bucket, cell, uniform_log_density)


def strata(grid: TimeGrid, num_strata: int, key: Key | None = None) -> PerBucket:
    """One timestep per equal stratum of u: its midpoint, or a uniform draw in it.

    Args:
      grid: the time grid.
      num_strata: n, how many strata.
      key: None for midpoints; a key for one independent draw per stratum.

    Returns:
      (n,) timesteps, increasing (with equal neighbours where n exceeds T).

    Example:
      >>> import adaptive_ts as ats
      >>> print(ats.timesteps.strata(ats.discrete(1000), 4))
      [125 375 625 875]
    """
    offset = 0.5
    if key is not None:
        offset = jax.random.uniform(collectives.threefry(key), (num_strata,), jnp.float32)
    u = (jnp.arange(num_strata, dtype=jnp.float32) + offset) / num_strata
    return grid.to_t(open_unit(u))
