"""The comparison bench: samplers and weightings, seed by seed, at equal steps.

``python -m adaptive_ts.experiment.bench [--rows ROW ...] [--schedules NAME ...] [--seeds N ...]
[--out DIR] [--jobs N] [--label NAME] [--report] [--field.path VALUE ...]``

Each finished run is one line of ``OUT/DATASET-SCHEDULE.jsonl``; what is there already is not run
again, so a sweep can be stopped at any time and goes on with the same command. At the end, and
with ``--report`` alone: ``OUT/*.md`` and ``OUT/*.png``.
"""

import argparse
import concurrent.futures.process
import dataclasses
import hashlib
import json
import multiprocessing
import os
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.bench_report import write_report
from adaptive_ts.experiment.cli import load_rows, parse, run_cli
from adaptive_ts.experiment.config import Config, fingerprint_fields
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.factory import build, known_names

PREFIX = "bench_"  # of the rows that are run by default
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Job(NamedTuple):
    """One entry on one schedule, and the seeds that are still to be run.

    Attributes:
      label: the row's name in the tables.
      config: of the runs, but for the seed.
      seeds: to be run.
      fingerprint: of the config, without the seed.
    """

    label: str
    config: Config
    seeds: tuple[int, ...]
    fingerprint: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bench", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--rows", nargs="+", help=f"rows of configs/*.py; default: all {PREFIX}* rows")
    add("--schedules", nargs="+", default=["linear"], help="noise schedules")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    add("--jobs", type=int, default=1, help="runs at once, each on one CPU core if more than 1")
    add("--label", help="another name for the (one) row in the tables, as when options differ")
    add("--report", action="store_true", help="only write the tables and pictures")
    add("--configs", default="configs", help="folder of rows")
    return parser


def fingerprint(config: Config) -> str:
    """Of what a run computes, but for its seed, and how long it goes on.

    Fields at their defaults are left out, so that a field added later, whose default keeps runs
    what they were, keeps their results too.
    """
    usual = fingerprint_fields(Config())
    fields = {k: v for k, v in fingerprint_fields(config).items() if v != usual[k] and k != "seed"}
    text = json.dumps({**fields, "train.steps": config.train.steps}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, of runs repeated the last; broken lines are left out."""
    found = {}
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.open())
    for line in lines:
        try:
            run = json.loads(line)
            found[run["label"], run["dataset"], run["schedule"], run["seed"]] = run
        except (ValueError, KeyError):
            continue  # the last line of a sweep that was killed
    return list(found.values())


def plan(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """The jobs that are not done yet, schedule by schedule."""
    rows = args.rows or [row for row in load_rows(args.configs) if row.startswith(PREFIX)]
    if args.label and len(rows) != 1:
        raise UserError(f"--label: names one row, got {len(rows)}: give --rows ROW")
    done = {
        (run["label"], run["schedule"], run["seed"], run["fingerprint"])
        for run in read_runs(args.out)
    }
    jobs, mesh = [], sharding.make_mesh()
    for schedule in args.schedules:
        for row in rows:
            argv = [row, *overrides, "--schedule.name", schedule, "--workdir", str(args.out)]
            _, config = parse(argv, configs_dir=args.configs, known=known_names())
            sharding.check_batch_size(config.train.batch_size, mesh)
            build(config, mesh)  # what is wrong with the options is known before anything runs
            label, mark = args.label or row.removeprefix(PREFIX), fingerprint(config)
            seeds = [s for s in args.seeds if (label, schedule, s, mark) not in done]
            if seeds:
                jobs.append(Job(label, config, tuple(seeds), mark))
    return jobs


def work(job: Job, results: "queue.Queue[dict[str, Any]]", cache: str) -> None:
    """Runs a job in a process of its own; every record goes into the queue."""
    import jax

    from adaptive_ts.experiment.contest import contest

    jax.config.update("jax_compilation_cache_dir", cache)
    for record in contest(job.config, job.seeds):
        config = dataclasses.replace(job.config, seed=record["seed"])
        results.put(
            {
                "label": job.label,
                "dataset": config.data.name,
                "schedule": config.schedule.name,
                "fingerprint": job.fingerprint,
                "cores": 1 if _ONE_CORE in os.environ.get("XLA_FLAGS", "") else os.cpu_count(),
                "jax": jax.__version__,
                **record,
            }
        )


def run_jobs(jobs: Sequence[Job], folder: Path, workers: int) -> None:
    """Runs the jobs, so many at once, and appends each finished run to its file."""
    from tqdm import tqdm

    from adaptive_ts.experiment.frechet import classifier_features

    for data in {job.config.data for job in jobs}:
        accuracy = classifier_features(data).accuracy
        print(f"{data.name}: Frechet distances by a classifier of accuracy {accuracy:.3f}")
    if workers > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
    context = multiprocessing.get_context("spawn")
    cache = str(Path("~/.cache/adaptive_ts/xla").expanduser())
    with (
        context.Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool,
        tqdm(total=sum(len(job.seeds) for job in jobs), unit=" run") as bar,
    ):
        results = manager.Queue()
        futures = [pool.submit(work, job, results, cache) for job in jobs]
        try:
            while bar.n < bar.total:
                try:
                    record = results.get(timeout=1)
                except queue.Empty:
                    for future in futures:
                        if future.done():
                            future.result()  # raises what went wrong
                    continue
                name = f"{record['dataset']}-{record['schedule']}.jsonl"
                with (folder / name).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                bar.set_postfix_str(f"{record['label']} seed {record['seed']}", refresh=False)
                bar.update()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a run was killed, perhaps for want of memory; {folder} has those that are done, "
                "and the same command goes on: try fewer --jobs",
                exit_code=1,
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main(argv: list[str]) -> int:
    """The command."""
    args, overrides = _parser().parse_known_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs} is out of range: must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.report:
            jobs = plan(args, overrides)
            if jobs:
                run_jobs(jobs, args.out, args.jobs)
        runs = read_runs(args.out)
        if not runs:
            raise UserError(
                f"no runs in {args.out / 'runs.jsonl'}: leave out --report to make some"
            )
        print(write_report(runs, args.out))
    except OSError as error:
        raise UserError(f"--out: cannot use {args.out}: {one_line(error)}") from error
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # This process builds, the others train: it must not take all of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.argv[0] = "bench"
    run_cli(main)
