"""google/hackable_diffusion: fixed laws as its time samplers, and its losses for learned ones.

Needs the package (Python 3.12): ``pip install 'adaptive-ts[hackable-diffusion]'``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from hackable_diffusion import hd
from kauldron import kd

from adaptive_ts.timesteps.grid import GridSample
from adaptive_ts.types import Along, Batch, Key, LossFn, Params, PerExample, TimestepSampler

_COLLECTION, _WEIGHT = "timesteps", "timestep_weight"
_EXAMPLE = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)}


@dataclasses.dataclass(kw_only=True, frozen=True)
class LawTimeSampler(hd.training.time_sampling.TimeSampler):
    """A ``TimeSampler`` that draws from a fixed law of ours, in continuous time.

    ``JointNestedTimeSampler`` hands one key to all its leaves: of one law, batch size and ``axes``
    they get equal times, of different laws times of equal rank. ``NestedTimeSampler`` hands each a
    key of its own.

    Attributes:
      sampler: a sampler without state and with weights 1, on `continuous` time within [0, 1].
      axes: the axes of the data that times are drawn for, axis 0 among them.
      along: how the times of an example go together along ``axes``, as in ``sampler.sample``.

    Raises:
      ValueError: when built, for a sampler that has a state or weights (this package has no place
        for either) or whose t is not a real number in [0, 1]; for axes without 0; for an unknown
        ``along``.

    Source: its own samplers, hackable_diffusion 1.0.1, ``lib/training/time_sampling.py``.
    """

    sampler: TimestepSampler
    axes: tuple[int, ...] = (0,)
    along: Along = "independent"

    def __post_init__(self) -> None:
        if 0 not in self.axes:
            raise ValueError(f"axes must have axis 0, the batch's, among them, got {self.axes}")
        _check_law(self.sampler)
        draw = partial(self.sampler.sample, shape=(1,), along=self.along)
        state = self.sampler.init(jax.random.key(0), _EXAMPLE)
        jax.eval_shape(draw, jax.random.key(0), state, _EXAMPLE)  # raises for an unknown along

    def __call__(self, key: Key, data_spec: jax.Array) -> jax.Array:
        """Times (B, 1, ..., 1), or with the extents of ``axes`` where they are kept, float32."""
        if not hasattr(data_spec, "shape"):
            raise ValueError(
                f"one LawTimeSampler draws for one array, got a {type(data_spec).__name__}: give "
                "NestedTimeSampler one for each of its leaves"
            )
        batch = {"image": data_spec}
        shape = _kept(data_spec.shape, self.axes)
        extra = tuple(data_spec.shape[axis] for axis in _sorted(self.axes, data_spec.ndim)[1:])
        options = {"shape": extra, "along": self.along} if extra else {}
        state = self.sampler.init(key, batch)  # no arrays
        return self.sampler.sample(key, state, batch, **options).t.reshape(shape)


@dataclasses.dataclass(kw_only=True, frozen=True, eq=False)
class GivenTimes(hd.training.time_sampling.TimeSampler):
    """The ``TimeSampler`` of times that were drawn elsewhere.

    Attributes:
      times: (b,), or (b, ...) with the extents of ``axes``.
      axes: the axes of the data that there are times for, axis 0 among them.
    """

    times: PerExample
    axes: tuple[int, ...] = (0,)

    def __call__(self, key: Key, data_spec: jax.Array) -> jax.Array:
        """The times, with an axis for each of the data's."""
        return self.times.reshape(_kept(data_spec.shape, self.axes))


