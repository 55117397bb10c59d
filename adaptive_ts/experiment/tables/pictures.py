"""A table's picture: curves, loss by noise level, p(t), and likelihood against image quality."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_ts.experiment.pictures import BLUE, GREY, ORANGE, count_steps, figure_of, finish

_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":")
_TIMESTEP = "timestep t (noise grows to the right)"
Runs = Mapping[int, dict[str, Any]]


def plot_table(
    path: str | os.PathLike[str],
    rows: Mapping[str, Runs],
    points: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Draws one dataset and schedule.

    Args:
      path: the PNG.
      rows: label -> seed -> record, uniform first if it is there.
      points: label -> differences from uniform (``vlb``, ``frechet``), for rows that have them.
      seconds: label -> seconds per training step.
      title: what is shown.
    """
    figure = figure_of(9.4, 9.6)
    several = any(len(run["frechet_curve"]) > 1 for runs in rows.values() for run in runs.values())
    last = ["images" if several else "tradeoff", "tradeoff"]
    axes = figure.subplot_mosaic([["steps", "clock"], ["loss", "draws"], last])
    reference = next(iter(rows))
    base = _mean(rows[reference], "mse_by_timestep")
    for i, (label, runs) in enumerate(rows.items()):
        look, first = _look(i, reference), next(iter(runs.values()))
        curve = _mean(runs, "curve")
        axes["steps"].plot(curve[:, 0], curve[:, 2], label=label, **look)
        axes["clock"].plot(curve[:, 0] * seconds[label], curve[:, 2], **look)
        ratio = _mean(runs, "mse_by_timestep") / base
        axes["loss"].plot(np.asarray(first["timesteps"]) + 1, ratio, **look)
        axes["draws"].plot(first["density_timesteps"], _mean(runs, "density"), **look)
        if several:
            images = _mean(runs, "frechet_curve")
            axes["images"].plot(images[:, 0], images[:, 2], marker="o", ms=3, **look)
    _likelihood(axes["steps"], axes["clock"], rows)
    axes["loss"].set(xscale="log", yscale="log", xlabel="timestep t + 1")
    axes["loss"].set_ylabel(f"eps-MSE / that of {reference}")
    _plain(axes["loss"].yaxis)
    axes["loss"].set_title("loss by noise level, at the end", fontsize=9)
    top = min(axes["draws"].get_ylim()[1], 10)
    axes["draws"].set(xlabel=_TIMESTEP, ylabel="p(t) / uniform", ylim=(0, max(top, 2)))
    axes["draws"].set_title("timesteps drawn, at the end", fontsize=9)
    if several:
        axes["images"].set(ylabel="Frechet distance", yscale="log")
        _plain(axes["images"].yaxis)
        count_steps(axes["images"])
        axes["images"].set_title("images over training, mean over seeds", fontsize=9)
    _tradeoff(axes["tradeoff"], list(rows), points)
    figure.legend(
        *axes["steps"].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8
    )
    finish(figure, path, title, colours=128)


def _likelihood(steps: Any, clock: Any, rows: Mapping[str, Runs]) -> None:
    """Without the first two evaluations, where all fall alike, to see what sets them apart."""
    curves = [_mean(runs, "curve")[:, 2] for runs in rows.values()]
    highest = max(curve[min(2, len(curve) - 1)] for curve in curves)
    lowest = min(curve.min() for curve in curves)
    for axes in (steps, clock):
        axes.set(ylabel="held-out VLB, bits/dim", yscale="log")
        if 0 < lowest < highest < np.inf:
            axes.set_ylim(lowest / 1.05, highest * 1.05)
        _plain(axes.yaxis)
    count_steps(steps)
    steps.set_title("likelihood over training, mean over seeds", fontsize=9)
    clock.set(xlabel="seconds: steps x time per step")
    clock.set_title("the same by wall-clock", fontsize=9)


def step_seconds(runs: Runs) -> float:
    """Seconds per training step: the median over all stretches between evaluations.

    Robust against whatever else the machine did meanwhile; a stretch is whole cycles of f_S.
    """
    curves = [np.asarray(run["curve"])[:, :2] for run in runs.values()]
    stretches = [np.diff(curve, axis=0, prepend=0.0) for curve in curves]
    steps, seconds = np.concatenate(stretches).T
    return float(np.median(seconds / steps))


def _tradeoff(axes: Any, labels: list[str], points: Mapping[str, Mapping[str, Any]]) -> None:
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    shown = {label: found for label, found in points.items() if found}
    for label, found in shown.items():
        look = _look(labels.index(label), labels[0])
        x, y = found["vlb"], found["frechet"]
        errors = {
            f"{side}err": None if d.low is None else [[d.mean - d.low], [d.high - d.mean]]
            for side, d in (("x", x), ("y", y))
        }
        colour, face = look["color"], "white" if look["ls"] == "--" else look["color"]
        shape = "s" if look["ls"] == ":" else "o"
        axes.errorbar(x.mean, y.mean, **errors, fmt=shape, ms=6, lw=0.8, color=colour, mfc=face)
    if shown:
        _scale(axes, "x", [found["vlb"].mean for found in shown.values()])
        _scale(axes, "y", [found["frechet"].mean for found in shown.values()])
    axes.set(xlabel="VLB minus uniform's, bits/dim", ylabel="Frechet distance minus uniform's")
    axes.set_title("left and down is better (95%, paired)", fontsize=9)


def _scale(axes: Any, side: str, values: list[float]) -> None:
    """Limits by the means alone: a row with few seeds has long bars; one far off, a log scale."""
    low, high = min([0.0, *values]), max([0.0, *values])
    typical = float(np.median(np.abs(values))) or 1.0
    limits = axes.set_xlim if side == "x" else axes.set_ylim
    margin = (high - low) / 3 or 1.0
    if high - low > 8 * typical:
        low, high, margin = 1.5 * low, 1.5 * high, typical
        scale = axes.set_xscale if side == "x" else axes.set_yscale
        scale("symlog", linthresh=2 * typical)
        far = [m * 10**k for k in range(-3, 6) for m in (1, 2, 5) if m * 10**k > typical / 2]
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_ticks([*(-x for x in far), 0, *far], minor=False)
        axis.set_ticks([], minor=True)
        axis.set_major_formatter("{x:g}")
    limits(low - margin, high + margin)


def _look(index: int, reference: str) -> dict[str, Any]:
    if reference == "uniform":
        if index == 0:
            return {"color": GREY, "ls": "--", "lw": 2.0}
        index -= 1
    style = _STYLES[index // len(_COLOURS) % len(_STYLES)]
    return {"color": _COLOURS[index % len(_COLOURS)], "ls": style, "lw": 1.6}


def _mean(runs: Runs, name: str) -> np.ndarray:
    return np.mean([run[name] for run in runs.values()], axis=0)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    some = (1, 2, 3, 4, 5, 6, 8) if high < 4 * low else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=some if high < 50 * low else (1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
