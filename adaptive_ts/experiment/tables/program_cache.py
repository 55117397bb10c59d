"""The version of the code that a result is of, kept so that asking again costs nothing."""

import contextlib
import hashlib
from pathlib import Path

import jax

import adaptive_ts
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.devices.compiling import CACHE
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import read_json, write_json
from adaptive_ts.experiment.tables.programs import program
from adaptive_ts.experiment.tables.records import fingerprint


def program_of(config: Config) -> str:
    """`programs.program`, which takes seconds; from a cache while no file has changed."""
    path, code = CACHE / "programs.json", _code()
    saved = _read(path)
    known = saved["programs"] if saved.get("code") == code else {}
    name = fingerprint(config)
    if name not in known:
        known = {**known, name: program(config)}
        with contextlib.suppress(OSError):  # a cache that cannot be written is none
            CACHE.mkdir(parents=True, exist_ok=True)
            write_json(path, {"code": code, "programs": known})
    return known[name]


def _read(path: Path) -> dict:
    with contextlib.suppress(OSError, UserError):
        saved = read_json(path)
        if isinstance(saved, dict) and isinstance(saved.get("programs"), dict):
            return saved
    return {}


def _code() -> str:
    digest = hashlib.sha256(jax.__version__.encode())
    root = Path(adaptive_ts.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
