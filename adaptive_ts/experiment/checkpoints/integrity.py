"""What a checkpoint says of itself, and whether to believe it.

orbax 0.12 keeps no checksums: a flipped bit in a data file restores as wrong numbers, silently. So
each leaf's checksum, dtype and shape go into the JSON item, and are compared when it is read.
"""

import contextlib
import errno
import gc
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from adaptive_ts.experiment.checkpoints.checksums import checksums
from adaptive_ts.experiment.errors import UserError, one_line, quiet
from adaptive_ts.experiment.files import json_digest

PyTree = Any
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_FINE, _DAMAGED, _REFUSED = range(3)


class DamagedError(Exception):
    """A checkpoint that is not what was saved; the message is the reason."""


class RefusedError(Exception):
    """A checkpoint that could not be read, and may be sound; the message is the reason."""


def described(state: PyTree, meta: dict) -> dict:
    """The JSON item that is saved beside a state: meta, layout, checksums, and one of its own."""
    content = {"meta": meta, "layout": layout(state), "checksums": checksums(state)}
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings then
    return {**content, "sha256": json_digest(content)}


def layout(tree: PyTree) -> dict[str, list]:
    """Path -> [dtype, shape] of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): [str(x.dtype), list(x.shape)] for p, x in leaves}


def restore(folder: epath.Path, abstract: PyTree) -> tuple[PyTree, dict]:
    """Reads a checkpoint and checks it; every process takes part.

    orbax's own restore is a collective, which a process that cannot read would leave the others
    in: here each reads by itself, and then all hear how it went.

    Args:
      folder: of the step.
      abstract: ``jax.ShapeDtypeStruct`` with shardings, of any mesh.

    Raises:
      DamagedError: it is not what was saved, in some process's eyes.
      RefusedError: some process could not read it, for a reason that may pass.
      UserError: it is of another model.
    """
    with _agreed():
        item = ocp.JsonCheckpointHandler().restore(folder / "meta")
        if json_digest({k: v for k, v in item.items() if k != "sha256"}) != item["sha256"]:
            raise DamagedError("its meta item does not match its checksum")
        if not all(isinstance(item[name], dict) for name in ("layout", "checksums")):
            raise DamagedError("its meta item is not what is written here")
    _check_layout(folder, item["layout"], layout(abstract))
    with _agreed():
        target = ocp.args.StandardRestore(jax.tree.map(_placed, abstract))
        state = ocp.StandardCheckpointHandler().restore(folder / "state", args=target)
    with _agreed():
        sums = checksums(state)
        bad = [name for name, value in item["checksums"].items() if sums[name] != value]
        if bad:
            raise DamagedError(
                f"wrong checksum of {bad[0]}, {len(bad)} of {len(sums)} leaves in all"
            )
    return state, item["meta"]


def os_error(error: BaseException | None) -> int | None:
    """The number of the system's error that is behind this one, if one is."""
    while error is not None:
        found = _OS_ERROR.search(str(error))
        if found:
            return int(found[1])
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _check_layout(folder: epath.Path, saved: dict, wanted: dict) -> None:
    differing = sorted(k for k in {*saved, *wanted} if saved.get(k) != wanted.get(k))
    if differing:
        name = differing[0]
        raise UserError(
            f"checkpoint {folder.name} in {folder.parent} does not fit this run: {name} is "
            f"{saved.get(name, 'absent')} in it and {wanted.get(name, 'absent')} here"
            f"{f', {len(differing) - 1} more differ' if differing[1:] else ''}; use the "
            "configuration it was made with or pass --workdir another"
        )


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if getattr(leaf, "sharding", None) is not None:
        return leaf
    # Without a sharding orbax wants the devices that wrote the checkpoint.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Lets every process do its reading; a failure of one is one of all."""
    how, why = _FINE, ""
    try:
        with quiet():
            yield
    except DamagedError as error:
        how, why = _DAMAGED, str(error)
    except Exception as error:  # orbax, TensorStore and JSON raise a dozen kinds
        how, why = _kind(error), _reason(error)
    if how:
        with quiet():
            gc.collect()  # what a failed read leaves behind complains on stderr when it is freed
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(how)).max())
        if worst > how:
            how, why = worst, "another process cannot read it"
    if how:
        raise (RefusedError if how == _REFUSED else DamagedError)(why)


def _kind(error: Exception) -> int:
    number = os_error(error)
    memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    refused = memory or (number is not None and number not in _MISSING)
    return _REFUSED if refused else _DAMAGED


def _reason(error: Exception) -> str:
    number = os_error(error)
    return one_line(error) if number is None or number in _MISSING else os.strerror(number)
