"""Timestep samplers."""

from adaptive_ts.samplers.adaptive import AdaptiveState, adaptive
from adaptive_ts.samplers.static import uniform
from adaptive_ts.samplers.wrappers import importance_weighted, mixed_with_uniform

__all__ = ["AdaptiveState", "adaptive", "importance_weighted", "mixed_with_uniform", "uniform"]
