"""A run's configuration: frozen dataclasses, one per group, and what can be said about them.

The docstring under each field is what ``adaptive-ts train --help`` shows. A new field needs a
default that keeps older runs what they were, and its range in
`adaptive_ts.experiment.config.checks`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from adaptive_ts.experiment.config.paths import (
    cast,
    flatten,
    leaf_types,
    leaves,
    nearest_field,
    replace,
)
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig, WeightingConfig
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import json_digest

SPACINGS = ("linear", "quadratic")  # of a solver's timesteps


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    name: str = "digits"
    """Dataset; folder/NAME or idx/NAME: files of your own."""
    dir: str | None = None
    """Folder of prepared datasets; None: tensorflow-datasets' own (~/tensorflow_datasets)."""
    source_dir: str | None = None
    """Folder with the dataset's original files, or with your own."""
    downsample: int = 1
    """Average squares of this many pixels on a side."""
    image_size: int | None = None
    """Side of the images: padded to it or, a folder of images, cropped and resized; None: as is."""
    flip: bool = False
    """Mirror half of the training images, drawn anew each epoch."""


@dataclass(frozen=True)
class TransformerConfig:
    """model.name dit or uvit."""

    patch_size: int = 2
    """Side of the squares of pixels that become tokens."""
    hidden_size: int = 384
    """Width of the tokens."""
    depth: int = 12
    """Blocks; U-ViT's middle one comes on top."""
    num_heads: int = 6
    """Heads of the attention."""
    num_classes: int | None = None
    """Tell the model each image's class: as many classes as the data set has; None: don't."""
    class_dropout: float = 0.1
    """Probability that training hides the class, as guidance needs."""


@dataclass(frozen=True)
class ModelConfig:
    """The network, and what it predicts. From channels to groups: the U-Net's own options."""

    name: Literal["unet", "dit", "uvit"] = "unet"
    """Architecture: DDPM's U-Net, or the transformers DiT and U-ViT."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    remat: bool = False
    """Compute the blocks again in the backward pass: slower, in less memory."""
    channels: int = 32
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level over those of the first; one level per number."""
    res_blocks: int = 1
    """Residual blocks per level."""
    attention: tuple[bool, ...] = (False, True)
    """Self-attention, level by level."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks."""
    groups: int = 32
    """Groups of the normalisation; at least two channels each for a narrow network."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters and losses stay float32."""
    prediction: Literal["eps", "x0", "v", "flow"] = "eps"
    """What the network predicts: noise, clean image, velocity, or noise minus image."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """Variance of the reverse step: beta_t, or that of the true posterior."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule."""

    name: str = "linear"
    """Noise schedule."""
    num_timesteps: int = 1000
    """T, the number of diffusion timesteps."""
    rescale: bool = True
    """Scale betas that rise to a fixed end by 1000/T, so that any T ends in the same noise."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with linear warm-up and clipping, and the average of the weights."""

    learning_rate: float = 2e-4
    """Learning rate after the warm-up."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    warmup_steps: int = 5000
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """Global-norm clip of the gradient."""
    ema_decay: float = 0.9999
    """Decay of the weight average; it warms up as min(decay, (1 + n) / (10 + n))."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what to write down."""

    steps: int = 2000
    """Optimizer steps in all; raise it to train a finished run further."""
    batch_size: int = 128
    """Images per step, over all devices."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""
    max_to_keep: int = 3
    """Checkpoints kept, the newest."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too."""
    accumulate: int = 1
    """Microbatches of a step, one after the other in less memory; batch_size is that of all."""
    max_skipped: int = 0
    """Updates skipped in a row, their loss or gradient not finite, before stopping; 0: none."""


@dataclass(frozen=True)
class GenerateConfig:
    """The images made at the end."""

    num_images: int = 64
    """How many."""
    solver: Literal["ddpm", "ddim", "dpmpp_2m", "heun"] = "ddim"
    """Ancestral sampling, DDIM, DPM-Solver++ 2M, or Heun."""
    steps: int = 50
    """Solver steps, at most T; for Heun two evaluations of the model each, for the others one."""
    eta: float = 0.0
    """DDIM noise: 0 deterministic, 1 as much as ancestral sampling."""
    guidance: float = 1.0
    """Weight of classifier-free guidance, for a model that is told classes; 1: none."""


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes share a run."""

    data: int | None = None
    """Devices along the axis data, which splits the batch; None: all that fsdp leaves."""
    fsdp: int = 1
    """Devices along fsdp, which splits the batch and the model's state; 1: the state is whole."""


