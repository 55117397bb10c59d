"""A program's temporary memory is cleared by the kernel once, not at every call."""

import ctypes
import subprocess
import sys

import pytest

from adaptive_ts.experiment.devices import memory

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from adaptive_ts.experiment.devices.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()

def f(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return x.sum()

x, w = jnp.ones((8_000, 256)), jnp.ones((256, 256)) / 256
g = jax.jit(jax.grad(f, argnums=1)).lower(x, w).compile()
for _ in range(20):
    g(x, w).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    g(x, w).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="of glibc's malloc",
)
def test_page_faults_of_a_call():
    faults = {}
    for how in ("leave", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
        )
        faults[how] = float(done.stdout)
    assert faults["leave"] > 5_000 and faults["keep"] < 0.3 * faults["leave"], faults


def test_elsewhere_nothing_is_done(monkeypatch):
    own = memory.keep_freed_memory.__wrapped__
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert own() is False
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # no mallopt: musl
    assert own() is False
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    assert own() is False
