"""``train.py`` as one of several processes: ``hosts_worker.py RANK PROCESSES PORT DEVICES ARGV``.

``EVENT=NAME:RANK:STEP`` makes that process, as it saves that step, send itself the signal NAME, or
fail (``FAIL``). Steps are slow from then on, as agreement takes some of them.
"""

import os
import signal
import sys
import time

from small_run import main

from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.train import loop

rank, processes, port, devices = map(int, sys.argv[1:5])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices // processes}"

sharding._SMALL = 16  # the small model's arrays too are split
name, who, at = os.environ.get("EVENT", "none:0:0").split(":")
real_open = loop.open_checkpoints


def open_checkpoints(*args, **options):
    checkpoints = real_open(*args, **options)

    def save(step, state, meta):
        if name != "none" and step >= int(at):
            time.sleep(0.3)
        if name != "none" and step == int(at) and rank == int(who):
            checkpoints.wait()
            if name == "FAIL":
                raise UserError("the disk of this host is full", exit_code=1)
            os.kill(os.getpid(), signal.Signals[name])
        return checkpoints.save(step, state, meta)

    return checkpoints._replace(save=save)


loop.open_checkpoints = open_checkpoints
own = sys.argv[5:]
if processes > 1:
    own += ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.process_id", str(rank)]
    own += ["--hosts.num_processes", str(processes)]
sys.argv[:] = ["train.py", *own]
run_cli(main)
