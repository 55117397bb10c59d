"""Memory of the host that programs on the CPU backend get, give back, and get again."""

import ctypes
import functools
import sys

import jax

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; whether it was told. Call it before a first step.

    XLA's CPU backend allocates the temporary memory of a program anew each time that it runs. Above
    32 MB malloc by itself hands it back to the kernel in between, which clears it page by page the
    next time: 10,000 page faults, 22 of 93 ms of CPU time, in a step of the row ``overhead`` at
    batch 64 (findings/xla_cpu_clears_its_memory_at_each_call.sh). This reaches programs with up to
    64 MB, the most that malloc holds for a thread; larger ones gain by
    ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` (docs/costs.md).

    Elsewhere than on CPUs, and with another malloc than glibc's, nothing is done.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 1 << 30, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])
