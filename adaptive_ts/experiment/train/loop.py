"""The main job: from a config to a trained model and the pictures of how it got there."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.assembly.step import train_steps
from adaptive_ts.experiment.checkpoints.folder import Checkpoints, open_checkpoints
from adaptive_ts.experiment.config.groups import Config, to_dict
from adaptive_ts.experiment.data.loading import batches, load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.devices.stopping import Stopped, stop_requests, stopping_at_once
from adaptive_ts.experiment.errors import Log
from adaptive_ts.experiment.train import ending
from adaptive_ts.experiment.train.plan import Plan, make_jobs, make_plan
from adaptive_ts.experiment.train.run_folder import check_meta, claimed
from adaptive_ts.experiment.train.watch import Step, reporting

EXIT_RESUME = 75  # EX_TEMPFAIL: stopped by a signal, to be started again


def run(row: str, config: Config, *, log: Log = print) -> int:
    """Trains what the config says, or what is left of it; returns the process's exit code.

    Leaves in ``config.workdir``: config.json, metrics.jsonl, timesteps.jsonl, checkpoints/,
    samples/, timesteps.png, losses.png, curve.png, summary.json and tensorboard/.

    Raises:
      UserError: a mistake of the user's, or an outside cause such as a full disk.
    """
    several = jax.distributed.is_initialized()
    try:
        with stopping_at_once(sigterm=not several):
            return _run(make_plan(row, config, log), several)
    except Stopped as signal:
        if several:
            raise
        log(f"Stopped by {signal}; what is saved stays. The same command goes on from there.")
        return EXIT_RESUME


def _run(plan: Plan, several: bool) -> int:
    config, folder = plan.config, plan.folder
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder, config, plan.dataset.fingerprint))
        checkpoints = stack.enter_context(_opened(plan))
        found = checkpoints.restore_latest(plan.state, plan.log)
        start, state, meta = found or (0, None, {})
        check_meta(folder, meta, start, config)
        if start >= config.train.steps and ending.is_complete(folder, start):
            plan.log(ending.complete_text(folder, config))
            return 0
        plan.log(_opening(plan, start))
        with compiling(make_jobs(plan, start), once=("init",)) as compiled:
            if state is None:
                state = compiled("init")(plan.key_init)
            state, elapsed, stopped = _train(plan, checkpoints, state, start, meta, compiled)
        if stopped:
            plan.log(
                f"Stopped by {stopped} after step {int(state.step)}; the state is saved in "
                f"{folder}. The same command goes on from there."
            )
            return EXIT_RESUME
        if several:  # JAX's own handler would have them agree on a step, and none is left
            stack.enter_context(stopping_at_once())
        held_out = load_split(config.data, "test", plan.log)
        plan.log(ending.finish(plan, state, held_out, elapsed))
    return 0


@contextlib.contextmanager
def _opened(plan: Plan) -> Iterator[Checkpoints]:
    folder, keep = plan.folder / "checkpoints", plan.config.train.max_to_keep
    checkpoints = open_checkpoints(folder, max_to_keep=keep)
    try:
        yield checkpoints
    except BaseException:
        # Closing waits for the save under way, and so for processes that may be gone.
        if jax.process_count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()


def _opening(plan: Plan, start: int) -> str:
    count = sum(x.size for x in jax.tree.leaves(plan.state.params))
    config = plan.config
    return (
        f"{plan.row}: {plan.dataset.images.shape[0]:,} images of {plan.dataset.name}, "
        f"{count:,} parameters, {config.sampler.name} sampler, {config.schedule.name} schedule; "
        f"{'resuming after' if start else 'from'} step {start} of {config.train.steps} on "
        f"{plan.mesh.size} {jax.devices()[0].platform} device(s). Folder: {plan.folder}. "
        "The first step waits for the compiler."
    )


def _train(
    plan: Plan,
    checkpoints: Checkpoints,
    state: TrainState,
    start: int,
    meta: dict[str, Any],
    compiled: Callable[[Any], Callable[..., Any]],
) -> tuple[TrainState, float, str | None]:
    """Steps until the end or a signal; every file is up to date with the state returned."""
    config, every = plan.config.train, plan.built.probe_every
    data = batches(
        plan.dataset,
        batch_size=config.batch_size,
        seed=plan.config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    began = time.monotonic() - float(meta.get("elapsed_s", 0))
    stopped = None
    with (
        reporting(plan, checkpoints, start=start, skipped=meta.get("skipped", 0)) as reporter,
        stop_requests(plan.mesh, checkpoints.reached_preemption) as poll,
        jax.transfer_guard_host_to_device("disallow"),
    ):
        pending = None
        placed = (sharding.put_batch(batch, plan.mesh) for batch in data)
        steps = train_steps(
            compiled, state, placed, plan.key, start=start, stop=config.steps, every=every
        )
        for taken in steps:
            number, state = taken.number, taken.state
            logged = number % config.log_every == 0 or number == config.steps
            density = compiled("density")(state.sampler, taken.batch) if logged else None
            reporter.write(pending)  # of the step before: this one is already under way
            pending = Step(number, taken.metrics, density)
            stopped = poll(number)
            if number % config.save_every == 0 or number == config.steps or stopped:
                reporter.write(pending)  # nothing is saved before its loss is known to be sound
                pending = None
                seconds, skipped = time.monotonic() - began, reporter.skipped()
                about = {"elapsed_s": seconds, "step": number, "skipped": skipped}
                checkpoints.save(number, state, {**about, "config": to_dict(plan.config)})
            if stopped:
                break
        checkpoints.wait()
    return state, time.monotonic() - began, stopped
