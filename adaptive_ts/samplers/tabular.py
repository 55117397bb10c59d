"""Samplers that learn, per timestep, from the losses that training computes anyway."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.diffusion.corruption import PREDICTIONS
from adaptive_ts.learning.statistics import (
    LossHistory,
    LossStatistics,
    check_losses,
    count_nonfinite,
    fill_unseen,
    init_history,
    init_statistics,
    loss_mean,
    push_history,
    summable,
    update_statistics,
)
from adaptive_ts.schedules.base import NoiseSchedule, known
from adaptive_ts.timesteps.draws import Coupling
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.timesteps.laws import table_sampler
from adaptive_ts.timesteps.tables import Strata, check_schedule, strata_of
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    Metrics,
    PerBucket,
    PerExample,
    TimestepSample,
    TimestepSampler,
    Weighting,
)
from adaptive_ts.weightings.predictions import log_error_ratio, log_power_of, on_schedule


def loss_second_moment(
    grid: TimeGrid,
    *,
    history: int = 10,
    uniform_prob: float = 1e-3,
    importance_weighted: bool = True,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """IDDPM's importance sampler: timesteps in proportion to the root mean square of their loss.

    p_t = (1 - uniform_prob) sqrt(mean of loss^2) / sum_t + uniform_prob / T over the last H
    losses at each t; weight 1 / (T p_t), so that the objective stays the uniform one. Until every
    t has H losses (at least T H examples) p is uniform and the weight 1.

    Args:
      grid: the time grid.
      history: H, losses kept per timestep (per bucket in continuous time).
      uniform_prob: probability of a uniform draw.
      importance_weighted: False for weight 1: the objective shifts towards high losses.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` whose state is a `LossHistory`. Metrics: ``nonfinite`` (losses of the
      batch left out) and ``warm`` (share of the timesteps with a full history).

    Raises:
      ValueError: an option out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.loss_second_moment(ats.discrete(2), history=1, uniform_prob=0.0)
      >>> draw = ats.TimestepSample(jnp.asarray([0, 1]), jnp.asarray([0.2, 0.7]), jnp.ones(2))
      >>> state = sampler.init(jax.random.key(0), None)
      >>> state, metrics = sampler.update(state, draw, jnp.asarray([1.0, 3.0]))
      >>> print(jnp.exp(sampler.log_density(state, draw, None)) / 2)
      [0.25 0.75]

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), Eq. 18, and the released code.
    """
    if isinstance(history, bool) or not isinstance(history, int | np.integer) or history < 1:
        raise ValueError(f"history must be an integer of at least 1, got {history!r}")
    _check_prob(uniform_prob)
    n = grid.num_buckets
    share = jnp.full((n,), 1 / n, jnp.float32)

    def init(key: Key, batch: Batch) -> LossHistory:
        return init_history(n, history)

    def probabilities(state: LossHistory) -> PerBucket:
        # Relative to the largest loss, whose square could overflow.
        largest = jnp.max(jnp.abs(state.losses))
        relative = state.losses / jnp.where(largest > 0, largest, 1.0)
        root = jnp.sqrt(jnp.mean(relative**2, axis=1))
        p = _mixed(root, share, uniform_prob)
        return jnp.where(jnp.all(state.count >= history), p, share)

    def update(
        state: LossHistory, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[LossHistory, Metrics]:
        losses = jax.lax.stop_gradient(losses)
        state = push_history(state, grid.to_bucket(sample.t), losses, axis_name=axis_name)
        return state, {
            "nonfinite": count_nonfinite(losses, axis_name=axis_name),
            "warm": jnp.mean((state.count >= history).astype(jnp.float32)),
        }

    return table_sampler(
        grid,
        init,
        probabilities,
        update,
        importance_weighted=importance_weighted,
        coupling=coupling,
        axis_name=axis_name,
    )


def loss_proportional(
    grid: TimeGrid,
    schedule: NoiseSchedule | None = None,
    *,
    weighting: Weighting | None = None,
    gamma: float = 1.0,
    num_buckets: int = 100,
    decay: float = 0.99,
    uniform_prob: float = 0.01,
    importance_weighted: bool = True,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """VDM++'s adaptive noise schedule: timesteps in proportion to their weighted loss.

    p_t = (1 - uniform_prob) c (w_t mean loss_t)^gamma + uniform_prob / T, the mean over a
    stratum of neighbouring timesteps and over past batches (an exponential average), p_t equal
    within a stratum. A stratum with no loss yet takes the value between those of its neighbours;
    before the first loss p is uniform. Weight 1 / (T p_t): the objective stays the uniform one,
    and with gamma = 1 all timesteps contribute to it alike. Without these weights it is the
    plain preference for high losses.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps; needed with a weighting.
      weighting: (b,) log-SNR -> (b,), the objective's weight w of the loss per uniform t. It only
        shapes p: give it to `with_weighting` too. None for 1.
      gamma: the power, at least 0 (uniform).
      num_buckets: strata of the grid, at most T.
      decay: of the averages, per update.
      uniform_prob: probability of a uniform draw.
      importance_weighted: False for weight 1.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` whose state is the `LossStatistics` of the weighted losses. Metrics:
      ``nonfinite`` (losses of the batch left out) and ``warm`` (share of the strata seen).

    Raises:
      ValueError: an option out of its range, a weighting without a schedule, or a schedule
        whose timesteps are not the grid's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.loss_proportional(ats.discrete(4), num_buckets=2, uniform_prob=0.0)
      >>> draw = ats.TimestepSample(jnp.asarray([0, 3]), jnp.asarray([0.1, 0.9]), jnp.ones(2))
      >>> state = sampler.init(jax.random.key(0), None)
      >>> state, metrics = sampler.update(state, draw, jnp.asarray([1.0, 3.0]))
      >>> print(jnp.exp(sampler.log_density(state, draw, None)) / 4)
      [0.125 0.375]

    Source: Kingma and Gao 2023 (arXiv 2303.00848), the adaptive noise schedule; their code is
    not public, and the strata, the decay and the uniform part are ours.
    """
    if weighting is not None and schedule is None:
        raise ValueError("a weighting is a function of log-SNR: give the schedule too")
    if schedule is not None:
        check_schedule(grid, schedule)
        weighting = None if weighting is None else on_schedule(weighting, schedule)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}; 0 is uniform")

    def weighted(t: PerExample, losses: PerExample) -> PerExample:
        if weighting is None or schedule is None:
            return losses
        return losses * weighting(schedule.log_snr(t))

    return _proportional(
        grid, strata_of(grid, num_buckets), weighted, float(gamma), decay, uniform_prob,
        importance_weighted, coupling, axis_name,
    )  # fmt: skip


def entropy_rate(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    *,
    prediction: str = "eps",
    weighting: Weighting | None = None,
    gate: tuple[float, float] | None = (0.15, 3.0),
    data_variance: float | None = 1.0,
    num_buckets: int = 100,
    decay: float = 0.99,
    uniform_prob: float = 0.01,
    importance_weighted: bool = False,
    coupling: Coupling = "independent",
    axis_name: AxisName = None,
) -> TimestepSampler:
    """InfoNoise: noise levels by the rate at which noise takes away what is known of x_0.

    With sigma = exp(-log SNR / 2) and the mean squared error mmse of x_0,

      p(sigma) ~ mmse / sigma^3 g(sigma) / w(sigma),   g = sigma^n / (sigma^n + c^n):

    mmse / sigma^3 is the derivative of the entropy of x_0 given x_t, and g closes the low-noise
    end, where no model comes near mmse. On the grid p_t ~ E[x_0 error] SNR |d log SNR| / 2 g / w,
    from the model's losses as in `loss_proportional`. All weights are 1: p w is what follows the
    entropy rate.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps.
      prediction: whose mean squared error the losses are: "eps", "x0", "v" or "flow"; turned
        into that of x_0 by 1 / SNR, 1, 1 / ((SNR + 1) (alpha^2 + sigma^2)) or
        1 / (1 + sqrt SNR)^2.
      weighting: (b,) log-SNR -> (b,), the weight w that the objective puts on the error of x_0;
        None for that of the plain loss, weight 1 on the prediction's own error (for eps, SNR).
        ``jnp.ones_like`` lets p itself follow the entropy rate.
      gate: (c, n), c in units of sigma for x_0 in [-1, 1]; None for no gate.
      data_variance: variance of x_0 per dimension, which mmse cannot exceed: losses that imply more
        are held there, as those of an eps model do at high noise, where little SNR divides them.
        1 bounds that of any x_0 in [-1, 1]; None for no bound.
      num_buckets: strata of the grid, at most T.
      decay: of the averages, per update.
      uniform_prob: probability of a uniform draw.
      importance_weighted: True for weight 1 / (T p_t), by which the objective stays the uniform
        one and only its variance changes.
      coupling: of the draws of a batch, as in `unit_draws`.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` whose state is the `LossStatistics` of the terms of p. Metrics:
      ``nonfinite`` (losses of the batch left out) and ``warm`` (share of the strata seen).

    Raises:
      ValueError: an option out of its range, an unknown prediction, or a schedule whose
        timesteps are not the grid's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.entropy_rate(ats.discrete(1000), ats.schedules.linear(1000))
      >>> state = sampler.init(jax.random.key(0), None)
      >>> t = jnp.arange(1000)
      >>> draw = ats.TimestepSample(t, (t + 0.5) / 1000, jnp.ones(1000))
      >>> state, metrics = sampler.update(state, draw, jnp.exp(-t / 100))  # falls with the noise
      >>> density = jnp.exp(sampler.log_density(state, draw, None))
      >>> print(density[0] < 1 < density[900])  # the gate at low noise, 1 / w at high
      True

    Source: Raya et al. 2026 (arXiv 2602.18647), Eqs. 13-15, with its n = 3. A fixed c = 0.15 is
    our default (the paper also has a rule that finds c), as are strata, decay and uniform part.
    """
    known(prediction, PREDICTIONS, "prediction")
    check_schedule(grid, schedule)
    pair = isinstance(gate, tuple | list) and len(gate) == 2
    if gate is not None and not (pair and all(0 < x < math.inf for x in gate)):
        raise ValueError(f"gate must be (c, n), finite and above 0, or None, got {gate}")
    cells = strata_of(grid, num_buckets)
    width, log_power = _log_snr_widths(grid, schedule, cells), log_power_of(schedule)
    weighting = None if weighting is None else on_schedule(weighting, schedule)

    if data_variance is not None and not 0 < data_variance < math.inf:
        raise ValueError(f"data_variance must be finite and above 0, or None, got {data_variance}")

    def rate(t: PerExample, losses: PerExample) -> PerExample:
        log_snr = schedule.log_snr(t)
        cell = cells.to_stratum(t) if grid.num_timesteps is None else t
        ratio = log_error_ratio(prediction, log_snr, None if log_power is None else log_power(t))
        mmse = losses * jnp.exp(-ratio)
        if data_variance is not None:
            mmse = jnp.minimum(mmse, jnp.float32(data_variance))
        found = 0.5 * jnp.asarray(width)[cell] * jnp.exp(log_snr) * mmse
        if gate is not None:
            c, n = map(float, gate)
            found = found * jax.nn.sigmoid(-n * (log_snr / 2 + math.log(c)))
        if weighting is None:
            return found * jnp.exp(-ratio)
        return found / weighting(log_snr)

    return _proportional(
        grid, cells, rate, 1.0, decay, uniform_prob, importance_weighted, coupling, axis_name
    )


def _log_snr_widths(grid: TimeGrid, schedule: NoiseSchedule, cells: Strata) -> np.ndarray:
    """|d log SNR| of each timestep, or of each stratum in continuous time, float32."""
    with jax.ensure_compile_time_eval():
        if grid.num_timesteps is None:
            u = np.linspace(0, 1, cells.num + 1, dtype=np.float32)
            log_snr = np.asarray(schedule.log_snr(grid.to_t(jnp.asarray(u))), np.float64)
            return np.abs(np.diff(log_snr)).astype(np.float32)
        t = jnp.arange(grid.num_timesteps, dtype=jnp.int32)
        log_snr = np.asarray(schedule.log_snr(t), np.float64)
    # From the middle between one neighbour and t to that between t and the other.
    return np.abs(np.gradient(log_snr)).astype(np.float32)


def _proportional(
    grid: TimeGrid,
    cells: Strata,
    terms_of: Callable[[PerExample, PerExample], PerExample],
    gamma: float,
    decay: float,
    uniform_prob: float,
    importance_weighted: bool,
    coupling: Coupling,
    axis_name: AxisName,
) -> TimestepSampler:
    """p_t ~ (mean of terms_of(t, loss) over t's stratum)^gamma."""
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}; 1 keeps plain totals")
    _check_prob(uniform_prob)

    def init(key: Key, batch: Batch) -> LossStatistics:
        return init_statistics(cells.num)

    def probabilities(state: LossStatistics) -> PerBucket:
        value = jnp.maximum(fill_unseen(loss_mean(state, unseen=0.0), state.count > 0), 0.0)
        largest = jnp.max(value)
        relative = (value / jnp.where(largest > 0, largest, 1.0)) ** gamma
        return cells.spread(_mixed(relative * cells.share, cells.share, uniform_prob))

    def update(
        state: LossStatistics, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[LossStatistics, Metrics]:
        check_losses(losses, sample.t)
        losses = jax.lax.stop_gradient(losses).astype(jnp.float32)
        terms = terms_of(sample.t, losses)
        sound = summable(losses) & summable(terms)
        terms = jnp.where(sound, terms, jnp.inf)  # left out, as NaN would be; no debug_nans
        bucket = cells.to_stratum(sample.t)
        state = update_statistics(state, bucket, terms, decay=decay, axis_name=axis_name)
        return state, {
            "nonfinite": count_nonfinite(terms, axis_name=axis_name),
            "warm": jnp.mean((state.count > 0).astype(jnp.float32)),
        }

    return table_sampler(
        grid,
        init,
        probabilities,
        update,
        importance_weighted=importance_weighted,
        coupling=coupling,
        axis_name=axis_name,
    )


def _mixed(value: PerBucket, share: PerBucket, uniform_prob: float) -> PerBucket:
    """value normalised, or uniform where it is all 0, then mixed with uniform."""
    total = jnp.sum(value)
    p = jnp.where(total > 0, value / jnp.where(total > 0, total, 1.0), share)
    return (1 - uniform_prob) * p + uniform_prob * share


def _check_prob(uniform_prob: float) -> None:
    if not 0 <= uniform_prob <= 1:
        raise ValueError(f"uniform_prob must be in [0, 1], got {uniform_prob}")
