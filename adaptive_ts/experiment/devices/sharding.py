"""Where arrays live: one mesh over all devices of all processes.

Its axis ``data`` splits the batch. A second one, ``fsdp``, splits the batch further and, with it,
the parameters, their average and the optimizer's state.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_ts.experiment.devices.memory import keep_freed_memory
from adaptive_ts.experiment.errors import UserError

AXES = ("data", "fsdp")
_SMALL = 4096  # elements: splitting an array of fewer saves nothing and costs a message


def make_mesh(
    devices: list[jax.Device] | None = None, *, data: int | None = None, fsdp: int = 1
) -> Mesh:
    """A mesh of the given devices, or of all there are, in the order of their processes.

    On CPUs the process keeps from here on the memory that it frees (`memory.keep_freed_memory`).

    Args:
      devices: a process's own follow one another, so that its rows of a batch do.
      data: devices along ``data``; None: as many as there are.
      fsdp: devices along ``fsdp``; 1: the mesh has no such axis.

    Raises:
      UserError: there are more or fewer devices than these.
    """
    keep_freed_memory()
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    count = len(devices)
    if count % fsdp:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(f"--mesh.fsdp: {fsdp} does not divide the {count} devices: use {fitting}")
    if data not in (None, count // fsdp):
        raise UserError(
            f"--mesh.data: {data} times --mesh.fsdp {fsdp} are not the {count} devices: use "
            f"{count // fsdp}, or leave it out"
        )
    if fsdp == 1:
        return Mesh(np.asarray(devices), AXES[:1], axis_types=(AxisType.Auto,))
    return Mesh(np.reshape(devices, (-1, fsdp)), AXES, axis_types=(AxisType.Auto,) * 2)


def axes(mesh: Mesh) -> str | tuple[str, ...]:
    """What the leading axis of a batch is split over: the name or names of all of the mesh."""
    return mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(axes(mesh)))


def shared(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """An array of the model's state: its longest axis that ``fsdp`` divides is split over it.

    Whole on every device without such an axis, and if the array is small.
    """
    parts = mesh.shape.get("fsdp", 1)
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting or math.prod(shape) < _SMALL:
        return replicated(mesh)
    longest = max(fitting, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError, with the nearest sizes that work, if the devices can't share a batch."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        sizes = " or ".join(str(size) for size in (below, below + parts) if size)
        of = f"{accumulate} microbatches on " if accumulate > 1 else ""
        raise UserError(
            f"--train.batch_size: {batch_size} is not divisible by {of}the {mesh.size} devices: "
            f"use {sizes}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch -> the global batch, split over the devices."""
    rows = split(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # meant, though JAX counts it as implicit
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole -> split over the devices."""
    rows = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda i: x[i]), tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a (possibly split) array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather(tree: Any, mesh: Mesh) -> Any:
    """Arrays split anyhow over the mesh -> whole on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
