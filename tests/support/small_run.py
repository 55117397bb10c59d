"""A training run as small as it gets, for test_train and test_resume: digits, 2,801 parameters."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache

from adaptive_ts.experiment.config import command_line
from adaptive_ts.experiment.train import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    "--model.channels 4 --model.multipliers 1 --model.attention False --schedule.num_timesteps 50 "
    "--sampler.every 2 --sampler.num_buckets 8 --sampler.num_selected 2 --generate.num_images 4 "
    "--generate.steps 3 --train.batch_size 8 --train.save_every 1 --train.log_every 1 "
    "--train.max_to_keep 2"
)


def arguments(folder, data_dir, extra="", row="digits"):
    """The command line of a small run in ``folder``."""
    return [row, *SMALL.split(), *f"--workdir {folder} --data.dir {data_dir} {extra}".split()]


COMPILER = {  # every run compiles the same functions: once for all, and in half the time
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compiler(folder):
    """Compiles fast, and keeps what is compiled in ``folder``."""
    wanted = {**COMPILER, "jax_compilation_cache_dir": str(folder)}
    before = {name: jax.config.values[name] for name in wanted}

    def update(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    update(wanted)
    try:
        yield
    finally:
        update(before)


def compiler_environment():
    """The same for a process started from here."""
    names = [*COMPILER, "jax_compilation_cache_dir"]
    return {name.upper(): str(jax.config.values[name]) for name in names}


def run_together(command_of, processes, env, timeout=300):
    """Runs ``command_of(rank, port)`` of each rank to the end: (exit code, stdout, stderr) of each.

    The port is a free one of this machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            list(map(str, command_of(rank, port))), env=env, stdout=pipe, stderr=pipe, text=True
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def parse(argv):
    return command_line.parse(argv, configs_dir=ROOT / "configs")


def train(folder, data_dir, extra="", row="digits"):
    """Runs in this process; returns the exit code and the lines it said."""
    said = []
    code = loop.run(*parse(arguments(folder, data_dir, extra, row)), log=said.append)
    return code, said


def main(argv):
    """What ``train.py ARGV`` does, in this process."""
    sys.path.insert(0, str(ROOT))
    try:
        import train as script
    finally:
        sys.path.remove(str(ROOT))
    return script.main(argv)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tree(folder):
    """path -> (bytes' hash, mtime) of every file below a folder."""
    return {
        str(p.relative_to(folder)): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns,
        )
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def saved_steps(folder):
    names = [p.name for p in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def same_run(folder, other):
    """Two finished runs: the whole state, the losses and p(t), bit for bit."""
    assert summary(folder)["state_digest"] == summary(other)["state_digest"]
    for name in ("metrics.jsonl", "timesteps.jsonl"):
        assert lines(folder, name) == lines(other, name)


@contextlib.contextmanager
def compilations():
    """The names of the functions that JAX compiles meanwhile (cached on disk or not)."""
    names = []

    class Names(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if text.startswith("Compiling "):
                names.append(text.split()[1])

    handler, logger = Names(), logging.getLogger("jax")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        jax.config.update("jax_log_compiles", True)  # jax.log_compiles is for this thread alone
        yield names
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(handler)
        logger.propagate = propagate


def terminated_at(number):
    """An `open_checkpoints` that sends this process SIGTERM as it saves step ``number``."""
    open_checkpoints = loop.open_checkpoints

    def opened(*args, **options):
        checkpoints = open_checkpoints(*args, **options)

        def save(step, state, meta):
            if step == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return checkpoints.save(step, state, meta)

        return checkpoints._replace(save=save)

    return opened
