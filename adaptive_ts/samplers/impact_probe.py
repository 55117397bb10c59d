"""A probe of the forward-mode sampler: the gradient of the objective, and its impact by stratum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_ts import collectives
from adaptive_ts.learning.impact import forward_impact, optimizer_response
from adaptive_ts.learning.over_timesteps import per_example
from adaptive_ts.learning.policy import beta_log_mass
from adaptive_ts.learning.statistics import summable
from adaptive_ts.timesteps.draws import Coupling, check_coupling, unit_draws
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.tables import Strata
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LossFn,
    Metrics,
    Params,
    PerBucket,
    PerExample,
    Scalar,
)

_TINY = 1e-12
METRICS = ("reward_mean", "reward_std", "entropy", "nonfinite")


class ImpactState(NamedTuple):
    """All that the sampler learns; one pytree, to be saved and restored with the model.

    Attributes:
      step: () int32, optimizer steps seen; it stands still while a probe waits for one that moves.
      impact: (n,) decayed sum of the scaled impacts.
      impact_weight: () its normaliser: impact / impact_weight is the average.
      loss: (n,) decayed sums of the objective's loss per bucket.
      loss_weight: (n,) their normalisers.
      report: metrics of the last probe, repeated until the next.
    """

    step: Scalar
    impact: PerBucket
    impact_weight: Scalar
    loss: PerBucket
    loss_weight: PerBucket
    report: Metrics


class Options(NamedTuple):
    objective: LossFn | None
    kappa: float
    every: int
    num_buckets: int
    num_examples: int
    temperature: float
    uniform_prob: float
    decay: float
    smooth: int
    fit: str
    jitter: bool
    chunk: int | None
    coupling: Coupling
    axis_name: AxisName
    bucket_sharding: jax.sharding.NamedSharding | None


class Model(NamedTuple):
    """What is being trained, before the step, on ``size`` examples of this device."""

    loss_fn: LossFn
    params: Params
    opt_state: optax.OptState
    optimizer: optax.GradientTransformation
    batch: Batch
    size: int


def probe_model(
    state: ImpactState,
    model: Model,
    key: Key,
    grid: TimeGrid,
    cells: Strata,
    options: Options,
) -> ImpactState:
    keys = jax.random.split(key, 5)
    axis_name, size = options.axis_name, model.size
    grads, loss, loss_weight = _objective_gradient(state, model, keys[:2], grid, cells, options)
    direction = optimizer_response(model.optimizer, grads, model.opt_state, model.params)
    total = size * collectives.axis_size(axis_name)
    chosen = jax.random.randint(keys[2], (options.num_examples,), 0, total)
    found = forward_impact(
        model.loss_fn,
        model.params,
        direction,
        collectives.take_examples(model.batch, chosen, size, axis_name, options.bucket_sharding),
        cells.jittered(keys[3]) if options.jitter else cells.timesteps,
        keys[4],
        chunk=options.chunk,
        axis_name=axis_name,
        sharding=options.bucket_sharding,
    )
    found = found.astype(jnp.float32)  # of a loss in float64: the state stays what it is
    known = summable(found)
    kept = jnp.where(known, found, 0.0)
    # One bucket that is not makes the scale of the others unsound: nothing is learned.
    sound = jnp.all(known)
    scaled = kept / (jnp.mean(jnp.abs(kept)) + _TINY)
    new = state._replace(
        impact=jnp.where(sound, options.decay * state.impact + scaled, state.impact),
        impact_weight=jnp.where(
            sound, options.decay * state.impact_weight + 1, state.impact_weight
        ),
        loss=loss,
        loss_weight=loss_weight,
    )
    p = law_of(new, cells.share, options)
    report = {
        "reward_mean": jnp.mean(kept),
        "reward_std": jnp.std(kept),
        "entropy": -jnp.sum(jax.scipy.special.xlogy(p, p / cells.share)),
        "nonfinite": jnp.sum(~known).astype(jnp.float32),
    }
    return new._replace(report=report)


def _objective_gradient(
    state: ImpactState,
    model: Model,
    keys: jax.Array,
    grid: TimeGrid,
    cells: Strata,
    options: Options,
) -> tuple[Params, PerBucket, PerBucket]:
    """grad J from one stratified batch, and the new averages of the loss per bucket."""
    axis_name, size = options.axis_name, model.size
    t = grid.to_t(unit_draws(keys[0], size, coupling="stratified", axis_name=axis_name))
    bucket = cells.to_stratum(t)
    indexed = hasattr(options.objective or model.loss_fn, "at")
    key = keys[1] if indexed else collectives.device_key(keys[1], axis_name)

    def losses_at(params: Params) -> PerExample:
        losses = (options.objective or model.loss_fn)(params, model.batch, t, key)
        return per_example(losses, size)

    def value(params: Params) -> tuple[Scalar, tuple[PerBucket, PerBucket]]:
        losses = losses_at(params).astype(jnp.float32)
        fixed = jax.lax.stop_gradient(losses)
        known = summable(fixed)
        zeros = jnp.zeros((options.num_buckets,), jnp.float32)
        added = zeros.at[bucket].add(jnp.where(known, fixed, 0.0))
        seen = zeros.at[bucket].add(known.astype(jnp.float32))
        added, seen = collectives.psum((added, seen), axis_name)
        loss = options.decay * state.loss + added
        weight = options.decay * state.loss_weight + seen
        scale = 1.0
        if options.kappa != 1:
            mean = jnp.maximum(loss / jnp.maximum(weight, _TINY), _TINY)[bucket]
            scale = mean ** jnp.float32(options.kappa - 1)
        return collectives.pmean(jnp.mean(scale * losses), axis_name), (loss, weight)

    grads, (loss, weight) = jax.grad(value, has_aux=True)(model.params)
    # As in the adaptive sampler: right whether or not shard_map has summed the gradients itself.
    return collectives.pmean(grads, axis_name), loss, weight


def law_of(state: ImpactState, share: PerBucket, options: Options) -> PerBucket:
    """(n,) the probabilities of the strata; ``share`` is what uniform timesteps give them."""
    num = options.num_buckets
    average = state.impact / jnp.maximum(state.impact_weight, 1.0)
    if options.smooth > 1:
        window = jnp.ones((options.smooth,), jnp.float32)
        sums = jnp.convolve(average, window, mode="same")
        average = sums / jnp.convolve(jnp.ones((num,), jnp.float32), window, mode="same")
    p = jax.nn.softmax(average / jnp.float32(options.temperature) + jnp.log(share))
    if options.fit == "beta":
        p = _beta_fit(p)
    return (1 - options.uniform_prob) * p + options.uniform_prob * share


def _beta_fit(p: PerBucket) -> PerBucket:
    """(n,) the masses of the Beta distribution over u with p's mean and variance."""
    num = p.shape[0]
    u = (jnp.arange(num, dtype=jnp.float32) + 0.5) / num
    mean = jnp.sum(p * u)
    variance = jnp.sum(p * (u - mean) ** 2) + 1 / (12 * num**2)  # within a stratum: uniform
    total = jnp.clip(mean * (1 - mean) / variance - 1, 0.2, 1e4)
    edges = jnp.arange(num, dtype=jnp.float32) / num
    a, b = (jnp.full((num,), x) for x in (mean * total, (1 - mean) * total))
    mass = jnp.exp(beta_log_mass(a, b, edges, edges + 1 / num))
    return mass / jnp.sum(mass)


