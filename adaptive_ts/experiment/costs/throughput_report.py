"""What `throughput` found, as rows for JSON and as a table for reading."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adaptive_ts.experiment.costs import torch_trainer
from adaptive_ts.experiment.costs.peaks import utilisation
from adaptive_ts.experiment.costs.race import Race


class Entry(NamedTuple):
    """One that is timed.

    Attributes:
      kind: "train" or "generate".
      framework: "jax" or "torch".
      name: the sampler; of PyTorch "eager" or "compiled"; of generation the solver.
      dtype: "float32" or "bfloat16".
      batch_size: images at once.
    """

    kind: str
    framework: str
    name: str
    dtype: str
    batch_size: int

    @property
    def label(self) -> str:
        """A name for a folder."""
        return f"{self.kind}-{self.framework}-{self.name}-{self.dtype}-{self.batch_size}"


class Yardstick(NamedTuple):
    """What images per second are compared with.

    Attributes:
      every: f_S, the steps of a turn of training.
      flops_per_image: of the uniform step.
      peaks: dtype -> TFLOP/s of a device at best, or None.
      devices: how many.
    """

    every: int
    flops_per_image: float
    peaks: Mapping[str, float | None]
    devices: int


def rows(entries: Sequence[Entry], race: Race, yardstick: Yardstick) -> list[dict[str, Any]]:
    """One dict per entry: its images/s over the rounds, and what follows from them.

    ``over_uniform`` is the median over the rounds of the ratio to JAX's uniform sampler at the
    same dtype and batch size, and ``over_torch`` that to PyTorch's {"eager", "compiled"}, with
    ``cpu``, PyTorch's CPU seconds over ours. FLOPs are the model's alone: what a sampler computes
    beside it is cost without use.
    """
    found = []
    for entry in entries:
        speeds = _speeds(entry, race, yardstick.every)
        row = {**entry._asdict(), "seconds": race.seconds[entry]}
        row |= {"images_per_s": None, "note": race.failures.get(entry)}
        if speeds:
            row["images_per_s"] = _spread(speeds)
            if entry.kind == "train":
                row |= _of_training(entry, speeds, race, yardstick)
                row["over_torch"] = _over_torch(entry, race)
        found.append(row)
    return found


def _speeds(entry: Entry, race: Race, every: int) -> list[float]:
    images = entry.batch_size * (every if entry.kind == "train" else 1)
    return [images / seconds for seconds in race.seconds[entry]]


def _of_training(
    entry: Entry, speeds: list[float], race: Race, yardstick: Yardstick
) -> dict[str, Any]:
    uniform = entry._replace(framework="jax", name="uniform")
    ratios = _ratios(race.seconds, uniform, entry)
    median, flops = statistics.median(speeds), yardstick.flops_per_image
    peak = yardstick.peaks[entry.dtype]
    return {
        "over_uniform": statistics.median(ratios) if ratios else None,
        "tflops_per_s": median * flops / 1e12,
        "utilisation": utilisation(median, flops, peak, yardstick.devices),
    }


def _over_torch(entry: Entry, race: Race) -> dict[str, dict[str, float]]:
    if entry.framework == "torch":
        return {}
    found = {}
    for name in torch_trainer.FLAVOURS:
        other = entry._replace(framework="torch", name=name)
        ratios = _ratios(race.seconds, other, entry)
        if ratios:
            used = _ratios(race.cpu_seconds, other, entry)
            found[name] = _spread(ratios) | ({"cpu": statistics.median(used)} if used else {})
    return found


def _ratios(seconds: Mapping[Any, list[float]], other: Entry, own: Entry) -> list[float]:
    """The other's seconds over one's own, of the rounds that both finished."""
    return [a / b for a, b in zip(seconds.get(other, []), seconds.get(own, []), strict=False)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def text(report: Mapping[str, Any]) -> str:
    """The report, to be read."""
    lines = [
        f"{report['row']}: {report['model']}, f_S={report['every']}, on {report['devices']}; "
        f"median (min to max) of {report['cycles']} cycles",
        *(f"  {line}" for line in report["settings"]),
        f"  {report['flops_per_image'] / 1e9:.4g} GFLOP per image and step, the compiler's count "
        "of the uniform step",
        _peak_line(report["peak_tflops"], report["device_kind"]),
        "",
        _line("training, images/s", "batch", "", "x uniform", "TFLOP/s", "of peak"),
    ]
    trained = [row for row in report["rows"] if row["kind"] == "train"]
    generated = [row for row in report["rows"] if row["kind"] == "generate"]
    lines += [_row_line(row) for row in trained]
    lines += [line for row in trained for line in _torch_lines(row)]
    lines += [_best_line(trained, dtype) for dtype in report["peak_tflops"]]
    if generated:
        lines += ["", f"generation, images/s: {report['generation']}"]
        lines += [_row_line(row) for row in generated]
    return "\n".join(line.rstrip() for line in lines if line is not None)


def _peak_line(peaks: Mapping[str, float | None], kind: str) -> str:
    known = [f"{dtype} {peak:g}" for dtype, peak in peaks.items() if peak is not None]
    if len(known) == len(peaks):
        return f"  peak of one device, TFLOP/s: {', '.join(known)}"
    return f"  no peak known of {kind}: --peak_tflops X gives the utilisation"


def _row_line(row: Mapping[str, Any]) -> str:
    name = row["name"] if row["framework"] == "jax" else f"PyTorch {row['name']}"
    head = f"{row['dtype']:<8}  {name}"
    speed = row["images_per_s"]
    if speed is None:
        return _line(head, row["batch_size"], row["note"] or "not finished")
    own = f"{_short(speed['median'])} ({_short(speed['min'])} to {_short(speed['max'])})"
    cells = [row.get("over_uniform"), row.get("tflops_per_s"), row.get("utilisation")]
    forms = ("{:.3f}", "{:.4g}", "{:.1%}")
    told = ["" if v is None else form.format(v) for v, form in zip(cells, forms, strict=True)]
    note = f"  {row['note']}" if row["note"] else ""
    return _line(head, row["batch_size"], own, *told) + note


def _torch_lines(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, ratio in row.get("over_torch", {}).items():
        cpu = f"; CPU seconds, PyTorch's over ours: {ratio['cpu']:.3f}" if "cpu" in ratio else ""
        lines.append(
            f"  {row['dtype']} {row['name']}, batch {row['batch_size']}, over PyTorch {name}: "
            f"{ratio['median']:.3f} x ({ratio['min']:.3f} to {ratio['max']:.3f}) the images/s{cpu}"
        )
    return lines


def _best_line(trained: Sequence[Mapping[str, Any]], dtype: str) -> str | None:
    """The batch size at which the uniform sampler is fastest, where there are several."""
    found = {
        row["batch_size"]: row["images_per_s"]["median"]
        for row in trained
        if (row["framework"], row["name"], row["dtype"]) == ("jax", "uniform", dtype)
        and row["images_per_s"]
    }
    if len(found) < 2:
        return None
    best = max(found, key=found.__getitem__)
    return f"  best batch of uniform, {dtype}: {best}, {_short(found[best])} images/s"


def _line(head: str, batch: Any, speed: str, *cells: str) -> str:
    return f"  {head:<27} {batch:>6}  {speed:<32}" + "".join(f"{cell:>11}" for cell in cells)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
