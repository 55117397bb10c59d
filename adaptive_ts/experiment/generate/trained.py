"""A run, read back from its folder; nothing in it is changed."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.assembly.build import (
    Built,
    build,
    check_classes,
    first_state,
)
from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.groups import Config, from_dict
from adaptive_ts.experiment.data.decoding import is_latent
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import Log, UserError, one_line
from adaptive_ts.experiment.files import read_json


class Trained(NamedTuple):
    """Attributes:
    built: what the run is made of.
    state: at the checkpoint, on all devices of the mesh.
    step: of the checkpoint.
    shape: (H, W, C) of the images.
    latents: they are latents, not pixels.
    """

    built: Built
    state: TrainState
    step: int
    shape: tuple[int, ...]
    latents: bool = False


def read_config(run: Path) -> Config:
    """The config of a run's folder.

    Raises:
      UserError: no such folder, no run, or one of another version.
    """
    if not run.is_dir():
        raise UserError(f"no run at {run}: give the folder of a run (its --workdir)")
    try:
        saved = read_json(run / "config.json")
    except OSError as error:
        raise UserError(f"cannot read {run / 'config.json'}: {one_line(error)}") from error
    if not isinstance(saved, dict):
        raise UserError(f"{run} holds no config.json of a run: give the folder of a run")
    config = from_dict(saved)
    problems = validate(config, unused=False)
    if problems:
        raise UserError(f"{run / 'config.json'}: {'; '.join(problems)}")
    return config


def load_trained(
    run: Path, config: Config, mesh: Mesh, *, step: int | None = None, log: Log = print
) -> Trained:
    """The newest checkpoint that verifies, or that of one step.

    The images' shape is the data set's, which must be there.

    Args:
      run: the folder.
      config: of the run, as by `read_config`; its data set may lie elsewhere by now.
      mesh: the devices that get the state.
      step: of the checkpoint; None: the newest that is good.
      log: takes a line for each slow thing done and each checkpoint that is damaged.

    Raises:
      UserError: no such checkpoint, none that is good, or one of another model.
    """
    folder = run / "checkpoints"
    steps = _saved_steps(folder)
    if not steps:
        raise UserError(f"{run} has no checkpoint: training saves one every --train.save_every")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"--step: {run} has no checkpoint of step {step}: it has {there}")
    dataset = load_split(config.data, "test", log)
    check_classes(config, dataset)
    shape = dataset.images.shape[1:]
    built = build(config, mesh)
    key, whole = seed_key(config.seed), (config.train.batch_size, *shape)
    _, target = first_state(built, whole, key, mesh)
    said: list[str] = []
    with _view(folder, steps if step is None else [step]) as view:
        try:
            # To pyrefly a field that holds a function is no method.
            # pyrefly: ignore[bad-specialization]
            with contextlib.closing(open_checkpoints(view)) as checkpoints:
                restored = checkpoints.restore_latest(target, said.append)
        except UserError as error:
            # Its words are of training, and of the view.
            text = str(error).replace(str(view), str(folder))
            text = text.replace("remove the folder or pass --workdir another", "train it again")
            raise UserError(text.replace(" or pass --workdir another", "")) from error
    for line in said:
        log(line)
    assert restored is not None  # the view shows one at least
    found, state, _ = restored
    latents = is_latent(dataset.images.dtype)
    return Trained(built, state, found, tuple(shape), latents)


def _saved_steps(folder: Path) -> list[int]:
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
    except OSError:
        return []


@contextlib.contextmanager
def _view(folder: Path, steps: Iterable[int]) -> Iterator[Path]:
    """A folder that shows some of the checkpoints, by links.

    Opening the run's own would do what orbax does to the one that it writes to; and the run may be
    read-only, or training still.
    """
    with tempfile.TemporaryDirectory(prefix="adaptive_ts_") as temporary:
        for step in steps:
            (Path(temporary) / str(step)).symlink_to(folder / str(step), target_is_directory=True)
        yield Path(temporary)
