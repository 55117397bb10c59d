"""A row and its overrides on the command line: ``[ROW] [--field.path VALUE ...]``.

tyro converts the values and writes the help. Names are checked, and mistakes explained, from the
dataclasses themselves, so that a mistake costs one line whatever tyro's own boxes look like.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import tyro

from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.groups import Config, default_workdir
from adaptive_ts.experiment.config.methods import NAMES
from adaptive_ts.experiment.config.paths import expected, leaf_types, nearest_field
from adaptive_ts.experiment.config.row_files import load_rows
from adaptive_ts.experiment.errors import UserError, nearest

DEFAULT_ROW = "digits"
USAGE = "[ROW] [--field.path VALUE ...]"
TRAIN_USAGE = "[ROW] [--dry_run] [--configs DIR] [--field.path VALUE ...]"


class _Option(NamedTuple):
    name: str  # the field's path as typed, with - turned into _
    values: tuple[str, ...]
    tokens: tuple[str, ...]  # what tyro gets


def describe(config: Config) -> str:
    """One line: what a config trains, how and how long."""
    c = config
    width = c.model.channels if c.model.name == "unet" else c.model.transformer.hidden_size
    return (
        f"{c.data.name}, {c.sampler.name} sampler, {c.schedule.name} schedule "
        f"(T={c.schedule.num_timesteps}), {c.model.name} of {width} channels, "
        f"{c.train.steps:,} steps of {c.train.batch_size} images"
    )


def split_row(argv: Sequence[str], default: str = DEFAULT_ROW) -> tuple[str, list[str]]:
    """The name that comes first, or the default, and what follows."""
    named = bool(argv) and not argv[0].startswith("-")
    return (argv[0] if named else default), list(argv[named:])


def split_option(argv: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option that is no field, or None, and the rest.

    Raises:
      UserError: it has no value.
    """
    words = list(argv)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option and equals:
            return value, words[:place] + words[place + 1 :]
        if name == option:
            if place + 1 == len(words) or words[place + 1].startswith("--"):
                raise UserError(f"{option}: expected a value; got nothing")
            return words[place + 1], words[:place] + words[place + 2 :]
    return None, words


def parse(
    argv: Sequence[str],
    *,
    configs_dir: str | os.PathLike[str] | None = None,
) -> tuple[str, Config]:
    """The row's name and its config with the overrides, valid and with a workdir.

    Args:
      argv: what follows the command's name.
      configs_dir: as for `load_rows`.

    Raises:
      UserError: a mistake in argv; the message is one line.
      SystemExit: code 0, after ``--list`` or ``--help``.
    """
    rows = load_rows(configs_dir)
    name, argv = split_row(argv)
    if "--list" in argv:
        width = max(map(len, rows))
        print("\n".join(f"{n:<{width}}  {describe(row.config)}" for n, row in rows.items()))
        raise SystemExit(0)
    if name not in rows:
        raise UserError(f"{name!r} is not a row: {nearest(name, rows, many='--list shows them')}")
    base = rows[name].config
    if "--help" in argv or "-h" in argv:
        print(_help(name, base, rows))
        raise SystemExit(0)
    config = _override(base, [_check_option(o) for o in _split(argv)])
    problems = validate(config)
    if problems:
        raise UserError("; ".join(problems))
    if config.workdir is None:
        config = dataclasses.replace(config, workdir=default_workdir(name, config, base))
    return name, config


def _help(name: str, base: Config, rows: Collection[str]) -> str:
    about = (
        f"Trains a diffusion model. {len(rows)} rows; the default is {DEFAULT_ROW}, and --list "
        f"describes them. Every field below is an option; the defaults shown are those of {name}. "
        "With --dry_run it tells what the run would cost, and writes nothing."
    )
    names = [f"  --{path}: {', '.join(names)}" for path, names in NAMES.items()]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        _tyro(["--help"], base, prog="train", description="")
    usage, _, options = out.getvalue().rstrip().partition("\n\n")  # tyro's knows no ROW
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n".join(
        [
            f"usage: adaptive-ts train {TRAIN_USAGE}",
            "",
            textwrap.fill(about, width),
            *names,
            "",
            options or usage,
        ]
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
