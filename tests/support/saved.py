"""A state that is saved and found again, for the tests of checkpoints."""

import contextlib
import subprocess

import jax
import jax.numpy as jnp
import optax
import pytest

from adaptive_ts.experiment.checkpoints.folder import open_checkpoints


def make_state(seed=0):
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (64, 48)),
        "h": jax.random.normal(key, (16, 8)).astype(jnp.bfloat16),
    }
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "key": jax.random.key(seed + 5),
        "keys": jax.random.split(jax.random.key(seed), 8),
        "nothing": None,
        "mask": jnp.arange(5) % 2 == 0,
        "bytes": jnp.arange(7, dtype=jnp.uint8),
        "step": jnp.int32(seed),
    }


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(folder, steps, seed_of=lambda step: step):
    checkpoints = open_checkpoints(folder)
    for step in steps:
        assert checkpoints.save(step, make_state(seed_of(step)), {"seed": seed_of(step)})
    checkpoints.close()


def restore(folder, log):
    checkpoints = open_checkpoints(folder)
    found = checkpoints.restore_latest(abstract(make_state()), log)
    checkpoints.close()
    return found


@contextlib.contextmanager
def small_disk(path, size="8m"):
    """A file system of this size at ``path``, which is not there before and after."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        refused = subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        refused = True
    if refused:
        pytest.skip("needs to mount a small tmpfs, which this user may not")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
