"""Where rows come from: the files of ``configs/``, and those that the package has with it."""

import ast
import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import adaptive_ts
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.errors import UserError, one_line


class Row(NamedTuple):
    """A named configuration, the file it comes from, and the table it belongs to.

    The table is the file's name, without an ending; of a row that takes the place of a built-in
    one it is that one's.
    """

    config: Config
    path: Path
    table: str


def load_rows(configs_dir: str | os.PathLike[str] | None = None) -> dict[str, Row]:
    """The rows of a folder's ``*.py``, by name.

    Each file is data: a module with a dict ``ROWS: dict[str, Config]``. It is Python and is run: a
    stranger's belongs here only once it is read. Nothing else that is read from files runs.

    Args:
      configs_dir: the folder; None: the package's own rows, and before them those of ``configs/``
        in the working folder: a file of the same name takes the place of a built-in file, a row of
        the same name that of a built-in row. Files there that do not set ROWS, or never speak of
        ``adaptive_ts``, are somebody else's and are not run.

    Raises:
      UserError: no such folder, no rows, a file that does not load, a name used twice.
    """
    if configs_dir is not None:
        folder = Path(configs_dir)
        if not folder.is_dir():
            raise UserError(f"--configs: no folder of configs at {folder}")
        rows = _load_files(sorted(folder.glob("[!_]*.py")))
        if not rows:
            raise UserError(f"no rows in {folder}/*.py: each file needs a dict ROWS of Configs")
        return rows
    own = [path for path in sorted(Path("configs").glob("[!_]*.py")) if _is_ours(path)]
    names = {path.name for path in own}
    built_in = sorted(built_in_folder().glob("[!_]*.py"))
    rows = _load_files([path for path in built_in if path.name not in names])
    for name, row in _load_files(own).items():
        rows[name] = row._replace(table=rows[name].table) if name in rows else row
    return rows


def built_in_folder() -> Path:
    """Where the package's own rows are: in the wheel, or beside the package in a checkout."""
    package = Path(adaptive_ts.__file__).parent
    packed = package / "experiment" / "rows"
    return packed if packed.is_dir() else package.parent / "configs"


def _is_ours(path: Path) -> bool:
    """Whether a file of the working folder, which may be anybody's, is meant to have rows.

    One that speaks of this package and of ROWS but is no Python is: loading it says what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    if "adaptive_ts" not in text:
        return False
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return "ROWS" in text
    return any(
        isinstance(target, ast.Name) and target.id == "ROWS"
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )


def _load_files(paths: list[Path]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in paths:
        for name, config in _load_file(path).items():
            if name in rows:
                raise UserError(f"{path}: row {name!r} is also in {rows[name].path}: rename one")
            rows[name] = Row(config, path, path.stem)
    return rows


def _load_file(path: Path) -> dict[str, Config]:
    spec = importlib.util.spec_from_file_location(f"adaptive_ts_configs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not load: {one_line(error)}") from error
    rows = getattr(module, "ROWS", None)
    if not isinstance(rows, dict) or not all(isinstance(c, Config) for c in rows.values()):
        raise UserError(
            f"{path}: needs a dict ROWS, from names to Configs; give --configs DIR for other rows"
        )
    for name, config in rows.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(f"{path}: row {name!r}: use letters, digits, '_', '.' and '-'")
        _check_groups(path, name, config)
    return rows


def _check_groups(path: Path, row: str, node: Any, above: str = "") -> None:
    for field in dataclasses.fields(node):
        group, value = field.type, getattr(node, field.name)
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            if not isinstance(value, group):
                raise UserError(
                    f"{path}: row {row!r}: {above}{field.name} is {value!r}: give a "
                    f"{group.__name__}"
                )
            _check_groups(path, row, value, f"{above}{field.name}.")
