"""The forward-mode sampler: how much a step at each timestep would lower the whole objective."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_ts import collectives
from adaptive_ts.learning.policy import beta_log_mass
from adaptive_ts.learning.probe import forward_impact, optimizer_response, probe_when_due
from adaptive_ts.learning.statistics import summable
from adaptive_ts.timesteps.draws import Coupling, check_coupling, unit_draws
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.laws import table_sampler
from adaptive_ts.timesteps.tables import Strata, strata_of
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
    TimestepSample,
    TimestepSampler,
)

_TINY = 1e-12
_METRICS = ("reward_mean", "reward_std", "entropy", "nonfinite")


class ImpactState(NamedTuple):
    """All that the sampler learns; one pytree, to be saved and restored with the model.

    Attributes:
      step: () int32, optimizer steps seen.
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


class _Options(NamedTuple):
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


def impact(
    grid: TimeGrid,
    optimizer: optax.GradientTransformation,
    *,
    objective: LossFn | None = None,
    kappa: float = 1.0,
    every: int = 40,
    num_buckets: int = 40,
    num_examples: int = 2,
    temperature: float = 2.0,
    uniform_prob: float = 0.1,
    decay: float = 0.9,
    smooth: int = 5,
    fit: Literal["free", "beta"] = "free",
    jitter: bool = False,
    chunk: int | None = None,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
    bucket_sharding: jax.sharding.NamedSharding | None = None,
) -> TimestepSampler:
    """Draws timesteps by how much a step on their loss would lower an objective over all of them.

    The objective is J_kappa = sum over buckets b of L_b^kappa / kappa, with L_b the mean of
    ``objective`` (a per-example loss) in bucket b of t; kappa = 0 is its limit, sum of log L_b.

    Every ``every``-th optimizer step, with l_t the extra ``loss_fn``, ``update`` the model's own
    optimizer and g = grad J from one stratified batch:

    1. impact_b = -<grad l_b, update(g) - update(0)>, for all buckets in one forward-mode pass
       (`forward_impact`), on fresh examples and noise;
    2. impact / (mean_b |impact_b| + tiny) joins an exponential average;
    3. p_b = (1 - uniform_prob) softmax(average_b / temperature) + uniform_prob / n.

    All weights are 1: the shift of the training loss is intended (`importance_weighted` undoes
    it). ``update`` needs the extras ``key``, ``batch``, ``loss_fn``, ``params`` and ``opt_state``
    (both from before the step), and takes ``probe`` as `adaptive` does. Why the options are what
    they are: ``docs/concepts/adaptive.md``.

    Args:
      grid: the time grid.
      optimizer: the model's own optax optimizer; its ``update`` is called with gradients, state
        and params only.
      objective: per-example loss that J is made of; None for the extra ``loss_fn``.
      kappa: the power in J.
      every: f_S, optimizer steps from one probe to the next.
      num_buckets: n, equal strata of u; at most T of them.
      num_examples: examples of the batch on which a bucket's impact is measured.
      temperature: of the softmax, in units of the mean absolute impact.
      uniform_prob: probability of a uniform draw.
      decay: of the averages, per probe.
      smooth: neighbouring buckets (an odd number, at most n are used) that the impact is averaged
        over; 1 for none.
      fit: ``"free"``, or ``"beta"``: the Beta distribution with the softmax's mean and variance.
      jitter: draw each bucket's timestep instead of taking its midpoint.
      chunk: buckets that a device evaluates at once; None for all.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
      bucket_sharding: in global view, how the batch's leading axis is split: lets the devices
        share the axis of buckets of the forward-mode pass in the same way.

    Returns:
      A `TimestepSampler` whose state is an `ImpactState`. Metrics: ``probed``, and of the last
      probe ``reward_mean`` and ``reward_std`` (of the impacts over the buckets, unscaled),
      ``entropy`` (of p, relative to uniform's 0) and ``nonfinite`` (impacts that were not
      `summable`; one is enough to leave out the probe).

    Raises:
      ValueError: an option out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adaptive_ts as ats
      >>> sampler = ats.impact(ats.discrete(1000), optax.adam(2e-4), every=40)
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> state = sampler.init(jax.random.key(0), batch)
      >>> print(sampler.sample(jax.random.key(1), state, batch).t.shape)
      (4,)

    Source: this library's own (`forward_impact`); the reward it takes the place of:
    Kim et al., CVPR 2025 (arXiv 2411.09998), Eq. 14.
    """
    options = _Options(
        objective=objective,
        kappa=kappa,
        every=every,
        num_buckets=min(num_buckets, grid.num_timesteps or num_buckets),
        num_examples=num_examples,
        temperature=temperature,
        uniform_prob=uniform_prob,
        decay=decay,
        smooth=smooth,
        fit=fit,
        jitter=jitter,
        chunk=chunk,
        coupling=coupling,
        axis_name=axis_name,
        bucket_sharding=bucket_sharding,
    )
    _check(options)
    most = options.num_buckets - 1 + options.num_buckets % 2
    options = options._replace(smooth=min(smooth, most))
    cells = strata_of(grid, options.num_buckets)

    def init(key: Key, batch: Batch) -> ImpactState:
        zeros = jnp.zeros((options.num_buckets,), jnp.float32)
        zero = jnp.float32(0)
        report = {name: zero for name in _METRICS}
        return ImpactState(jnp.int32(0), zeros, zero, zeros, zeros, report)

    def update(
        state: ImpactState,
        sample: TimestepSample,
        losses: PerExample,
        *,
        key: Key,
        batch: Batch,
        loss_fn: LossFn,
        params: Params,
        opt_state: optax.OptState,
        probe: bool | None = None,
        **extra: Any,
    ) -> tuple[ImpactState, Metrics]:
        def probed(state: ImpactState) -> ImpactState:
            model = _Model(loss_fn, params, opt_state, optimizer, batch)
            return _probe(state, model, key, grid, cells, options)

        return probe_when_due(state, probed, every=every, probe=probe)

    return table_sampler(
        grid,
        init,
        lambda state: cells.spread(_law(state, cells.share, options)),
        update,
        coupling=coupling,
        axis_name=axis_name,
    )


