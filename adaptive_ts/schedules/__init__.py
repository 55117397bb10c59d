"""Noise schedules: t -> signal, noise and log-SNR."""

from adaptive_ts.schedules.base import NoiseSchedule, PosteriorTables, from_betas, posterior_tables
from adaptive_ts.schedules.continuous import (
    rectified_flow,
    vdm_linear,
    ve_log_linear,
    vp_cosine,
    vp_linear,
)
from adaptive_ts.schedules.discrete import (
    constant_beta,
    cosine,
    jsd,
    linear,
    quad,
    sigmoid,
    sigmoid_beta,
    warmup,
    zero_terminal_snr,
)

__all__ = [
    "NoiseSchedule",
    "PosteriorTables",
    "constant_beta",
    "cosine",
    "from_betas",
    "jsd",
    "linear",
    "posterior_tables",
    "quad",
    "rectified_flow",
    "sigmoid",
    "sigmoid_beta",
    "vdm_linear",
    "ve_log_linear",
    "vp_cosine",
    "vp_linear",
    "warmup",
    "zero_terminal_snr",
]
