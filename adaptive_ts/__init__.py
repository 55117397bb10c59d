"""Timestep sampling for training diffusion models, in JAX and Flax."""

from adaptive_ts.diffusion import (
    ExampleLoss,
    NoiseSchedule,
    corrupt,
    cosine,
    denoising_loss,
    from_betas,
    linear,
    posterior_tables,
    predicted_eps,
    prediction_target,
    prior_bits_per_dim,
    quad,
    total_bits_per_dim,
    vlb_loss,
)
from adaptive_ts.grid import GridSample, TimeGrid, continuous, discrete, strata
from adaptive_ts.policy import (
    Policy,
    beta_entropy,
    beta_log_mass,
    beta_log_prob,
    beta_sample,
    conv_beta_policy,
)
from adaptive_ts.probe import decrease_on_batch, decrease_profile
from adaptive_ts.samplers import (
    AdaptiveState,
    adaptive,
    importance_weighted,
    mixed_with_uniform,
    uniform,
)
from adaptive_ts.selection import (
    ProfileQueue,
    f_statistic,
    init_queue,
    push,
    select,
    top_timesteps,
)
from adaptive_ts.statistics import (
    LossStatistics,
    init_statistics,
    loss_mean,
    loss_std,
    update_statistics,
)
from adaptive_ts.types import LossFn, TimestepSample, TimestepSampler, Weighting

__version__ = "0.1.0"

__all__ = [
    "AdaptiveState",
    "ExampleLoss",
    "GridSample",
    "LossFn",
    "LossStatistics",
    "NoiseSchedule",
    "Policy",
    "ProfileQueue",
    "TimeGrid",
    "TimestepSample",
    "TimestepSampler",
    "Weighting",
    "adaptive",
    "beta_entropy",
    "beta_log_mass",
    "beta_log_prob",
    "beta_sample",
    "continuous",
    "conv_beta_policy",
    "corrupt",
    "cosine",
    "decrease_on_batch",
    "decrease_profile",
    "denoising_loss",
    "discrete",
    "f_statistic",
    "from_betas",
    "importance_weighted",
    "init_queue",
    "init_statistics",
    "linear",
    "loss_mean",
    "loss_std",
    "mixed_with_uniform",
    "posterior_tables",
    "predicted_eps",
    "prediction_target",
    "prior_bits_per_dim",
    "push",
    "quad",
    "select",
    "strata",
    "top_timesteps",
    "total_bits_per_dim",
    "uniform",
    "update_statistics",
    "vlb_loss",
]
