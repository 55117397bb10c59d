"""Every command of the documentation is one that its own parser takes; those marked are run.

``<!-- runs -->`` before a block: it runs here, in a second. ``<!-- runs: slow -->``: each of its
lines runs in under a minute on two cores. Such blocks run line by line in an empty folder.
"""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
from documents import PAGES, ROOT, command_of, commands, fences, flags, read, shell_lines, switches

from adaptive_ts.experiment.config import Config, ModelConfig, TransformerConfig
from adaptive_ts.experiment.config.command_line import parse, split_row
from adaptive_ts.experiment.config.methods import NAMES
from adaptive_ts.experiment.config.paths import leaf_types
from adaptive_ts.experiment.config.row_files import load_rows
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.generate import request
from adaptive_ts.experiment.main import command

CONFIGS = ROOT / "configs"
# A run whose model is told classes: what may be asked of it is all that may be asked.
TOLD = Config(model=ModelConfig(name="dit", transformer=TransformerConfig(num_classes=10)))
TELLING = {"help", "list", "version"}  # options that tell something and end
OTHERS = {"extra", "with"}  # of uv


def _module(name: str):
    return importlib.import_module(f"adaptive_ts.experiment.main.{name}")


def _of_rows(row: str, overrides: list[str]) -> None:
    parse([row, *overrides], configs_dir=CONFIGS)


def _check_tables(argv: list[str]) -> None:
    args, overrides = _module("tables").arguments(argv)
    labels = {row.removeprefix(f"{args.table}_") for row in load_rows(CONFIGS)}
    unknown = {*(args.rows or ())} - labels | {*(args.schedules or ())} - {*NAMES["schedule.name"]}
    if unknown or "uniform" not in labels:
        raise UserError(f"not of {args.table}: {sorted(unknown)}")
    _of_rows(f"{args.table}_uniform", overrides)


def check(argv: list[str]) -> None:
    """Raises UserError for what the command's own parser does not take, or an unknown row."""
    name, *rest = argv
    if name.startswith("--"):
        return _check_telling(name)
    if name not in command.COMMANDS:
        raise UserError(f"{name!r} is not a command")
    rest = [word for word in rest if word not in ("--help", "--list")]
    if name == "train":
        return _of_rows(*_row_and_rest([word for word in rest if word != "--dry_run"], "digits"))
    if name == "tables":
        return _check_tables(rest)
    parser = _module(name).make_parser()
    if name in ("overhead", "scaling", "throughput"):
        row, rest = _row_and_rest(rest, "overhead")
        return _of_rows(row, parser.parse_known_args(rest)[1])
    args = parser.parse_args(rest)
    if name in ("generate", "evaluate"):
        request.options(TOLD, args)
    return None


def _check_telling(option: str) -> None:
    if option[2:] not in TELLING:
        raise UserError(f"{option} is no option of adaptive-ts")


def _row_and_rest(argv: list[str], default: str) -> tuple[str, list[str]]:
    return split_row(argv, default)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_what_their_parsers_take(page):
    for argv in commands(read(page)):
        try:
            check(argv)
        except UserError as error:
            pytest.fail(f"{page}: adaptive-ts {' '.join(argv)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "adaptive-ts trian digits",
        "train.py digit",
        "train.py --train.step 3",
        "adaptive-ts generate RUN --guidence 3",
        "adaptive-ts generate RUN --solver ddmp",
        "adaptive-ts evaluate RUN --preprocess torch",
        "adaptive-ts tables digits --rows unifrom",
        "adaptive-ts tables digit",
        "adaptive-ts tables digits --sampler.nam beta",
        "adaptive-ts throughput --cycels 3",
        "adaptive-ts scaling overhed",
        "adaptive-ts decode FILE",
    ],
)
def test_a_mistake_in_a_command_is_found(line):
    with pytest.raises(UserError):
        check(command_of(line))


def test_commands_are_found():
    found = [argv for page in PAGES for argv in commands(read(page))]
    assert {argv[0] for argv in found} >= set(command.COMMANDS)
    assert len(found) > 40


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    text = read(page)
    unknown = flags(text) - set(leaf_types(Config))
    assert not unknown, f"{page} names fields that no config has: {sorted(unknown)}"
    known = {
        option.lstrip("-")
        for name in command.COMMANDS
        if name != "train"
        for option in _module(name).make_parser()._option_string_actions
    }
    fields = {path for path in leaf_types(Config) if "." not in path}
    unknown = switches(text) - known - fields - TELLING - OTHERS
    assert not unknown, f"{page} names options that no command has: {sorted(unknown)}"


def _marked(mark: str) -> list[tuple[str, str, str]]:
    """(page, what the mark says, block) of the blocks with this mark."""
    return [
        (page, block.before, block.code)
        for page in PAGES
        for block in fences(read(page))
        if block.before.startswith(f"<!-- runs{mark}")
    ]


def _arguments(code: str) -> list[list[str]]:
    found = [command_of(line) for line in shell_lines(code) if line]
    assert all(found), code
    return found


@pytest.mark.parametrize(("page", "mark", "code"), _marked(" -->"))
def test_marked_blocks_run(page, mark, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in _arguments(code):
        try:
            ended = command.main(argv)
        except SystemExit as stop:
            ended = stop.code
        assert not ended and capsys.readouterr().out, argv


@pytest.mark.slow
@pytest.mark.parametrize(("page", "mark", "code"), _marked(": slow"))
def test_marked_slow_blocks_run(page, mark, code, tmp_path):
    if "with docs/tables" in mark:
        shutil.copytree(ROOT / "docs" / "tables", tmp_path / "docs" / "tables")
    own = {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(tmp_path / "data"), "XLA_FLAGS": ""}
    for argv in _arguments(code):
        words = [sys.executable, "-m", "adaptive_ts.experiment.main", *argv]
        ended = subprocess.run(
            words, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, timeout=240
        )
        assert ended.returncode == 0, f"{page}: {argv}: {ended.stderr[-2000:]}"


def test_blocks_are_marked():
    assert _marked(" -->") and len(_marked(": slow")) >= 2


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("myst_nb")
    words = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs")]
    ended = subprocess.run(
        [*words, str(tmp_path)], capture_output=True, text=True, timeout=600, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "reference" / "samplers.html").exists()
