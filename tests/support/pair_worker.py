"""One of two processes that train nothing: ``pair_worker.py RANK PORT FOLDER``; see test_pair."""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.hosts import joined
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.train import run_folder

SHAPE = (64, 4096)
rank, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])


def told(line):
    print(line, flush=True)


def together(name):
    multihost_utils.sync_global_devices(name)


def checkpoints_of_both():
    """Two checkpoints of an array of which each has half; then one of them loses its half."""
    placed = sharding.split(sharding.make_mesh())
    content = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    target = {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=placed)}
    checkpoints = open_checkpoints(folder / "checkpoints")
    for step in (1, 2):
        w = jax.make_array_from_callback(SHAPE, placed, lambda i, s=step: content[i] + s)
        checkpoints.save(step, {"w": w}, {})
        checkpoints.wait()
    together("saved")
    if rank == 0:
        theirs = (folder / "checkpoints/2/state/ocdbt.process_1/d").iterdir()
        os.truncate(max(theirs, key=lambda p: p.stat().st_size), 100)
    together("truncated")
    step, state, _ = checkpoints.restore_latest(target, told)
    right = all(
        (np.asarray(s.data) == content[s.index] + 1).all() for s in state["w"].addressable_shards
    )
    told(f"restored {step}, {right}")


def claims():
    """Of one folder: with the same options, and with others."""
    config = c.Config()
    with run_folder.claimed(folder / "run", config, "images"):
        together("claimed")
    other = c.replace(config, {"train.save_every": 3 + rank})
    for mine, data in ((other, "images"), (config, f"images {rank}")):
        try:
            with run_folder.claimed(folder / "other", mine, data):
                told("claimed all the same")
        except UserError as error:
            told(str(error))


def main(argv):
    hosts = c.HostsConfig(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    with joined(hosts, 75):
        checkpoints_of_both()
        claims()
        together("now")
        if rank == 1:
            os._exit(9)
        while True:
            together("alone")


run_cli(main)
