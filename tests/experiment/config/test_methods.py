"""The table of methods against the functions that its rows name."""

import dataclasses
import inspect

import pytest

import adaptive_ts as ats
from adaptive_ts.experiment.config import Config, SamplerConfig, WeightingConfig
from adaptive_ts.experiment.config.methods import (
    NAMES,
    SAMPLERS,
    SCHEDULES,
    WEIGHTINGS,
    make_schedule,
    make_weighting,
)
from adaptive_ts.experiment.config.paths import replace

WRAPPERS = {"importance_weighted", "mixed_with_uniform", "with_density_of", "with_weighting"}
# Public, and not a name of a config: a table of the caller's own; schedules of an infinite VLB, or
# in continuous time; weightings that are learned, made of others, or 1.
NO_SAMPLERS = WRAPPERS | {"from_probabilities", "AdaptiveState", "CurriculumState", "ImpactState"}
NO_SCHEDULES = {"jsd", "zero_terminal_snr", "rectified_flow", "vdm_linear", "ve_log_linear"}
NO_SCHEDULES |= {"vp_cosine", "vp_linear", "from_betas", "posterior_tables"}
NO_SCHEDULES |= {"NoiseSchedule", "PosteriorTables"}
NO_WEIGHTINGS = {"constant", "convert", "edm2_uncertainty", "Uncertainty", "UncertaintyParams"}


def parameters(function):
    return inspect.signature(function).parameters


def test_every_public_method_is_a_row():
    assert set(SAMPLERS) == set(ats.samplers.__all__) - NO_SAMPLERS
    assert set(SCHEDULES) == set(ats.schedules.__all__) - NO_SCHEDULES
    assert set(WEIGHTINGS) - {"none"} == set(ats.weightings.__all__) - NO_WEIGHTINGS
    assert set(NAMES["sampler.on_top_of"]) == set(SAMPLERS) - {"adaptive", "impact"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_takes_what_its_row_says(name):
    row, takes = SAMPLERS[name], parameters(getattr(ats.samplers, name))
    assert next(iter(takes)) == "grid"
    if name != "loss_proportional":  # which takes it for its weighting alone
        assert (list(takes)[1:2] == ["schedule"]) == row.schedule
    # Without an inverse CDF there is nothing to couple.
    assert ("coupling" in takes) == row.coupled
    assert ("every" in takes) == row.probes
    if row.group is not None and row.arguments is SAMPLERS["beta"].arguments:
        fields = dataclasses.fields(getattr(SamplerConfig(), row.group))
        assert {field.name for field in fields} <= set(takes)
        for field in fields:  # the command line's defaults are the library's
            own = takes[field.name].default
            assert own in (field.default, inspect.Parameter.empty), field.name


def test_every_group_of_options_belongs_to_a_row():
    config = SamplerConfig()
    groups = {
        field.name
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    }
    assert groups == {row.group for row in SAMPLERS.values()} - {None}


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - {"none"}))
def test_a_weighting_takes_what_its_row_says(name):
    row, takes = WEIGHTINGS[name], parameters(getattr(ats.weightings, name))
    assert set(row.options) <= {field.name for field in dataclasses.fields(WeightingConfig())}
    config = replace(Config(), {"weighting.name": name, "model.prediction": "v"})
    weight = make_weighting(config, make_schedule(config))
    assert (
        weight(ats.schedules.linear(1000).log_snr(ats.timesteps.strata(ats.discrete(1000), 5)))[
            0
        ].shape
        == ()
    )
    if name != "sigmoid":  # which takes it only for its derivative
        assert (list(takes)[:1] == ["schedule"]) == row.schedule


def test_every_option_of_a_weighting_belongs_to_a_row():
    used = {option for row in WEIGHTINGS.values() if row for option in row.options}
    assert used == {field.name for field in dataclasses.fields(WeightingConfig())} - {"name"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_what_its_row_says(name):
    takes = parameters(getattr(ats.schedules, name))
    assert ("rescale" in takes) == SCHEDULES[name].rescale
    config = replace(Config(), {"schedule.name": name, "schedule.num_timesteps": 50})
    assert make_schedule(config).num_timesteps == 50
