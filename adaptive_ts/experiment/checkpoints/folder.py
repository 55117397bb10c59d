"""Verified checkpoints: orbax writes and reads them, checksums say whether to believe them.

What is damaged is named, and the checkpoint before it is used. All of orbax that this project
touches is in this file and in `integrity`.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from adaptive_ts.experiment.checkpoints import integrity
from adaptive_ts.experiment.errors import Log, UserError, lost_peer, one_line, quiet

PyTree = Any
_STATUS = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|FAILED_PRECONDITION|UNAVAILABLE|DATA_LOSS|INTERNAL|"
    r"ABORTED|DEADLINE_EXCEEDED|No space left|Read-only file system"
)


class Checkpoints(NamedTuple):
    """A folder of checkpoints, opened by ``open_checkpoints``.

    Attributes:
        save: ``(step, state, meta) -> bool``: starts writing and returns while it goes on; False if
            this step was already saved or restored here. ``meta`` is anything JSON can hold.
            Raises UserError when the disk refuses (also for the save before, which ran on), and
            ValueError for a leaf that cannot be saved.
        restore_latest: ``(abstract_state, log) -> (step, state, meta) | None``: the newest
            checkpoint that verifies, None when there is none at all. ``abstract_state`` holds
            ``jax.ShapeDtypeStruct`` with shardings, of any mesh. Raises UserError when none is
            usable, when one cannot be read for a reason that may pass, and when an intact one
            belongs to another model.
        latest_step: ``() -> int | None``: the newest step on disk not known to be damaged.
        wait: ``() -> None``: until the last save is on disk. Raises UserError if it failed.
        close: ``() -> None``: waits, then stops the background threads. Raises like ``wait``.
        reached_preemption: ``(step) -> bool``: whether one of several processes got SIGTERM and
            all stop at this step; each asks it after every step.
    """

    save: Callable[[int, PyTree, dict], bool]
    restore_latest: Callable[..., tuple[int, PyTree, dict] | None]
    latest_step: Callable[[], int | None]
    wait: Callable[[], None]
    close: Callable[[], None]
    reached_preemption: Callable[[int], bool]


def open_checkpoints(
    folder: str | os.PathLike, *, max_to_keep: int = 3, keep_period: int | None = None
) -> Checkpoints:
    """Opens a folder of checkpoints, making it if needed.

    Args:
        folder: the folder; each checkpoint becomes ``folder/STEP``.
        max_to_keep: how many of the newest stay.
        keep_period: steps that are multiples of it also stay.

    Returns:
        The functions that save to and restore from it.

    Raises:
        ValueError: if ``max_to_keep`` is below 1.
        UserError: if the folder cannot be made or read.
    """
    if max_to_keep < 1:
        raise ValueError(f"max_to_keep must be at least 1; got {max_to_keep}")
    root = epath.Path(folder).expanduser()
    root = root if "://" in str(root) else root.absolute()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        keep_period=keep_period,
        cleanup_tmp_directories=True,  # what runs left behind that were killed as they saved
    )
    remedy = "pass --workdir another"
    logging.getLogger("absl").addFilter(_no_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _no_given_up_read:
        sys.unraisablehook = functools.partial(_no_given_up_read, sys.unraisablehook)
    with _as_user_error(f"cannot use {root} for checkpoints", lambda: remedy), quiet():
        root.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(root, item_names=("state", "meta"), options=options)
    opened = _Folder(manager, root, set(), set())
    return Checkpoints(
        save=functools.partial(_save, opened),
        restore_latest=functools.partial(_restore_latest, opened),
        latest_step=functools.partial(_latest_step, opened),
        wait=functools.partial(_wait, opened),
        close=functools.partial(_close, opened),
        reached_preemption=manager.reached_preemption,
    )


class _Folder(NamedTuple):
    manager: ocp.CheckpointManager
    root: epath.Path
    damaged: set[int]  # found so by restore_latest, and still on disk
    good: set[int]  # saved or restored here


def _latest_step(folder: _Folder) -> int | None:
    return max(set(ocp.utils.checkpoint_steps(folder.root)) - folder.damaged, default=None)


def _save(folder: _Folder, step: int, state: PyTree, meta: dict) -> bool:
    state = _saveable(state)
    if step in folder.good:
        return False
    manager = folder.manager
    with _writing(folder):
        _probe(folder.root)
        # An older one was restored and orbax overwrites nothing: now they are in the way.
        for bad in folder.damaged & set(manager.all_steps()):
            manager.delete(bad)
        folder.damaged.clear()
        newest = max(manager.all_steps(), default=-1)
        if newest >= step:
            raise UserError(
                f"{folder.root} already holds step {newest}, and step {step} is to be saved: "
                "restore it first, or pass --workdir another"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(integrity.described(state, meta)),
        )
        manager.save(step, args=items, force=True)
    folder.good.add(step)
    return True


def _restore_latest(
    folder: _Folder, abstract_state: PyTree, log: Log = print
) -> tuple[int, PyTree, dict] | None:
    reasons = []
    for step in sorted(ocp.utils.checkpoint_steps(folder.root), reverse=True):
        try:
            state, meta = integrity.restore(folder.root / str(step), abstract_state)
        except integrity.RefusedError as e:
            raise UserError(
                f"cannot read checkpoint {step} in {folder.root} ({e}): try again; if that does "
                f"not help, move {folder.root / str(step)} away, and the one before it is used",
                exit_code=1,
            ) from e
        except integrity.DamagedError as e:
            reasons.append(f"checkpoint {step} is damaged ({e})")
            log(f"{reasons[-1]}: trying the one before")
            folder.damaged.add(step)
        else:
            folder.good.add(step)
            return step, state, meta
    if not reasons:
        return None
    more = f" and {len(reasons) - 1} more" if reasons[1:] else ""
    raise UserError(
        f"no usable checkpoint in {folder.root}: {reasons[0]}{more}; remove the folder or pass "
        "--workdir another"
    )


def _wait(folder: _Folder) -> None:
    with _writing(folder):
        folder.manager.wait_until_finished()
        folder.manager.check_for_errors()


def _close(folder: _Folder) -> None:
    with _writing(folder):
        folder.manager.close()


def _no_orbax(record: logging.LogRecord) -> bool:
    """Its threads log pages of traceback about what we report in one line."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _no_given_up_read(hook: Callable[[Any], None], found: Any) -> None:
    """Reads still under way when another fails complain as well, in pages, once they are freed."""
    code = getattr(found.object, "cr_code", None)
    other = code is None or f"{os.sep}orbax{os.sep}" not in code.co_filename
    if other and str(found.exc_value) != "Event loop is closed":
        hook(found)


