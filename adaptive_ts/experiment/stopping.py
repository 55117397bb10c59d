"""When a run is asked to stop: by a signal here, or to any of its processes."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment import sharding

Poll = Callable[[int], str | None]


@contextlib.contextmanager
def stop_requests(mesh: Mesh, reached_preemption: Callable[[int], bool]) -> Iterator[Poll]:
    """``poll(step)``, asked once after each step: the signal to stop for, the same everywhere.

    Alone, this process hears SIGINT and SIGTERM; a second one acts as if nobody listened. Among
    others, JAX's own handler hears SIGTERM and has all agree on a step; a SIGINT is told to all
    devices with one small sum, read a step later so that nobody waits for it.

    Args:
      mesh: the devices.
      reached_preemption: step -> whether JAX's handler has all stop at it.
    """
    several = jax.distributed.is_initialized()
    with _listening((signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)) as received:
        if not several:
            yield lambda step: received[0] if received else None
            return
        tell, told = _teller(mesh), []

        def poll(step: int) -> str | None:
            told.append(tell(bool(received)))
            interrupted = len(told) > 1 and int(told.pop(0))
            return "SIGTERM" if reached_preemption(step) else "SIGINT" if interrupted else None

        yield poll


def _teller(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """This process's flag -> how many devices' processes have theirs up, on every device."""
    mine = len(mesh.local_devices)
    count = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))
    return lambda flag: count(sharding.put_batch(np.full((mine,), flag, np.int32), mesh))


@contextlib.contextmanager
def _listening(numbers: tuple[signal.Signals, ...]) -> Iterator[list[str]]:
    """The names of the signals received; after the first, the handlers of before are back."""
    received: list[str] = []
    previous = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for one, handler in previous.items():
            signal.signal(one, handler)

    try:
        for number in numbers:
            signal.signal(number, handle)
    except ValueError:  # not in the main thread: somebody else's process, its own handlers
        previous.clear()
    try:
        yield received
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
