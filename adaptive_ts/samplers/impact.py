"""The forward-mode sampler: how much a step at each timestep would lower the whole objective."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from adaptive_ts.collectives import detached, threefry
from adaptive_ts.learning.due import moved, probe_when_due
from adaptive_ts.learning.plain_arrays import check_plain
from adaptive_ts.samplers.impact_probe import (
    METRICS,
    ImpactState,
    Model,
    Options,
    check_options,
    law_of,
    probe_model,
)
from adaptive_ts.timesteps.draws import Coupling
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.laws import table_sampler
from adaptive_ts.timesteps.tables import strata_of
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LossFn,
    Metrics,
    Params,
    PerExample,
    TimestepSample,
    TimestepSampler,
)


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

    Every ``every``-th optimizer step, with l_t the extra ``loss_fn``, g = grad J from one
    stratified batch and P g what the model's own optimizer makes of g (`optimizer_response`):

    1. impact_b = <grad l_b, P g>, for all buckets in one forward-mode pass (`forward_impact`), on
       fresh examples and noise;
    2. impact / mean_b |impact_b| joins an exponential average;
    3. p_b = (1 - uniform_prob) softmax(average_b / temperature) + uniform_prob / n.

    All weights are 1: the shift of the training loss is intended (`importance_weighted` undoes
    it). ``update`` needs the extras ``key``, ``batch``, ``loss_fn``, ``params`` and ``opt_state``
    (both from before the step), and takes ``probe`` as `adaptive` does; with ``new_params`` a probe
    waits for a step that moved them. Why the options are what
    they are: ``docs/concepts/adaptive.md``.

    One time per example: ``sample`` takes no ``shape``, since the probes call the losses with (b,).

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
      ValueError: an option out of its range; from ``update``, NNX variables in place of arrays.

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
    options = Options(
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
    check_options(options)
    most = options.num_buckets - 1 + options.num_buckets % 2
    options = options._replace(smooth=min(smooth, most))
    cells = strata_of(grid, options.num_buckets)

    def init(key: Key, batch: Batch) -> ImpactState:
        # Each with a buffer of its own: the state may be donated.
        impact, loss, weight = (jnp.zeros((options.num_buckets,), jnp.float32) for _ in range(3))
        report = {name: jnp.float32(0) for name in METRICS}
        return ImpactState(jnp.int32(0), impact, jnp.float32(0), loss, weight, report)

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
        new_params: Params | None = None,
        probe: bool | None = None,
        **extra: Any,
    ) -> tuple[ImpactState, Metrics]:
        check_plain(params=params, opt_state=opt_state, new_params=new_params)
        given = (state, params, opt_state, batch, new_params)
        state, params, opt_state, batch, new_params = detached(given)

        def probed(state: ImpactState) -> ImpactState:
            model = Model(loss_fn, params, opt_state, optimizer, batch, sample.t.shape[0])
            return probe_model(state, model, threefry(key), grid, cells, options)

        def may() -> jax.Array:
            if new_params is None:
                return jnp.asarray(True)
            return moved(params, new_params, axis_name)

        return probe_when_due(state, probed, every=every, probe=probe, may=may)

    return table_sampler(
        grid,
        init,
        lambda state: cells.spread(law_of(state, cells.share, options)),
        update,
        coupling=coupling,
        axis_name=axis_name,
        single="impact",
    )