def _probe(root: epath.Path) -> None:
    """Fails where the disk does: orbax's threads would wait five minutes for a folder to appear."""
    if "://" not in str(root):
        probe = root / f".probe-{jax.process_index()}"
        shutil.rmtree(probe, ignore_errors=True)
        probe.mkdir()
        try:
            (probe / "file").write_bytes(bytes(4096))
        finally:
            shutil.rmtree(probe)


def _writing(folder: _Folder):
    def last_good() -> str:
        with contextlib.suppress(OSError):
            step = _latest_step(folder)
            return "there is no earlier one" if step is None else f"the last one is step {step}"
        return "the folder cannot be read"

    return _as_user_error(f"cannot write a checkpoint to {folder.root}", last_good)


def _saveable(state: PyTree) -> PyTree:
    def check(path, leaf):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, str | bytes):
            raise ValueError(f"leaf {name} is {leaf!r}: put text into meta")
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        if array.dtype != getattr(leaf, "dtype", array.dtype):
            raise ValueError(f"leaf {name} is {leaf.dtype}, which JAX would make {array.dtype}")
        if array.size == 0:
            raise ValueError(f"leaf {name} has shape {array.shape}: orbax saves no empty arrays")
        return array

    return jax.tree_util.tree_map_with_path(check, state)


@contextlib.contextmanager
def _as_user_error(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """A disk that refuses, in whatever form it comes, as one line; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        cause = None if lost_peer(e) else _disk_cause(e)
        if cause is None:
            raise
        raise UserError(f"{what} ({cause}): {remedy()}", exit_code=1) from e


def _disk_cause(error: BaseException | None) -> str | None:
    number = integrity.os_error(error)
    if number is not None:
        return os.strerror(number)
    while error is not None:
        if isinstance(error, OSError) or _STATUS.search(str(error)):
            return one_line(error)
        error = error.__cause__ or error.__context__
    return None
