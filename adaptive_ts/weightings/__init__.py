"""Loss weightings: the log-SNR of an example -> the weight of its loss."""

from adaptive_ts.weightings.plain import (
    constant,
    debiased,
    edm,
    max_snr,
    min_snr,
    p2,
    snr,
    snr_plus_one,
    soft_min_snr,
    truncated_snr,
)
from adaptive_ts.weightings.predictions import convert
from adaptive_ts.weightings.scheduled import change_aware, sigmoid, vlb
from adaptive_ts.weightings.uncertainty import Uncertainty, UncertaintyParams, edm2_uncertainty

__all__ = [
    "Uncertainty",
    "UncertaintyParams",
    "change_aware",
    "constant",
    "convert",
    "debiased",
    "edm",
    "edm2_uncertainty",
    "max_snr",
    "min_snr",
    "p2",
    "sigmoid",
    "snr",
    "snr_plus_one",
    "soft_min_snr",
    "truncated_snr",
    "vlb",
]
