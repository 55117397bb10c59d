"""Other people's train steps. What needs one of their packages is a module to import by name."""

from adaptive_ts.integrations.steps import Drawn, SampledLoss, sampled_loss

__all__ = ["Drawn", "SampledLoss", "sampled_loss"]
