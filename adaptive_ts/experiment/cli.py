"""The command line: ``train.py [ROW] [--field.path VALUE ...]``.

tyro converts the values and writes the help. Names are checked, and mistakes explained, from the
dataclasses themselves, so that a mistake costs one line whatever tyro's own boxes look like.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tyro

from adaptive_ts.experiment.config import Config, default_workdir, validate
from adaptive_ts.experiment.errors import UserError, nearest, one_line
from adaptive_ts.experiment.fields import expected, leaf_types, nearest_field

DEFAULT_ROW = "digits"
USAGE = "train.py [ROW] [--dry_run] [--field.path VALUE ...]"


class Row(NamedTuple):
    """A named configuration, and the file it comes from."""

    config: Config
    path: Path


class _Option(NamedTuple):
    name: str  # the field's path as typed, with - turned into _
    values: tuple[str, ...]
    tokens: tuple[str, ...]  # what tyro gets


def load_rows(configs_dir: str | os.PathLike[str]) -> dict[str, Row]:
    """The rows of every ``configs_dir/*.py``, by name.

    Each file is data: a module with a dict ``ROWS: dict[str, Config]``. It is Python and is run: a
    stranger's belongs here only once it is read. Nothing else that is read from files runs.

    Raises:
      UserError: no such folder, no rows, a file that does not load, a name used twice.
    """
    folder = Path(configs_dir)
    if not folder.is_dir():
        raise UserError(f"no folder of configs at {folder}: start from the repository's root")
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for name, config in _load_file(path).items():
            if name in rows:
                raise UserError(f"{path}: row {name!r} is also in {rows[name].path}: rename one")
            rows[name] = Row(config, path)
    if not rows:
        raise UserError(f"no rows in {folder}/*.py: each file needs a dict ROWS of Configs")
    return rows


def _load_file(path: Path) -> dict[str, Config]:
    spec = importlib.util.spec_from_file_location(f"adaptive_ts_configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not load: {one_line(error)}") from error
    rows = getattr(module, "ROWS", None)
    if not isinstance(rows, dict) or not all(isinstance(c, Config) for c in rows.values()):
        raise UserError(f"{path}: needs a dict ROWS, from names to Configs")
    for name in rows:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(f"{path}: row {name!r}: use letters, digits, '_', '.' and '-'")
    return rows


def describe(config: Config) -> str:
    """One line: what a config trains, how and how long."""
    c = config
    width = c.model.channels if c.model.name == "unet" else c.model.transformer.hidden_size
    return (
        f"{c.data.name}, {c.sampler.name} sampler, {c.schedule.name} schedule "
        f"(T={c.schedule.num_timesteps}), {c.model.name} of {width} channels, "
        f"{c.train.steps:,} steps of {c.train.batch_size} images"
    )


def parse(
    argv: Sequence[str],
    *,
    configs_dir: str | os.PathLike[str],
    known: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, Config]:
    """The row's name and its config with the overrides, valid and with a workdir.

    Args:
      argv: what follows ``train.py``.
      configs_dir: the folder with the rows.
      known: field path -> allowed names, for `validate`.

    Raises:
      UserError: a mistake in argv; the message is one line.
      SystemExit: code 0, after ``--list`` or ``--help``.
    """
    rows = load_rows(configs_dir)
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else DEFAULT_ROW
    if "--list" in argv:
        width = max(map(len, rows))
        print("\n".join(f"{n:<{width}}  {describe(row.config)}" for n, row in rows.items()))
        raise SystemExit(0)
    if name not in rows:
        raise UserError(f"{name!r} is not a row: {nearest(name, rows, many='--list shows them')}")
    base = rows[name].config
    if "--help" in argv or "-h" in argv:
        print(_help(name, base, rows, known or {}))
        raise SystemExit(0)
    config = _override(base, [_check_option(o) for o in _split(argv)])
    problems = validate(config, known)
    if problems:
        raise UserError("; ".join(problems))
    if config.workdir is None:
        config = dataclasses.replace(config, workdir=default_workdir(name, config, base))
    return name, config


def _help(name: str, base: Config, rows: Iterable[str], known: Mapping[str, Sequence[str]]) -> str:
    about = (
        f"Trains a diffusion model. {len(rows)} rows; the default is {DEFAULT_ROW}, and --list "
        f"describes them. Every field below is an option; the defaults shown are those of {name}. "
        "With --dry_run it tells what the run would cost, and writes nothing."
    )
    names = [f"  --{path}: {', '.join(names)}" for path, names in known.items()]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        _tyro(["--help"], base, prog="train.py", description="")
    usage, _, options = out.getvalue().rstrip().partition("\n\n")  # tyro's knows no ROW
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n".join(
        [f"usage: {USAGE}", "", textwrap.fill(about, width), *names, "", options or usage]
    )


def _tyro(args: Sequence[str], base: Config, **options: Any) -> Config:
    # Without flag conversion every field, booleans too, is `--field.path VALUE`.
    config = (tyro.conf.FlagConversionOff,)
    # tyro's boxes are many lines; console_outputs=False alone leaves some of them.
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            Config, args=args, default=base, use_underscores=True, config=config, **options
        )


def _split(argv: Sequence[str]) -> list[_Option]:
    """Groups argv into options with their values; ``--a=b`` and ``--a b`` are the same."""
    groups: list[list[str]] = []
    for token in argv:
        if token.startswith("--"):
            groups.append([token])
        elif not groups:
            raise UserError(f"{token!r} is not an option: {USAGE}")
        else:
            groups[-1].append(token)
    options = []
    for first, *rest in groups:
        head, equals, value = first.partition("=")
        values = (value, *rest) if equals else tuple(rest)
        options.append(_Option(head[2:].replace("-", "_"), values, ()))
    return options


def _check_option(option: _Option) -> _Option:
    """The option with the tokens for tyro, its name and number of values in order."""
    kinds = leaf_types(Config)
    if option.name not in kinds:
        close = nearest_field(option.name, kinds)
        hint = f"did you mean --{close.replace(' or ', ' or --')}?" if close else "see --help"
        raise UserError(f"--{option.name}: unknown field: {hint}")
    kind, values = kinds[option.name], option.values
    if kind is bool or kind == tuple[bool, ...]:
        values = tuple(v.capitalize() if v.lower() in ("true", "false") else v for v in values)
    if kind not in (tuple[int, ...], tuple[bool, ...]):
        if not values:
            raise UserError(f"--{option.name}: expected {expected(kind)}; got nothing")
        if len(values) > 1:
            raise UserError(
                f"{values[1]!r} after --{option.name} {values[0]} is not an option: {USAGE}"
            )
        return option._replace(values=values, tokens=(f"--{option.name}={values[0]}",))
    return option._replace(values=values, tokens=(f"--{option.name}", *values))


def _override(base: Config, options: Sequence[_Option]) -> Config:
    args = [token for option in options for token in option.tokens]
    try:
        return _tyro(args, base)
    except SystemExit:
        pass
    for option in options:  # which one was it?
        try:
            _tyro(option.tokens, base)
        except SystemExit:
            wanted = expected(leaf_types(Config)[option.name])
            got = " ".join(option.values)
            raise UserError(f"--{option.name}: expected {wanted}; got {got!r}") from None
    raise UserError(f"cannot read {' '.join(args)!r}: see --help")


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s, and whose options are never abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextlib.contextmanager
def usable(place: str | os.PathLike[str], option: str = "--out") -> Iterator[None]:
    """Turns what goes wrong with a file or folder that was named into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: cannot use {place}: {one_line(error)}") from error


def check_empty(folder: Path, option: str = "--out") -> None:
    """Raises UserError if something is in the folder, or it cannot be read."""
    with usable(folder, option):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{option}: {folder} is not empty: give a new folder")


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls ``main(argv)`` and ends the process: no traceback for a user's mistake.

    A `UserError` becomes one line on stderr and its exit code; Ctrl-C one line and 130; a reader
    that went away (``train.py --help | head``) nothing. Everything else propagates.
    """
    name = Path(sys.argv[0]).name
    with contextlib.suppress(AttributeError):  # a log file shows a line when it is said
        sys.stdout.reconfigure(line_buffering=True)
    try:
        try:
            code = main(sys.argv[1:]) or 0
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The interpreter flushes stdout once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)
