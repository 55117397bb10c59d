"""Pictures of an evaluation: bound, loss, gradient noise and effects of steps, by timestep."""

import os
from typing import Any

import numpy as np

from adaptive_ts.experiment.pictures import BLUE, GREY, ORANGE, figure_of, finish

Array = Any  # what numpy.asarray takes
Path = str | os.PathLike[str]

_TIMESTEP = "timestep t (noise grows to the right; the axis is stretched at both ends)"
_LABELS = 12  # along an axis of the heat map


def plot_vlb(
    path: Path, timesteps: Array, sizes: Array, vlb: Array, error: Array, title: str
) -> None:
    """Draws the terms of the held-out bound with their intervals, and their running sum.

    Args:
      path: the PNG.
      timesteps: (n,) increasing.
      sizes: (n,) how many timesteps each stands for.
      vlb: (n,) mean terms, bits/dim.
      error: (n,) half of their 95% intervals; NaN is no interval.
      title: what is shown.
    """
    t, vlb, error = (np.asarray(x, float) for x in (timesteps, vlb, error))
    figure = figure_of(7.5, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _line(above, t, vlb, BLUE, "mean over images")
    _band(above, t, vlb, error)
    above.set_ylabel("VLB term, bits/dim")
    above.legend(frameon=False, fontsize=9)
    running = np.cumsum(np.asarray(sizes, float) * vlb)
    below.step(_place(t, t[-1]), running, where="mid", color=ORANGE, lw=2)
    below.set(ylabel="sum up to t,\nbits/dim", ylim=(0, None))
    _time_axis(below, t)
    finish(figure, path, title)


def plot_loss(path: Path, timesteps: Array, loss: Array, title: str) -> None:
    """Draws the held-out loss.

    Args:
      path: the PNG.
      timesteps: (n,) increasing.
      loss: (n,) mean losses.
      title: what is shown.
    """
    t = np.asarray(timesteps, float)
    figure = figure_of(7.5, 4)
    axes = figure.subplots()
    _line(axes, t, np.asarray(loss, float), BLUE, "mean over images")
    axes.set_ylabel("held-out loss per example")
    _time_axis(axes, t)
    finish(figure, path, title)


def plot_gradient_noise(
    path: Path, timesteps: Array, variance: Array, mean_square: Array, title: str
) -> None:
    """Draws how much of a timestep's gradient is noise, and how much is common to all examples.

    Args:
      path: the PNG.
      timesteps: (n,) increasing.
      variance: (n,) of one example's gradient.
      mean_square: (n,) squared norm of the mean gradient; what is not above 0 is left out.
      title: what is shown.
    """
    t = np.asarray(timesteps, float)
    figure = figure_of(7.5, 4.4)
    axes = figure.subplots()
    _line(axes, t, np.asarray(variance, float), ORANGE, "variance of one example's gradient")
    _line(axes, t, np.asarray(mean_square, float), BLUE, "squared norm of the mean gradient")
    axes.set_ylabel("squared norm")
    axes.legend(frameon=False, fontsize=9)
    _time_axis(axes, t)
    finish(figure, path, title)


def plot_step_effects(path: Path, timesteps: Array, effects: Array, title: str) -> None:
    """Draws the matrix of what a step on one timestep buys at another, as a heat map.

    Colours are symmetric about 0 and logarithmic but near it, where they are linear.

    Args:
      path: the PNG.
      timesteps: (n,) increasing.
      effects: (n, n): row t of the step, column tau of the loss; positive where the loss fell.
      title: what is shown.
    """
    from matplotlib.colors import SymLogNorm

    timesteps, effects = np.asarray(timesteps), np.asarray(effects, float)
    sizes = np.abs(effects[np.isfinite(effects)])
    reach = float(sizes.max(initial=0)) or 1.0
    linear = max(float(np.quantile(sizes, 0.25)) if sizes.size else 0, reach / 1e4)
    figure = figure_of(7.6, 6.2)
    axes = figure.subplots()
    image = axes.pcolormesh(
        effects, norm=SymLogNorm(linear, vmin=-reach, vmax=reach), cmap="RdBu", rasterized=True
    )
    at = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), _LABELS)).astype(int))
    labels = [f"{t:,}" for t in timesteps[at]]
    axes.set_xticks(at + 0.5, labels)
    axes.set_yticks(at + 0.5, labels)
    axes.set(xlabel="timestep τ of the loss", ylabel="timestep t of the step")
    axes.set_aspect("equal")
    axes.plot([0, len(timesteps)], [0, len(timesteps)], color=GREY, ls=":", lw=1)  # t = tau
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    _symmetric_ticks(bar, linear, reach)
    bar.set_label("by how much the held-out loss at τ falls (red: rises)")
    finish(figure, path, title)


def _symmetric_ticks(bar: Any, linear: float, reach: float) -> None:
    from matplotlib.ticker import NullLocator

    powers = np.arange(np.ceil(np.log10(linear)), np.floor(np.log10(reach)) + 1).astype(int)
    powers = powers[:: max(1, -(-len(powers) // 4))]
    above = [(10.0**p, f"$10^{{{p}}}$") for p in powers]
    below = [(-x, label.replace("$", "$-", 1)) for x, label in reversed(above)]
    ticks, labels = zip(*below, (0.0, "0"), *above, strict=True)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(ticks, labels=labels)


def _place(t: np.ndarray, last: float) -> np.ndarray:
    """Both ends of the time axis stretched, as the timesteps measured are close together there."""
    return np.log((t + 0.5) / (last - t + 0.5))


def _line(axes: Any, t: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    axes.plot(_place(t, t[-1]), shown, color=colour, lw=2, marker="o", ms=3, label=label)
    axes.grid(axis="y", color=GREY, alpha=0.15)
    if np.isfinite(shown).any():
        axes.set_yscale("log")


def _band(axes: Any, t: np.ndarray, mean: np.ndarray, error: np.ndarray) -> None:
    known = np.isfinite(mean) & np.isfinite(error) & (mean > 0)
    if known.any():
        share = 100 * error[known] / mean[known]
        low = np.maximum(mean - error, mean / 10)  # the axis is logarithmic
        axes.fill_between(
            _place(t, t[-1]),
            np.where(known, low, np.nan),
            np.where(known, mean + error, np.nan),
            color=BLUE,
            alpha=0.3,
            lw=0,
            label=f"95% interval, ±{share.min():.2g}% to ±{share.max():.2g}%",
        )


def _time_axis(axes: Any, t: np.ndarray) -> None:
    last = float(t[-1])
    near = [0.0, *(x for p in range(7) for x in (10.0**p, 3 * 10.0**p) if x < last / 2)]
    ticks = np.array(sorted({*near, *(last - x for x in near)}))
    places, shown = _place(ticks, last), []
    for i in np.argsort(-np.abs(places), kind="stable"):  # the ends first
        if all(abs(places[i] - places[k]) > 0.045 * np.ptp(places) for k in shown):
            shown.append(i)
    axes.set_xticks(places[shown], [f"{x:,.0f}" for x in ticks[shown]])
    axes.set_xlabel(_TIMESTEP)
