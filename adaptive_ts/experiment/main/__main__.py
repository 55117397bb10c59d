"""``python -m adaptive_ts.experiment.main COMMAND ...`` is ``adaptive-ts COMMAND ...``."""

from adaptive_ts.experiment.main.command import run

if __name__ == "__main__":
    run()
