"""Several processes on this machine: the numbers of one, and none left waiting for the others."""

import os
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from small_run import (
    ROOT,
    arguments,
    compiler_environment,
    lines,
    parse,
    run_together,
    summary,
    train,
)

from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
from adaptive_ts.experiment.train.plan import make_plan

DEVICES, STEPS = 4, "--train.steps 20"
MESHES = {"data": 1, "fsdp": 4, "both": 2}  # devices along fsdp


@pytest.fixture(scope="module")
def one_process(run_data, once):
    """A run of one process with eight devices."""

    def make(folder):
        assert train(folder / "run", run_data, STEPS)[0] == 0

    return once("twenty", make) / "run"


def start(processes, folder, data_dir, extra="", event="none:0:0"):
    """Runs all processes to their end: (exit code, stdout, stderr) of each."""
    script = ROOT / "tests" / "support" / "hosts_worker.py"
    env = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT), "EVENT": event}
    argv = arguments(folder, data_dir, f"{STEPS} {extra}")

    def command(rank, port):
        return sys.executable, script, rank, processes, port, DEVICES, *argv

    return run_together(command, processes, env)


def final_state(folder, data_dir):
    plan = make_plan(*parse(arguments(folder, data_dir, STEPS)), lambda line: None)
    checkpoints = open_checkpoints(folder / "checkpoints")
    step, state, _ = checkpoints.restore_latest(plan.state)
    checkpoints.close()
    assert step == 20
    return state


def same_numbers(folder, other, data_dir):
    """Losses, draws, selected timesteps and the final state, to float tolerance."""
    for name in ("metrics.jsonl", "timesteps.jsonl"):
        ours, theirs = lines(folder, name), lines(other, name)
        assert len(ours) == len(theirs) == 20
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.keys() == its.keys()
            for key, value in its.items():
                np.testing.assert_allclose(mine[key], value, rtol=2e-3, atol=2e-4, err_msg=key)
    ours, theirs = final_state(folder, data_dir), final_state(other, data_dir)
    # With 50 timesteps the 100 buckets tell each from the others: the draws, weighted by age.
    np.testing.assert_allclose(ours.statistics.count, theirs.statistics.count, rtol=1e-6)
    np.testing.assert_array_equal(ours.sampler.selected, theirs.sampler.selected)
    for mine, its in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-5)
    assert summary(folder)["steps"] == summary(other)["steps"] == 20


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_numbers_of_one(
    one_process, run_data, tmp_path
):
    folder, mesh = tmp_path / "run", "--mesh.fsdp 2"
    stopped = start(2, folder, run_data, mesh, "SIGTERM:1:3")
    assert [code for code, *_ in stopped] == [75, 75], stopped
    assert "Stopped by SIGTERM after step" in stopped[0][1] and "same command" in stopped[0][1]
    done = start(2, folder, run_data, mesh)
    assert [code for code, *_ in done] == [0, 0], done
    assert "resuming after step" in done[0][1] and "Everything is in" in done[0][1]
    # Process 1 prints nothing of its own.
    assert not [line for line in done[1][1].splitlines() if "peer ranks" not in line]
    same_numbers(folder, one_process, run_data)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_mesh_of_any_processes_has_the_numbers_of_one(
    processes, mesh, one_process, run_data, tmp_path
):
    folder = tmp_path / "run"
    done = start(processes, folder, run_data, f"--mesh.fsdp {MESHES[mesh]}")
    assert [code for code, *_ in done] == [0] * processes, done
    same_numbers(folder, one_process, run_data)


@pytest.mark.slow
def test_an_interrupt_of_one_process_stops_both_and_one_goes_on_alone(
    one_process, run_data, tmp_path
):
    folder = tmp_path / "run"
    stopped = start(2, folder, run_data, "", "SIGINT:1:3")
    assert [code for code, *_ in stopped] == [75, 75], stopped
    assert "Stopped by SIGINT after step" in stopped[0][1]
    code, said = train(folder, run_data, STEPS)  # eight devices, none of them split
    assert code == 0 and "resuming after step" in said[0]
    same_numbers(folder, one_process, run_data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "codes", "words"),
    [
        ("FAIL:1:3", [75, 1], "process 1 of 2, on {host}: the disk of this host is full"),
        ("SIGKILL:1:3", [75, -signal.SIGKILL], ""),
        ("SIGKILL:0:3", [-signal.SIGKILL, 75], ""),
    ],
)
def test_when_one_dies_the_others_say_so_and_end_at_once(event, codes, words, run_data, tmp_path):
    folder, began = tmp_path / "run", time.monotonic()
    ended = start(2, folder, run_data, "--hosts.timeout 20", event)
    assert [code for code, *_ in ended] == codes, ended
    assert words.format(host=socket.gethostname()) in "".join(text for *_, text in ended)
    who = codes.index(75)
    assert f"process {who} of 2" in ended[who][2] and "lost another process" in ended[who][2]
    assert time.monotonic() - began < 200, "most of it is compiling"
    code, said = train(folder, run_data, STEPS)
    assert code == 0
    assert "resuming after step 2" in said[0] or "resuming after step 3" in said[0]
