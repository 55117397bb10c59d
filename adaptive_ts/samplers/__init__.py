"""Timestep samplers."""

from adaptive_ts.samplers.adaptive import adaptive
from adaptive_ts.samplers.adaptive_probe import AdaptiveState
from adaptive_ts.samplers.curriculum import CurriculumState, curriculum
from adaptive_ts.samplers.impact import impact
from adaptive_ts.samplers.impact_probe import ImpactState
from adaptive_ts.samplers.log_snr import (
    log_normal_sigma,
    log_snr_cauchy,
    log_snr_cosine,
    log_snr_laplace,
    lognorm_timestep,
)
from adaptive_ts.samplers.logit import cosmap, logit_normal, mode
from adaptive_ts.samplers.speed import speed
from adaptive_ts.samplers.static import beta, from_probabilities, uniform
from adaptive_ts.samplers.tabular import entropy_rate, loss_proportional, loss_second_moment
from adaptive_ts.samplers.wrappers import (
    importance_weighted,
    mixed_with_uniform,
    with_density_of,
    with_weighting,
)

__all__ = [
    "AdaptiveState",
    "CurriculumState",
    "ImpactState",
    "adaptive",
    "beta",
    "cosmap",
    "curriculum",
    "entropy_rate",
    "from_probabilities",
    "impact",
    "importance_weighted",
    "log_normal_sigma",
    "log_snr_cauchy",
    "log_snr_cosine",
    "log_snr_laplace",
    "logit_normal",
    "lognorm_timestep",
    "loss_proportional",
    "loss_second_moment",
    "mixed_with_uniform",
    "mode",
    "speed",
    "uniform",
    "with_density_of",
    "with_weighting",
]
