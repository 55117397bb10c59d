"""Trains a diffusion model: ``python train.py [ROW] [--field.path VALUE ...]``; see --help."""

import os
from pathlib import Path

from adaptive_ts.experiment.cli import parse, run_cli
from adaptive_ts.experiment.errors import UserError, one_line


def main(argv: list[str]) -> int:
    # The names of data sets, samplers and schedules are known without starting JAX's devices.
    from adaptive_ts.experiment.factory import known_names

    row, config = parse(argv, configs_dir=Path(__file__).parent / "configs", known=known_names())
    start_hosts(config.hosts)
    from adaptive_ts.experiment.loop import run

    return run(row, config)


def start_hosts(hosts) -> None:
    """Joins the other processes, if the config names any."""
    import jax

    try:
        if hosts.auto:
            jax.distributed.initialize()
        elif hosts.coordinator is not None:
            jax.distributed.initialize(hosts.coordinator, hosts.num_processes, hosts.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--hosts: cannot join the other processes: {one_line(error)}") from error


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the host's processor
    run_cli(main)
