"""Draws on (0, 1) for the examples of a batch, independent or coupled."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.timesteps.grid import open_unit
from adaptive_ts.types import AxisName, Key, PerExample

Coupling: TypeAlias = Literal["independent", "stratified", "low_discrepancy", "antithetic"]


def check_coupling(coupling: str) -> None:
    """Raises ValueError for an unknown coupling."""
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling must be one of {get_args(Coupling)}, got {coupling!r}")


def unit_draws(
    key: Key, size: int, *, coupling: Coupling = "independent", axis_name: AxisName = None
) -> PerExample:
    """Uniform draws v on (0, 1), one per example, coupled across the N of the global batch or not.

    * ``"independent"``: no coupling;
    * ``"stratified"``: v_i = (pi(i) + w_i) / N, one independent w_i per stratum;
    * ``"low_discrepancy"``: v_i = (w + pi(i) / N) mod 1, one w shared by all;
    * ``"antithetic"``: pairs v, 1 - v: the second half of the batch mirrors the first.

    pi is a random permutation, so that the place in the batch says nothing about v.

    Args:
      key: the same on every device.
      size: b, examples of this device.
      coupling: as above.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Returns:
      (b,) float32, each of them uniform whatever the coupling.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> v = ats.timesteps.unit_draws(jax.random.key(0), 4, coupling="stratified")
      >>> print(jnp.sort(jnp.floor(4 * v)))
      [0. 1. 2. 3.]

    Source: strata: McKay et al. 1979; the shifted lattice: Kingma et al. 2021 (arXiv 2107.00630),
    App. I.1; pairs: Song et al. 2021 (arXiv 2010.02502), released code.
    """
    total = size * collectives.axis_size(axis_name)
    index = collectives.example_index(size, axis_name)
    key_order, key_draw = jax.random.split(collectives.threefry(key))
    if coupling == "antithetic":
        half = -(-total // 2)
        v = _uniform(key_draw, index % half)
        return open_unit(jnp.where(index >= half, 1 - v, v))
    if coupling == "independent":
        return open_unit(_uniform(key_draw, index))
    place = jax.random.permutation(key_order, total)[index].astype(jnp.float32)
    if coupling == "low_discrepancy":
        shift = jax.random.uniform(key_draw, dtype=jnp.float32)
        return open_unit(jnp.mod(shift + place / total, 1.0))
    # Not so close to 1 that the sum rounds to the next stratum.
    jitter = jnp.minimum(_uniform(key_draw, index), 1 - total * 2.0**-23)
    return open_unit((place + jitter) / total)


def _uniform(key: Key, index: PerExample) -> PerExample:
    """One number per example, by global index."""
    keys = collectives.example_keys(key, index)
    return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
