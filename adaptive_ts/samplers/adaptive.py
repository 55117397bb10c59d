"""The paper's sampler: a policy network proposes the timesteps, rewarded by what they buy."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from adaptive_ts import collectives
from adaptive_ts.learning import policy as policies
from adaptive_ts.learning import reinforce, selection
from adaptive_ts.learning.due import moved, probe_when_due
from adaptive_ts.learning.plain_arrays import check_plain
from adaptive_ts.learning.probe import Estimate
from adaptive_ts.samplers.adaptive_probe import (
    METRICS,
    AdaptiveState,
    Options,
    StepTaken,
    check_options,
    first_selection,
    probe_step,
)
from adaptive_ts.timesteps.grid import GridSample, TimeGrid
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


def adaptive(
    grid: TimeGrid,
    policy: policies.Policy,
    optimizer: optax.GradientTransformation,
    *,
    every: int = 40,
    num_selected: int = 2,
    history: int = 20,
    entropy_coef: float = 1e-2,
    estimate: Estimate = "auto",
    common_noise: bool = True,
    entropy: Literal["bonus", "in_reward"] = "bonus",
    reduce: Literal["mean", "sum"] = "mean",
    normalize_reward: bool = True,
    lagged_selection: bool = False,
    relative: bool = False,
    num_buckets: int = 25,
    jitter: bool = False,
    chunk: int | None = None,
    axis_name: AxisName = None,
    bucket_sharding: jax.sharding.NamedSharding | None = None,
) -> TimestepSampler:
    """Learns online which timesteps to train on, for each image.

    u_i ~ Beta(a, b) with (a, b) = policy(x_i), t_i = grid(u_i), all weights 1: the shift of the
    objective is intended (`importance_weighted` undoes it). Every ``every``-th optimizer step:

    1. the profile delta_{k, tau} of one random example joins a queue;
    2. S = the buckets whose column best explains the rows' totals (univariate F-regression);
    3. reward_i = mean over tau in S of L_tau(params; x_i) - L_tau(new_params; x_i);
    4. one step up E[log pi(u_i | x_i) reward_i] + entropy_coef * E[H(pi)].

    ``update`` needs the extras ``key``, ``batch``, ``loss_fn`` (the objective to lower: the
    paper's is `vlb_loss`), ``params`` and ``new_params``. Its extra ``probe=True/False`` decides
    at trace time whether this step probes, in place of the counter inside ``lax.cond``. A step
    that moved no parameter (gradients accumulated or skipped) can't be judged: it learns nothing,
    says ``probed`` 0, and the probe is due at the next. `mixed_with_uniform` tells it by
    ``uniform_prob`` that some draws were not its own: their scores are weighted by pi(u) over the
    mixture.

    One time per example, since the policy looks at one image: ``sample`` takes no ``shape``.

    The paper's text and its published code differ; each difference is an option, and
    ``docs/concepts/adaptive.md`` says which value is whose.

    Args:
      grid: the time grid.
      policy: such as `conv_beta_policy`.
      optimizer: the policy's.
      every: f_S, optimizer steps from one probe to the next.
      num_selected: |S|; the paper has 3. With 2, and 25 buckets, the policy gradient points the
        same way (cosine .97) at six tenths of the cost.
      history: |Q|, rows in the queue of profiles.
      entropy_coef: weight of the entropy bonus, in units of the (normalised) reward.
      estimate: of the decreases, as in `decrease_on_batch`: ``"difference"``, ``"directional"``,
        or ``"auto"``: the derivative where the model computes in less than float32.
      common_noise: the same noise before and after the step.
      entropy: a plain ``"bonus"``, or ``"in_reward"``: a part of the reward.
      reduce: ``"mean"`` or ``"sum"`` of the decreases over S.
      normalize_reward: by its running mean and standard deviation.
      lagged_selection: reward by the S of the previous probe.
      relative: probe log L instead of L.
      num_buckets: equal strata of u that a profile covers; at most T of them.
      jitter: draw the timestep of each stratum instead of taking its midpoint.
      chunk: buckets of a profile that a device evaluates at once; None for all.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
      bucket_sharding: in global view, how the batch's leading axis is split: the devices share
        the buckets of a profile in the same way.

    Returns:
      A `TimestepSampler` whose state is an `AdaptiveState`. Metrics: ``probed`` (1 where this
      step probed), and of the last probe ``reward_mean``, ``reward_std``, ``alpha_mean``,
      ``beta_mean``, ``entropy`` and ``nonfinite`` (rewards and profiles left out for it).

    Raises:
      ValueError: an option out of its range; from ``update``, parameters that are NNX variables.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adaptive_ts as ats
      >>> grid, policy = ats.discrete(1000), ats.learning.conv_beta_policy()
      >>> sampler = ats.adaptive(grid, policy, optax.adam(1e-3), every=40)
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> state = sampler.init(jax.random.key(0), batch)
      >>> print(state.selected, sampler.sample(jax.random.key(1), state, batch).t.shape)
      [ 6 18] (4,)

    Source: Kim et al., CVPR 2025 (arXiv 2411.09998), Algorithms 1 and 2, Eq. 14.
    """
    options = Options(
        every=every,
        num_selected=num_selected,
        history=history,
        entropy_coef=entropy_coef,
        estimate=estimate,
        common_noise=common_noise,
        entropy=entropy,
        reduce=reduce,
        normalize_reward=normalize_reward,
        lagged_selection=lagged_selection,
        relative=relative,
        num_buckets=min(num_buckets, grid.num_timesteps or num_buckets),
        jitter=jitter,
        chunk=chunk,
        axis_name=axis_name,
        bucket_sharding=bucket_sharding,
    )
    check_options(options)

    def init(key: Key, batch: Batch) -> AdaptiveState:
        params = policy.init(collectives.threefry(key), batch)
        with jax.numpy_dtype_promotion("standard"):
            opt_state = optimizer.init(params)
        return AdaptiveState(
            step=jnp.int32(0),
            policy=params,
            opt_state=_not_of(params, opt_state),
            queue=selection.init_queue(history, options.num_buckets),
            selected=first_selection(options),
            reward=reinforce.init_moments(),
            report={name: jnp.float32(0) for name in METRICS},
        )

    def draw(key: Key, state: AdaptiveState, batch: Batch) -> TimestepSample:
        a, b = policy.apply(state.policy, batch)
        index = collectives.example_index(a.shape[0], axis_name)
        own = collectives.on_rows(policies.beta_sample, a.shape[0], bucket_sharding)
        u = own(collectives.example_keys(key, index), a, b)
        return TimestepSample(grid.to_t(u), u, jnp.ones(u.shape, jnp.float32))

    def log_density(state: AdaptiveState, sample: TimestepSample, batch: Batch) -> PerExample:
        a, b = policy.apply(state.policy, batch)
        if sample.t.shape != a.shape:
            raise ValueError(
                f"adaptive has one density per example: got t {sample.t.shape} for {a.shape} images"
            )
        if grid.num_timesteps is None:
            return policies.beta_log_prob(a, b, sample.u)
        own = collectives.on_rows(policies.beta_log_mass, a.shape[0], bucket_sharding)
        mass = own(a, b, *grid.cell(sample.t))
        return mass + jnp.log(jnp.float32(grid.num_timesteps))

    def update(
        state: AdaptiveState,
        sample: TimestepSample,
        losses: PerExample,
        *,
        key: Key,
        batch: Batch,
        loss_fn: LossFn,
        params: Params,
        new_params: Params,
        probe: bool | None = None,
        uniform_prob: float = 0.0,
        **extra: Any,
    ) -> tuple[AdaptiveState, Metrics]:
        check_plain(params=params, new_params=new_params)
        state, *taken = collectives.detached((state, params, new_params, batch, sample))

        def probed(state: AdaptiveState) -> AdaptiveState:
            step_taken = StepTaken(loss_fn, *taken, uniform_prob=uniform_prob)
            own = collectives.threefry(key)
            return probe_step(state, step_taken, own, grid, policy, optimizer, options)

        return probe_when_due(
            state,
            probed,
            every=every,
            probe=probe,
            may=lambda: moved(params, new_params, axis_name),
        )

    return TimestepSampler(init, GridSample(grid, draw, single="adaptive"), log_density, update)


def _not_of(params: Params, opt_state: optax.OptState) -> optax.OptState:
    """An optimizer's state with copies where it holds the parameters: both may be donated."""
    held = {id(x) for x in jax.tree.leaves(params)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in held else x, opt_state)
