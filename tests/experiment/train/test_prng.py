"""A run is that of its seed, whatever JAX's default generator."""

import jax
import pytest
from small_run import same_run, train

from adaptive_ts.experiment.assembly.state import final_keys


@pytest.fixture
def unsafe_rbg():
    before = jax.config.values["jax_default_prng_impl"]
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # for all threads
    yield
    jax.config.update("jax_default_prng_impl", before)


def test_the_keys_of_a_seed(unsafe_rbg):
    found = [key.dtype for key in final_keys(3)]
    assert found == [jax.random.key(0, impl="threefry2x32").dtype] * 2


@pytest.mark.slow
def test_a_run_under_another_default_generator(three, run_data, unsafe_rbg, tmp_path):
    assert jax.random.key(0).dtype != jax.random.key(0, impl="threefry2x32").dtype
    assert train(tmp_path / "run", run_data, "--train.steps 3")[0] == 0
    same_run(tmp_path / "run", three)
