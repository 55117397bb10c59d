"""What every command shares: its parser, what ends it, and the words for a place it cannot use."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from adaptive_ts.experiment.errors import UserError, one_line

_EXTRAS = {  # what each brings that is imported by name
    "train": (
        *("PIL", "array_record", "grain", "importlib_resources", "matplotlib", "orbax", "sklearn"),
        *("tensorboardX", "tensorflow_datasets", "tqdm", "tyro"),
    ),
    "latents": ("diffusers", "torch"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s, and whose options are never abbreviated."""

    def __init__(self, **options: Any):
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError for an option below the least that it may be."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise UserError(
                f"--{name}: {getattr(args, name)} is out of range: must be at least {value}"
            )


@contextlib.contextmanager
def usable(place: str | os.PathLike[str], option: str = "--out") -> Iterator[None]:
    """Turns what goes wrong with a file or folder that was named into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: cannot use {place}: {one_line(error)}") from error


def usable_file(path: Path, option: str = "--out") -> None:
    """Raises UserError if no file can be written there; makes its folder.

    Called before anything slow, whose results would be lost.
    """
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder: give a file")
    with usable(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)


def check_empty(folder: Path, option: str = "--out") -> None:
    """Raises UserError if something is in the folder, or it cannot be read."""
    with usable(folder, option):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{option}: {folder} is not empty: give a new folder")


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls ``main(argv)`` and ends the process: no traceback for a user's mistake.

    A `UserError` becomes one line on stderr and its exit code; Ctrl-C one line and 130; a reader
    that went away (``adaptive-ts train --help | head``) nothing. Everything else propagates.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file shows a line when it is said
        sys.stdout.reconfigure(line_buffering=True)
    try:
        try:
            code = main(sys.argv[1:]) or 0
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
    except UserError as error:
        print(f"{_program()}: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, parts in _EXTRAS.items() if package in parts), None)
        if extra is None:
            raise
        remedy = f"pip install 'adaptive-ts[{extra}]'"
        print(f"{_program()}: {package} is not installed: {remedy}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\n{_program()}: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The interpreter flushes stdout once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _program() -> str:
    """Its name as it was called, which `main` may have made clearer."""
    return Path(sys.argv[0]).name
