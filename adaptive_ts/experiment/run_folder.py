"""The folder of a run: whose it is, and that it is nobody else's at the same time."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_ts.experiment import config as configs
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import locked, read_json, write_json


def check_folder(folder: Path, config: Config) -> None:
    """Refuses a folder that holds a run of another config; changes nothing."""
    try:
        saved = read_json(folder / "config.json")
    except OSError as error:
        raise UserError(f"--workdir: cannot use {folder}: {error.strerror}") from error
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise UserError(f"{folder / 'config.json'} holds no config of a run: move it away")
    found = configs.differences(saved, config)
    if found:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(found)}); nothing was changed: "
            "choose another --workdir, or give the options it was started with"
        )


@contextlib.contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Makes the folder this run's own while it lasts; every process takes part.

    Raises:
      UserError: another run is at work in it, it cannot be written to, or some process sees
        another folder of this name.
    """
    with contextlib.ExitStack() as stack:
        problem = _claim(folder, config, stack) if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            problem = _agree(folder, problem)
        if problem:
            raise UserError(problem)
        yield


def _claim(folder: Path, config: Config, stack: contextlib.ExitStack) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not stack.enter_context(locked(folder / ".lock", wait=False)):
            return (
                f"{folder} is being trained in by another process: wait for it, or choose another "
                "--workdir"
            )
        path, content = folder / "config.json", configs.to_dict(config)
        if read_json(path) != content:
            write_json(path, content)
    except OSError as error:
        return f"--workdir: cannot write to {folder}: {error.strerror}"
    return None


def _agree(folder: Path, problem: str | None) -> str | None:
    """The problem that process 0 or any other has with the folder, as each can tell it."""
    mark = folder / f".shared-{secrets.randbits(31) if jax.process_index() == 0 else 0}"
    if jax.process_index() == 0 and not problem:
        mark.touch()
    number = int(multihost_utils.broadcast_one_to_all(np.int32(mark.name.split("-")[1])))
    seen = problem is None and (folder / f".shared-{number}").exists()
    all_see = multihost_utils.process_allgather(np.int32(seen)).all()
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if problem or all_see:
        return problem
    return (
        f"--workdir: not every process sees the same {folder}: give a folder that all hosts share, "
        "and see what process 0 says"
    )
