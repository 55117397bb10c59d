"""The samplers' and the weightings' options, one group each.

A new option needs a default that keeps older runs what they were, and its range, where the
sampler's own constructor does not check it, in `adaptive_ts.experiment.config.checks`.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BetaConfig:
    """sampler.name beta: u ~ Beta(a, b)."""

    a: float = 0.8
    """First parameter; below 1 it favours low noise."""
    b: float = 1.0
    """Second parameter; above 1 it favours low noise."""


@dataclass(frozen=True)
class LogitNormalConfig:
    """sampler.name logit_normal: logit u ~ N(mean, std^2), then shifted."""

    mean: float = 0.0
    """Mean of the logit; above 0 it favours high noise."""
    std: float = 1.0
    """Standard deviation of the logit."""
    shift: float = 1.0
    """Timestep shift a: u -> a u / (1 + (a - 1) u)."""
    diffusers_time: bool = False
    """Time runs as in diffusers: a mean above 0 favours low noise."""


@dataclass(frozen=True)
class ModeConfig:
    """sampler.name mode: Stable Diffusion 3's heavy-tailed law."""

    scale: float = 1.29
    """Above 0 it favours the middle, below 0 the ends."""
    shift: float = 1.0
    """Timestep shift."""


@dataclass(frozen=True)
class CosmapConfig:
    """sampler.name cosmap."""

    shift: float = 1.0
    """Timestep shift."""


@dataclass(frozen=True)
class LogSnrConfig:
    """sampler.name log_normal_sigma, log_snr_laplace, log_snr_cauchy, log_snr_cosine."""

    loc: float | None = None
    """Centre: of ln sigma (log_normal_sigma, -1.2) or of log-SNR (0)."""
    scale: float | None = None
    """Width (of cosine: its inverse); None: 1.2 (log_normal_sigma), 0.5 (laplace), 1."""
    placement: Literal["cdf", "nearest"] = "cdf"
    """log_normal_sigma on timesteps: exact mass per timestep, or the nearest sigma."""


@dataclass(frozen=True)
class SpeedConfig:
    """sampler.name speed."""

    tau: float = 0.7
    """Where the convergence area begins, as a share of the time axis."""
    k: float = 5.0
    """How much more often timesteps before tau are drawn."""
    dual: bool = True
    """Mirror half of the draws."""
    as_published: bool = False
    """Exactly as the published code does it."""


@dataclass(frozen=True)
class CurriculumConfig:
    """sampler.name curriculum."""

    kind: Literal["gaussian", "switch"] = "gaussian"
    """From uniform to a Gaussian, or from logit-normal to uniform at once."""
    mean: float = 0.3
    """Centre of the Gaussian, as a share of the time axis."""
    std: float = 0.2
    """Its width."""
    steps: int = 50_000
    """Length of the passage, or the step of the switch."""
    logit_mean: float = 0.0
    """Mean of the logit before the switch."""
    logit_std: float = 1.0
    """Its standard deviation."""
    as_published: bool = False
    """The Gaussian as SpeeD's code has it: a spike."""


@dataclass(frozen=True)
class SecondMomentConfig:
    """sampler.name loss_second_moment."""

    history: int = 10
    """Losses kept per timestep; sampling is uniform until all timesteps have as many."""
    uniform_prob: float = 1e-3
    """Share of uniform in the mixture."""
    importance_weighted: bool = True
    """Weight the losses by 1 / (T p(t))."""


@dataclass(frozen=True)
class ProportionalConfig:
    """sampler.name loss_proportional."""

    gamma: float = 1.0
    """Power of the loss."""
    decay: float = 0.99
    """Of the averages, per step."""
    uniform_prob: float = 0.01
    """Share of uniform in the mixture."""
    num_buckets: int = 100
    """Strata of the time axis."""
    importance_weighted: bool = True
    """Weight the losses by 1 / (T p(t))."""


@dataclass(frozen=True)
class EntropyRateConfig:
    """sampler.name entropy_rate."""

    decay: float = 0.99
    """Of the averages, per step."""
    uniform_prob: float = 0.01
    """Share of uniform in the mixture."""
    num_buckets: int = 100
    """Strata of the time axis."""
    gate: float = 0.15
    """The noise level below which the gate closes."""
    data_variance: float = 1.0
    """Variance of the images per pixel, which bounds the error in x0."""
    per_loss: bool = True
    """Divide by the weight of the training loss on the error in x0."""


@dataclass(frozen=True)
class ImpactConfig:
    """sampler.name impact; with sampler.every, .chunk and .jitter."""

    objective: Literal["loss", "vlb"] = "loss"
    """What is to be lowered at all timesteps: the eps-MSE, or the VLB term."""
    kappa: float = 1.0
    """Sum over buckets of objective^kappa / kappa; 0: of its logarithm."""
    num_buckets: int = 40
    """Strata of the time axis."""
    num_examples: int = 2
    """Images on which the impact of a bucket is measured."""
    temperature: float = 2.0
    """Of the softmax over buckets, in units of the mean absolute impact."""
    uniform_prob: float = 0.1
    """Share of uniform in the mixture."""
    decay: float = 0.9
    """Of the averages, per probe."""
    smooth: int = 5
    """Buckets (odd) that the impact is averaged over."""
    fit: Literal["free", "beta"] = "free"
    """Each bucket on its own, or the Beta distribution nearest to them."""


