"""p(t), and p(t) w(t): what a sampler and its weights make of the objective."""

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.schedules.base import NoiseSchedule
from adaptive_ts.timesteps.grid import GridSample
from adaptive_ts.timesteps.tables import bucket_timesteps, check_schedule
from adaptive_ts.types import Batch, PerBucket, State, TimestepSample, TimestepSampler, Weighting
from adaptive_ts.weightings.predictions import on_schedule


def relative_density(
    sampler: TimestepSampler, state: State, batch: Batch, timesteps: PerBucket, u: PerBucket
) -> tuple[PerBucket, PerBucket]:
    """(T p(t), E[T p(t) w(t)]) at some timesteps, each (k,), averaged over the batch.

    w is the factor of the weights that t determines (``GridSample.factor``).
    """
    size = collectives.batch_size(batch)
    factor = getattr(sampler.sample, "factor", None)

    def at(t: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        t, u = jnp.full((size,), t), jnp.full((size,), u)
        sample = TimestepSample(t, u, jnp.ones((size,), jnp.float32))
        density = jnp.exp(sampler.log_density(state, sample, batch))
        weight = 1.0 if factor is None else factor(state, sample, batch)
        # What is never drawn counts for nothing, whatever its importance weight.
        return jnp.mean(density), jnp.mean(jnp.where(density > 0, density * weight, 0.0))

    return jax.vmap(at)(timesteps, u)


def effective_density(
    sampler: TimestepSampler,
    weighting: Weighting | None = None,
    schedule: NoiseSchedule | None = None,
    *,
    state: State | None = None,
    batch: Batch | None = None,
) -> PerBucket:
    """p(t) w(t), normalised: how much each timestep counts in the objective.

    Drawing t with p and weighting its loss by w trains, in expectation, on sum_t p(t) w(t) L_t.
    On this axis a sampler and a weighting can be compared: p2 with uniform timesteps, say, and
    timesteps drawn in proportion to p2's weights are one.

    Args:
      sampler: p; its own weights (`with_weighting`, `importance_weighted`) count.
      weighting: (b,) log-SNR -> (b,) weight on top of them; None for none.
      schedule: the noise schedule; needed with a weighting.
      state: the sampler's state; None for that of its first step.
      batch: the images a policy looks at, and their number where the law depends on the batch
        size; None for one empty 8x8 image.

    Returns:
      (n,) the share of each of the grid's buckets (of each t on a discrete grid); sums to 1.

    Raises:
      ValueError: a sampler that does not name its grid, a weighting without a schedule, or a
        schedule whose timesteps are not the grid's.

    Example:
      >>> import adaptive_ts as ats
      >>> schedule, uniform = ats.schedules.linear(1000), ats.uniform(ats.discrete(1000))
      >>> share = ats.effective_density(uniform, ats.weightings.p2(gamma=1.0), schedule)
      >>> print(share.shape, bool(share[0] < share[999]))
      (1000,) True

    Source: Hang et al. 2024 (arXiv 2407.03297), section 3.2: p(lambda) and w(lambda) only act
    through their product.
    """
    if not isinstance(sampler.sample, GridSample):
        raise ValueError("this sampler does not name its time grid: its sample is no GridSample")
    grid = sampler.sample.grid
    if (weighting is None) != (schedule is None):
        raise ValueError("a weighting is a function of log-SNR: give weighting and schedule both")
    if batch is None:
        batch = {"image": jnp.zeros((1, 8, 8, 1))}
    if state is None:
        state = sampler.init(collectives.seed_key(0), batch)
    timesteps = bucket_timesteps(grid)
    _, share = relative_density(sampler, state, batch, timesteps, grid.to_u(timesteps))
    if weighting is not None and schedule is not None:
        check_schedule(grid, schedule)
        share = share * on_schedule(weighting, schedule)(schedule.log_snr(timesteps))
    return share / jnp.sum(share)