def example_loss(model: Any, loss: Any, *, axes: tuple[int, ...] = (0,)) -> LossFn:
    """The per-example loss of a ``Diffusion``, its timesteps an argument.

    Args:
      model: a ``hackable_diffusion.kdiff.core.Diffusion``, whose keys (``x0="batch.image"``) say
        what it reads; its own ``time_sampler`` is not used.
      loss: its loss, (preds, targets, time) -> (b,), such as ``hd.training.SiD2Loss``.
      axes: the axes of the data that times are drawn for.

    Returns:
      ``loss_fn(params, batch, t, key) -> (b,)``. Random streams are "default" and "dropout"; the
      model has no collections but its parameters.

    Source: hackable_diffusion 1.0.1, ``kdiff/core.py``.
    """

    def loss_fn(params: Params, batch: Batch, t: PerExample, key: Key) -> PerExample:
        timed = model.clone(time_sampler=GivenTimes(times=t, axes=axes))
        streams = dict(zip(("default", "dropout"), jax.random.split(key), strict=True))
        inputs = kd.kontext.resolve_from_keyed_obj({"batch": batch}, model)
        out = timed.apply({"params": params}, **inputs, rngs=streams, is_training_property=True)
        return _losses(loss, out)

    return loss_fn


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class SampledTrainStep(kd.train.TrainStep):
    """Kauldron's train step of a ``Diffusion`` whose timesteps are drawn, and learned, by ours.

    The model's own ``time_sampler`` is not used. The sampler's state is a collection of the train
    state, "timesteps", and so in its checkpoints; the timesteps' weights reach the loss as its
    mask, normalized by values, so that it stays their mean.

    Attributes:
      sampler: any sampler of ours, on `continuous` time within [0, 1].
      loss: the name, among ``aux.losses``, of the ``KauldronLossWrapper``.

    Raises:
      ValueError: when traced, a loss that has a mask of its own.

    Source: ours; kauldron 1.4.4, ``train/train_step.py``, says ``_step`` may be overwritten.
    """

    sampler: TimestepSampler
    loss: str = "diffusion_loss"

    def init(self, elem_spec: Any, **options: Any) -> Any:
        """Kauldron's train state, with the sampler's."""
        state = super().init(elem_spec, **options)
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), elem_spec)
        key, _ = jax.random.split(self.rng_streams.init_rngs()["default"])  # kauldron's, to JAX's
        # Copies: kauldron donates its state, in which no two leaves may share a buffer.
        return self._with(state, jax.tree.map(jnp.copy, self.sampler.init(key, spec)))

    def _with(self, state: Any, sampler_state: Any) -> Any:
        return state.replace(
            collections={**state.collections, _COLLECTION: {"state": sampler_state}}
        )

    def _step(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        rest = {k: v for k, v in state.collections.items() if k != _COLLECTION}
        sampler_state = state.collections[_COLLECTION]["state"]
        key_t, key = jax.random.split(self.rng_streams.train_rngs(state.step)["default"])
        draw = self.sampler.sample(key_t, sampler_state, batch)
        # Kauldron's step, of this model and loss but with these times and weights.
        wrapper = self.aux.losses[self.loss]
        if wrapper.mask is not None:
            raise ValueError(
                f"the loss {self.loss!r} has mask={wrapper.mask!r}, where the timesteps' weights "
                "belong: leave it None, and mask by a loss of your own"
            )
        weighted = dataclasses.replace(wrapper, mask=f"batch.{_WEIGHT}", normalize_by="values")
        losses = {**self.aux.losses, self.loss: weighted}
        step = dataclasses.replace(
            self,
            model=self.model.clone(time_sampler=GivenTimes(times=draw.t)),
            aux=dataclasses.replace(self.aux, losses=losses),
        )
        new, context = super(SampledTrainStep, step)._step(
            state.replace(collections=rest), {**batch, _WEIGHT: draw.weight}
        )
        sampler_state, _ = self.sampler.update(
            sampler_state,
            draw,
            _losses(wrapper.loss, context.preds),
            key=key,
            batch=batch,
            loss_fn=example_loss(self.model, wrapper.loss),
            params=state.params,
            new_params=new.params,
            opt_state=state.opt_state,
        )
        return self._with(new, sampler_state), context


def _losses(loss: Any, out: Any) -> PerExample:
    """(b,) of what a ``Diffusion`` returns."""
    return loss(preds=out["output"], targets=out["target"], time=out["noise_info"]["time"])


def _check_law(sampler: TimestepSampler) -> None:
    learned = "; in a train step of your own use adaptive_ts.integrations.sampled_loss"
    sample = sampler.sample
    if not isinstance(sample, GridSample):
        raise ValueError("this sampler does not name its time grid: make its sample a GridSample")
    T = sample.grid.num_timesteps
    if T is not None:
        raise ValueError(
            f"this sampler draws integer timesteps below T={T}, and times here are real numbers "
            "in [0, 1]: build it on continuous()"
        )
    _check_stateless(sampler, learned)
    if sample.proposal is not None:
        raise ValueError(
            "this sampler is importance weighted, and a TimeSampler has no channel for weights: "
            f"give the sampler without importance_weighted{learned}"
        )
    if sample.weigh is not None:
        raise ValueError(
            "this sampler weights its losses (with_weighting or with_density_of), and a "
            f"TimeSampler has no channel for weights: put the weighting into the loss{learned}"
        )
    with jax.ensure_compile_time_eval():
        low, high = map(float, sample.grid.to_t(jnp.asarray([0.0, 1.0], jnp.float32)))
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"this sampler's t goes from {low:g} to {high:g}, and times here are in [0, 1]: build "
            "it on such a grid, as continuous(t_min=1e-4, t_max=1 - 1e-4)"
        )


def _check_stateless(sampler: TimestepSampler, remedy: str) -> None:
    said = f"this sampler has a state, which a TimeSampler cannot carry from step to step{remedy}"
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state = jax.eval_shape(sampler.init, key, _EXAMPLE)
    except Exception as error:  # only a state is made from the batch's leaves
        raise ValueError(said) from error
    if jax.tree.leaves(state):
        raise ValueError(said)


def _sorted(axes: tuple[int, ...], ndim: int) -> list[int]:
    return sorted(axis % ndim for axis in axes)


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with 1 for all axes but these."""
    kept = _sorted(axes, len(shape))
    return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))
