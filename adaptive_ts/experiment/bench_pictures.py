"""The bench's picture: curves, loss by noise level, p(t), and likelihood against image quality."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_ts.experiment.pictures import BLUE, GREY, ORANGE, count_steps, figure_of, finish

_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":")
_TIMESTEP = "timestep t (noise grows to the right)"
Runs = Mapping[int, dict[str, Any]]


def plot_bench(
    path: str | os.PathLike[str],
    rows: Mapping[str, Runs],
    points: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
) -> None:
    """Draws one dataset and schedule.

    Args:
      path: the PNG.
      rows: label -> seed -> record, uniform first if it is there.
      points: label -> differences from uniform (``vlb``, ``frechet``), for rows that have them.
      title: what is shown.
    """
    figure = figure_of(8.2, 6.4)
    axes = figure.subplots(2, 2)
    reference = next(iter(rows))
    base = _mean(rows[reference], "mse_by_timestep")
    top = 2.0
    for i, (label, runs) in enumerate(rows.items()):
        look = _look(i, reference)
        curve = _mean(runs, "curve")
        axes[0, 0].plot(curve[:, 0], curve[:, 2], label=label, **look)
        first = next(iter(runs.values()))
        ratio = _mean(runs, "mse_by_timestep") / base
        axes[0, 1].plot(np.asarray(first["timesteps"]) + 1, ratio, **look)
        density = _mean(runs, "density")
        axes[1, 0].plot(first["density_timesteps"], density, **look)
        top = max(top, 1.1 * float(density.max()))
    axes[0, 0].set(ylabel="held-out VLB, bits/dim", yscale="log")
    _plain(axes[0, 0].yaxis)
    count_steps(axes[0, 0])
    axes[0, 0].set_title("likelihood over training, mean over seeds", fontsize=9)
    axes[0, 1].set(xscale="log", xlabel="timestep t + 1", ylabel=f"eps-MSE / that of {reference}")
    axes[0, 1].set_title("loss by noise level, at the end", fontsize=9)
    axes[1, 0].set(xlabel=_TIMESTEP, ylabel="p(t) / uniform", ylim=(0, min(top, 10)))
    axes[1, 0].set_title("timesteps drawn, at the end", fontsize=9)
    _tradeoff(axes[1, 1], list(rows), points)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8
    )
    finish(figure, path, title)


def _tradeoff(axes: Any, labels: list[str], points: Mapping[str, Mapping[str, Any]]) -> None:
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    shown = {label: found for label, found in points.items() if found}
    for place, (label, found) in enumerate(shown.items()):
        colour = _look(labels.index(label), labels[0])["color"]
        x, y = found["vlb"], found["frechet"]
        errors = {
            f"{side}err": None if d.low is None else [[d.mean - d.low], [d.high - d.mean]]
            for side, d in (("x", x), ("y", y))
        }
        axes.errorbar(x.mean, y.mean, **errors, fmt="o", ms=5, lw=0.8, color=colour)
        axes.annotate(
            label,
            (x.mean, y.mean),
            (4, 4 if place % 2 else -10),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    if shown:  # one row with few seeds must not set the scale for all
        axes.set_xlim(*_limits([found["vlb"].mean for found in shown.values()]))
        axes.set_ylim(*_limits([found["frechet"].mean for found in shown.values()]))
    axes.set(xlabel="VLB minus uniform's, bits/dim", ylabel="Frechet distance minus uniform's")
    axes.set_title("left and down is better (95%, paired)", fontsize=9)


def _limits(values: list[float]) -> tuple[float, float]:
    """0 and all the values, with a margin of a third."""
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = (high - low) / 3 or 1.0
    return low - margin, high + margin


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

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
