"""The command ``throughput`` on the small runs' options."""

import json

import jax
import numpy as np
from small_run import ROOT, SMALL

from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.main import throughput

CONFIGS = ["--configs", str(ROOT / "configs")]


def one_device():
    return sharding.Mesh(np.asarray(jax.devices()[:1]), (sharding.AXES[0],))


def run(folder, data_dir, *extra):
    """The command with the small runs' options, which test_train compiles too; what it reports."""
    out = folder / "new" / "throughput.json"
    argv = ["digits", *CONFIGS, *SMALL.split(), "--data.dir", str(data_dir), "--out", str(out)]
    assert throughput.main([*argv, "--cycles", "2", *extra]) == 0
    return json.loads(out.read_text())
