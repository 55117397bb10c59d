"""The paper's sampler: a policy network proposes the timesteps, rewarded by what they buy."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_ts import collectives
from adaptive_ts.learning import policy as policies
from adaptive_ts.learning import probe as probes
from adaptive_ts.learning import reinforce, selection
from adaptive_ts.learning.statistics import summable
from adaptive_ts.timesteps.grid import GridSample, TimeGrid, strata
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    LossFn,
    Metrics,
    Params,
    PerExample,
    Scalar,
    Selected,
    TimestepSample,
    TimestepSampler,
)

_METRICS = ("reward_mean", "reward_std", "alpha_mean", "beta_mean", "entropy", "nonfinite")


class AdaptiveState(NamedTuple):
    """All that the sampler learns; one pytree, to be saved and restored with the model.

    Attributes:
      step: () int32, optimizer steps seen.
      policy: parameters of the policy network.
      opt_state: state of the policy's optimizer.
      queue: the last profiles delta_{k, tau}.
      selected: (s,) int32, the bucket indices of S.
      reward: running moments of the reward.
      report: metrics of the last probe, repeated until the next.
    """

    step: Scalar
    policy: Params
    opt_state: optax.OptState
    queue: selection.ProfileQueue
    selected: Selected
    reward: reinforce.RewardMoments
    report: Metrics


class _Options(NamedTuple):
    every: int
    num_selected: int
    history: int
    entropy_coef: float
    common_noise: bool
    entropy: Literal["bonus", "in_reward"]
    reduce: Literal["mean", "sum"]
    normalize_reward: bool
    lagged_selection: bool
    relative: bool
    num_buckets: int
    jitter: bool
    chunk: int | None
    axis_name: AxisName
    bucket_sharding: jax.sharding.NamedSharding | None


def adaptive(
    grid: TimeGrid,
    policy: policies.Policy,
    optimizer: optax.GradientTransformation,
    *,
    every: int = 40,
    num_selected: int = 3,
    history: int = 20,
    entropy_coef: float = 1e-2,
    common_noise: bool = True,
    entropy: Literal["bonus", "in_reward"] = "bonus",
    reduce: Literal["mean", "sum"] = "mean",
    normalize_reward: bool = True,
    lagged_selection: bool = False,
    relative: bool = False,
    num_buckets: int = 100,
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
    at trace time whether this step probes, in place of the counter inside ``lax.cond``.

    The paper's text and its published code differ; each difference is an option, and
    ``docs/concepts/adaptive.md`` says which value is whose.

    Args:
      grid: the time grid.
      policy: such as `conv_beta_policy`.
      optimizer: the policy's.
      every: f_S, optimizer steps from one probe to the next.
      num_selected: |S|.
      history: |Q|, rows in the queue of profiles.
      entropy_coef: weight of the entropy bonus, in units of the (normalised) reward.
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
      ValueError: an option out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adaptive_ts as ats
      >>> grid, policy = ats.discrete(1000), ats.learning.conv_beta_policy()
      >>> sampler = ats.adaptive(grid, policy, optax.adam(1e-3), every=40)
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> state = sampler.init(jax.random.key(0), batch)
      >>> print(state.selected, sampler.sample(jax.random.key(1), state, batch).t.shape)
      [16 50 83] (4,)

    Source: Kim et al., CVPR 2025 (arXiv 2411.09998), Algorithms 1 and 2, Eq. 14.
    """
    options = _Options(
        every=every,
        num_selected=num_selected,
        history=history,
        entropy_coef=entropy_coef,
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
    _check(options)

    def init(key: Key, batch: Batch) -> AdaptiveState:
        params = policy.init(key, batch)
        zero = jnp.float32(0)
        return AdaptiveState(
            step=jnp.int32(0),
            policy=params,
            opt_state=optimizer.init(params),
            queue=selection.init_queue(history, options.num_buckets),
            selected=_first_selection(options),
            reward=reinforce.init_moments(),
            report={name: zero for name in _METRICS},
        )

    def draw(key: Key, state: AdaptiveState, batch: Batch) -> TimestepSample:
        a, b = policy.apply(state.policy, batch)
        index = collectives.example_index(a.shape[0], axis_name)
        own = collectives.on_rows(policies.beta_sample, a.shape[0], bucket_sharding)
        u = own(collectives.example_keys(key, index), a, b)
        return TimestepSample(grid.to_t(u), u, jnp.ones(u.shape, jnp.float32))

    def log_density(state: AdaptiveState, sample: TimestepSample, batch: Batch) -> PerExample:
        a, b = policy.apply(state.policy, batch)
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
        **extra: Any,
    ) -> tuple[AdaptiveState, Metrics]:
        def probed(state: AdaptiveState) -> AdaptiveState:
            step_taken = _Step(loss_fn, params, new_params, batch, sample)
            return _probe(state, step_taken, key, grid, policy, optimizer, options)

        return probes.probe_when_due(state, probed, every=every, probe=probe)

    return TimestepSampler(init, GridSample(grid, draw), log_density, update)


class _Step(NamedTuple):
    """The optimizer step that is being judged."""

    loss_fn: LossFn
    params: Params
    new_params: Params
    batch: Batch
    sample: TimestepSample


