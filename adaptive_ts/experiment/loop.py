"""The main job: from a config to a trained model and the pictures of how it got there."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptive_ts.experiment import config as configs
from adaptive_ts.experiment import finish, report, sharding
from adaptive_ts.experiment.checkpoint import Checkpoints, open_checkpoints
from adaptive_ts.experiment.compiling import compiling
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.data import Dataset, batches, is_latent, load_split
from adaptive_ts.experiment.errors import UserError, one_line
from adaptive_ts.experiment.factory import Built, build, check_classes, first_state
from adaptive_ts.experiment.state import TrainState
from adaptive_ts.experiment.step import make_density, make_step
from adaptive_ts.types import Key, PerBucket

EXIT_RESUME = 75  # EX_TEMPFAIL: stopped by a signal, to be started again
Log = Callable[[str], None]


class _Run(NamedTuple):
    """All that stays the same while a run goes on."""

    config: Config
    folder: Path
    mesh: Mesh
    built: Built
    dataset: Dataset
    key: Key
    checkpoints: Checkpoints
    log: Log


def run(row: str, config: Config, *, log: Log = print) -> int:
    """Trains what the config says, or what is left of it; returns the process's exit code.

    Leaves in ``config.workdir``: config.json, metrics.jsonl, timesteps.jsonl, checkpoints/,
    samples/, timesteps.png, losses.png, curve.png, summary.json and tensorboard/.

    Raises:
      UserError: a mistake of the user's, or an outside cause such as a full disk.
    """
    folder = Path(config.workdir).expanduser().resolve()
    log = log if jax.process_index() == 0 else lambda line: None
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, mesh)
    _check_folder(folder, config)
    dataset = load_split(config.data, "train", log)
    _check_data(config, dataset)
    built = build(config, mesh)
    key_init, key = jax.random.split(jax.random.key(config.seed))
    shape = (config.train.batch_size, *dataset.images.shape[1:])
    init, target = first_state(built, shape, key_init, mesh)
    _claim_folder(folder, config)
    checkpoints = open_checkpoints(folder / "checkpoints", max_to_keep=config.train.max_to_keep)
    with contextlib.closing(checkpoints):
        job = _Run(config, folder, mesh, built, dataset, key, checkpoints, log)
        found = checkpoints.restore_latest(target, log)
        start = found[0] if found else 0
        if start >= config.train.steps and finish.is_complete(folder, start):
            log(finish.complete_text(folder, config))
            return 0
        log(_opening(row, job, target, start))
        jobs = _jobs(job, target, start)
        if not found:
            whole = sharding.replicated(mesh)
            jobs = {"init": (jax.jit(init, out_shardings=whole), (key_init,)), **jobs}
        with compiling(jobs) as compiled:
            state = found[1] if found else compiled("init")(key_init)
            elapsed = float(found[2]["elapsed_s"]) if found else 0.0
            state, elapsed, stopped = _train(job, state, start, elapsed, compiled)
        if stopped:
            log(
                f"Stopped by {stopped} after step {int(state.step)}; the state is saved in "
                f"{folder}. The same command goes on from there."
            )
            return EXIT_RESUME
        held_out = load_split(config.data, "test", log)
        log(finish.finish(row, config, folder, built, state, held_out, elapsed, mesh))
    return 0


def _check_folder(folder: Path, config: Config) -> None:
    """Refuses a folder that holds a run of another config; changes nothing."""
    try:
        saved = report.read_json(folder / "config.json")
    except OSError as error:
        raise UserError(f"--workdir: cannot use {folder}: {error.strerror}") from error
    if saved is None:
        return
    found = configs.differences(saved, config)
    if found:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(found)}); nothing was changed: "
            "choose another --workdir, or give the options it was started with"
        )


def _check_data(config: Config, dataset: Dataset) -> None:
    """Refuses options that mean nothing to this data set."""
    check_classes(config, dataset)
    if config.sampler.decoder_nll and is_latent(dataset.images.dtype):
        raise UserError(
            f"--sampler.decoder_nll: True is of 8-bit pixels, and {dataset.name} holds latents: "
            "leave it out"
        )


def _claim_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, content = folder / "config.json", configs.to_dict(config)
        if jax.process_index() == 0 and report.read_json(path) != content:
            report.write_json(path, content)
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {folder}: {error.strerror}") from error


def _jobs(job: _Run, state: TrainState, start: int) -> dict[Any, tuple[Any, tuple[Any, ...]]]:
    """What is compiled: the step variants that the steps ahead need, and the record of p(t)."""
    every, parts = job.built.probe_every, job.built.parts
    numbers = range(start + 1, job.config.train.steps + 1)
    variants = {_variant(number, every) for number in numbers[: every or 1]}
    rows = sharding.split(job.mesh)
    shape = (job.config.train.batch_size, *job.dataset.images.shape[1:])
    batch = {
        "image": jax.ShapeDtypeStruct(shape, job.dataset.images.dtype, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    steps = {
        probe: (make_step(parts, probe=probe), (state, batch, job.key))
        for probe in sorted(variants, key=bool)  # the first steps don't probe
    }
    return {**steps, "density": (make_density(parts), (state.sampler, batch))}


def _variant(number: int, every: int | None) -> bool | None:
    """Whether the step of this number (from 1) probes; None for a sampler that never does."""
    return None if every is None else number % every == 0


def _opening(row: str, job: _Run, state: TrainState, start: int) -> str:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    config = job.config
    return (
        f"{row}: {job.dataset.images.shape[0]:,} images of {job.dataset.name}, "
        f"{count:,} parameters, {config.sampler.name} sampler, {config.schedule.name} schedule; "
        f"{'resuming after' if start else 'from'} step {start} of {config.train.steps} on "
        f"{job.mesh.size} {jax.devices()[0].platform} device(s). Folder: {job.folder}. "
        "The first step waits for the compiler."
    )


def _train(
    job: _Run,
    state: TrainState,
    start: int,
    elapsed: float,
    compiled: Callable[[Any], Callable[..., Any]],
) -> tuple[TrainState, float, str | None]:
    """Steps until the end or a signal; every file is up to date with the state returned."""
    config, every = job.config, job.built.probe_every
    steps = config.train.steps
    data = batches(
        job.dataset,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    began = time.monotonic() - elapsed
    with _reporting(job, start) as reporter, _signals() as signals:
        pending = None
        for number in range(start + 1, steps + 1):
            batch = sharding.put_batch(next(data), job.mesh)
            state, metrics = compiled(_variant(number, every))(state, batch, job.key)
            logged = number % config.train.log_every == 0 or number == steps
            density = compiled("density")(state.sampler, batch) if logged else None
            reporter.write(pending)  # of the step before: this one is already under way
            pending = number, metrics, density
            stop = bool(signals)
            if number % config.train.save_every == 0 or number == steps or stop:
                reporter.write(pending)  # nothing is saved before its loss is known to be sound
                pending = None
                seconds = time.monotonic() - began
                job.checkpoints.save(number, state, {"elapsed_s": seconds, "step": number})
            if stop:
                break
        job.checkpoints.wait()
    return state, time.monotonic() - began, signals[0] if signals else None


class _Reporter(NamedTuple):
    write: Callable[[tuple[int, dict[str, jax.Array], PerBucket | None] | None], None]


@contextlib.contextmanager
def _reporting(job: _Run, start: int) -> Iterator[_Reporter]:
    """Progress, metrics.jsonl, timesteps.jsonl, TensorBoard; stops at a loss that is not finite."""
    config, main = job.config, jax.process_index() == 0
    metrics_log = report.open_metrics(
        job.folder, resume_step=start, tensorboard=config.train.tensorboard, enabled=main
    )
    density_log = report.open_jsonl(job.folder / "timesteps.jsonl", resume_step=start, enabled=main)
    progress = report.progress(config.train.steps, initial=start, enabled=main, log=job.log)
    window: list[float] = []

    def write(item: tuple[int, dict[str, jax.Array], PerBucket | None] | None) -> None:
        if item is None:
            return
        number, metrics, density = item
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise UserError(_not_finite(job, number, values), exit_code=1)
        window.append(values["loss"])
        progress.update(number, values["loss"])
        if density is not None:
            mean = sum(window) / len(window)
            window.clear()
            metrics_log.write(number, {**values, "loss_mean": mean})
            rounded = [round(float(x), 5) for x in sharding.fetch(density)]
            density_log.write(number, {"density": rounded})

    try:
        yield _Reporter(write)
    except OSError as error:
        raise UserError(
            f"cannot write to {job.folder}: {one_line(error)}; {_last_good(job)}", exit_code=1
        ) from error
    finally:
        progress.close()
        metrics_log.close()
        density_log.close()


def _not_finite(job: _Run, step: int, values: dict[str, float]) -> str:
    return (
        f"the loss is {values['loss']} and the gradient's norm {values['grad_norm']} at step "
        f"{step}: stopped, nothing saved since; {_last_good(job)}. A lower "
        "--optimizer.learning_rate or --optimizer.clip_norm may help"
    )


def _last_good(job: _Run) -> str:
    with contextlib.suppress(UserError):
        job.checkpoints.wait()
    step = job.checkpoints.latest_step()
    if step is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is of step {step}, in {job.folder / 'checkpoints'}"


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of the stop signals received; a second one acts as if there were no handler."""
    received: list[str] = []
    previous = {}

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for one, handler in previous.items():
            signal.signal(one, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.getsignal(number)
    try:
        for number in previous:
            signal.signal(number, handle)
    except ValueError:  # not in the main thread: somebody else's process, its own handlers
        previous.clear()
    try:
        yield received
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