@dataclass(frozen=True)
class SamplerConfig:
    """Which timesteps to train on. From `objective` on, but for `every`, `jitter`, `chunk` (impact
    too) and `rounding` (all): the adaptive sampler's own options."""

    name: str = "adaptive"
    """Timestep sampler."""
    stratified: bool = False
    """Uniform sampler: one draw from each of batch_size equal strata."""
    coupling: Literal["independent", "stratified", "low_discrepancy", "antithetic"] = "independent"
    """How the draws of one batch hang together, for the samplers that draw by inverse CDF."""
    importance_weighted: bool = False
    """Weight the losses by 1/(T p(t)), so that the objective stays that of uniform sampling."""
    uniform_prob: float = 0.0
    """Probability of drawing uniformly instead of from the sampler."""
    on_top_of: str | None = None
    """Another sampler, whose density becomes a loss weighting: its objective, this one's draws."""
    objective: Literal["vlb", "loss"] = "vlb"
    """What the probe measures: the VLB term (bits/dim), or the training loss."""
    every: int = 40
    """f_S: probe on every such optimizer step."""
    num_selected: int = 2
    """|S|: timesteps that make up the reward; 3 in the paper."""
    history: int = 20
    """|Q|: profiles that the selection looks back on."""
    entropy_coef: float = 1e-2
    """Coefficient of the policy's entropy."""
    learning_rate: float = 1e-3
    """Adam learning rate of the policy."""
    clip_norm: float = 1.0
    """Global-norm clip of the policy's gradient."""
    estimate: Literal["auto", "difference", "directional"] = "auto"
    """What the step bought: a difference of losses, or the derivative along it (bfloat16)."""
    common_noise: bool = True
    """Same noise before and after the step; False: fresh noise, as in the published code."""
    entropy: Literal["bonus", "in_reward"] = "bonus"
    """Entropy as a plain bonus; in_reward: inside the reward, as in the published code."""
    reduce: Literal["mean", "sum"] = "mean"
    """Reward over the selected timesteps: mean (paper) or sum (published code)."""
    normalize_reward: bool = True
    """Standardise the reward by its running mean and deviation; False: as in the code."""
    lagged_selection: bool = False
    """Reward with the timesteps selected by the previous probe, as in the published code."""
    relative: bool = False
    """Measure relative decreases: of the logarithm of each timestep's term."""
    num_buckets: int = 25
    """Strata of the time axis that a profile covers; T: every timestep, as in the code."""
    jitter: bool = False
    """Draw each stratum's timestep anew at each probe; False: its midpoint."""
    chunk: int | None = None
    """Buckets probed at once, to save memory; None: all."""
    rounding: Literal["floor", "nearest"] = "floor"
    """u to t: floor(u T), or round(u (T - 1)) with half-mass end bins, as in the code."""
    decoder_nll: bool = False
    """VLB at t=0 by the discretised decoder likelihood; False: the Gaussian KL there too."""
    beta: BetaConfig = field(default_factory=BetaConfig)
    logit_normal: LogitNormalConfig = field(default_factory=LogitNormalConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    cosmap: CosmapConfig = field(default_factory=CosmapConfig)
    log_snr: LogSnrConfig = field(default_factory=LogSnrConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    second_moment: SecondMomentConfig = field(default_factory=SecondMomentConfig)
    proportional: ProportionalConfig = field(default_factory=ProportionalConfig)
    entropy_rate: EntropyRateConfig = field(default_factory=EntropyRateConfig)
    impact: ImpactConfig = field(default_factory=ImpactConfig)


@dataclass(frozen=True)
class WeightingConfig:
    """What the losses are multiplied by, as a function of log-SNR."""

    name: str = "none"
    """Loss weighting."""
    gamma: float | None = None
    """min_snr, soft_min_snr, max_snr: the SNR's bound (5, 4, 5); p2: the power (1)."""
    k: float = 1.0
    """p2: the SNR's offset."""
    bias: float = 0.0
    """sigmoid: the bias."""
    derivative: bool = False
    """sigmoid: times -d log SNR / dt; for uniform timesteps."""
    max_snr: float | None = None
    """debiased: cap on the SNR."""
    sigma_data: float = 0.5
    """edm: standard deviation of the data."""
    tau: float = 0.7
    """change_aware: where the convergence area begins."""
    lam: float = 0.6
    """change_aware: the contrast, 0.5 for none."""
    as_published: bool = False
    """As the published code does it, where that differs."""
