"""When a sampler probes: each so many steps, and only where a step moved the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.types import AxisName, Metrics, Params, State


def moved(old: Params, new: Params, axis_name: AxisName) -> jax.Array:
    """() bool: whether any parameter of any device differs."""
    differs = [jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)]
    here = jnp.any(jnp.stack(differs)) if differs else jnp.asarray(False)
    return here if axis_name is None else collectives.psum(here.astype(jnp.int32), axis_name) > 0


def probe_when_due(
    state: State,
    probed: Callable[[State], State],
    *,
    every: int,
    probe: bool | None,
    may: Callable[[], jax.Array] = lambda: jnp.asarray(True),
) -> tuple[State, Metrics]:
    """Counts an optimizer step, and probes if this is one of each ``every``-th.

    A step that moved nothing (of gradients that are accumulated, skipped, frozen) says nothing: a
    probe is put off to the next that does.

    Args:
      state: a NamedTuple with ``step``, steps counted, and ``report``, metrics.
      probed: what a probe makes of it.
      every: f_S.
      probe: decides at trace time instead of the counter inside ``lax.cond``; None leaves it to
        the counter.
      may: -> () bool, whether there is something to probe; asked where a probe is due. Where there
        is not, ``step`` stands still, so that the next step is due.

    Returns:
      The state, and its report with ``probed`` (1 where this step probed).
    """
    last = (state.step + 1) % every == 0
    if probe is None:
        due = jax.lax.cond(last, may, lambda: jnp.asarray(False))
        new = jax.lax.cond(due, probed, lambda state: state, state)
        step = jnp.where(last & ~due, state.step, state.step + 1)
    elif probe:
        due = may()
        new = jax.tree.map(lambda new, old: jnp.where(due, new, old), probed(state), state)
        step = jnp.where(due, state.step + 1, (state.step // every + 1) * every - 1)
    else:
        due, new, step = jnp.asarray(False), state, state.step + 1
    metrics = {"probed": due.astype(jnp.float32), **new.report}
    return new._replace(step=step.astype(jnp.int32)), metrics