class _Model(NamedTuple):
    """What is being trained, before the step."""

    loss_fn: LossFn
    params: Params
    opt_state: optax.OptState
    optimizer: optax.GradientTransformation
    batch: Batch


def _probe(
    state: ImpactState,
    model: _Model,
    key: Key,
    grid: TimeGrid,
    cells: Strata,
    options: _Options,
) -> ImpactState:
    keys = jax.random.split(key, 5)
    axis_name, size = options.axis_name, collectives.batch_size(model.batch)
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
    p = _law(new, cells.share, options)
    report = {
        "reward_mean": jnp.mean(kept),
        "reward_std": jnp.std(kept),
        "entropy": -jnp.sum(jax.scipy.special.xlogy(p, p / cells.share)),
        "nonfinite": jnp.sum(~known).astype(jnp.float32),
    }
    return new._replace(report=report)


def _objective_gradient(
    state: ImpactState,
    model: _Model,
    keys: jax.Array,
    grid: TimeGrid,
    cells: Strata,
    options: _Options,
) -> tuple[Params, PerBucket, PerBucket]:
    """grad J from one stratified batch, and the new averages of the loss per bucket."""
    axis_name, size = options.axis_name, collectives.batch_size(model.batch)
    t = grid.to_t(unit_draws(keys[0], size, coupling="stratified", axis_name=axis_name))
    bucket = cells.to_stratum(t)
    indexed = hasattr(options.objective or model.loss_fn, "at")
    key = keys[1] if indexed else collectives.device_key(keys[1], axis_name)

    def losses_at(params: Params) -> PerExample:
        return (options.objective or model.loss_fn)(params, model.batch, t, key)

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


def _law(state: ImpactState, share: PerBucket, options: _Options) -> PerBucket:
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


def _check(options: _Options) -> None:
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


def _check_numbers(options: _Options) -> None:
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
