"""Tables of the paper's kind: every row of a data set, seed by seed, at equal steps.

``adaptive-ts tables [TABLE] [--rows ROW ...] [--schedules NAME ...]
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
import os
from collections.abc import Sequence
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, usable
from adaptive_ts.experiment.config.command_line import split_row
from adaptive_ts.experiment.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts tables", description=__doc__)
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
    add("--configs", help="folder of rows; default: ./configs and the built-in ones")
    return parser


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, with ``table``, and the fields' overrides; checked as far as that goes alone.

    TABLE comes first, as train's ROW does: argparse would take an override's value for it.
    """
    table, rest = split_row(argv)
    args, overrides = make_parser().parse_known_args(rest)
    args.table = table
    check(args, overrides)
    return args, overrides


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


def main(argv: list[str]) -> int:
    """The command."""
    args, overrides = arguments(argv)
    # This process builds, the others train: it must not take all of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from adaptive_ts.experiment.devices.compiling import keep_compiled
    from adaptive_ts.experiment.tables import plan
    from adaptive_ts.experiment.tables.jobs import run_jobs
    from adaptive_ts.experiment.tables.records import read_runs
    from adaptive_ts.experiment.tables.report import write_report
    from adaptive_ts.experiment.tables.times import measure_times

    keep_compiled()
    if args.times:
        with usable(args.out):
            print(measure_times(plan.planned(args, overrides), args.out))
    elif not args.report:
        args.seeds = args.seeds or [0, 1, 2]
        jobs = plan.missing(args, overrides)
        if args.dry_run:
            print("\n".join(plan.commands(jobs, argv)) or f"nothing is missing in {args.out}")
            return 0
        with usable(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        if jobs:
            run_jobs(
                jobs,
                args.out,
                workers=args.jobs,
                image_evaluations=args.image_evaluations,
                features=plan.features_of(args),
            )
    with usable(args.out):
        runs = plan.chosen(read_runs(args.out), args)
        if not runs and not args.times:
            raise UserError(f"no such runs in {args.out}: leave out --report to make some")
        print(write_report(runs, args.out))
    return 0
