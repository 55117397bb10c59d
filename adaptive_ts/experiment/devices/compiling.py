"""Compiling all that a run needs at once, on all cores, before and while the first steps run."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adaptive_ts.experiment.errors import quiet

Compiled = Callable[..., Any]


@contextlib.contextmanager
def compiling(
    jobs: Mapping[Any, tuple[Any, tuple[Any, ...]]],
) -> Iterator[Callable[[Any], Compiled]]:
    """name -> the compiled function, waiting for it if need be; each is compiled exactly once.

    XLA compiles one function on one core: functions compiled one by one leave the others idle.

    Args:
      jobs: name -> (a jitted function, its arguments, abstract or real), most urgent first.
    """
    # While grain is imported no other thread can import anything: it replaces Python's own way to.
    with quiet():
        import grain  # noqa: F401
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
    futures = {
        name: pool.submit(lambda f, args: f.lower(*args).compile(), function, args)
        for name, (function, args) in jobs.items()
    }
    try:
        yield lambda name: futures[name].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
