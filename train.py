"""Trains a diffusion model: ``python train.py [ROW] [--field.path VALUE ...]``; see --help."""

import os
from pathlib import Path

from adaptive_ts.experiment.cli import parse, run_cli


def main(argv: list[str]) -> int:
    # The names of data sets, samplers and schedules are known without starting JAX's devices.
    from adaptive_ts.experiment.factory import known_names
    from adaptive_ts.experiment.hosts import joined

    own = [token for token in argv if token not in ("--dry_run", "--dry-run")]
    row, config = parse(own, configs_dir=Path(__file__).parent / "configs", known=known_names())
    from adaptive_ts.experiment.dry_run import dry_run
    from adaptive_ts.experiment.loop import EXIT_RESUME, run

    with joined(config.hosts, EXIT_RESUME):
        return run(row, config) if len(own) == len(argv) else dry_run(row, config)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the host's processor
    run_cli(main)
