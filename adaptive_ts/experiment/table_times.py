"""What a training step of each row costs: timed in turn, not while other runs went on."""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.compiling import compiling
from adaptive_ts.experiment.data import load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.factory import build
from adaptive_ts.experiment.files import read_json, write_json
from adaptive_ts.experiment.table_jobs import Job
from adaptive_ts.experiment.table_records import setting
from adaptive_ts.experiment.throughput_race import (
    Trainer,
    in_turn,
    init_function,
    put_images,
    step_functions,
)

ROUNDS = 5


def measure_times(jobs: Sequence[Job], folder: Path, *, rounds: int = ROUNDS) -> str:
    """Times whole cycles of f_S steps of all jobs in turn; writes ``times-SETTING.json``.

    Returns:
      One line per row: the median, and the range over the rounds.

    Raises:
      UserError: memory is short.
    """
    from tqdm import tqdm

    trainers = {job.label: _trainer(job) for job in tqdm(jobs, desc="compiling", unit=" row")}
    with tqdm(total=(rounds + 1) * len(trainers), desc="timing", unit=" cycle") as bar:
        race = in_turn(dict(trainers), rounds, after_turn=lambda name: bar.update())
    for name, why in race.failures.items():
        raise UserError(f"{name}: {why}: give fewer --rows, or a smaller batch", exit_code=1)
    seconds = {
        name: [round(x / trainers[name].every, 6) for x in found]
        for name, found in race.seconds.items()
    }
    about = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    about |= {"cores": os.cpu_count(), "jax": jax.__version__}
    name = f"times-{setting(jobs[0].config)}.json"
    write_json(folder / name, {**about, "seconds_per_step": seconds})
    return "\n".join(
        f"{label}: {1e3 * statistics.median(x):.2f} ms per step "
        f"({1e3 * min(x):.2f} to {1e3 * max(x):.2f} in {len(x)} cycles)"
        for label, x in seconds.items()
    )


def read_times(folder: Path, mark: str) -> Mapping[str, float]:
    """Label -> median seconds per step, of the runs of one `setting`; empty if never measured."""
    saved = read_json(folder / f"times-{mark}.json")
    found = saved.get("seconds_per_step") if isinstance(saved, dict) else None
    return {label: statistics.median(x) for label, x in (found or {}).items()}


def _trainer(job: Job) -> Trainer:
    config, mesh = job.config, sharding.make_mesh()
    data = load_split(config.data, "train", lambda line: None).images
    images = data[np.arange(config.train.batch_size) % data.shape[0]]
    batch, key = put_images(images, mesh), jax.random.key(config.seed)
    built = build(config, mesh)
    whole = sharding.replicated(mesh)
    state = jax.jit(init_function(built, images.shape), out_shardings=whole)(key)
    jobs = {name: (step, (state, batch, key)) for name, step in step_functions(built).items()}
    with compiling(jobs) as compiled:
        steps = {name: compiled(name) for name in jobs}
    return Trainer(state, steps, batch, key, built.probe_every or config.sampler.every)
