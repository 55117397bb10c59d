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
    """Sums over examples, decayed from probe to probe, each () float32.

    Attributes:
      weight: examples.
      total: of their rewards.
      total_square: of the squares of their distances from the mean.
    """

    weight: Scalar
    total: Scalar
    total_square: Scalar


class Standard(NamedTuple):
    """What makes a reward an advantage, (reward - pivot - shift) scale, each () float32.

    Attributes:
      pivot: the mean of the probes before: the distances from it keep their digits.
      shift: of the mean since.
      scale: one over the standard deviation, or over what float32 tells apart of rewards this far
        from the pivot, if that is more.
    """

    pivot: Scalar
    shift: Scalar
    scale: Scalar


def init_moments() -> RewardMoments:
    """Moments of nothing yet."""
    return RewardMoments(jnp.float32(0), jnp.float32(0), jnp.float32(0))


def standardize(
    moments: RewardMoments, reward: PerExample, *, axis_name: AxisName = None
) -> tuple[RewardMoments, Standard, Metrics]:
    """The running moments with a batch of rewards, how they standardise it, and metrics of it.

    Args:
      moments: of the probes so far.
      reward: (b,); those that are not `summable` are left out and counted.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.
    """
    known, pivot = summable(reward), moments.total / jnp.maximum(moments.weight, _TINY)
    distance = jnp.where(known, reward - pivot, 0.0)
    count = known.astype(jnp.float32)
    sums = (count.sum(), distance.sum(), (distance * distance).sum(), (1 - count).sum())
    num, total, square, bad = collectives.psum(sums, axis_name)

    weight = _DECAY * moments.weight + num
    safe, shift = jnp.maximum(weight, _TINY), total / jnp.maximum(weight, _TINY)
    spread = _DECAY * moments.total_square + jnp.maximum(square - total * shift, 0.0)
    eps = jnp.finfo(jnp.float32).eps
    resolved = jnp.sqrt(4 * eps * square / jnp.maximum(num, 1)) + 64 * eps * jnp.abs(pivot + shift)
    std = jnp.maximum(jnp.sqrt(spread / safe), resolved)
    # Where all that was seen is exactly 0 the distances are, too.
    scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 0.0)

    own = total / jnp.maximum(num, 1)
    variance = jnp.maximum(square / jnp.maximum(num, 1) - own * own, 0.0)
    metrics = {
        "reward_mean": jnp.where(num > 0, pivot + own, 0.0),
        "reward_std": jnp.sqrt(variance),
        "nonfinite": bad,
    }
    moments = RewardMoments(weight, (pivot + shift) * weight, spread)
    return moments, Standard(pivot, shift, scale), metrics


def advantages(reward: PerExample, standard: Standard | None) -> PerExample:
    """Rewards as the policy gradient sees them: standardised, or as they are.

    Args:
      reward: (b,); those that are not `summable` get advantage 0.
      standard: from `standardize`; None leaves the others as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning import reinforce
      >>> reward = jnp.asarray([1.0, 3.0, jnp.nan])
      >>> _, standard, metrics = reinforce.standardize(reinforce.init_moments(), reward)
      >>> print(reinforce.advantages(reward, standard), metrics["reward_mean"])
      [-1.  1.  0.] 2.0
    """
    known = summable(reward)
    if standard is not None:
        reward = (reward - standard.pivot - standard.shift) * standard.scale
    return jnp.where(known, reward, 0.0)


def reinforce_loss(
    a: PerExample,
    b: PerExample,
    u: PerExample,
    advantage: PerExample,
    *,
    entropy_coef: float,
    entropy: Literal["bonus", "in_reward"] = "bonus",
    ratio: PerExample | None = None,
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
      ratio: (b,) constants, pi(u) over the density that u was drawn with; None for 1.

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
    if ratio is not None:
        log_prob = log_prob * jax.lax.stop_gradient(ratio)
    if entropy == "in_reward":
        return -jnp.mean(log_prob * (advantage + bonus))
    return -jnp.mean(log_prob * advantage) - jnp.mean(bonus)


def in_parts(
    gradient: Callable[[PerExample, float], tuple[Params, Metrics]],
    reward: PerExample,
    standard: Standard,
    entropy_coef: float,
) -> tuple[Params, Metrics]:
    """The gradient at the standardised `advantages`, made of three that don't need them.

    The advantage needs the mean and the std of the rewards, which cross devices; a gradient at it
    would wait for them, and then cross devices too. `reinforce_loss` is linear in advantage and
    entropy, so both can cross at once: with rewards r and their gradient g(advantage, c),

      g((r - pivot - shift) scale, c) = g(r - pivot, 0) scale - g(1, 0) shift scale + g(0, c).

    Args:
      gradient: g, with metrics that depend on neither argument.
      reward: (b,); those that are not `summable` count for nothing.
      standard: from `standardize`. Its pivot is near the mean, so that the terms don't cancel.
      entropy_coef: c.
    """
    known, (pivot, shift, scale) = summable(reward), standard
    factors = scale, -shift * scale, jnp.float32(1)
    found = [
        gradient(jnp.where(known, reward - pivot, 0.0), 0.0),
        gradient(known.astype(jnp.float32), 0.0),
        gradient(jnp.zeros_like(reward), entropy_coef),
    ]

    def combine(*grads: jax.Array) -> jax.Array | int:
        return sum(factor * grad for factor, grad in zip(factors, grads, strict=True))

    return jax.tree.map(combine, *(grads for grads, _ in found)), found[0][1]
