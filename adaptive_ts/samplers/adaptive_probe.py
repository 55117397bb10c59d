"""A probe of the adaptive sampler: profile, selection, reward, one step of the policy."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_ts import collectives
from adaptive_ts.learning import policy as policies
from adaptive_ts.learning import probe as probes
from adaptive_ts.learning import reinforce, selection
from adaptive_ts.learning.statistics import summable
from adaptive_ts.timesteps.grid import TimeGrid, strata
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
)

METRICS = ("reward_mean", "reward_std", "alpha_mean", "beta_mean", "entropy", "nonfinite")


class AdaptiveState(NamedTuple):
    """All that the sampler learns; one pytree, to be saved and restored with the model.

    Attributes:
      step: () int32, optimizer steps seen; it stands still while a probe waits for one that moves.
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


class Options(NamedTuple):
    every: int
    num_selected: int
    history: int
    entropy_coef: float
    estimate: probes.Estimate
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


class StepTaken(NamedTuple):
    """The optimizer step that is being judged."""

    loss_fn: LossFn
    params: Params
    new_params: Params
    batch: Batch
    sample: TimestepSample
    uniform_prob: float


def probe_step(
    state: AdaptiveState,
    step: StepTaken,
    key: Key,
    grid: TimeGrid,
    policy: policies.Policy,
    optimizer: optax.GradientTransformation,
    options: Options,
) -> AdaptiveState:
    axis_name, size = options.axis_name, step.sample.t.shape[0]
    key_example, key_profile, key_reward, key_strata = jax.random.split(key, 4)
    timesteps = strata(grid, options.num_buckets, key_strata if options.jitter else None)

    shared: dict[str, Any] = {
        **{name: getattr(options, name) for name in ("estimate", "common_noise", "relative")},
        "axis_name": axis_name,
        "sharding": options.bucket_sharding,
    }
    total = size * collectives.axis_size(axis_name)
    chosen = jax.random.randint(key_example, (), 0, total)
    profile = probes.decrease_profile(
        step.loss_fn,
        step.params,
        step.new_params,
        collectives.take_example(step.batch, chosen, size, axis_name, options.bucket_sharding),
        timesteps,
        key_profile,
        chunk=options.chunk,
        **shared,
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
        size=size,
        **shared,
    )
    reward = decrease.sum(0) if options.reduce == "sum" else decrease.mean(0)
    moments, standard, report = reinforce.standardize(state.reward, reward, axis_name=axis_name)
    report["nonfinite"] += jnp.sum(~summable(profile)).astype(jnp.float32)

    def gradient(advantage: PerExample, entropy_coef: float) -> tuple[Params, Metrics]:
        return _policy_gradient(state, step, advantage, policy, entropy_coef, options)

    if options.bucket_sharding is not None and options.normalize_reward:
        grads, learned = reinforce.in_parts(gradient, reward, standard, options.entropy_coef)
    else:
        advantage = reinforce.advantages(reward, standard if options.normalize_reward else None)
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
    step: StepTaken,
    advantage: PerExample,
    policy: policies.Policy,
    entropy_coef: float,
    options: Options,
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
            ratio=_ratio(a, b, step) if step.uniform_prob else None,
        )
        metrics = {"alpha_mean": a, "beta_mean": b, "entropy": policies.beta_entropy(a, b)}
        # The mean over devices on both sides of the gradient is right whether or not the mapped
        # transformation sums gradients of replicated parameters by itself (shard_map does).
        return collectives.pmean(value, options.axis_name), jax.tree.map(jnp.mean, metrics)

    return collectives.pmean(jax.grad(loss, has_aux=True)(state.policy), options.axis_name)


def _ratio(a: PerExample, b: PerExample, step: StepTaken) -> PerExample:
    """(b,) pi(u) over the density of the draws: the score of a draw that was not the policy's own.

    As a fraction of uniform's density of u, which is 1 on every grid.
    """
    log_prob = policies.beta_log_prob(a, b, step.sample.u)
    prob = step.uniform_prob
    return jax.lax.stop_gradient(1 / ((1 - prob) + prob * jnp.exp(-log_prob)))


def _learn(
    state: AdaptiveState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    """One policy-gradient step; none where the gradient is not finite."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies counters by floats
        updates, opt_state = optimizer.update(grads, state.opt_state, state.policy)
        new = optax.apply_updates(state.policy, updates), opt_state
        sound = jnp.isfinite(optax.tree.norm(grads))
    return jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), new, (state.policy, state.opt_state)
    )


def first_selection(options: Options) -> Selected:
    index = jnp.arange(options.num_selected, dtype=jnp.int32)
    if options.lagged_selection:
        return index
    return ((2 * index + 1) * options.num_buckets) // (2 * options.num_selected)


def check_options(options: Options) -> None:
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
    probes.check_estimate(options.estimate, options.common_noise)
    if options.axis_name is not None and options.bucket_sharding is not None:
        raise ValueError(
            f"bucket_sharding is for the global view, but axis_name={options.axis_name!r} was "
            "given too: leave one of them out"
        )
