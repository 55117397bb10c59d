"""The rows of a comparison: one method each, on the same base, for any data set."""

from collections.abc import Mapping
from typing import Any

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import replace

# What the paper compares its sampler with, as samplers and as weightings; SpeeD is both.
_HEURISTICS: Mapping[str, Mapping[str, Any]] = {
    "p2": {"weighting.name": "p2"},
    "min_snr": {"weighting.name": "min_snr"},
    "log_normal": {"sampler.name": "log_normal_sigma"},
    "clts": {"sampler.name": "curriculum"},
    "speed": {"sampler.name": "speed", "weighting.name": "change_aware"},
}

_AS_PUBLISHED = {
    "sampler.learning_rate": 1e-2,
    "sampler.entropy_coef": 1e-2,
    "sampler.num_selected": 3,
    "sampler.common_noise": False,
    "sampler.entropy": "in_reward",
    "sampler.reduce": "sum",
    "sampler.normalize_reward": False,
    "sampler.lagged_selection": True,
    "sampler.rounding": "nearest",
}

_NEWER: Mapping[str, Mapping[str, Any]] = {
    "stratified": {"sampler.stratified": True},
    "beta_1_2": {"sampler.name": "beta", "sampler.beta.a": 1.0, "sampler.beta.b": 2.0},
    "logit_normal": {"sampler.name": "logit_normal"},
    "loss_second_moment": {"sampler.name": "loss_second_moment"},
    "entropy_rate": {"sampler.name": "entropy_rate"},
    "loss_proportional": {
        "sampler.name": "loss_proportional",
        "sampler.proportional.importance_weighted": False,
    },
    "impact": {"sampler.name": "impact"},
}


def comparison(
    prefix: str, base: Config, adaptive: Mapping[str, Any] | None = None
) -> dict[str, Config]:
    """``PREFIX_LABEL`` -> config, uniform first: the paper's comparison, then the newer methods.

    ``adaptive_LABEL`` is the adaptive sampler on top of a heuristic: with its loss weighting where
    it has one, and with its density as a loss weighting where it is a sampler. CLTS's curriculum
    takes the first half of the training.

    Args:
      prefix: of the rows' names.
      base: all but sampler and weighting, with uniform timesteps.
      adaptive: by path, options of the adaptive sampler that are this data set's own.
    """
    adaptive = {"sampler.name": "adaptive", **(adaptive or {})}
    heuristics = {label: dict(options) for label, options in _HEURISTICS.items()}
    heuristics["clts"]["sampler.curriculum.steps"] = max(base.train.steps // 2, 1)
    rows: dict[str, Mapping[str, Any]] = {"uniform": {}, **heuristics, "adaptive": adaptive}
    for label, options in heuristics.items():
        name = options.get("sampler.name")
        below = {} if name is None else {"sampler.on_top_of": name}
        rows[f"adaptive_{label}"] = {**options, **adaptive, **below}
    every_timestep = {"sampler.num_buckets": base.schedule.num_timesteps}
    rows["adaptive_as_published"] = {**adaptive, **_AS_PUBLISHED, **every_timestep}
    rows |= _NEWER
    return {f"{prefix}_{label}": replace(base, dict(changes)) for label, changes in rows.items()}
