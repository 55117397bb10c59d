"""Draws on (0, 1) for the examples of a batch, independent or coupled."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from adaptive_ts import collectives
from adaptive_ts.grid import open_unit
from adaptive_ts.types import AxisName, Key, PerExample

Coupling: TypeAlias = Literal["independent", "stratified", "low_discrepancy", "antithetic"]


def check_coupling(coupling: str) -> None:
    """Raises ValueError for an unknown coupling."""
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling must be one of {get_args(Coupling)}, got {coupling!r}")


def unit_draws(
    key: Key, size: int, *, coupling: Coupling = "independent", axis_name: AxisName = None
) -> PerExample:
    """v (b,), each uniform on (0, 1); across the N examples of the global batch

    * ``"independent"``: independent;
    * ``"stratified"``: v_i = (pi(i) + w_i) / N, one independent w_i per stratum;
    * ``"low_discrepancy"``: v_i = (w + pi(i) / N) mod 1, one w shared by all;
    * ``"antithetic"``: pairs v, 1 - v: the second half of the batch mirrors the first.

    pi is a random permutation, so that the place in the batch says nothing about v.

    Args:
      key: the same on every device.
      size: b, examples of this device.
      coupling: as above.
      axis_name: the mapped axis inside ``shard_map`` or ``pmap``.

    Source: strata: McKay et al. 1979; the shifted lattice: Kingma et al. 2021 (arXiv 2107.00630),
    App. I.1; pairs: Song et al. 2021 (arXiv 2010.02502), released code.
    """
    total = size * collectives.axis_size(axis_name)
    index = collectives.example_index(size, axis_name)
    key_order, key_draw = jax.random.split(key)
    half = -(-total // 2)
    mirrored = index >= half
    if coupling == "antithetic":
        index = jnp.where(mirrored, index - half, index)
    v = jax.vmap(jax.random.uniform)(collectives.example_keys(key_draw, index))
    if coupling == "antithetic":
        v = jnp.where(mirrored, 1 - v, v)
    elif coupling != "independent":
        place = jax.random.permutation(key_order, total)[index].astype(jnp.float32)
        if coupling == "stratified":
            v = (place + v) / total
        else:
            v = jnp.mod(jax.random.uniform(key_draw) + place / total, 1.0)
    return open_unit(v)
