"""Tables and pictures: means over seeds, and differences from uniform by seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from adaptive_ts.experiment.files import atomic
from adaptive_ts.experiment.tables.pictures import plot_table, step_seconds
from adaptive_ts.experiment.tables.records import comparable
from adaptive_ts.experiment.tables.times import read_times

BASELINE = "uniform"
Runs = Mapping[int, dict[str, Any]]  # seed -> record

_HEADER = (
    "| row | seeds | VLB, bits/dim | minus uniform | Frechet distance | minus uniform | eps-MSE | "
    "steps to uniform's VLB | time to it | time per step |"
)


class Difference(NamedTuple):
    """A mean of paired differences and its 95% interval (None for fewer than two pairs)."""

    mean: float
    low: float | None
    high: float | None


class Reached(NamedTuple):
    """Where the VLB first is as low as uniform's at the end, by seed.

    Attributes:
      seeds: how many got there, and of how many.
      steps: mean share of uniform's steps, over those that did; NaN if none.
    """

    seeds: tuple[int, int]
    steps: float


def write_report(runs: Sequence[dict[str, Any]], folder: Path) -> str:
    """Writes ``DATASET-SCHEDULE.md`` and ``.png`` of `comparable` runs; returns the tables."""
    texts = []
    for name, chosen in comparable(runs).items():
        rows = by_row(chosen)
        first = chosen[0]
        title = f"{first['dataset']}, {first['schedule']} schedule, {first['steps']:,} steps"
        times = read_times(folder, first["setting"])
        seconds = {label: times.get(label, step_seconds(runs)) for label, runs in rows.items()}
        text = f"{title}; images by {first['features']}\n\n{table(rows, seconds)}\n"
        with atomic(folder / f"{name}.md") as file:
            file.write(text.encode())
        points = {label: differences(rows, label) for label in rows if label != BASELINE}
        plot_table(folder / f"{name}.png", rows, points, seconds, title=title)
        texts.append(text)
    return "\n".join(texts)


def by_row(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """label -> seed -> record; uniform first, then in the order of the runs."""
    labels = dict.fromkeys(run["label"] for run in runs)
    rows = {label: {} for label in sorted(labels, key=lambda label: label != BASELINE)}
    for run in runs:
        rows[run["label"]][run["seed"]] = run
    return rows


def table(rows: Mapping[str, Runs], seconds: Mapping[str, float]) -> str:
    """A Markdown table of all rows, mean +- standard deviation over seeds.

    Args:
      rows: label -> seed -> record.
      seconds: label -> seconds per training step.
    """
    lines = [_HEADER, "|---" * _HEADER.count("| ") + "|"]
    for label, runs in rows.items():
        found = differences(rows, label)
        reached = reach(rows, label)
        base = rows.get(BASELINE)
        cost = seconds[label] / seconds[BASELINE] if base else float("nan")
        cells = [
            label,
            str(len(runs)),
            _spread([run["vlb"] for run in runs.values()], 3),
            _interval(found.get("vlb"), 3),
            _spread([run["frechet"] for run in runs.values()], 1),
            _interval(found.get("frechet"), 1),
            _spread([run["mse"] for run in runs.values()], 4),
            *(_share(reached, x) for x in (reached.steps, reached.steps * cost)),
            f"{cost:.2f}" if base else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: Mapping[str, Runs], label: str) -> dict[str, Difference]:
    """VLB and Frechet distance minus uniform's, paired by seed; empty without common seeds."""
    base, runs = rows.get(BASELINE, {}), rows[label]
    seeds = sorted(base.keys() & runs.keys())
    if label == BASELINE or not seeds:
        return {}
    return {
        name: paired([runs[s][name] - base[s][name] for s in seeds]) for name in ("vlb", "frechet")
    }


def paired(values: Sequence[float]) -> Difference:
    """The mean and its 95% interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Difference(mean, None, None)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Difference(mean, float(low), float(high))


def reach(rows: Mapping[str, Runs], label: str) -> Reached:
    """How soon a row's VLB is down at uniform's final one, interpolated between evaluations."""
    base, runs = rows.get(BASELINE, {}), rows[label]
    seeds = sorted(base.keys() & runs.keys())
    found = []
    for seed in seeds:
        target, curve = base[seed]["curve"][-1], np.asarray(runs[seed]["curve"])
        at = crossing(curve[:, 2], target[2])
        if at is not None:
            found.append(np.interp(at, np.arange(len(curve)), curve[:, 0]) / target[0])
    return Reached((len(found), len(seeds)), float(np.mean(found or np.nan)))


def crossing(values: np.ndarray, target: float) -> float | None:
    """The (fractional) index where falling values first reach the target; None if never."""
    below = np.flatnonzero(np.asarray(values) <= target)
    if not len(below):
        return None
    last = int(below[0])
    if last == 0:
        return 0.0
    before, after = values[last - 1], values[last]
    return last - 1 + float((before - target) / (before - after))


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _interval(found: Difference | None, digits: int) -> str:
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:+.{digits}f}"
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _share(reached: Reached, value: float) -> str:
    got, of = reached.seeds
    if not got:
        return "not reached" if of else ""
    return f"{value:.2f}" + (f" ({got} of {of} seeds)" if got < of else "")
