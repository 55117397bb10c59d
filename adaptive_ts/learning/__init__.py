"""What samplers learn while a model trains: statistics, probes, selection and the policy."""

from adaptive_ts.learning.impact import forward_impact
from adaptive_ts.learning.policy import (
    Policy,
    beta_entropy,
    beta_log_mass,
    beta_log_prob,
    beta_sample,
    conv_beta_policy,
)
from adaptive_ts.learning.probe import decrease_on_batch, decrease_profile
from adaptive_ts.learning.selection import (
    ProfileQueue,
    f_statistic,
    init_queue,
    push_profile,
    select_timesteps,
    top_timesteps,
)
from adaptive_ts.learning.statistics import (
    LossHistory,
    LossStatistics,
    init_history,
    init_statistics,
    loss_mean,
    loss_std,
    push_history,
    update_statistics,
)

__all__ = [
    "LossHistory",
    "LossStatistics",
    "Policy",
    "ProfileQueue",
    "beta_entropy",
    "beta_log_mass",
    "beta_log_prob",
    "beta_sample",
    "conv_beta_policy",
    "decrease_on_batch",
    "decrease_profile",
    "f_statistic",
    "forward_impact",
    "init_history",
    "init_queue",
    "init_statistics",
    "loss_mean",
    "loss_std",
    "push_history",
    "push_profile",
    "select_timesteps",
    "top_timesteps",
    "update_statistics",
]
