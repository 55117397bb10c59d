"""Which runs a table is made of, and which of them are missing."""

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence

from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.config.row_files import load_rows
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError, nearest
from adaptive_ts.experiment.quality.features import FeatureChoice, image_features
from adaptive_ts.experiment.tables.jobs import Job
from adaptive_ts.experiment.tables.program_cache import program_of
from adaptive_ts.experiment.tables.records import Record, fingerprint, read_runs

_OWN = ("--rows", "--schedules", "--seeds", "--jobs")  # what a command for one run sets itself


def table_rows(args: argparse.Namespace) -> dict[str, str]:
    """Label in the tables -> name of the row, of the rows that were asked for.

    Raises:
      UserError: no such table or row, a table without rows, a label for several rows.
    """
    rows, table = load_rows(args.configs), args.table
    tables = {row.table for row in rows.values()}
    if table not in tables:
        raise UserError(f"{table!r} is not a file of rows: {nearest(table, tables)}")
    found = {
        name.removeprefix(f"{table}_"): name
        for name, row in rows.items()
        if row.table == table and name.startswith(f"{table}_")
    }
    if not found:
        raise UserError(f"{table}.py has no rows called {table}_...: no table")
    asked = [row.removeprefix(f"{table}_") for row in args.rows or found]
    for label in asked:
        if label not in found:
            raise UserError(f"--rows: {label!r} is not a row of {table}: {nearest(label, found)}")
    if args.label and len(set(asked)) != 1:
        raise UserError(f"--label: names one row, got {len(asked)}: give --rows ROW")
    return {args.label or label: found[label] for label in asked}


def missing(args: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
    """The jobs that are not done yet, schedule by schedule."""
    done = read_runs(args.out)
    known = functools.cache(lambda data: image_features(data, features_of(args)).about)
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
            _, config = parse(argv, configs_dir=args.configs)
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


def features_of(args: argparse.Namespace) -> FeatureChoice:
    """What images are compared in, as asked for."""
    return FeatureChoice(args.features, args.inception_weights, args.preprocess)


def commands(jobs: Sequence[Job], argv: Sequence[str]) -> list[str]:
    """One command for each run that is missing; ``argv`` is that of the whole table."""
    shared = _without(argv, _OWN, ("--dry_run",))
    return [
        shlex.join(
            (
                *("adaptive-ts", "tables", *shared, "--rows", job.row),
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


def chosen(runs: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """The runs of the rows, schedules and seeds that were asked for, all of them by default."""
    rows = args.rows and [row.removeprefix(f"{args.table}_") for row in args.rows]
    labels = [args.label] if args.label else rows
    asked = {"label": labels, "schedule": args.schedules, "seed": args.seeds}
    return [run for run in runs if all(not v or run[k] in v for k, v in asked.items())]
