"""The end of a run: held-out numbers, generated images, pictures, summary.json, one paragraph."""

import platform
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.experiment import logs, pictures
from adaptive_ts.experiment.assembly.state import LOSS_BUCKETS, TrainState, final_keys
from adaptive_ts.experiment.assembly.step import density_timesteps
from adaptive_ts.experiment.checkpoints.checksums import state_digest
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset, is_latent
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.evaluate.likelihood import Evaluation, evaluate
from adaptive_ts.experiment.files import read_json, write_json
from adaptive_ts.experiment.generate.making import image_batches, save_grid
from adaptive_ts.experiment.train.plan import Plan
from adaptive_ts.learning.statistics import loss_mean, loss_std
from adaptive_ts.timesteps.grid import TimeGrid

_FILES = (
    ("samples/", "generated images"),
    ("timesteps.png", "p(t) over training, against uniform"),
    ("losses.png", "loss per timestep"),
    ("curve.png", "training loss"),
    ("metrics.jsonl", "all metrics"),
    ("tensorboard/", "the same for TensorBoard"),
    ("checkpoints/", "the state"),
    ("summary.json", "these numbers"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_complete(folder: Path, step: int) -> bool:
    """Whether the run's reports are of this step."""
    saved = read_json(folder / "summary.json")
    return isinstance(saved, dict) and saved.get("steps") == step


def complete_text(folder: Path, config: Config) -> str:
    """What to say when there is nothing left to do."""
    summary = read_json(folder / "summary.json")
    more = max(2 * summary["steps"], config.train.steps)
    return (
        f"This run is complete: {summary['steps']:,} steps, nothing to do. "
        f"{logs.summary_text(summary, _FILES)} To train on: --train.steps {more}."
    )


def finish(plan: Plan, state: TrainState, held_out: Dataset, elapsed: float) -> str:
    """Evaluates, generates, draws and writes; returns the paragraph to print.

    Every process takes part in the computing; process 0 writes.

    Raises:
      UserError: a disk that refuses.
    """
    config, folder, built, mesh = plan.config, plan.folder, plan.built, plan.mesh
    step = int(state.step)
    ema = sharding.gather(state.ema, mesh)
    key_noise, key_images = final_keys(config.seed)
    size = config.train.batch_size
    result = evaluate(built, ema, held_out, size, key_noise, mesh)
    shape = held_out.images.shape[1:]
    latents = is_latent(held_out.images.dtype)
    batches = image_batches(config, built, shape, mesh, latents=latents)
    images = np.concatenate(list(batches(ema, key_images)))
    summary = {
        "row": plan.row,
        "dataset": held_out.name,
        "sampler": config.sampler.name,
        "schedule": config.schedule.name,
        "seed": config.seed,
        "steps": step,
        "loss": _recent_loss(folder),
        "held_out_loss": result.total_loss,
        "vlb_bits_per_dim": result.total_vlb,
        "vlb_error": result.total_vlb_error,
        "held_out_images": result.num_images,
        "wall_clock_s": round(elapsed, 2),
        "steps_per_s": round(step / max(elapsed, 1e-9), 3),
        "images_per_s": round(step * size / max(elapsed, 1e-9), 1),
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {
            "python": platform.python_version(),
            "adaptive_ts": _version("adaptive-ts"),
            **{name: _version(name) for name in _PACKAGES},
        },
        "data_fingerprint": held_out.fingerprint,
        "state_digest": state_digest({"state": state, "data": {"position": np.int64(step)}}),
        "workdir": str(folder),
    }
    if jax.process_index() == 0:
        try:
            _draw(config, folder, built.parts.grid, state, result, images, step)
            write_json(folder / "summary.json", summary)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {one_line(error)}; step {step} is saved: the same "
                "command then finishes the run",
                exit_code=1,
            ) from error
    return logs.summary_text(summary, _FILES)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _recent_loss(folder: Path) -> float | None:
    """The mean training loss since the log line before the last one."""
    entries = logs.read_metrics(folder / "metrics.jsonl")
    return entries[-1].get("loss_mean") if entries else None


def _draw(
    config: Config,
    folder: Path,
    grid: TimeGrid,
    state: TrainState,
    result: Evaluation,
    images: np.ndarray,
    step: int,
) -> None:
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    save_grid(samples / f"step_{step:08d}.png", images)
    name = f"{config.sampler.name} sampler"
    rows = logs.read_metrics(folder / "timesteps.jsonl")
    if rows:
        pictures.plot_timesteps(
            folder / "timesteps.png",
            np.asarray([row["step"] for row in rows]),
            np.asarray([row["density"] for row in rows]),
            np.asarray(density_timesteps(grid)),
            title=f"Which timesteps the {name} trains on",
        )
    entries = logs.read_metrics(folder / "metrics.jsonl")
    pictures.plot_curve(
        folder / "curve.png",
        np.asarray([entry["step"] for entry in entries]),
        np.asarray([entry["loss_mean"] for entry in entries], float),
        title=f"Training loss, {name}",
    )
    statistics = state.statistics
    centres = (np.arange(LOSS_BUCKETS) + 0.5) / LOSS_BUCKETS
    pictures.plot_losses(
        folder / "losses.png",
        np.asarray(grid.to_t(jnp.asarray(centres, jnp.float32))),
        np.asarray(loss_mean(statistics)),
        np.asarray(loss_std(statistics)),
        np.asarray(statistics.count),
        title=f"Training loss by timestep, {name}",
    )
