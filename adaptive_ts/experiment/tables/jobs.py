"""The runs of a table, in processes of their own."""

import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.quality.features import FeatureChoice, image_features
from adaptive_ts.experiment.tables.records import Record, append_run, setting

_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Job(NamedTuple):
    """One row on one schedule, and the seeds that are still to be run.

    Attributes:
      label: the row's name in the tables.
      row: its name in the configs.
      config: of the runs, but for the seed.
      seeds: to be run.
      fingerprint: of the config, without the seed.
    """

    label: str
    row: str
    config: Config
    seeds: tuple[int, ...]
    fingerprint: str

    def about(self, config: Config) -> Record:
        """What is known of a run before it is done."""
        return {
            "label": self.label,
            "dataset": config.data.name,
            "schedule": config.schedule.name,
            "seed": config.seed,
            "fingerprint": self.fingerprint,
            "setting": setting(config),
        }


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int,
    image_evaluations: int,
    features: FeatureChoice,
) -> None:
    """Runs the jobs, so many at once, and appends each finished run to its file."""
    from tqdm import tqdm

    for data in {job.config.data for job in jobs}:
        about = image_features(data, features).about
        print(f"{data.name}: Frechet distances by {about}")
    if workers > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
    options = {"image_evaluations": image_evaluations, "features": features}
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool,
        tqdm(total=sum(_steps(job) for job in jobs), unit=" step", smoothing=0.05) as bar,
    ):
        results = manager.Queue()
        futures = [pool.submit(_work, job, results, folder, options) for job in jobs]
        left = sum(len(job.seeds) for job in jobs)
        bar.set_postfix_str(f"{left} runs left")
        try:
            while left:
                try:
                    found = results.get(timeout=1)
                except queue.Empty:
                    for future in futures:
                        if future.done():
                            future.result()  # raises what went wrong
                    continue
                if isinstance(found, int):
                    bar.update(found)
                    continue
                append_run(folder, found)
                left -= 1
                bar.set_postfix_str(f"{found['label']} seed {found['seed']} done, {left} runs left")
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a run was killed, perhaps for want of memory; {folder} has those that are done, "
                "and the same command goes on: try fewer --jobs",
                exit_code=1,
            ) from error
        finally:
            # Left without waiting, Python 3.11's pool hangs if a process ends at that moment.
            pool.shutdown(wait=True, cancel_futures=True)


def _steps(job: Job) -> int:
    return len(job.seeds) * job.config.train.steps


def _work(
    job: Job, results: "queue.Queue[int | Record]", folder: Path, options: dict[str, Any]
) -> None:
    """Runs a job in a process of its own; steps done and finished runs go into the queue."""
    import jax

    from adaptive_ts.experiment.devices.compiling import keep_compiled
    from adaptive_ts.experiment.tables.program_cache import program_of
    from adaptive_ts.experiment.tables.runs import contest

    keep_compiled()
    code = program_of(job.config)
    saved = folder / "checkpoints" / f"{job.label}-{job.fingerprint}-{code}"
    options = {**options, "folder": saved, "on_steps": results.put}
    one_core = _ONE_CORE in os.environ.get("XLA_FLAGS", "")
    made = {
        "program": code,
        "cores": 1 if one_core else os.cpu_count(),
        "jax": jax.__version__,
    }
    for record in contest(job.config, job.seeds, **options):
        config = dataclasses.replace(job.config, seed=record["seed"])
        results.put({**job.about(config), **made, **record})
