"""What a training step of each row costs: timed in turn, not while other runs went on."""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from adaptive_ts.experiment.costs.race import in_turn, make_trainers
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import read_json, write_json
from adaptive_ts.experiment.tables.jobs import Job
from adaptive_ts.experiment.tables.records import setting

ROUNDS = 5


def measure_times(jobs: Sequence[Job], folder: Path, *, rounds: int = ROUNDS) -> str:
    """Times whole cycles of f_S steps of all jobs in turn; writes ``times-SETTING.json``.

    Returns:
      One line per row: the median, and the range over the rounds.

    Raises:
      UserError: memory is short.
    """
    from tqdm import tqdm

    configs = {job.label: job.config for job in jobs}
    with tqdm(total=len(jobs), desc="compiling", unit=" row") as bar:
        trainers = make_trainers(configs, sharding.make_mesh(), lambda name: bar.update())
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
