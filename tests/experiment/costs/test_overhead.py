"""What a probe costs, by the compiler's own count of operations."""

import jax
import pytest
from small_run import ROOT

from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.costs import overhead
from adaptive_ts.experiment.devices import sharding


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "most"), [("impact", 1.06), ("adaptive", 1.10)])
def test_operations_per_step_over_uniform(run_data, sampler, most):
    """The ``overhead`` row: 128 images, f_S = 40, a model that dwarfs its bookkeeping."""
    argv = ["overhead", "--sampler.name", sampler, "--data.dir", str(run_data)]
    _, config = parse(argv, configs_dir=ROOT / "configs")
    flops = overhead.flops(config, sharding.make_mesh(jax.devices()[:1]))
    assert flops["uniform"] <= flops["plain"] < flops["probe"]
    ratio = overhead.flops_ratio(flops, config.sampler.every)
    assert 1.01 < ratio <= most
    assert overhead.flops_ratio({"uniform": 2.0, "plain": 3.0}, 40) == 1.5  # one that never probes
