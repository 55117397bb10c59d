"""Where arrays live: one mesh over all devices of all processes, its one axis ``data``."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_ts.experiment.errors import UserError

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, or of all there are."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError, with the nearest sizes that work, if the devices can't share a batch."""
    devices = mesh.size
    if batch_size % devices:
        below = batch_size // devices * devices
        sizes = " or ".join(str(size) for size in (below, below + devices) if size)
        raise UserError(
            f"--train.batch_size: {batch_size} is not divisible by the {devices} devices: "
            f"use {sizes}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch -> the global batch, split over the devices."""
    sharding = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole -> split over the devices."""
    rows = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda i: x[i]), tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a (possibly split) array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
