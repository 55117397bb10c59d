"""Tables of the paper's kind: every row of a data set, seed by seed, at equal steps.

``python -m adaptive_ts.experiment.tables [TABLE] [--rows ROW ...] [--schedules NAME ...]
[--seeds N ...] [--out DIR] [--jobs N] [--image_evaluations N] [--features NAME]
[--inception_weights PATH] [--preprocess NAME] [--label NAME] [--dry_run] [--times]
[--report] [--field.path VALUE ...]``

TABLE is a file of ``configs/`` (default: digits); its rows are those called ``TABLE_...``. Each
finished run is one line of ``OUT/DATASET-SCHEDULE.jsonl``. What is there already, of the same
config and the same version of the code, is not run again; a run that was stopped goes on from its
last checkpoint. So a table can be stopped at any time and goes on with the same command.
``--dry_run`` prints one command for each run that is missing, for a cluster. ``--times`` measures
what a step of each row costs, in turn, into ``OUT/times-*.json``; without it wall-clock is what the
runs took. At the end, and with ``--report`` alone: ``OUT/*.md`` and ``OUT/*.png``.
"""

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.cli import (
    DEFAULT_ROW,
    Parser,
    load_rows,
    parse,
    run_cli,
    usable,
)
from adaptive_ts.experiment.config import DataConfig
from adaptive_ts.experiment.errors import UserError, nearest
from adaptive_ts.experiment.factory import build, known_names
from adaptive_ts.experiment.table_features import FeatureChoice, image_features
from adaptive_ts.experiment.table_jobs import Job, run_jobs
from adaptive_ts.experiment.table_programs import CACHE, program_of
from adaptive_ts.experiment.table_records import Record, fingerprint, read_runs
from adaptive_ts.experiment.table_report import write_report
from adaptive_ts.experiment.table_times import measure_times

