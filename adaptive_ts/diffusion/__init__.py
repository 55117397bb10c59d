"""x_t, what a model predicts, and the losses: mean squared errors and VLB terms."""

from adaptive_ts.diffusion.corruption import corrupt, predicted_eps, prediction_target
from adaptive_ts.diffusion.losses import (
    ExampleLoss,
    denoising_loss,
    prior_bits_per_dim,
    total_bits_per_dim,
    vlb_loss,
    vlb_terms,
)

__all__ = [
    "ExampleLoss",
    "corrupt",
    "denoising_loss",
    "predicted_eps",
    "prediction_target",
    "prior_bits_per_dim",
    "total_bits_per_dim",
    "vlb_loss",
    "vlb_terms",
]
