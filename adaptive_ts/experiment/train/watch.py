"""What a run tells while it trains, and when it has to stop because the numbers are not finite."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from adaptive_ts.experiment import logs
from adaptive_ts.experiment.checkpoints.folder import Checkpoints
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError, lost_peer, one_line
from adaptive_ts.experiment.train.plan import Plan
from adaptive_ts.types import Metrics, PerBucket


class Step(NamedTuple):
    """A step that is under way, or done: its number from 1, metrics, and p(t) where recorded."""

    number: int
    metrics: Metrics
    density: PerBucket | None


class Reporter(NamedTuple):
    """Attributes:
    write: takes a step and waits for it; None: nothing.
    skipped: () -> updates skipped in a row, up to the last step written.
    """

    write: Callable[[Step | None], None]
    skipped: Callable[[], int]


@contextlib.contextmanager
def reporting(
    plan: Plan, checkpoints: Checkpoints, *, start: int, skipped: int
) -> Iterator[Reporter]:
    """Progress, metrics.jsonl, timesteps.jsonl and TensorBoard; every process watches, 0 writes.

    Args:
      plan: the run.
      checkpoints: its own, for what is said when it stops.
      start: the step that it goes on from.
      skipped: updates skipped in a row up to there.

    Raises:
      UserError: more updates in a row are not finite than may be skipped; a disk that refuses.
    """
    config, main = plan.config, jax.process_index() == 0
    progress = logs.progress(config.train.steps, initial=start, enabled=main, log=plan.log)
    window: list[float] = []
    bad = skipped

    def write(step: Step | None) -> None:
        nonlocal bad
        if step is None:
            return
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        sound = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        bad = 0 if sound else bad + 1
        if sound:
            window.append(values["loss"])
        elif bad > config.train.max_skipped:
            raise UserError(_not_finite(plan, checkpoints, step.number, values, bad), exit_code=1)
        else:
            progress.log(
                f"step {step.number}: the loss is {values['loss']}, the gradient's norm "
                f"{values['grad_norm']}: update skipped, {bad} in a row of at most "
                f"{config.train.max_skipped}"
            )
        progress.update(step.number, values["loss"] if sound else None)
        if step.density is not None:
            mean = sum(window) / len(window) if window else math.nan
            window.clear()
            metrics_log.write(step.number, {**values, "loss_mean": mean})
            rounded = [round(float(x), 5) for x in sharding.fetch(step.density)]
            density_log.write(step.number, {"density": rounded})

    try:
        with contextlib.ExitStack() as stack:  # closing a log writes again what a full disk refused
            stack.callback(progress.close)
            metrics_log = logs.open_metrics(
                plan.folder,
                resume_step=start,
                tensorboard=config.train.tensorboard,
                enabled=main,
            )
            stack.callback(metrics_log.close)
            path = plan.folder / "timesteps.jsonl"
            density_log = logs.open_jsonl(path, resume_step=start, enabled=main)
            stack.callback(density_log.close)
            yield Reporter(write, lambda: bad)
    except OSError as error:
        if lost_peer(error):
            raise
        raise UserError(
            f"cannot write to {plan.folder}: {one_line(error)}; {last_good(plan, checkpoints)}",
            exit_code=1,
        ) from error


def last_good(plan: Plan, checkpoints: Checkpoints) -> str:
    """What there is to go on from."""
    with contextlib.suppress(UserError):
        checkpoints.wait()
    step = checkpoints.latest_step()
    if step is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is of step {step}, in {plan.folder / 'checkpoints'}"


def _not_finite(
    plan: Plan, checkpoints: Checkpoints, step: int, values: dict[str, float], bad: int
) -> str:
    found = f"the loss is {values['loss']} and the gradient's norm {values['grad_norm']}"
    most = plan.config.train.max_skipped
    if most:
        how = f"{found} at step {step}, {bad} steps in a row, --train.max_skipped {most}: stopped"
    else:
        how = f"{found} at step {step}: stopped, nothing saved since"
    return (
        f"{how}; {last_good(plan, checkpoints)}. A lower --optimizer.learning_rate or "
        "--optimizer.clip_norm may help"
        + ("" if most else ", or --train.max_skipped, to go on past a few such steps")
    )
