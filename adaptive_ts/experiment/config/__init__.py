"""A run's configuration: frozen dataclasses, one per group, and what can be said about them."""

from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.groups import (
    Config,
    DataConfig,
    GenerateConfig,
    HostsConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    TransformerConfig,
    default_workdir,
    differences,
    fingerprint_fields,
    from_dict,
    to_dict,
)
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig, WeightingConfig

__all__ = [
    "Config",
    "DataConfig",
    "GenerateConfig",
    "HostsConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TransformerConfig",
    "WeightingConfig",
    "default_workdir",
    "differences",
    "fingerprint_fields",
    "from_dict",
    "replace",
    "to_dict",
    "validate",
]
