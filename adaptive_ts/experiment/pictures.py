"""Pictures of a run: generated images, the learned p(t), losses.

Drawn on figures of their own, without pyplot, so that a caller's matplotlib is left as it was.
"""

import math
import os
from typing import Any

import numpy as np

from adaptive_ts.experiment.files import atomic

Array = Any  # what numpy.asarray takes

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"
_FADING = ("#BBD6E8", "#6BAED6", BLUE)  # early, midway, now
_MAX_BINS = 100
_TIMESTEP = "timestep t (noise grows to the right)"


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(
    figure: Any, path: str | os.PathLike[str], title: str, *, colours: int | None = None
) -> None:
    """Writes the PNG; of few colours it is a third as large."""
    from PIL import Image

    figure.suptitle(title, fontsize=12)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as file:
        if colours is None:
            figure.canvas.print_png(file)
            return
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        image = Image.fromarray(pixels).quantize(colours, dither=Image.Dither.NONE)
        image.save(file, "PNG", optimize=True)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Cell borders around increasing centres: halfway between, the outer ones mirrored."""
    centres = np.asarray(centres, float)
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def to_uint8(images: Array) -> np.ndarray:
    """Images in [-1, 1], or beyond, as pixels: 0 to 255, to the nearest; NaN is black."""
    bounded = np.nan_to_num(np.asarray(images, np.float32), nan=-1.0).clip(-1, 1)
    return np.rint((bounded + 1) * 127.5).astype(np.uint8)


def save_image_grid(
    path: str | os.PathLike[str], images: Array, *, side: int = 800, smooth: bool = False
) -> None:
    """Writes images as one PNG, small ones magnified so that their pixels can be seen.

    Args:
      path: the file.
      images: (N, H, W, C) uint8, or float in [-1, 1]; C is 1 or 3.
      side: about how many pixels wide the grid should be.
      smooth: magnify by bicubic interpolation, which makes tiny images easier to recognise; False:
        every pixel a square.

    Raises:
      ValueError: images of another shape.
    """
    from PIL import Image

    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images of shape {images.shape}: need (N, H, W, C) with C 1 or 3, N > 0")
    if images.dtype != np.uint8:
        images = to_uint8(images)
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 2
    scale = max(1, (side // columns - gap) // width)
    size, how = (
        (width * scale, height * scale),
        (Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST),
    )
    tall, wide = height * scale + gap, width * scale + gap
    grid = np.full((rows * tall + gap, columns * wide + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        cell = Image.fromarray(image[..., 0] if channels == 1 else image).resize(size, how)
        top, left = gap + (i // columns) * tall, gap + (i % columns) * wide
        grid[top : top + height * scale, left : left + width * scale] = np.asarray(cell).reshape(
            height * scale, width * scale, channels
        )
    with atomic(path) as file:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(file, "PNG")


def plot_timesteps(
    path: str | os.PathLike[str],
    steps: Array,
    densities: Array,
    timesteps: Array,
    title: str = "Which timesteps are trained on",
) -> None:
    """Draws the sampler's p(t) over training, against uniform.

    Args:
      path: the PNG.
      steps: (k,) increasing training steps.
      densities: (k, n) p(t) relative to uniform, that is T p(t), at those steps.
      timesteps: (n,) increasing timesteps of the columns.
      title: what is shown.
    """
    from matplotlib.colors import LogNorm

    steps, timesteps = np.asarray(steps), np.asarray(timesteps, float)
    densities = np.asarray(densities, float).reshape(len(steps), len(timesteps))
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 500)).astype(int))
    # Symmetric about 1 = uniform; a Beta's infinite ends must not set the scale, and it is never
    # so narrow that rounding looks like a preference.
    away = np.abs(np.log(np.clip(densities[shown], 1 / 8, 8)))
    reach = max(1.25, float(np.exp(np.quantile(away, 0.98))))

    figure = figure_of(10, 4.2)
    figure.get_layout_engine().set(wspace=0.06)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    mesh = left.pcolormesh(
        _edges(steps[shown]),
        _edges(timesteps),
        densities[shown].T.clip(1e-30),
        norm=LogNorm(1 / reach, reach),
        cmap="PuOr_r",
        rasterized=True,
    )
    left.set_ylabel("timestep t (noise grows upwards)")
    left.set_title("p(t) relative to uniform, over training", fontsize=10)
    count_steps(left)
    _ratio_bar(figure.colorbar(mesh, ax=left, pad=0.02, extend="both"), reach)

    chosen = sorted({0, (len(steps) - 1) // 2, len(steps) - 1})
    for i, colour in zip(chosen, _FADING[-len(chosen) :], strict=True):
        width = 2.2 if i == chosen[-1] else 1.4
        right.plot(timesteps, densities[i], color=colour, lw=width, label=f"step {steps[i]:,}")
    right.axhline(1, color=GREY, ls="--", lw=1.2, label="uniform")
    top = max(1.5, 1.25 * float(np.quantile(densities[chosen], 0.99)))
    right.set(xlabel=_TIMESTEP, ylabel="p(t) / uniform", ylim=(0, top))
    right.set_title("p(t) early, midway and at the end", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    finish(figure, path, title)


def count_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("training step")


def _ratio_bar(bar: Any, reach: float) -> None:
    from matplotlib.ticker import NullLocator

    above = [r for r in (1.1, 1.2, 1.5, 2, 4, 8) if r <= reach * 1.001]
    above = [r for r in above if reach < 1.5 or r >= 1.5] if reach < 3 else above[3:]
    labels = [f"1/{r:g}×" for r in reversed(above)] + ["1×"] + [f"{r:g}×" for r in above]
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks([1 / r for r in reversed(above)] + [1.0] + above, labels=labels)


def plot_losses(
    path: str | os.PathLike[str],
    timesteps: Array,
    mean: Array,
    std: Array,
    count: Array,
    title: str = "Training loss by timestep",
) -> None:
    """Draws the loss of each timestep, its spread, and how often each was drawn.

    More than 100 timesteps are pooled into bins. On the log axis the band reaches as far down
    as it does up, to mean + one standard deviation.

    Args:
      path: the PNG.
      timesteps: (n,) increasing.
      mean: (n,) mean loss per example.
      std: (n,) its standard deviation over examples.
      count: (n,) examples behind the mean; timesteps without any are left out.
      title: what is shown.
    """
    t, mean, std, count = _pool(timesteps, mean, std, count)
    seen = (count > 0) & np.isfinite(mean) & (mean > 0)
    figure = figure_of(7.5, 4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if seen.any():
        factor = 1 + std[seen] / mean[seen]
        above.fill_between(
            t[seen],
            mean[seen] / factor,
            mean[seen] * factor,
            color=BLUE,
            alpha=0.2,
            lw=0,
            label="one standard deviation over examples",
        )
        above.plot(t[seen], mean[seen], color=BLUE, lw=2, label="mean")
        above.legend(frameon=False, fontsize=9)
    _log_losses(above)
    above.set_ylabel("loss per example")
    edges = _edges(t)
    below.bar(edges[:-1], count, np.diff(edges), align="edge", color=ORANGE, alpha=0.75)
    below.set(xlabel=_TIMESTEP, ylabel="examples")
    finish(figure, path, title)


def _log_losses(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _pool(*columns: Array) -> tuple[np.ndarray, ...]:
    """Neighbouring timesteps pooled into at most 100 bins, each weighted by its count."""
    t, mean, std, count = (np.asarray(c, float) for c in columns)
    bins = np.arange(len(t)) * min(len(t), _MAX_BINS) // len(t)
    seen = count > 0
    mean, std = np.where(seen, mean, 0.0), np.where(seen, std, 0.0)
    total = np.bincount(bins, count)
    first = np.bincount(bins, count * mean) / np.maximum(total, 1)
    second = np.bincount(bins, count * (std**2 + mean**2)) / np.maximum(total, 1)
    centres = np.bincount(bins, t) / np.bincount(bins)
    return centres, first, np.sqrt(np.maximum(second - first**2, 0)), total


def plot_curve(
    path: str | os.PathLike[str],
    steps: Array,
    loss: Array,
    title: str = "Training loss",
    *,
    window: int | None = None,
) -> None:
    """Draws the training loss and its running mean.

    Args:
      path: the PNG.
      steps: (k,) training steps.
      loss: (k,) losses; non-finite ones are left out.
      title: what is shown.
      window: points per running mean; None: a twentieth of them.
    """
    steps, loss = np.asarray(steps), np.asarray(loss, float)
    steps, loss = steps[np.isfinite(loss)], loss[np.isfinite(loss)]
    window = window or max(1, len(loss) // 20)
    figure = figure_of(7.5, 4)
    axes = figure.subplots()
    axes.plot(steps, loss, color=_FADING[0], lw=1, label="logged")
    if 1 < window < len(loss):
        smooth = np.convolve(loss, np.full(window, 1 / window), "valid")
        axes.plot(
            steps[window - 1 :],
            smooth,
            color=BLUE,
            lw=2,
            label=f"mean of the last {window} points",
        )
    if len(loss) and loss.min() > 0 and loss.max() > 10 * loss.min():
        _log_losses(axes)
    count_steps(axes)
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9)
    finish(figure, path, title)
