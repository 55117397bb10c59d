"""Trains a diffusion model: ``python train.py [ROW] [--field.path VALUE ...]``; see --help.

The same as ``adaptive-ts train``.
"""

import os

from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.main.train import main

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the host's processor
    run_cli(main)
