"""When a run is asked to stop: by a signal here, or to any of its processes.

Where it trains, the step is finished and saved first (`stop_requests`). Before and after that
there is nothing to save: it stops where it is (`stopping_at_once`).
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import Log

Poll = Callable[[int], str | None]


class Stopped(KeyboardInterrupt):
    """A signal while there was nothing to save; its text is the signal's name."""


@contextlib.contextmanager
def stopping_at_once(*, sigterm: bool = True) -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`; a second one acts as if nobody listened.

    Args:
      sigterm: False leaves it to JAX, which has several processes agree on a step.
    """

    def stop(name: str) -> None:
        raise Stopped(name)

    with _listening((signal.SIGINT, signal.SIGTERM) if sigterm else (signal.SIGINT,), stop):
        yield


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
    several, received = jax.distributed.is_initialized(), []
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    with _listening(numbers, received.append):
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
def _listening(numbers: tuple[signal.Signals, ...], heard: Log) -> Iterator[None]:
    """Tells the name of the first signal; from then on each acts as if nobody listened."""
    previous = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: Any) -> None:
        for one in numbers:
            usual = signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL
            signal.signal(one, usual)
        heard(signal.Signals(number).name)

    try:
        for number in numbers:
            signal.signal(number, handle)
    except ValueError:  # not in the main thread: somebody else's process, its own handlers
        previous.clear()
    try:
        yield
    finally:
        for one, handler in previous.items():
            # None: JAX's own, in C++, which cannot be put back; nobody asks it any more.
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