def check_options(options: Options) -> None:
    """Raises ValueError for the first option that is out of its range."""
    for name in ("every", "num_buckets", "num_examples", "smooth", "chunk"):
        value = getattr(options, name)
        if value is None and name == "chunk":
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    _check_numbers(options)
    if options.smooth % 2 == 0:
        raise ValueError(
            f"smooth must be odd, for a window about each bucket; got {options.smooth}"
        )
    if options.fit not in ("free", "beta"):
        raise ValueError(f"fit must be 'free' or 'beta', got {options.fit!r}")
    if options.objective is not None and not callable(options.objective):
        raise ValueError(
            f"objective must be a per-example loss such as vlb_loss(...), or None for the "
            f"training loss, got {options.objective!r}"
        )
    check_coupling(options.coupling)
    if options.axis_name is not None and options.bucket_sharding is not None:
        raise ValueError(
            f"bucket_sharding is for the global view, but axis_name={options.axis_name!r} was "
            "given too: leave one of them out"
        )


def _check_numbers(options: Options) -> None:
    for name in ("temperature", "kappa", "uniform_prob", "decay"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < options.temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, got {options.temperature}")
    if not abs(options.kappa) < float("inf"):
        raise ValueError(f"kappa must be finite, got {options.kappa}; 1 is the plain sum")
    if not 0 <= options.uniform_prob <= 1:
        raise ValueError(f"uniform_prob must be in [0, 1], got {options.uniform_prob}")
    if not 0 <= options.decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {options.decay}")
