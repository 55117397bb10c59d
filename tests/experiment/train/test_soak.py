"""A long run: memory, buffers, open files and the time of a step stay as they were."""

import itertools
import json
import os
import statistics
import subprocess
import sys

import pytest
from small_run import ROOT, arguments, compiler_environment

WORKER = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
import jax
from small_run import compilations, parse
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.train import loop

out, every, put = sys.argv[1], int(sys.argv[2]), sharding.put_batch
steps, files = 0, open(out, "w")

def sampled(batch, mesh):
    global steps
    steps += 1
    if steps % every == every - 10:
        arrays = jax.live_arrays()
        pages = int(open("/proc/self/statm").read().split()[1])
        sample = {{
            "step": steps,
            "cpu": time.process_time(),
            "time": time.monotonic(),
            "rss": pages * os.sysconf("SC_PAGE_SIZE"),
            "arrays": len(arrays),
            "bytes": sum(x.nbytes for x in arrays),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "compiled": len(names),
        }}
        del arrays
        print(json.dumps(sample), file=files, flush=True)
    return put(batch, mesh)

sharding.put_batch = sampled
loop.ending.finish = lambda *args: ""
with compilations() as names:
    code = loop.run(*parse(sys.argv[3:]))
print(json.dumps(names), file=files, flush=True)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("steps", "every"),  # between saves, and between samples taken just before them
    [(640, 80), pytest.param(50_000, 200, marks=pytest.mark.slow)],
)
def test_a_long_run_stays_as_it_is(steps, every, run_data, tmp_path):
    script, out = tmp_path / "worker.py", tmp_path / "samples.jsonl"
    script.write_text(WORKER.format(tests=str(ROOT / "tests/support")))
    extra = f"--train.steps {steps} --train.log_every 40 --train.save_every {every}"
    extra += " --sampler.every 40"
    argv = [out, str(every), *arguments(tmp_path / "run", run_data, extra)]
    env = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run([sys.executable, script, *argv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *samples, names = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(samples) == steps // every

    assert names.count("jit(step)") == 2, "with and without the probe"
    assert names.count("jit(density)") == names.count("jit(init)") == 1
    warm, late = samples[1 : len(samples) // 2], samples[len(samples) // 2 :]
    assert {sample["compiled"] for sample in samples[1:]} == {len(names)}, "all in the beginning"

    def of(name, group):
        return [sample[name] for sample in group]

    table = "\n".join(map(str, [*samples[:12], "...", *samples[-12:]]))
    print(table)
    for name in ("arrays", "bytes", "files"):
        assert max(of(name, late)) <= max(of(name, warm)), name
    assert max(of("threads", late)) <= max(of("threads", warm)) + 2, "pools may grow a little"
    assert max(of("rss", late)) <= 1.05 * max(of("rss", warm)), table
    assert statistics.mean(of("rss", late)) <= 1.05 * statistics.mean(of("rss", warm)), table
    # Processor time, which a busy machine stretches less than it does the clock's.
    taken = [b["cpu"] - a["cpu"] for a, b in itertools.pairwise(samples)]
    half = len(taken) // 2
    assert statistics.median(taken[half:]) <= 1.25 * statistics.median(taken[:half]), taken
