"""What a table keeps of its runs: one JSON object per line, and which of them go together."""

import fcntl
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adaptive_ts.experiment.config.groups import Config, fingerprint_fields
from adaptive_ts.experiment.files import json_digest

Record = dict[str, Any]
_COMPARED = ("sampler.", "weighting.", "schedule.name")
_IDENTITY = ("label", "dataset", "schedule", "seed", "fingerprint", "program", "cores", "features")
_NEEDED = (*_IDENTITY, "setting", "data", "curve")
_SAME = ("dataset", "schedule", "data", "setting", "cores", "features")


def fingerprint(config: Config) -> str:
    """Of what a run computes, but for its seed, and how long it goes on.

    Fields at their defaults are left out, so that a field added later, whose default keeps runs
    what they were, keeps their results too.
    """
    return json_digest(_changed(config), 12)


def setting(config: Config) -> str:
    """Of what runs that are compared must have in common: all but the method and the schedule."""
    fields = _changed(config)
    rest = {k: v for k, v in fields.items() if not k.startswith(_COMPARED)}
    return json_digest(rest, 12)


def _changed(config: Config) -> dict[str, Any]:
    usual = fingerprint_fields(Config())
    fields = {k: v for k, v in fingerprint_fields(config).items() if v != usual[k] and k != "seed"}
    fields["train.steps"] = config.train.steps
    if config.data.source_dir is not None:  # other files, another set of the same name
        fields["data.source_dir"] = config.data.source_dir
    return fields


def file_name(dataset: str, schedule: str) -> str:
    """``digits-linear``, without an ending."""
    return f"{dataset.replace('/', '_')}-{schedule}"


def read_runs(folder: Path) -> list[Record]:
    """The records of a folder, of runs repeated the last; lines that are none are left out."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                run = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            if isinstance(run, dict) and all(name in run for name in _NEEDED):
                found[tuple(run[name] for name in _IDENTITY)] = run
    return list(found.values())


def append_run(folder: Path, record: Record) -> None:
    """Adds one line to the file of the record's set and schedule; others may do so meanwhile."""
    path = folder / f"{file_name(record['dataset'], record['schedule'])}.jsonl"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, 2):  # a line that was cut off must not take this one with it
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def comparable(runs: Iterable[Record]) -> dict[str, list[Record]]:
    """File name -> runs on the same images and schedule, of one setting, measured the same way.

    That is: on as many cores each, and by the same features of images. Of a row whose options or
    whose code changed only the runs with those of the last one count.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in _SAME), []).append(run)
    names = [file_name(*key[:2]) for key in groups]
    found = {}
    for key, group in groups.items():
        name = file_name(*key[:2])
        if names.count(name) > 1:
            name += f"-{json_digest(dict(zip(_SAME, key, strict=True)), 12)}"
        found[name] = _of_last_options(group)
    return found


def _of_last_options(runs: Sequence[Record]) -> list[Record]:
    last = {run["label"]: (run["fingerprint"], run["program"]) for run in runs}
    return [run for run in runs if (run["fingerprint"], run["program"]) == last[run["label"]]]
