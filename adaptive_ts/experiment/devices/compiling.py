"""Compiling: all that a run needs at once, with the options that pay, and kept for the next run."""

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.stages import Lowered

from adaptive_ts.experiment.errors import quiet

Compiled = Callable[..., Any]
Options = Mapping[str, Any]

CACHE = Path("~/.cache/adaptive_ts").expanduser()

# What is set on x86 CPUs, and what it gains there (docs/costs.md has the runs):
# - no YNNPACK: convolutions and sums by Eigen and XLA itself. A step of the row `overhead`, batch
#   64, takes 0.73 of its time with jaxlib 0.10.2 and 0.80 with 0.12.0.1.
CPU_OPTIONS: Options = {"xla_cpu_experimental_ynn_fusion_type": ""}
# What runs once is not worth optimising: the first state compiles in a third of the CPU time.
ONCE_OPTIONS: Options = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@contextlib.contextmanager
def compiling(
    jobs: Mapping[Any, tuple[Any, tuple[Any, ...]]], once: tuple[Any, ...] = ()
) -> Iterator[Callable[[Any], Compiled]]:
    """name -> the compiled function, waiting for it if need be; each is compiled exactly once.

    XLA compiles one function on one core: functions compiled one by one leave the others idle.
    Tracing is Python, which one thread does at a time: in the order given, so that what is wanted
    first is not kept waiting by what is long.

    Args:
      jobs: name -> (a jitted function, its arguments, abstract or real), most urgent first.
      once: names of functions that are called once or twice, which are not optimised. What they
        make differs in its last bits from what optimised ones make: of the first state, "init",
        every command says it.
    """
    # While grain is imported no other thread can import anything: it replaces Python's own way to.
    with quiet():
        import grain  # noqa: F401
    usual, quick = compiler_options(), compiler_options(once=True)
    tracer = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=(os.cpu_count() or 1) + 1)
    traced = {name: tracer.submit(f.lower, *args) for name, (f, args) in jobs.items()}

    def compiled(name: Any) -> Compiled:
        return compile_with(traced[name].result(), quick if name in once else usual)

    futures = {name: pool.submit(compiled, name) for name in jobs}
    try:
        yield lambda name: futures[name].result()
    finally:
        for threads in (tracer, pool):
            threads.shutdown(wait=False, cancel_futures=True)


def compile_with(lowered: Lowered, options: dict[str, Any]) -> Compiled:
    """The compiled program, without the options where the backend cannot compile it with them.

    Without YNNPACK some products of bfloat16 matrices are not implemented (jaxlib 0.10.2).
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not options or "UNIMPLEMENTED" not in str(error):
            raise
        return lowered.compile()


def compiler_options(*, once: bool = False) -> dict[str, Any]:
    """XLA's options for the default backend, of those that this jaxlib knows.

    Args:
      once: for a function that is called once or twice.
    """
    if jax.default_backend() != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return {}
    wanted = {**CPU_OPTIONS, **(ONCE_OPTIONS if once else {})}
    return {name: value for name, value in wanted.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        logging.getLogger(__name__).warning(
            "jaxlib %s does not know the compiler option %s: programs run without it",
            *(jax.lib.__version__, name),
        )
        return False
    return True


def keep_compiled() -> None:
    """What is compiled from here on is kept, and found again by the next process.

    In a folder of ``~/.cache/adaptive_ts`` for each kind of processor: machine code is of one, and
    a home folder may be many machines'. JAX's own settings (``JAX_COMPILATION_CACHE_DIR``,
    ``JAX_ENABLE_COMPILATION_CACHE``) come first; a folder that cannot be written is none.
    """
    # JAX sets the attributes of its options at run time.
    if jax.config.jax_compilation_cache_dir is not None:  # pyrefly: ignore[missing-attribute]
        return
    folder = CACHE / f"xla-{_processor()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    """8 hex digits of the processor's kind and of what it can do."""
    about = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:8]
