"""SpeeD: fewer timesteps from where the noise has almost converged."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.schedules.base import NoiseSchedule, discrete_betas, log_alphas_bar
from adaptive_ts.timesteps.grid import GridSample, TimeGrid, open_unit
from adaptive_ts.timesteps.laws import (
    Law,
    check_parameters,
    static_sampler,
    tabulated_law,
    unit_law,
)
from adaptive_ts.timesteps.tables import check_schedule
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    PerExample,
    State,
    TimestepSample,
    TimestepSampler,
)

_FLAT = 1e-4  # slope of sigma per timestep below which the published code mirrors


def speed(
    grid: TimeGrid,
    schedule: NoiseSchedule,
    *,
    tau: float = 0.7,
    k: float = 5.0,
    dual: bool = True,
    as_published: bool = False,
    axis_name: AxisName = None,
) -> TimestepSampler:
    """Timesteps of the convergence area (the noisiest) are drawn k times less often.

    p(t) = k / Z for t < tau T and 1 / Z from there on, Z = k tau T + (1 - tau) T; in continuous
    time the same density of u. With ``dual`` half of the global batch mirrors the other half.

    The mirror image of the default is that of the inverse CDF: pairs v, 1 - v, so that every
    draw has the law p, in any batch. The published code mirrors timesteps: of a global batch of
    n it draws h = n // 2 + 1 from p, and the rest are |m - t| for the first of these, where m is
    the first timestep at which sqrt(1 - abar) rises by less than 1e-4, plus 1 (642 for the
    linear schedule). The law of a draw is then (h p + (n - h) p_mirrored) / n: it depends on the
    batch size, and as no mirror image lies beyond m (linear, cosine, quad), timesteps above m
    are halved a second time, to about a tenth of the others for k = 5. ``as_published=True``
    does this, place in the batch included, and ``log_density`` is that of the batch's law.

    The weights are 1: SpeeD's own loss weighting is `weightings.change_aware`.

    Args:
      grid: the time grid.
      schedule: the noise schedule, of the same timesteps; m depends on it, nothing else does.
      tau: where the convergence area begins, as a share of the time axis.
      k: how much more often a timestep before it is drawn.
      dual: mirror half of the draws.
      as_published: exactly as the published code does it; discrete grids only.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` with an empty state.

    Raises:
      ValueError: tau outside (0, 1), k not positive and finite, ``as_published`` in continuous
        time, or a schedule whose timesteps are not the grid's.

    Example:
      >>> import adaptive_ts as ats
      >>> sampler = ats.speed(ats.discrete(1000), ats.schedules.linear(1000))
      >>> p = 1000 * ats.effective_density(sampler)
      >>> print(f"{p[0]:.3f} {p[699]:.3f} {p[700]:.3f}")
      1.316 1.316 0.263

    Source: Wang et al., CVPR 2025 (arXiv 2405.17403), asymmetric sampling; the mirrored half:
    released code, ``Speed_IDDPM``.
    """
    check_schedule(grid, schedule)
    check_parameters(
        "speed",
        "tau must be in (0, 1) and k positive and finite",
        0 < tau < 1 and 0 < k < math.inf,
        tau=tau,
        k=k,
    )
    tau, k = float(tau), float(k)
    if as_published:
        check_parameters(
            "speed",
            "the published code has timesteps: use a discrete grid, or as_published=False",
            grid.num_timesteps is not None,
            as_published=as_published,
        )
        if dual:
            return _published(grid, schedule, tau, k, axis_name)
    law = _step_law(grid, tau, k)
    coupling = "antithetic" if dual else "independent"
    return static_sampler(grid, law, coupling=coupling, axis_name=axis_name)


def _step_law(grid: TimeGrid, tau: float, k: float) -> Law:
    Z = k * tau + 1 - tau
    before = k * tau / Z

    def quantile(v: PerExample) -> PerExample:
        return jnp.where(v < before, v * (Z / k), 1 - (1 - v) * Z)

    return unit_law(
        grid,
        cdf=lambda u: (k * np.minimum(u, tau) + np.maximum(u - tau, 0.0)) / Z,
        quantile=quantile,
        log_pdf=lambda u: jnp.where(u < tau, np.float32(math.log(k / Z)), -np.float32(math.log(Z))),
    )


def mirror_timestep(schedule: NoiseSchedule) -> int:
    """m of the published code: where sqrt(1 - abar) is first flat, plus 1; at most T - 1."""
    sigma = np.sqrt(-np.expm1(log_alphas_bar(discrete_betas(schedule))))
    first = int(np.argmax(np.gradient(sigma) < _FLAT))  # 0 where it is nowhere flat, as there
    return min(first + 1, sigma.size - 1)


def _published(
    grid: TimeGrid, schedule: NoiseSchedule, tau: float, k: float, axis_name: AxisName
) -> TimestepSampler:
    T, m = grid.num_timesteps, mirror_timestep(schedule)
    assert T is not None  # `speed` has checked
    p = np.where(np.arange(T) < round(tau * T), k, 1.0)
    p /= p.sum()
    mirrored = np.bincount(np.abs(m - np.arange(T)), p, minlength=T)
    drawn = tabulated_law(grid, p)

    def halves(size: int) -> tuple[int, int]:
        total = size * collectives.axis_size(axis_name)
        return min(total // 2 + 1, total), total

    def draw(key: Key, state: State, batch: Batch) -> TimestepSample:
        size = collectives.batch_size(batch)
        first, _ = halves(size)
        index = collectives.example_index(size, axis_name)
        image = index >= first
        keys = collectives.example_keys(key, jnp.where(image, index - first, index))
        v = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
        t, u = drawn.draw(open_unit(v))
        other = jnp.abs(m - t)
        t, u = jnp.where(image, other, t), jnp.where(image, grid.to_u(other), u)
        return TimestepSample(t, u, jnp.ones((size,), jnp.float32))

    def log_density(state: State, sample: TimestepSample, batch: Batch) -> PerExample:
        first, total = halves(collectives.batch_size(batch))
        law = (first * p + (total - first) * mirrored) / total
        return tabulated_law(grid, law).log_density(sample.t)

    # Its empty state and its update are those of any static sampler.
    return static_sampler(grid, drawn)._replace(
        sample=GridSample(grid, draw), log_density=log_density
    )
