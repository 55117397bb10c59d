"""Compiler options that exist, one that does not, and programs that the next process finds."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from adaptive_ts.experiment.devices import compiling


@pytest.fixture
def x86(monkeypatch):
    """jaxlib knows its options on every processor; we set them on this kind."""
    monkeypatch.setattr(compiling.platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("x86")
def test_this_jaxlib_knows_every_option():
    assert compiling.compiler_options() == compiling.CPU_OPTIONS
    assert compiling.compiler_options(once=True) == {
        **compiling.CPU_OPTIONS, **compiling.ONCE_OPTIONS
    }  # fmt: skip


@pytest.mark.usefixtures("x86")
def test_an_option_that_is_not_there_is_left_out_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "CPU_OPTIONS", {"xla_cpu_no_such_thing": "1"})
    with caplog.at_level(logging.WARNING):
        assert compiling.compiler_options() == {}
        jobs = {"f": (jax.jit(jnp.sin), (jnp.float32(1),))}
        with compiling.compiling(jobs) as compiled:
            assert float(compiled("f")(jnp.float32(0))) == 0
    (record,) = caplog.records
    said = record.getMessage()
    assert "xla_cpu_no_such_thing" in said and jax.lib.__version__ in said and "\n" not in said


def test_a_program_that_an_option_breaks_is_compiled_without():
    class Lowered:
        """Of the program in test_throughput (bfloat16, classes), which is large."""

        said = "UNIMPLEMENTED: Dot with multiple contracting dimensions is not implemented."

        def compile(self, compiler_options=None):
            if compiler_options:
                raise jax.errors.JaxRuntimeError(self.said)
            return "compiled"

    lowered = Lowered()
    assert compiling.compile_with(lowered, compiling.CPU_OPTIONS) == "compiled"
    lowered.said = "RESOURCE_EXHAUSTED: memory"
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory"):
        compiling.compile_with(lowered, compiling.CPU_OPTIONS)


def test_other_machines_are_left_alone(monkeypatch):
    monkeypatch.setattr(compiling.platform, "machine", lambda: "arm64")
    assert compiling.compiler_options(once=True) == {}


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """As in a fresh process, with another home."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compiling, "CACHE", tmp_path / "cache")
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_for_the_next_process(no_cache):
    compiling.keep_compiled()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: jnp.sin(x) + 41).lower(jnp.float32(1)).compile()
    (folder,) = (no_cache / "cache").iterdir()
    assert folder.name.startswith("xla-") and any(folder.iterdir())


def test_a_folder_of_ones_own_comes_first(no_cache):
    jax.config.update("jax_compilation_cache_dir", str(no_cache / "own"))
    compiling.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == str(no_cache / "own")
    assert not (no_cache / "cache").exists()


def test_where_nothing_can_be_written_nothing_is_kept(no_cache, monkeypatch):
    (no_cache / "file").touch()
    monkeypatch.setattr(compiling, "CACHE", no_cache / "file")
    compiling.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] is None