_OWN = ("--rows", "--schedules", "--seeds", "--jobs")  # what a command for one run sets itself


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tables", description=__doc__)
    add = parser.add_argument
    add("--rows", nargs="+", help="rows of the table, with or without TABLE_; default: all")
    add("--schedules", nargs="+", help="noise schedules; default: the rows' own")
    add("--seeds", nargs="+", type=int, help="seeds; default: 0 1 2")
    add("--out", type=Path, default=Path("runs/tables"), help="folder of the results")
    add("--jobs", type=int, default=1, help="runs at once, each on one CPU core if more than 1")
    add("--image_evaluations", type=int, default=1, help="how often a run's images are measured")
    add("--features", choices=("classifier", "inception"), help="what images are compared in")
    add("--inception_weights", help="Inception's file, which colour images need; see evaluate")
    add("--preprocess", choices=("ref", "tf"), default="ref", help="of Inception's images")
    add("--times", action="store_true", help="time the rows' steps in turn, on an idle machine")
    add("--label", help="another name for the (one) row in the tables, as when options differ")
    add("--dry_run", action="store_true", help="only print a command for each run that is missing")
    add("--report", action="store_true", help="only write tables and pictures of what is there")
    add("--configs", default="configs", help="folder of rows")
    return parser


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, with ``table``, and the fields' overrides; checked as far as that goes alone.

    TABLE comes first, as train.py's ROW does: argparse would take an override's value for it.
    """
    named = bool(argv) and not argv[0].startswith("-")
    args, overrides = _parser().parse_known_args(argv[named:])
    args.table = argv[0] if named else DEFAULT_ROW
    check(args, overrides)
    return args, overrides


def table_rows(args: argparse.Namespace) -> dict[str, str]:
    """Label in the tables -> name of the row, of the rows that were asked for.

    Raises:
      UserError: no such table or row, a table without rows, a label for several rows.
    """
    rows, table = load_rows(args.configs), args.table
    tables = {row.path.stem for row in rows.values()}
    if table not in tables:
        raise UserError(f"{table!r} is not a file of {args.configs}: {nearest(table, tables)}")
    found = {
        name.removeprefix(f"{table}_"): name
        for name, row in rows.items()
        if row.path.stem == table and name.startswith(f"{table}_")
    }
    if not found:
        raise UserError(f"{args.configs}/{table}.py has no rows called {table}_...: no table")
    asked = [row.removeprefix(f"{table}_") for row in args.rows or found]
    for label in asked:
        if label not in found:
            raise UserError(f"--rows: {label!r} is not a row of {table}: {nearest(label, found)}")
    if args.label and len(set(asked)) != 1:
        raise UserError(f"--label: names one row, got {len(asked)}: give --rows ROW")
    return {args.label or label: found[label] for label in asked}


def plan(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """The jobs that are not done yet, schedule by schedule."""
    done = read_runs(args.out)
    known = functools.cache(lambda data: image_features(data, _features(args)).about)
    left = [
        job._replace(seeds=_missing(job, args.seeds, done, known))
        for job in planned(args, overrides)
    ]
    return [job for job in left if job.seeds]


def planned(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """All rows on all schedules, without seeds; to time them, on the first schedule."""
    jobs, mesh = [], sharding.make_mesh()
    schedules = list(dict.fromkeys(args.schedules or [None]))
    for schedule in schedules[:1] if args.times else schedules:
        for label, row in table_rows(args).items():
            own = [] if schedule is None else ["--schedule.name", schedule]
            argv = [row, *overrides, *own, "--workdir", str(args.out)]
            _, config = parse(argv, configs_dir=args.configs, known=known_names())
            sharding.check_batch_size(config.train.batch_size, mesh)
            build(config, mesh)  # what is wrong with the options is known before anything runs
            jobs.append(Job(label, row, config, (), fingerprint(config)))
    return jobs


def _missing(
    job: Job, seeds: Sequence[int], done: Sequence[Record], features: Callable[[DataConfig], str]
) -> tuple[int, ...]:
    """The seeds of which there is no record of this config, this code and these features."""
    about = job.about(job.config)
    same = [run for run in done if all(run[k] == about[k] for k in about if k != "seed")]
    if same:
        made = program_of(job.config), features(job.config.data)
        same = [run for run in same if (run["program"], run["features"]) == made]
    found = {run["seed"] for run in same}
    return tuple(seed for seed in dict.fromkeys(seeds) if seed not in found)


def _features(args: argparse.Namespace) -> FeatureChoice:
    return FeatureChoice(args.features, args.inception_weights, args.preprocess)


def commands(jobs: Sequence[Job], argv: Sequence[str]) -> list[str]:
    """One command for each run that is missing; ``argv`` is that of the whole table."""
    shared = _without(argv, _OWN, ("--dry_run",))
    return [
        shlex.join(
            (
                *("python", "-m", "adaptive_ts.experiment.tables", *shared, "--rows", job.row),
                *("--schedules", job.config.schedule.name, "--seeds", str(seed)),
            )
        )
        for job in jobs
        for seed in job.seeds
    ]


def _without(argv: Sequence[str], several: Sequence[str], flags: Sequence[str]) -> list[str]:
    """``argv`` without these options and their values."""
    kept, skipping = [], False
    for token in argv:
        if token.startswith("--"):
            skipping = token.partition("=")[0] in several
        if not skipping and token not in flags:
            kept.append(token)
    return kept


def check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raises UserError for what is out of range, or is the table's own to set."""
    for name in ("jobs", "image_evaluations"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range: must be at least 1")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds: {seed} is out of range: must be in 0..4294967295")
    also = [f"--{name}" for name in ("dry_run", "times") if getattr(args, name)]
    if args.report and (also or overrides):
        first = [*also, *overrides][0]
        raise UserError(f"--report: {first} means nothing to it: leave it out")
    instead = {"--schedule.name": "--schedules", "--seed": "--seeds", "--workdir": "--out"}
    for option in overrides:
        name = option.partition("=")[0]
        if name in instead:
            raise UserError(f"{name}: a table has several: use {instead[name]}")


def chosen(runs: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """The runs of the rows, schedules and seeds that were asked for, all of them by default."""
    rows = args.rows and [row.removeprefix(f"{args.table}_") for row in args.rows]
    labels = [args.label] if args.label else rows
    asked = {"label": labels, "schedule": args.schedules, "seed": args.seeds}
    return [run for run in runs if all(not v or run[k] in v for k, v in asked.items())]


def main(argv: list[str]) -> int:
    """The command."""
    args, overrides = arguments(argv)
    if args.times:
        with usable(args.out):
            print(measure_times(planned(args, overrides), args.out))
    elif not args.report:
        args.seeds = args.seeds or [0, 1, 2]
        jobs = plan(args, overrides)
        if args.dry_run:
            print("\n".join(commands(jobs, argv)) or f"nothing is missing in {args.out}")
            return 0
        with usable(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        if jobs:
            run_jobs(
                jobs,
                args.out,
                workers=args.jobs,
                image_evaluations=args.image_evaluations,
                features=_features(args),
            )
    with usable(args.out):
        runs = chosen(read_runs(args.out), args)
        if not runs and not args.times:
            raise UserError(f"no such runs in {args.out}: leave out --report to make some")
        print(write_report(runs, args.out))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # This process builds, the others train: it must not take all of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
    sys.argv[0] = "tables"
    run_cli(main)
