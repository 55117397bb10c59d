"""The comparison bench: samplers and weightings, seed by seed, at equal steps.

``python -m adaptive_ts.experiment.bench [--rows ROW ...] [--schedules NAME ...] [--seeds N ...]
[--out DIR] [--jobs N] [--label NAME] [--report] [--field.path VALUE ...]``

Each finished run is one line of ``OUT/DATASET-SCHEDULE.jsonl``; what is there already is not run
again, so a sweep can be stopped at any time and goes on with the same command. At the end, and
with ``--report`` alone: ``OUT/*.md`` and ``OUT/*.png``.
"""

import argparse
import concurrent.futures.process
import contextlib
import dataclasses
import multiprocessing
import os
import queue
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.bench_records import (
    Record,
    append_run,
    fingerprint,
    read_runs,
    setting,
)
from adaptive_ts.experiment.bench_report import write_report
from adaptive_ts.experiment.cli import load_rows, parse, run_cli
from adaptive_ts.experiment.config import Config
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
    add("--schedules", nargs="+", help="noise schedules; default: linear")
    add("--seeds", nargs="+", type=int, help="seeds; default: 0 1 2")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    add("--jobs", type=int, default=1, help="runs at once, each on one CPU core if more than 1")
    add("--label", help="another name for the (one) row in the tables, as when options differ")
    add("--report", action="store_true", help="only write tables and pictures of what is there")
    add("--configs", default="configs", help="folder of rows")
    return parser


def plan(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """The jobs that are not done yet, schedule by schedule."""
    rows = args.rows or [row for row in load_rows(args.configs) if row.startswith(PREFIX)]
    rows = list(dict.fromkeys(rows))
    if args.label and len(rows) != 1:
        raise UserError(f"--label: names one row, got {len(rows)}: give --rows ROW")
    done = {
        (run["label"], run["schedule"], run["seed"], run["fingerprint"])
        for run in read_runs(args.out)
    }
    jobs, mesh = [], sharding.make_mesh()
    for schedule in dict.fromkeys(args.schedules):
        for row in rows:
            argv = [row, *overrides, "--schedule.name", schedule, "--workdir", str(args.out)]
            _, config = parse(argv, configs_dir=args.configs, known=known_names())
            sharding.check_batch_size(config.train.batch_size, mesh)
            build(config, mesh)  # what is wrong with the options is known before anything runs
            label, mark = args.label or row.removeprefix(PREFIX), fingerprint(config)
            seeds = dict.fromkeys(s for s in args.seeds if (label, schedule, s, mark) not in done)
            if seeds:
                jobs.append(Job(label, config, tuple(seeds), mark))
    return jobs


def check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raises UserError for what is out of range, or is the sweep's own to set."""
    if args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs} is out of range: must be at least 1")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds: {seed} is out of range: must be in 0..4294967295")
    if args.report and overrides:
        raise UserError(f"--report: {overrides[0]} means nothing to it: leave it out")
    instead = {"--schedule.name": "--schedules", "--seed": "--seeds", "--workdir": "--out"}
    for option in overrides:
        name = option.partition("=")[0]
        if name in instead:
            raise UserError(f"{name}: a sweep has several: use {instead[name]}")


def chosen(runs: list[Record], args: argparse.Namespace) -> list[Record]:
    """The runs of the rows, schedules and seeds that were asked for, all of them by default."""
    rows = args.rows and [row.removeprefix(PREFIX) for row in args.rows]
    labels = [args.label] if args.label else rows
    asked = {"label": labels, "schedule": args.schedules, "seed": args.seeds}
    return [run for run in runs if all(not v or run[k] in v for k, v in asked.items())]


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
                "setting": setting(config),
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
                append_run(folder, record)
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
    check(args, overrides)
    if not args.report:
        args.schedules, args.seeds = args.schedules or ["linear"], args.seeds or [0, 1, 2]
    with _usable(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        jobs = plan(args, overrides)
        if jobs:
            run_jobs(jobs, args.out, args.jobs)
    with _usable(args.out):
        runs = chosen(read_runs(args.out), args)
        if not runs:
            raise UserError(f"no such runs in {args.out}: leave out --report to make some")
        print(write_report(runs, args.out))
    return 0


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot use {folder}: {one_line(error)}") from error


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # This process builds, the others train: it must not take all of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.argv[0] = "bench"
    run_cli(main)
