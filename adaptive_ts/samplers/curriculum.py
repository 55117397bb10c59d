"""Curricula: from one law of timesteps to another as training goes on."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.schedules.base import known
from adaptive_ts.timesteps.grid import GridSample, TimeGrid, open_unit
from adaptive_ts.timesteps.laws import (
    Law,
    check_parameters,
    logit_normal_law,
    tabulated_law,
    truncated_normal_law,
    uniform_law,
)
from adaptive_ts.types import (
    AxisName,
    Batch,
    Key,
    Metrics,
    PerExample,
    Scalar,
    TimestepSample,
    TimestepSampler,
)


class CurriculumState(NamedTuple):
    """step: () int32, optimizer steps so far."""

    step: Scalar


def curriculum(
    grid: TimeGrid,
    *,
    kind: Literal["gaussian", "switch"] = "gaussian",
    mean: float = 0.3,
    std: float = 0.2,
    steps: int = 50_000,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    as_published: bool = False,
    axis_name: AxisName = None,
) -> TimestepSampler:
    """A curriculum: uniform at first and then more and more Gaussian, or logit-normal at first.

    * ``"gaussian"`` (CLTS): p = (1 - a) uniform + a N(mean, std^2), the Gaussian of u conditioned
      on (0, 1), a = min(step / steps, 1).
    * ``"switch"``: logit u ~ N(logit_mean, logit_std^2) before step ``steps``, then uniform.

    ``as_published`` is the "clts" of SpeeD's code: there, by the precedence of its operators, the
    Gaussian is a spike 1 / (T sqrt(2 pi)) at timestep mean T and zero elsewhere, and p is
    normalised after mixing. At step ``steps`` all draws are at that one timestep; beyond it the
    code stops with an error, and we stay there. The authors' own code of CLTS is not public: mean
    0.3 is theirs at second hand, std 0.2 our choice.

    Args:
      grid: the time grid.
      kind: ``"gaussian"`` or ``"switch"``.
      mean: centre of the Gaussian, as a share of the time axis.
      std: its width before conditioning, positive; not used ``as_published``.
      steps: length of the passage, or the step of the switch, in optimizer steps.
      logit_mean, logit_std: of the logit before the switch.
      as_published: as in SpeeD's code; ``"gaussian"`` on a discrete grid only.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      A `TimestepSampler` whose state is a `CurriculumState`, counted by ``update``; weights 1.

    Raises:
      ValueError: an unknown kind, a mean outside [0, 1], a std that is not positive and finite,
        steps below 1, or ``as_published`` where there is nothing published.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> sampler = ats.curriculum(ats.discrete(1000), steps=100)
      >>> for step in (0, 100):
      ...     state = ats.samplers.CurriculumState(jnp.int32(step))
      ...     print(f"{1000 * ats.effective_density(sampler, state=state)[300]:.2f}")
      1.00
      2.14

    Source: Xu et al. 2024 (arXiv 2404.07946); the spike: Wang et al. (arXiv 2405.17403),
    released code.
    """
    known(kind, ("gaussian", "switch"), "kind")
    _check(kind, mean, std, steps, logit_mean, logit_std)
    steps, T = int(steps), grid.num_timesteps
    if as_published:
        check_parameters(
            "curriculum",
            "what is published is kind='gaussian' on timesteps; give as_published=False",
            kind == "gaussian" and T is not None,
            as_published=as_published,
            kind=kind,
            num_timesteps=T,
        )
        assert T is not None  # checked just above
        spike = np.arange(T) == min(round(mean * T), T - 1)
        height = 1 / (T * math.sqrt(2 * math.pi))
        return _mixture(grid, tabulated_law(grid, spike), _passage(steps, height), axis_name)
    if kind == "gaussian":
        law = truncated_normal_law(grid, float(mean), float(std))
        return _mixture(grid, law, _passage(steps, 1.0), axis_name)

    def before(step: Scalar) -> tuple[Scalar, Scalar]:
        share = (step < steps).astype(jnp.float32)
        return share, 1 - share

    return _mixture(grid, logit_normal_law(grid, logit_mean, logit_std), before, axis_name)


def _check(
    kind: str, mean: float, std: float, steps: int, logit_mean: float, logit_std: float
) -> None:
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    check_parameters(
        "curriculum",
        "steps must be an integer from 1 to 2**31 - 1",
        whole and 1 <= steps < 2**31,
        steps=steps,
    )
    if kind == "gaussian":
        check_parameters(
            "curriculum",
            "mean must be in [0, 1] (a share of the time axis), std positive and finite",
            0 <= mean <= 1 and 0 < std < math.inf,
            mean=mean,
            std=std,
        )
    else:
        check_parameters(
            "curriculum",
            "logit_mean must be finite, logit_std positive and finite",
            math.isfinite(logit_mean) and 0 < logit_std < math.inf,
            logit_mean=logit_mean,
            logit_std=logit_std,
        )


def _passage(steps: int, height: float) -> Callable[[Scalar], tuple[Scalar, Scalar]]:
    """Shares a h and 1 - a, normalised, a = min(step / steps, 1)."""

    def shares(step: Scalar) -> tuple[Scalar, Scalar]:
        done = jnp.minimum(step, steps)
        # 1 - a from integers: near the end its digits decide the ratio of a small h to it.
        focus = done.astype(jnp.float32) / steps * height
        rest = (steps - done).astype(jnp.float32) / steps
        return focus / (focus + rest), rest / (focus + rest)

    return shares


def _mixture(
    grid: TimeGrid,
    focus: Law,
    shares: Callable[[Scalar], tuple[Scalar, Scalar]],
    axis_name: AxisName,
) -> TimestepSampler:
    """Draws from ``focus`` and uniform with shares that depend on the step."""
    rest = uniform_law(grid)

    def init(key: Key, batch: Batch) -> CurriculumState:
        return CurriculumState(jnp.int32(0))

    def draw(key: Key, state: CurriculumState, batch: Batch) -> TimestepSample:
        size = collectives.batch_size(batch)
        keys = collectives.example_keys(key, collectives.example_index(size, axis_name))
        v, coin = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys).T
        focused = coin < shares(state.step)[0]
        pairs = zip(focus.draw(open_unit(v)), rest.draw(open_unit(v)), strict=True)
        t, u = (jnp.where(focused, near, far) for near, far in pairs)
        return TimestepSample(t, u, jnp.ones((size,), jnp.float32))

    def log_density(state: CurriculumState, sample: TimestepSample, batch: Batch) -> PerExample:
        near, far = (jnp.log(share) for share in shares(state.step))
        return jnp.logaddexp(near + focus.log_density(sample.t), far + rest.log_density(sample.t))

    def update(
        state: CurriculumState, sample: TimestepSample, losses: PerExample, **extra: Any
    ) -> tuple[CurriculumState, Metrics]:
        return CurriculumState(state.step + 1), {}

    return TimestepSampler(init, GridSample(grid, draw), log_density, update)
