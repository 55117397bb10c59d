"""What an evaluation leaves: evaluation.json, evaluation.npz, pictures, and lines to print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
import scipy

import adaptive_ts
from adaptive_ts.experiment.assembly.step import density_timesteps
from adaptive_ts.experiment.evaluate import pictures
from adaptive_ts.experiment.evaluate.likelihood import Evaluation, geometric_strata
from adaptive_ts.experiment.evaluate.measure import Diagnosis, Measured
from adaptive_ts.experiment.files import atomic, to_plain, write_json
from adaptive_ts.experiment.logs import read_metrics
from adaptive_ts.experiment.pictures import plot_timesteps
from adaptive_ts.experiment.quality.scores import line, quality_lines
from adaptive_ts.timesteps.grid import TimeGrid

_MODULES = (adaptive_ts, jax, jaxlib, flax, optax, np, scipy)
# What is told of images: of all, and of those of a file.
_TOLD = ("solver", "steps", "eta", "spacing", "variance", "guidance", "labels", "seed")
_TOLD_OF_FILES = (*_TOLD, "weights", "step")


def write_results(
    out: Path, run: Path, grid: TimeGrid, conditions: Mapping[str, Any], measured: Measured
) -> dict[str, Any]:
    """Writes everything, ``evaluation.json`` last; returns what that holds.

    Args:
      out: the folder.
      run: of the training; its ``timesteps.jsonl`` is drawn with the diagnostics.
      grid: of the run's timesteps.
      conditions: what the numbers depend on.
      measured: the numbers.
    """
    out.mkdir(parents=True, exist_ok=True)
    likelihood = measured.likelihood
    sizes = geometric_strata(grid.num_buckets).sizes
    arrays: dict[str, Any] = {
        "timesteps": likelihood.timesteps,
        "timesteps_stood_for": sizes,
        "vlb": likelihood.vlb,
        "vlb_error": likelihood.vlb_error,
        "loss": likelihood.loss,
    }
    about = f"{conditions['dataset']}, step {conditions['step']:,}, ema"
    _draw_likelihood(out, likelihood, sizes, about)
    if measured.diagnosis is not None:
        sampler = conditions["sampler"]
        arrays |= _draw_diagnosis(out, run, grid, measured.diagnosis, about, sampler)
    with atomic(out / "evaluation.npz") as file:
        np.savez(file, **arrays)
    results = {
        "conditions": conditions,
        "quality": measured.quality,
        "likelihood": likelihood._asdict(),
        "versions": {module.__name__: module.__version__ for module in _MODULES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "files": sorted({"evaluation.json", *(p.name for p in out.iterdir() if p.is_file())}),
    }
    write_json(out / "evaluation.json", results)
    return to_plain(results)


def _draw_likelihood(out: Path, found: Evaluation, sizes: np.ndarray, about: str) -> None:
    total = f"{found.total_vlb:.3f} ± {found.total_vlb_error:.3f} bits/dim"
    pictures.plot_vlb(
        out / "vlb_by_timestep.png",
        found.timesteps,
        sizes,
        found.vlb,
        found.vlb_error,
        title=f"Held-out VLB, {total} ({about}, {found.num_images:,} images)",
    )
    pictures.plot_loss(
        out / "loss_by_timestep.png",
        found.timesteps,
        found.loss,
        title=f"Held-out loss, mean {found.total_loss:.4g} ({about}, {found.num_images:,} images)",
    )


def _draw_diagnosis(
    out: Path, run: Path, grid: TimeGrid, found: Diagnosis, about: str, sampler: str
) -> dict[str, Any]:
    """The pictures; returns the arrays behind them."""
    about = about.replace("ema", "training weights")
    pictures.plot_gradient_noise(
        out / "gradient_noise.png",
        found.timesteps,
        found.noise.variance,
        found.noise.mean_square,
        title=f"Gradient noise by timestep ({about})",
    )
    pictures.plot_step_effects(
        out / "step_effects.png",
        found.timesteps,
        found.effects,
        title=f"What a step at t buys at τ ({about})",
    )
    arrays = {
        "diagnostic_timesteps": found.timesteps,
        "gradient_variance": found.noise.variance,
        "gradient_mean_square": found.noise.mean_square,
        "step_effects": found.effects,
    }
    rows = read_metrics(run / "timesteps.jsonl")
    if rows:
        steps, densities = (np.asarray([row[k] for row in rows]) for k in ("step", "density"))
        at = np.asarray(density_timesteps(grid))
        plot_timesteps(
            out / "timesteps.png",
            steps,
            densities,
            at,
            title=f"Which timesteps the {sampler} sampler trains on",
        )
        arrays |= {"density_steps": steps, "density": densities, "density_timesteps": at}
    return arrays


def report_lines(results: Mapping[str, Any], out: Path) -> list[str]:
    """An evaluation to print: the conditions, a line per number, and where everything is.

    Args:
      results: of ``evaluation.json``.
      out: the folder.
    """
    conditions, found = results["conditions"], results["likelihood"]
    where = f"{conditions['run']} at step {conditions['step']:,}"
    weights = f"EMA weights (decay {conditions['ema_decay']:g})"
    about = f"n={found['num_images']:,} held-out images, 95% interval"
    loss = f"n={found['num_images']:,}, mean over timesteps, unweighted"
    quality = quality_lines(results["quality"])
    if not conditions["chosen"]:
        quality[0] += f" (the default for such images; or --features {_other(conditions)})"
    return [
        f"{where}, {weights}, {conditions['dataset']}, {conditions['schedule']} schedule",
        f"images: {_images(conditions['images'])}",
        *quality,
        f"held out: {conditions['dataset']}/test, data {conditions['data_fingerprint']}, "
        f"noise of seed {conditions['seed']}",
        line("VLB, bits/dim", _interval(found["total_vlb"], found["total_vlb_error"]), about),
        line(f"MSE of {conditions['prediction']}", _number(found["total_loss"]), loss),
        f"By timestep, and everything else, in {out}: {', '.join(results['files'])}.",
    ]


def _other(conditions: Mapping[str, Any]) -> str:
    return {"inception": "classifier", "classifier": "inception"}[conditions["network"]]


def _images(images: Mapping[str, Any]) -> str:
    def told(names: tuple[str, ...]) -> str:
        known = {name: images[name] for name in names if images.get(name) is not None}
        return ", ".join(f"{name} {_short(value)}" for name, value in known.items())

    count = f"n={images['num_images']:,}"
    if "file" in images:
        known = told(_TOLD_OF_FILES) or "solver, steps and weights unknown: no info.json beside it"
        return f"{count} of {images['file']} ({known}), pixels {images['digest']}"
    return f"{count}, {told(_TOLD)}"


def _short(value: Any) -> str:
    if isinstance(value, list):  # of labels
        many = f"{value[0]} .. {value[-1]} ({len(value):,} in turn)"
        return many if len(value) > 10 else " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(value: float | None, error: float | None) -> str:
    return _number(value) + ("" if error is None else f" ± {error:.2g}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
