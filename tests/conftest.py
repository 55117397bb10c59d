"""Eight host devices, strict rank promotion, and the goldens; imported before JAX starts."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

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


@pytest.fixture(scope="session")
def mesh8():
    """Eight devices on one axis called "data"."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="session")
def run_data(tmp_path_factory):
    """A data_dir with the digits prepared, and compiled functions kept on disk from here on."""
    from jax.experimental.compilation_cache import compilation_cache
    from small_run import CACHE

    from adaptive_ts.experiment.data import load

    folder = tmp_path_factory.mktemp("run_data")
    for split in ("train", "test"):
        load("digits", split=split, data_dir=folder, log=lambda line: None)
    CACHE["jax_compilation_cache_dir"] = str(folder / "compiled")
    before = {name: jax.config.values[name] for name in CACHE}
    for name, value in CACHE.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def six(run_data, tmp_path_factory):
    """(folder, what it said, what was compiled) of an uninterrupted run of six steps."""
    from small_run import compilations, train

    folder = tmp_path_factory.mktemp("six") / "run"
    with compilations() as names:
        code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0
    return folder, said, names
