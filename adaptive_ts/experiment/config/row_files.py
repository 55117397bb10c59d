"""Where rows come from: the files of ``configs/``, and those that the package has with it."""

import ast
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import adaptive_ts
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.errors import UserError, one_line


class Row(NamedTuple):
    """A named configuration, and the file it comes from."""

    config: Config
    path: Path


def load_rows(configs_dir: str | os.PathLike[str] | None = None) -> dict[str, Row]:
    """The rows of a folder's ``*.py``, by name.

    Each file is data: a module with a dict ``ROWS: dict[str, Config]``. It is Python and is run: a
    stranger's belongs here only once it is read. Nothing else that is read from files runs.

    Args:
      configs_dir: the folder; None: ``configs/`` of the working folder, where it has files with
        ROWS (others are not run), and for all other names the package's own rows.

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
    own = [path for path in sorted(Path("configs").glob("[!_]*.py")) if _has_rows(path)]
    here = {path.resolve() for path in own}
    built_in = sorted(built_in_folder().glob("[!_]*.py"))
    return _load_files([path for path in built_in if path.resolve() not in here]) | _load_files(own)


def built_in_folder() -> Path:
    """Where the package's own rows are: in the wheel, or beside the package in a checkout."""
    package = Path(adaptive_ts.__file__).parent
    packed = package / "experiment" / "rows"
    return packed if packed.is_dir() else package.parent / "configs"


def _has_rows(path: Path) -> bool:
    """Whether a file of the working folder, which may be anybody's, sets ROWS."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    assigned = [node.targets for node in body if isinstance(node, ast.Assign)]
    assigned += [[node.target] for node in body if isinstance(node, ast.AnnAssign)]
    names = [
        target.id for targets in assigned for target in targets if isinstance(target, ast.Name)
    ]
    return "ROWS" in names


def _load_files(paths: list[Path]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in paths:
        for name, config in _load_file(path).items():
            if name in rows:
                raise UserError(f"{path}: row {name!r} is also in {rows[name].path}: rename one")
            rows[name] = Row(config, path)
    return rows


def _load_file(path: Path) -> dict[str, Config]:
    spec = importlib.util.spec_from_file_location(f"adaptive_ts_configs_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # as of all files named *.py
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
