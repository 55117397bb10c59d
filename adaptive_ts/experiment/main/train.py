"""Trains a diffusion model.

``adaptive-ts train [ROW] [--dry_run] [--configs DIR] [--field.path VALUE ...]``
"""


def main(argv: list[str]) -> int:
    """The command."""
    from adaptive_ts.experiment.config.command_line import parse, split_option

    folder, argv = split_option(argv, "--configs")
    own = [token for token in argv if token not in ("--dry_run", "--dry-run")]
    row, config = parse(own, configs_dir=folder)
    from adaptive_ts.experiment.costs.dry_run import dry_run
    from adaptive_ts.experiment.devices.compiling import keep_compiled
    from adaptive_ts.experiment.devices.hosts import joined
    from adaptive_ts.experiment.train.loop import EXIT_RESUME, run

    keep_compiled()
    with joined(config.hosts, EXIT_RESUME):
        return run(row, config) if len(own) == len(argv) else dry_run(row, config)
