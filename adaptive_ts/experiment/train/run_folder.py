"""The folder of a run: whose it is, and that it is nobody else's at the same time."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_ts.experiment import config as configs
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import flatten
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


def check_meta(folder: Path, meta: Mapping[str, Any], step: int, config: Config) -> None:
    """Refuses a checkpoint of another config, whatever the folder's config.json says."""
    found = configs.differences(meta["config"], config) if "config" in meta else []
    if found:
        raise UserError(
            f"checkpoint {step} in {folder / 'checkpoints'} is of a run of another config "
            f"({'; '.join(found)}); nothing was changed: choose another --workdir, or give the "
            "options it was started with"
        )


@contextlib.contextmanager
def claimed(folder: Path, config: Config, data: str) -> Iterator[None]:
    """Makes the folder this run's own while it lasts; every process takes part.

    Args:
      folder: of the run.
      config: of the run.
      data: fingerprint of the training images.

    Raises:
      UserError: another run is at work in it, it cannot be written to, some process sees another
        folder of this name, or has other options or data.
    """
    with contextlib.ExitStack() as stack:
        problem = _claim(folder, config, stack) if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            problem = _agree(folder, problem) or _same(config, data)
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
        check_folder(folder, config)  # once more: now nobody else writes to it
        path, content = folder / "config.json", configs.to_dict(config)
        if read_json(path) != content:
            write_json(path, content)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"--workdir: cannot write to {folder}: {error.strerror}"
    return None


def _agree(folder: Path, problem: str | None) -> str | None:
    """The problem that process 0 or any other has with the folder, as each can tell it."""
    mark = folder / f".shared-{secrets.randbits(31) if jax.process_index() == 0 else 0}"
    if jax.process_index() == 0 and not problem:
        try:
            mark.touch()
        except OSError as error:
            problem = f"--workdir: cannot write to {folder}: {error.strerror}"
    number = int(multihost_utils.broadcast_one_to_all(np.int32(mark.name.split("-")[1])))
    seen = False
    with contextlib.suppress(OSError):
        seen = problem is None and (folder / f".shared-{number}").exists()
    all_see = multihost_utils.process_allgather(np.int32(seen)).all()
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    if problem or all_see:
        return problem
    return (
        f"--workdir: not every process sees the same {folder}: give a folder that all hosts share, "
        "and see what process 0 says"
    )


def _same(config: Config, data: str) -> str | None:
    """What differs from process 0, here or in another process: all would wait for each other."""
    own = {**_shared_options(config), "training images": data}
    text = json.dumps(own).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text[:size].ljust(size), np.uint8)
    first = json.loads(bytes(multihost_utils.broadcast_one_to_all(sent)))
    found = [
        f"{name}: {first.get(name)!r} there, {value!r} here"
        for name, value in own.items()
        if first.get(name) != value
    ]
    if not multihost_utils.process_allgather(np.int32(bool(found))).any():
        return None
    return (
        f"the processes differ ({'; '.join(found) or 'this one is as process 0'}): start the same "
        "command on all hosts, with the same --data.dir"
    )


def _shared_options(config: Config) -> dict[str, Any]:
    """What has to be the same in all processes: all but where things lie and who each is."""
    flat = flatten(configs.to_dict(config), Config)
    own = ("workdir", "data.dir", "data.source_dir", "hosts.process_id")
    return {name: value for name, value in flat.items() if name not in own}
