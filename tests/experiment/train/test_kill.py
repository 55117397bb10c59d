"""Killed with SIGKILL at random moments and started again: the same bits as never stopped."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from small_run import ROOT, arguments, compiler_environment, lines, same_run, saved_steps, train

PATIENCE = 600  # seconds; what takes longer is stuck


@pytest.fixture(scope="module")
def uninterrupted(six, run_data, once):
    """steps -> the folder of a run that nobody stopped, on the same eight devices."""

    def make(steps):
        if steps == 6:
            return six[0]

        def run(folder):
            extra = f"--train.steps {steps} --train.save_every {steps}"
            assert train(folder / "run", run_data, extra)[0] == 0

        return once(f"uninterrupted_{steps}", run) / "run"

    return make


class Killer:
    """Starts train.py, kills it at a moment drawn at random, and looks at what is left."""

    def __init__(self, folder, data_dir, steps, seed):
        self.folder, self.steps, self.rng = folder, steps, random.Random(seed)
        argv = arguments(folder, data_dir, f"--train.steps {steps}")
        self.command = [sys.executable, str(ROOT / "train.py"), *argv]
        self.env = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT)}
        self.start_up, self.per_step = 5.0, 0.2  # seconds, measured as the runs go by
        self.kills, self.half_saved = [], set()
        print(f"seed {seed}")

    def saved(self):
        there = (self.folder / "checkpoints").is_dir() and saved_steps(self.folder)
        return there[-1] if there else 0

    def logged(self, old=None):
        """Steps in metrics.jsonl; 0 while it is still the file ``old``."""
        path = self.folder / "metrics.jsonl"
        there = path.exists() and path.stat().st_ino != old
        return path.read_bytes().count(b"\n") if there else 0

    def kill(self, until):
        """Kills once step ``until`` is logged and its save begins, or, if None, at the start."""
        before, began, log = self.saved(), time.monotonic(), self.folder.with_suffix(".log")
        metrics = self.folder / "metrics.jsonl"
        old = metrics.stat().st_ino if metrics.exists() else None
        with log.open("w") as out:
            process = subprocess.Popen(self.command, env=self.env, stdout=out, stderr=out)
            if until is None:
                time.sleep(self.rng.uniform(0, self.start_up))
            else:
                self.wait_for(process, old, before, until, log)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, log.read_text()
        self.kills.append(f"{'start' if until is None else until} {time.monotonic() - began:.1f} s")
        said, after = log.read_text(), self.saved()
        print(self.kills[-1], "saved", before, "then", after)
        assert after >= before, "a complete checkpoint is gone"
        assert "damaged" not in said and "Traceback" not in said, said
        if "The first step waits" in said:
            assert f"{'resuming after' if before else 'from'} step {before} of" in said
        if (self.folder / "checkpoints").is_dir():
            names = [p.name for p in (self.folder / "checkpoints").iterdir()]
            self.half_saved |= {name for name in names if "tmp" in name}

    def wait_for(self, process, old, before, until, log):
        first, began = None, time.monotonic()
        while (logged := self.logged(old)) < until:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - began < PATIENCE, log.read_text()
            if first is None and logged > before:
                first = time.monotonic()
                self.start_up = first - began
            time.sleep(0.002)
        if first is not None and until > before + 1:
            self.per_step = (time.monotonic() - first) / (until - before - 1)
        time.sleep(self.rng.uniform(0, self.per_step))


@pytest.mark.parametrize(("kills", "steps"), [(2, 6), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, steps, uninterrupted, run_data, tmp_path):
    killer = Killer(tmp_path / "run", run_data, steps, seed=time.time_ns() % 10**6)
    for left in range(kills, 0, -1):
        done = killer.saved()
        if left == 1:
            killer.kill(steps)  # as it saves the last step, or while it evaluates and draws
        elif killer.rng.random() < 0.3 or done >= steps - 1:
            killer.kill(None)
        else:
            most = max(1, round(1.5 * (steps - 1 - done) / (left - 1)))
            killer.kill(min(done + killer.rng.randint(1, most), steps - 1))
    print("half saved:", *killer.half_saved)
    assert not (killer.folder / "summary.json").exists()
    assert len(killer.half_saved) >= kills // 10, "hardly a kill met a save: choose other moments"

    code, said = train(killer.folder, run_data, f"--train.steps {steps}")
    assert code == 0, said
    same_run(killer.folder, uninterrupted(steps))
    assert [line["step"] for line in lines(killer.folder)] == list(range(1, steps + 1))
    names = {p.name for p in (killer.folder / "checkpoints").iterdir()}
    assert names <= {str(steps - 1), str(steps)}, "what the killed left behind is gone"