@dataclass(frozen=True)
class HostsConfig:
    """More than one process. Start the same command on every host."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """How many processes take part."""
    process_id: int | None = None
    """Which one this is, from 0."""
    auto: bool = False
    """Ask the environment for all three (TPU pods, SLURM, Open MPI)."""
    timeout: int = 100
    """Seconds without a sign of life after which a process counts as lost, and all stop."""


@dataclass(frozen=True)
class Config:
    """All of a run."""

    seed: int = 0
    """Seed of everything random: weights, data order, timesteps, noise."""
    workdir: str | None = None
    """Folder of the run; None: under runs/, named after the row and what was changed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)


# Where bytes lie, how long to go on, what to write down and which devices share the work how do
# not change what is computed (but for the order of sums, and which units a dropout drops).
_NOT_THE_RUN = (
    *("workdir", "data.dir", "data.source_dir", "train.steps", "train.log_every"),
    *("train.save_every", "train.max_to_keep", "train.tensorboard", "train.accumulate"),
    *("train.max_skipped", "mesh.data", "mesh.fsdp", "hosts.auto", "hosts.timeout"),
    *("hosts.coordinator", "hosts.num_processes", "hosts.process_id"),
)

# What default_workdir spells out.
_IN_THE_NAME = ("seed", "sampler.name", "schedule.name")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists, equal to what JSON gives back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(saved: Mapping[str, Any]) -> Config:
    """The config of a `to_dict`; absent fields take their defaults.

    Raises:
      UserError: unknown fields (with the nearest known ones) and values of a wrong type.
    """
    problems, values, kinds = [], {}, leaf_types(Config)
    for path, value in flatten(saved, Config).items():
        if path not in kinds:
            close = nearest_field(path, kinds)
            problems.append(f"{path}: unknown field{f': did you mean {close}?' if close else ''}")
            continue
        try:
            values[path] = cast(value, kinds[path])
        except TypeError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise UserError(f"not a config of this version: {'; '.join(problems)}")
    return replace(Config(), values)


def fingerprint_fields(config: Config) -> dict[str, Any]:
    """The fields that define what is computed, by path.

    Left out: how long the run goes on, where it lies, how often it logs and saves, the hosts.
    """
    kinds = leaf_types(Config)
    return {p: cast(v, kinds[p]) for p, v in leaves(config).items() if p not in _NOT_THE_RUN}


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """How a saved config (`to_dict`'s) differs from this one in `fingerprint_fields`.

    A field that the saved config lacks, from before it existed, counts as its default.

    >>> from adaptive_ts.experiment.config.groups import Config, differences, to_dict
    >>> differences(to_dict(Config(seed=1)), Config())
    ['seed: 1 there, 0 here']
    """
    here, kinds = fingerprint_fields(config), leaf_types(Config)
    there = fingerprint_fields(Config())
    for path, value in flatten(saved, Config).items():
        if path in _NOT_THE_RUN:
            continue
        try:
            there[path] = cast(value, kinds[path])
        except (KeyError, TypeError):
            there[path] = value
    lines = [
        f"{path}: {there[path]!r} there, {value!r} here"
        for path, value in here.items()
        if there[path] != value
    ]
    return lines + [f"{p}: {v!r} there, unknown here" for p, v in there.items() if p not in here]


def default_workdir(row: str, config: Config, base: Config) -> str:
    """``runs/ROW/SAMPLER-SCHEDULE-seedN``, and a hash if other fields differ from the row's.

    Args:
      row: the row's name.
      config: the run's config.
      base: the row's own, before anything was overridden.
    """
    name = f"{config.sampler.name}-{config.schedule.name}-seed{config.seed}"
    own, asked = fingerprint_fields(base), fingerprint_fields(config)
    # Only what differs: a field added later must not send the same command to another folder.
    changed = {p: v for p, v in asked.items() if p not in _IN_THE_NAME and v != own[p]}
    if changed:
        name += f"-{json_digest(changed, 8)}"
    return str(PurePosixPath("runs", row, name))
