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
