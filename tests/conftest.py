"""Eight host devices, strict rank promotion, and the goldens; imported before JAX starts."""

import fcntl
import gc
import json
import os
import pathlib
from importlib.metadata import version

# Nearly all of the suite's time is compilation, and the older code generator takes half as long.
# Versions after 0.10 have only the other one, which their runs of these tests exercise.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
).strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Python's garbage collector looks less often, and no more at what is imported by now.

    Tracing makes objects by the million, in a heap that grows: it took a quarter of a run's time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """``golden(name)`` is the arrays of tests/golden/name.npz, as a dict."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def strict():
    """``with strict():`` around our own functions; optax and scikit-learn break under it."""
    return lambda: jax.numpy_dtype_promotion("strict")


@pytest.fixture
def quick_compilation():
    """For tests whose cost is nearly all compilation; their arithmetic is tiny."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def mesh8():
    """Eight devices on one axis called "data"."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: the folder that ``make(folder)`` filled, for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    from built_wheel import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def run_data(once):
    """A data_dir with the digits prepared; meanwhile functions are compiled fast and kept."""
    from small_run import compiler

    from adaptive_ts.experiment.data.loading import load

    def prepare(folder):
        for split in ("train", "test"):
            load("digits", split=split, data_dir=folder, log=lambda line: None)

    data_dir = once("run_data", prepare)
    with compiler(once("compiled", lambda folder: None)):
        yield data_dir


@pytest.fixture(scope="module")
def six(run_data, once):
    """(folder, what was compiled) of an uninterrupted run of six steps."""
    from small_run import compilations, train

    def make(folder):
        with compilations() as names:
            code, said = train(folder / "run", run_data, "--train.steps 6")
        assert code == 0
        assert "Everything is in" in said[-1] and "\n" not in said[-1]
        assert str(folder / "run") in said[-1]
        (folder / "compiled.json").write_text(json.dumps(names))

    folder = once("six", make)
    return folder / "run", json.loads((folder / "compiled.json").read_text())


@pytest.fixture(scope="module")
def three(run_data, once):
    """The folder of a run that ended after three of the six steps, between two probes."""
    from small_run import train

    def make(folder):
        assert train(folder / "run", run_data, "--train.steps 3")[0] == 0

    return once("three", make) / "run"