def _probe(
    state: AdaptiveState,
    step: _Step,
    key: Key,
    grid: TimeGrid,
    policy: policies.Policy,
    optimizer: optax.GradientTransformation,
    options: _Options,
) -> AdaptiveState:
    axis_name = options.axis_name
    key_example, key_profile, key_reward, key_strata = jax.random.split(key, 4)
    timesteps = strata(grid, options.num_buckets, key_strata if options.jitter else None)

    size = step.sample.t.shape[0]
    total = size * collectives.axis_size(axis_name)
    chosen = jax.random.randint(key_example, (), 0, total)
    profile = probes.decrease_profile(
        step.loss_fn,
        step.params,
        step.new_params,
        collectives.take_example(step.batch, chosen, size, axis_name, options.bucket_sharding),
        timesteps,
        key_profile,
        common_noise=options.common_noise,
        relative=options.relative,
        chunk=options.chunk,
        axis_name=axis_name,
        sharding=options.bucket_sharding,
    )
    queue = selection.push_profile(state.queue, profile)
    min_rows = 2 if options.lagged_selection else 3
    selected = selection.select_timesteps(
        queue, options.num_selected, state.selected, min_rows=min_rows
    )

    used = state.selected if options.lagged_selection else selected
    decrease = probes.decrease_on_batch(
        step.loss_fn,
        step.params,
        step.new_params,
        step.batch,
        timesteps[used],
        key_reward,
        common_noise=options.common_noise,
        relative=options.relative,
        axis_name=axis_name,
        sharding=options.bucket_sharding,
    )
    reward = decrease.sum(0) if options.reduce == "sum" else decrease.mean(0)
    moments, advantage, report = reinforce.advantages(
        state.reward, reward, normalize=options.normalize_reward, axis_name=axis_name
    )
    report["nonfinite"] += jnp.sum(~summable(profile)).astype(jnp.float32)

    def gradient(advantage: PerExample, entropy_coef: float) -> tuple[Params, Metrics]:
        return _policy_gradient(state, step, advantage, policy, entropy_coef, options)

    if options.bucket_sharding is not None and options.normalize_reward:
        old = reinforce.mean_and_std(state.reward)[0]
        grads, learned = reinforce.in_parts(gradient, reward, old, moments, options.entropy_coef)
    else:
        grads, learned = gradient(advantage, options.entropy_coef)
    params, opt_state = _learn(state, grads, optimizer)
    return state._replace(
        policy=params,
        opt_state=opt_state,
        queue=queue,
        selected=selected,
        reward=moments,
        report=report | learned,
    )


def _policy_gradient(
    state: AdaptiveState,
    step: _Step,
    advantage: PerExample,
    policy: policies.Policy,
    entropy_coef: float,
    options: _Options,
) -> tuple[Params, Metrics]:
    """The gradient of `reinforce_loss`, the same on every device, and metrics of the policy."""

    def loss(params: Params) -> tuple[Scalar, Metrics]:
        a, b = policy.apply(params, step.batch)
        value = reinforce.reinforce_loss(
            a,
            b,
            step.sample.u,
            advantage,
            entropy_coef=entropy_coef,
            entropy=options.entropy,
        )
        metrics = {"alpha_mean": a, "beta_mean": b, "entropy": policies.beta_entropy(a, b)}
        # The mean over devices on both sides of the gradient is right whether or not the mapped
        # transformation sums gradients of replicated parameters by itself (shard_map does).
        return collectives.pmean(value, options.axis_name), jax.tree.map(jnp.mean, metrics)

    return collectives.pmean(jax.grad(loss, has_aux=True)(state.policy), options.axis_name)


def _learn(
    state: AdaptiveState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    """One policy-gradient step; none where the gradient is not finite."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.policy)
    new = optax.apply_updates(state.policy, updates), opt_state
    sound = jnp.isfinite(optax.tree.norm(grads))
    return jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), new, (state.policy, state.opt_state)
    )


def _first_selection(options: _Options) -> Selected:
    index = jnp.arange(options.num_selected, dtype=jnp.int32)
    if options.lagged_selection:
        return index
    return ((2 * index + 1) * options.num_buckets) // (2 * options.num_selected)


def _check(options: _Options) -> None:
    """Raises ValueError for the first option that is out of its range."""
    least = {"every": 1, "num_selected": 1, "history": 3, "num_buckets": 1, "chunk": 1}
    for name, low in least.items():
        value = getattr(options, name)
        if value is None and name == "chunk":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    if options.num_selected > options.num_buckets:
        raise ValueError(
            f"num_selected must be at most the number of buckets, {options.num_buckets}, "
            f"got {options.num_selected}"
        )
    if not 0 <= options.entropy_coef < float("inf"):
        raise ValueError(f"entropy_coef must be finite and >= 0, got {options.entropy_coef}")
    if options.entropy not in ("bonus", "in_reward"):
        raise ValueError(f"entropy must be 'bonus' or 'in_reward', got {options.entropy!r}")
    if options.reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {options.reduce!r}")
    if options.axis_name is not None and options.bucket_sharding is not None:
        raise ValueError(
            f"bucket_sharding is for the global view, but axis_name={options.axis_name!r} was "
            "given too: leave one of them out"
        )
