"""The contract: what a timestep sampler is, and what it is handed.

Axis glossary, used in every signature of this package:

* ``b``  batch (of this device, when an ``axis_name`` is given)
* ``n``  buckets of the time grid
* ``s``  selected timesteps

What belongs to a time is ``(b, *shape)`` where ``sample`` was given a shape: one per frame, say.

t grows with noise. Log-SNR is natural. VLB terms are in bits per dimension.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeAlias

import jax

Params: TypeAlias = Any  # a pytree of arrays
Batch: TypeAlias = Any  # a pytree of arrays; per-example leaves lead with axis b
State: TypeAlias = Any  # a pytree of arrays
Key: TypeAlias = jax.Array  # a typed key, or an old-style uint32 key
AxisName: TypeAlias = str | tuple[str, ...] | None

Scalar: TypeAlias = jax.Array  # ()
PerExample: TypeAlias = jax.Array  # (b,); (b, *shape) where it belongs to a time
PerBucket: TypeAlias = jax.Array  # (n,)
Selected: TypeAlias = jax.Array  # (s,)
Metrics: TypeAlias = dict[str, Scalar]

Weighting: TypeAlias = Callable[[PerExample], PerExample]  # log-SNR -> loss weight

Along: TypeAlias = Literal["independent", "equal", "increasing"]

_Extra = ParamSpec("_Extra")
_Axes = ParamSpec("_Axes")


class TimestepSample(NamedTuple):
    """One drawn timestep per example, or several: all are (b,), or ``(b, *shape)`` where asked for.

    Attributes:
      t: (b,) what the loss sees: int32 in [0, T), or float32 in (t_min, t_max).
      u: (b,) float32, the draw on (0, 1) before the grid maps it to ``t``.
      weight: (b,) float32, the only channel to the objective: train on
        ``mean(weight * losses)``.
      r: (b,) a second time of the same kind as ``t``, of a law that draws two; None otherwise.
    """

    t: PerExample
    u: PerExample
    weight: PerExample
    r: PerExample | None = None


class LossFn(Protocol):
    """A per-example, unweighted training loss; the timesteps are an argument.

    ``loss_fn(params, batch, t, key) -> (b,)``, of t's shape. It draws its noise from the one key
    it gets.
    """

    def __call__(self, params: Params, batch: Batch, t: PerExample, key: Key, /) -> PerExample: ...


class IndexedLossFn(LossFn, Protocol):
    """A ``LossFn`` whose noise can be chosen by example, such as an ``ExampleLoss``.

    ``at(params, batch, t, key, index) -> (b,)``: (b,) int32 ``index`` names each example's noise.
    """

    @property  # read-only: a method and a field of a frozen dataclass both will do
    def at(self) -> Callable[[Params, Batch, PerExample, Key, PerExample], PerExample]: ...


class InitFn(Protocol):
    """``init(key, batch) -> state``; the batch may be a pytree of ``jax.ShapeDtypeStruct``."""

    def __call__(self, key: Key, batch: Batch) -> State: ...


class SampleFn(Protocol[_Axes]):
    """``sample(key, state, batch, *, shape=(), along="independent") -> TimestepSample``.

    ``shape`` are the axes after b, as of a ``GridSample``. A sampler of one's own may leave out
    both keywords.
    """

    def __call__(
        self, key: Key, state: State, batch: Batch, *args: _Axes.args, **axes: _Axes.kwargs
    ) -> TimestepSample: ...


class LogDensityFn(Protocol):
    """``log_density(state, sample, batch) -> (b,)``, relative to uniform over the grid's t.

    ``exp(-log_density)`` is the importance weight; on a discrete grid it is 1 / (T p_t). Of t's
    shape; with increasing times that of a time picked at random among an example's.
    """

    def __call__(self, state: State, sample: TimestepSample, batch: Batch) -> PerExample: ...


class UpdateFn(Protocol[_Extra]):
    """``update(state, sample, losses, **extra) -> (state, metrics)``.

    ``extra`` may hold ``key``, ``batch``, ``loss_fn``, ``params``, ``new_params``, ``opt_state``
    and ``probe``. A sampler declares those it needs and ignores the rest. `mixed_with_uniform` adds
    ``uniform_prob``, the share of draws that are uniform, for what learns from its own draws.
    Losses have t's shape.
    """

    def __call__(
        self,
        state: State,
        sample: TimestepSample,
        losses: PerExample,
        *args: _Extra.args,
        **extra: _Extra.kwargs,
    ) -> tuple[State, Metrics]: ...


class TimestepSampler(NamedTuple):
    """A timestep sampler: four pure functions. Its state is a pytree the caller carries.

    Example:
      >>> import jax
      >>> import adaptive_ts as ats
      >>> sampler = ats.uniform(ats.discrete(1000))
      >>> batch = {"image": jax.numpy.zeros((8, 32, 32, 3))}
      >>> state = sampler.init(jax.random.key(0), batch)
      >>> sampler.sample(jax.random.key(1), state, batch).t.shape
      (8,)
    """

    init: InitFn
    sample: SampleFn[...]
    log_density: LogDensityFn
    update: UpdateFn[...]
