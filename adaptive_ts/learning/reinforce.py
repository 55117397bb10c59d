"""The policy gradient: running moments of the reward, and the REINFORCE loss of a Beta policy."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.learning.policy import beta_entropy, beta_log_prob
from adaptive_ts.learning.statistics import summable
from adaptive_ts.types import AxisName, Metrics, Params, PerExample, Scalar

_DECAY = 0.9  # the running moments remember about ten probes: rewards shrink as training goes on
_TINY = 1e-30


class RewardMoments(NamedTuple):
    """Sums over examples, decayed from probe to probe, each () float32."""

    weight: Scalar
    total: Scalar
    total_square: Scalar


def init_moments() -> RewardMoments:
    """Moments of nothing yet."""
    return RewardMoments(jnp.float32(0), jnp.float32(0), jnp.float32(0))


def mean_and_std(moments: RewardMoments) -> tuple[Scalar, Scalar]:
    """Mean and standard deviation; both 0 where nothing was seen."""
    weight = jnp.maximum(moments.weight, _TINY)
    mean = moments.total / weight
    return mean, jnp.sqrt(jnp.maximum(moments.total_square / weight - mean * mean, 0.0))


def advantages(
    moments: RewardMoments, reward: PerExample, *, normalize: bool, axis_name: AxisName = None
) -> tuple[RewardMoments, PerExample, Metrics]:
    """Rewards as the policy gradient sees them: (reward - mean) / std, by running moments.

    Args:
      moments: of the probes so far.
      reward: (b,); those that are not `summable` get advantage 0 and are counted.
      normalize: False leaves the others as they are.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      The new moments, (b,) advantages, and the metrics ``reward_mean``, ``reward_std`` (of this
      batch) and ``nonfinite``.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import reinforce
      >>> reward = jnp.asarray([1.0, 3.0, jnp.nan])
      >>> _, advantage, metrics = reinforce.advantages(
      ...     reinforce.init_moments(), reward, normalize=True
      ... )
      >>> print(advantage, metrics["reward_mean"], metrics["nonfinite"])
      [-1.  1.  0.] 2.0 1.0
    """
    known = summable(reward)
    kept = jnp.where(known, reward, 0.0)
    count = known.astype(jnp.float32)
    *sums, bad = collectives.psum(
        (count.sum(), kept.sum(), (kept * kept).sum(), (1 - count).sum()), axis_name
    )
    batch = RewardMoments(*sums)
    moments = RewardMoments(*(_DECAY * old + new for old, new in zip(moments, batch, strict=True)))
    batch_mean, batch_std = mean_and_std(batch)
    metrics = {"reward_mean": batch_mean, "reward_std": batch_std, "nonfinite": bad}
    if not normalize:
        return moments, kept, metrics
    mean, std = mean_and_std(moments)
    return moments, jnp.where(known, (kept - mean) / jnp.maximum(std, _TINY), 0.0), metrics


def reinforce_loss(
    a: PerExample,
    b: PerExample,
    u: PerExample,
    advantage: PerExample,
    *,
    entropy_coef: float,
    entropy: Literal["bonus", "in_reward"] = "bonus",
) -> Scalar:
    """The loss whose gradient is the policy gradient of a Beta policy at the draws u.

    ``"bonus"``: -mean(log pi(u) advantage) - c mean(H). ``"in_reward"``, as in the published
    code: -mean(log pi(u) (advantage + c H)), the entropy H not detached.

    Args:
      a: (b,) first Beta parameters, differentiable.
      b: (b,) second ones.
      u: (b,) the draws on (0, 1).
      advantage: (b,) constants.
      entropy_coef: c.
      entropy: where the entropy term sits.

    Returns:
      () the mean over this device's examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import reinforce
      >>> one = jnp.ones((2,))
      >>> loss = reinforce.reinforce_loss(2 * one, one, 0.8 * one, one, entropy_coef=0.0)
      >>> print(loss.round(2))  # -log(2 u)
      -0.47

    Source: Williams 1992; Kim et al., CVPR 2025 (arXiv 2411.09998), Algorithm 1.
    """
    advantage, u = jax.lax.stop_gradient((advantage, u))
    log_prob, bonus = beta_log_prob(a, b, u), entropy_coef * beta_entropy(a, b)
    if entropy == "in_reward":
        return -jnp.mean(log_prob * (advantage + bonus))
    return -jnp.mean(log_prob * advantage) - jnp.mean(bonus)


def in_parts(
    gradient: Callable[[PerExample, float], tuple[Params, Metrics]],
    reward: PerExample,
    old_mean: Scalar,
    moments: RewardMoments,
    entropy_coef: float,
) -> tuple[Params, Metrics]:
    """The gradient at the normalised `advantages`, as a combination of three that don't need them.

    The advantage needs the mean and the std of the rewards, which cross devices; a gradient at it
    would wait for them, and then cross devices too. `reinforce_loss` is linear in advantage and
    entropy, so both can cross at once: with m an earlier mean, rewards r and their
    gradient g(advantage, c),

      g((r - mean) / std, c) = g(r - m, 0) / std - g(1, 0) (mean - m) / std + g(0, c).

    Args:
      gradient: g, with metrics that depend on neither argument.
      reward: (b,); those that are not `summable` count for nothing.
      old_mean: m. Near the mean, so that the first two terms don't cancel.
      moments: with these rewards.
      entropy_coef: c.
    """
    known, (mean, std) = summable(reward), mean_and_std(moments)
    scale = 1 / jnp.maximum(std, _TINY)
    factors = scale, (old_mean - mean) * scale, jnp.float32(1)
    found = [
        gradient(jnp.where(known, reward - old_mean, 0.0), 0.0),
        gradient(known.astype(jnp.float32), 0.0),
        gradient(jnp.zeros_like(reward), entropy_coef),
    ]

    def combine(*grads: jax.Array) -> jax.Array | int:
        return sum(factor * grad for factor, grad in zip(factors, grads, strict=True))

    return jax.tree.map(combine, *(grads for grads, _ in found)), found[0][1]
