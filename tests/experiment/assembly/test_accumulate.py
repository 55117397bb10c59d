"""A step in microbatches is the step of the whole batch, in less memory."""

import functools

import jax
import numpy as np
import pytest
from small_run import arguments, main, parse

from adaptive_ts.experiment.assembly import build
from adaptive_ts.experiment.assembly import step as step_file
from adaptive_ts.experiment.assembly.step import make_step
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError

STEPS, BATCH = 4, 32
OPTIONS = "--optimizer.warmup_steps 0 --data.flip True --train.accumulate"


def small(extra, *, devices=1, row="digits"):
    """(the step, its first state, a batch's shape and the mesh) of a small run; not compiled."""
    _, config = parse(arguments("unused", "unused", extra, row))
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=config.mesh.fsdp)
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    built, key = build.build(config, mesh), jax.random.key(0)
    shape = (config.train.batch_size, 8, 8, 1)
    init, state = build.first_state(built, shape, key, mesh)
    # The sampler's own counter says when to probe: it has to count steps, not microbatches.
    step = make_step(built.parts, probe=None, state=state)
    placed = jax.tree.map(lambda x: x.sharding, state)
    return step, jax.jit(init, out_shardings=placed), shape, mesh


@functools.cache
def trained(devices, accumulate, fsdp=1):
    """The metrics of each step, and the state at the end."""
    extra = f"{OPTIONS} {accumulate} --train.batch_size {BATCH} --mesh.fsdp {fsdp}"
    step, init, shape, mesh = small(extra, devices=devices)
    state, history, rng = init(jax.random.key(0)), [], np.random.default_rng(0)
    for _ in range(STEPS):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        batch = sharding.put_batch({"image": image, "label": np.zeros(BATCH, np.int32)}, mesh)
        state, metrics = step(state, batch, jax.random.key(1))
        history.append({name: float(value) for name, value in metrics.items()})
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params)]
    assert any(split) == (fsdp > 1)
    return history, jax.device_get(state)


@pytest.mark.parametrize(
    ("devices", "accumulate", "fsdp"),
    [
        pytest.param(1, 4, 1, marks=pytest.mark.slow),
        pytest.param(8, 2, 1, marks=pytest.mark.slow),
        (8, 4, 4),
    ],
)
def test_microbatches_are_the_whole_batch(devices, accumulate, fsdp, run_data, monkeypatch):
    if fsdp > 1:
        monkeypatch.setattr(sharding, "_SMALL", 16)  # of this model's arrays, split some
    whole, one = trained(1, 1)
    history, state = trained(devices, accumulate, fsdp)
    assert [step["probed"] for step in history] == [0, 1, 0, 1]
    for step, expected in zip(history, whole, strict=True):
        for name in expected:
            np.testing.assert_allclose(step[name], expected[name], rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(step["loss"], expected["loss"], rtol=1e-5)
    # The very same timesteps, and each loss beside its own.
    np.testing.assert_array_equal(state.statistics.count, one.statistics.count)
    np.testing.assert_array_equal(state.sampler.selected, one.sampler.selected)
    for name in ("statistics", "params", "ema"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            getattr(state, name),
            getattr(one, name),
        )


def test_microbatches_take_less_memory(run_data):
    def needed(accumulate):
        extra = f"{OPTIONS} {accumulate} --train.batch_size 256"
        step, init, shape, mesh = small(extra, row="digits_uniform")
        rows = sharding.split(mesh)
        batch = {
            "image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows),
            "label": jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=rows),
        }
        state = jax.eval_shape(init, jax.random.key(0))
        compiled = step.lower(state, batch, jax.random.key(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = needed(1), needed(4)
    assert parts < whole / 2, (whole, parts)


@pytest.mark.parametrize(
    ("size", "sizes"), [(40, "use 32 or 64"), (100, "use 96 or 128"), (20, "use 32")]
)
def test_a_batch_that_does_not_divide_is_told_the_nearest_sizes(size, sizes, tmp_path):
    extra = f"--train.accumulate 4 --train.batch_size {size}"
    with pytest.raises(UserError) as error:
        main(arguments(tmp_path / "run", tmp_path, extra))
    assert str(error.value) == (
        f"--train.batch_size: {size} is not divisible by 4 microbatches on the 8 devices: {sizes}"
    )


def traced(scan, monkeypatch):
    """The step with this in place of the loop on a CPU: (it, its first state, loops, batch)."""
    monkeypatch.setattr(step_file, "_unrolled_scan", scan)
    extra = f"{OPTIONS} 4 --train.batch_size 16"
    step, init, shape, mesh = small(extra, row="digits_uniform")
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    batch = sharding.put_batch({"image": image, "label": np.zeros(16, np.int32)}, mesh)
    state = jax.eval_shape(init, jax.random.key(0))
    loops = str(step.trace(state, batch, jax.random.key(1)).jaxpr).count("scan[")
    return step, init, loops, batch


def test_on_a_cpu_the_microbatches_are_no_loop(run_data, monkeypatch):
    unrolled = traced(step_file._unrolled_scan, monkeypatch)[2]
    assert traced(jax.lax.scan, monkeypatch)[2] == unrolled + 1


@pytest.mark.slow
def test_the_sums_of_the_loop_in_the_same_order(run_data, monkeypatch):
    found = []
    for scan in (step_file._unrolled_scan, jax.lax.scan):
        step, init, _, batch = traced(scan, monkeypatch)
        found.append(jax.device_get(step(init(jax.random.key(0)), batch, jax.random.key(1))))
    (state, metrics), (same_state, same) = found
    for name in same:
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-6, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, state.opt_state, same_state.opt_state)
