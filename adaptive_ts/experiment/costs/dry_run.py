"""What a run would be: its size, memory, cost and time, without leaving anything behind."""

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.assembly.step import train_steps, variant
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.costs.counts import cost_of, notes
from adaptive_ts.experiment.data.catalogue import is_prepared
from adaptive_ts.experiment.data.loading import batches
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.errors import Log
from adaptive_ts.experiment.train.plan import Plan, make_jobs, make_plan
from adaptive_ts.types import Batch

_STEPS = 8  # timed, of each variant
_LARGEST = 5  # arrays told of


def dry_run(row: str, config: Config, *, log: Log = print) -> int:
    """Builds, compiles and tries a few steps; tells about them and writes nothing.

    Every process takes part. Data that is not prepared yet is prepared in a folder that is
    removed afterwards.

    Raises:
      UserError: whatever would stop the run at its start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        elsewhere = {} if is_prepared(config.data) else {"data.dir": scratch}
        plan = make_plan(row, replace(config, elsewhere), log, keep=False)
        began = time.monotonic()
        jobs = make_jobs(plan, 0)
        with compiling(jobs, once=("init",)) as compiled:
            steps = {name: compiled(name) for name in jobs if name not in ("init", "density")}
            compiled("density")
            waited = time.monotonic() - began
            seconds = _seconds(plan, compiled("init")(plan.key_init), steps)
    for line in [*_size(plan), *_cost(steps), *_largest(plan), _time(plan, seconds, waited)]:
        plan.log(line)
    plan.log(f"Nothing was written: {plan.folder} is as it was.")
    return 0


def local_bytes(tree: Any) -> int:
    """What a tree of placed arrays, abstract or not, takes on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * _itemsize(x.dtype)
        for x in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _seconds(
    plan: Plan, state: TrainState, steps: dict[Any, Callable[..., Any]]
) -> dict[Any, float]:
    """Variant -> the shortest of a few steps, which nothing else on the machine held up."""
    data = batches(
        plan.dataset,
        batch_size=plan.config.train.batch_size,
        seed=plan.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    found = {}
    silent = jax.process_index() > 0
    with tqdm(total=len(steps) * _STEPS, desc="trying", unit=" step", disable=silent) as bar:
        for name, step in steps.items():
            times: list[float] = []
            began: list[float] = []

            def placed(began: list[float] = began) -> Iterator[Batch]:
                for batch in data:
                    on_devices = sharding.put_batch(batch, plan.mesh)
                    began.append(time.perf_counter())
                    yield on_devices

            taken = train_steps(
                lambda probe, step=step: step, state, placed(), plan.key, stop=_STEPS, every=None
            )
            for done in taken:
                state = done.state
                jax.block_until_ready((state, done.metrics))
                times.append(time.perf_counter() - began[-1])
                bar.update()
            found[name] = min(times)
    return found


def _size(plan: Plan) -> list[str]:
    config, state = plan.config, plan.state
    count = sum(x.size for x in jax.tree.leaves(state.params))
    whole = sum(x.size * _itemsize(x.dtype) for x in jax.tree.leaves(state))
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.shape.items())
    return [
        f"{plan.row}: {count:,} parameters; {plan.dataset.images.shape[0]:,} images of "
        f"{plan.dataset.name}, {'x'.join(map(str, plan.dataset.images.shape[1:]))}",
        f"mesh: {mesh}; {plan.mesh.size} {jax.devices()[0].device_kind} device(s) of "
        f"{jax.process_count()} process(es); batch {config.train.batch_size}, "
        f"{config.train.batch_size // plan.mesh.size} on each, in {config.train.accumulate} "
        "microbatch(es)",
        f"state: {_mega(whole)} in all, {_mega(local_bytes(state))} on each device",
    ]


def _cost(steps: dict[Any, Any]) -> list[str]:
    costs = {"step with a probe" if name else "step": cost_of(x) for name, x in steps.items()}
    lines = [
        f"{what}, on each device: {cost.flops / 1e9:,.3f} GFLOPs, {_mega(cost.bytes_accessed)} "
        f"read and written, {_mega(cost.temp_bytes)} of memory besides the state and the batch"
        for what, cost in costs.items()
    ]
    return lines + notes(list(costs.values()), jax.devices()[0].platform)


def _largest(plan: Plan) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(plan.state)
    leaves.sort(key=lambda item: -item[1].size)
    return ["largest arrays, with what each device holds of them:"] + [
        f"  {_mega(x.size * _itemsize(x.dtype)):>10}  {jax.tree_util.keystr(path)} "
        f"{'x'.join(map(str, x.shape))}: {'x'.join(map(str, x.sharding.shard_shape(x.shape)))}, "
        f"{_axes(x.sharding.spec)}"
        for path, x in leaves[:_LARGEST]
    ]


def _axes(spec: Any) -> str:
    split = [f"axis {axis} split over {name}" for axis, name in enumerate(spec) if name]
    return ", ".join(split) or "whole"


def _time(plan: Plan, seconds: dict[Any, float], waited: float) -> str:
    total, every = plan.config.train.steps, plan.built.probe_every
    probes = total // every if every else 0
    probe = seconds.get(True, 0.0)  # a run of f_S = 1 has no other steps
    plain = seconds.get(variant(1, every), probe)
    whole = (total - probes) * plain + probes * probe
    each = f"{1e3 * plain:.1f} ms a step" + (
        f", {1e3 * probe:.1f} ms with a probe" if probes else ""
    )
    return (
        f"time: about {tqdm.format_interval(whole)} for {total:,} steps ({each}), after "
        f"{tqdm.format_interval(waited)} of compiling"
    )


def _mega(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
