"""The mesh and what it splits: the same numbers, and a state that takes its share of the memory."""

import jax
import numpy as np
import pytest
from small_run import arguments, parse

from adaptive_ts.experiment.assembly.build import build, first_state
from adaptive_ts.experiment.costs.dry_run import local_bytes
from adaptive_ts.experiment.data.loading import batches
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.train.plan import make_jobs, make_plan


def silent(line):
    pass


def test_a_mesh_has_a_second_axis_only_where_it_splits_the_state():
    assert dict(sharding.make_mesh().shape) == {"data": 8}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(data=1, fsdp=8).shape) == {"data": 1, "fsdp": 8}
    backwards = sharding.make_mesh(jax.devices()[::-1], fsdp=2)
    assert [device.id for device in backwards.devices.flat] == list(range(8))
    with pytest.raises(UserError, match=r"--mesh\.fsdp: 3 does not divide the 8 devices: use 1, 2"):
        sharding.make_mesh(fsdp=3)
    with pytest.raises(UserError, match=r"--mesh\.data: 8 times --mesh\.fsdp 2 are not the 8 dev"):
        sharding.make_mesh(data=8, fsdp=2)


def test_the_longest_axis_that_divides_is_split():
    mesh = sharding.make_mesh(fsdp=4)

    def kept(*shape):
        return sharding.shared(mesh, shape).shard_shape(shape)

    assert kept(3, 3, 64, 128) == (3, 3, 64, 32)
    assert kept(3, 3, 64, 130) == (3, 3, 16, 130)
    assert kept(4097, 7) == (4097, 7), "nothing divides"
    assert kept(63, 65) == (63, 65) and kept(64, 60) == (64, 60), "small"
    assert sharding.shared(sharding.make_mesh(), (64, 128)).is_fully_replicated


@pytest.mark.parametrize("fsdp", [2, 8])
def test_each_device_holds_its_share_of_the_large_arrays(fsdp):
    mesh = sharding.make_mesh(fsdp=fsdp)
    built = build(parse(["cifar10"])[1], mesh)
    _, state = first_state(built, (8, 32, 32, 3), jax.random.key(0), mesh)
    model = jax.tree.leaves((state.params, state.ema, state.opt_state))
    large = [x for x in model if x.size >= 4096]
    whole = sum(4 * x.size for x in large)
    assert whole > 0.9 * sum(4 * x.size for x in model)
    assert abs(local_bytes(large) * fsdp / whole - 1) <= 0.1
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.sampler))


@pytest.mark.parametrize("fsdp", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_steps_on_split_state_equal_those_on_a_whole_one(fsdp, run_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_SMALL", 16)

    def train(fsdp):
        extra = f"--sampler.name uniform --mesh.fsdp {fsdp} --train.steps 3"
        plan = make_plan(*parse(arguments(tmp_path / "run", run_data, extra)), silent)
        jobs = make_jobs(plan, 0)
        (init, _), (step, _) = jobs["init"], jobs[None]
        state, losses = init(plan.key_init), []
        data = batches(plan.dataset, batch_size=8, seed=0)
        for _ in range(3):
            state, metrics = step(state, sharding.put_batch(next(data), plan.mesh), plan.key)
            losses.append(float(metrics["loss"]))
        split = [x for x in jax.tree.leaves(state.opt_state) if not x.is_fully_replicated]
        assert bool(split) == (fsdp > 1), "the step keeps the state where it was"
        return losses, [np.asarray(x) for x in jax.tree.leaves((state.params, state.statistics))]

    losses, state = train(1)
    others, found = train(fsdp)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for mine, its in zip(found, state, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)
