"""Stopped, terminated, killed or damaged, and started again: the same bits as never stopped."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from small_run import (
    ROOT,
    arguments,
    compiler_environment,
    lines,
    same_run,
    saved_steps,
    terminated_at,
    train,
)

from adaptive_ts.experiment.train import loop


def test_three_steps_and_three_more_equal_six(three, six, run_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "resuming after step 3 of 6" in said[0]
    assert [line["probed"] for line in lines(folder)] == [0, 1, 0, 1, 0, 1]
    same_run(folder, six[0])


def test_a_damaged_checkpoint_is_stepped_over(three, six, run_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    assert saved_steps(folder) == [2, 3]
    data = [p for p in (folder / "checkpoints/3/state").rglob("d/*") if p.is_file()]
    path = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0
    assert said[0].startswith("checkpoint 3 is damaged") and "\n" not in said[0]
    assert "resuming after step 2 of 6" in said[1]
    same_run(folder, six[0])


# train.py, killed with step 3's files half written: orbax is held where it would rename the folder.
KILLED = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
import train
from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.train import loop

real_open = loop.open_checkpoints

def open_checkpoints(folder, **options):
    checkpoints = real_open(folder, **options)

    def save(step, state, meta):
        if step < 3:
            return checkpoints.save(step, state, meta)
        checkpoints.wait()
        rename = os.rename
        os.rename = os.replace = lambda *args, **kwargs: time.sleep(600)
        checkpoints.save(step, state, meta)
        while not [p for p in pathlib.Path(folder).rglob("*") if "tmp" in p.name]:
            time.sleep(0.01)
        time.sleep({delay})
        os.kill(os.getpid(), signal.SIGKILL)

    return checkpoints._replace(save=save)

loop.open_checkpoints = open_checkpoints
run_cli(train.main)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_then_terminated(six, run_data, tmp_path, monkeypatch):
    folder, script = tmp_path / "run", tmp_path / "train_killed.py"
    script.write_text(KILLED.format(root=str(ROOT), delay=0.2))
    argv = arguments(folder, run_data, "--train.steps 6")
    env = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT)}  # and eight devices
    done = subprocess.run([sys.executable, script, *argv], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert saved_steps(folder)[-1] == 2
    left = [p.name for p in (folder / "checkpoints").iterdir() if not p.name.isdigit()]
    assert any(name.startswith("3.") for name in left), "killed too early or too late"

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_checkpoints", terminated_at(3))
        code, said = train(folder, run_data, "--train.steps 6")
    assert "resuming after step 2 of 6" in said[0]
    assert code == 75 == loop.EXIT_RESUME
    assert "Stopped by SIGTERM after step 4" in said[-1] and "same command" in said[-1]
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(folder)[-1] == 4 and not (folder / "summary.json").exists()

    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "resuming after step 4 of 6" in said[0]
    same_run(folder, six[0])
