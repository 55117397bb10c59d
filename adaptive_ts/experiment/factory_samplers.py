"""From a config to its timestep sampler and loss weighting; the tables of their names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from adaptive_ts import samplers, weightings
from adaptive_ts.diffusion import ExampleLoss
from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.config import Config, ModelConfig, WeightingConfig
from adaptive_ts.grid import TimeGrid
from adaptive_ts.policy import conv_beta_policy
from adaptive_ts.schedules import NoiseSchedule, known
from adaptive_ts.types import TimestepSampler, Weighting


class Setting(NamedTuple):
    """What a sampler may be built from.

    Attributes:
      config: of the run.
      grid: the time grid.
      schedule: the noise schedule.
      mesh: the devices.
      optimizer: the model's.
      vlb: the VLB terms in bits/dim, deterministic.
    """

    config: Config
    grid: TimeGrid
    schedule: NoiseSchedule
    mesh: Mesh
    optimizer: optax.GradientTransformation
    vlb: ExampleLoss


def _adaptive(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    return samplers.adaptive(
        s.grid,
        conv_beta_policy(),
        optax.chain(optax.clip_by_global_norm(c.clip_norm), optax.adam(c.learning_rate)),
        every=c.every,
        num_selected=c.num_selected,
        history=c.history,
        entropy_coef=c.entropy_coef,
        common_noise=c.common_noise,
        entropy=c.entropy,
        reduce=c.reduce,
        normalize_reward=c.normalize_reward,
        lagged_selection=c.lagged_selection,
        relative=c.relative,
        num_buckets=c.num_buckets,
        jitter=c.jitter,
        chunk=c.chunk,
        bucket_sharding=_shared_buckets(s),
    )


def _impact(s: Setting) -> TimestepSampler:
    c, own = s.config.sampler, s.config.sampler.impact
    return samplers.impact(
        s.grid,
        s.optimizer,
        objective=s.vlb if own.objective == "vlb" else None,
        kappa=own.kappa,
        every=c.every,
        num_buckets=own.num_buckets,
        num_examples=own.num_examples,
        temperature=own.temperature,
        uniform_prob=own.uniform_prob,
        decay=own.decay,
        smooth=own.smooth,
        fit=own.fit,
        jitter=c.jitter,
        chunk=c.chunk,
        coupling=c.coupling,
        bucket_sharding=_shared_buckets(s),
    )


def _uniform(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    return samplers.uniform(s.grid, stratified=c.stratified, coupling=c.coupling)


def _beta(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    return samplers.beta(s.grid, c.beta.a, c.beta.b, coupling=c.coupling)


def _logit_normal(s: Setting) -> TimestepSampler:
    c, own = s.config.sampler, s.config.sampler.logit_normal
    return samplers.logit_normal(
        s.grid,
        own.mean,
        own.std,
        shift=own.shift,
        diffusers_time=own.diffusers_time,
        coupling=c.coupling,
    )


def _lognorm_timestep(s: Setting) -> TimestepSampler:
    return samplers.lognorm_timestep(s.grid, s.schedule, coupling=s.config.sampler.coupling)


def _mode(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    return samplers.mode(s.grid, c.mode.scale, shift=c.mode.shift, coupling=c.coupling)


def _cosmap(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    return samplers.cosmap(s.grid, shift=c.cosmap.shift, coupling=c.coupling)


def _log_normal_sigma(s: Setting) -> TimestepSampler:
    c, own = s.config.sampler, s.config.sampler.log_snr
    given = {"p_mean": own.loc, "p_std": own.scale}
    return samplers.log_normal_sigma(
        s.grid, s.schedule, placement=own.placement, coupling=c.coupling, **_given(given)
    )


def _log_snr_laplace(s: Setting) -> TimestepSampler:
    return samplers.log_snr_laplace(s.grid, s.schedule, **_log_snr(s, "loc"))


def _log_snr_cauchy(s: Setting) -> TimestepSampler:
    return samplers.log_snr_cauchy(s.grid, s.schedule, **_log_snr(s, "loc"))


def _log_snr_cosine(s: Setting) -> TimestepSampler:
    return samplers.log_snr_cosine(s.grid, s.schedule, **_log_snr(s, "shift"))


def _log_snr(s: Setting, centre: str) -> dict[str, Any]:
    own = s.config.sampler.log_snr
    return {
        "coupling": s.config.sampler.coupling,
        **_given({centre: own.loc, "scale": own.scale}),
    }


def _given(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _speed(s: Setting) -> TimestepSampler:
    own = s.config.sampler.speed
    return samplers.speed(
        s.grid, s.schedule, tau=own.tau, k=own.k, dual=own.dual, as_published=own.as_published
    )


def _curriculum(s: Setting) -> TimestepSampler:
    return samplers.curriculum(s.grid, **dataclasses.asdict(s.config.sampler.curriculum))


def _loss_second_moment(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    options = dataclasses.asdict(c.second_moment)
    return samplers.loss_second_moment(s.grid, coupling=c.coupling, **options)


def _loss_proportional(s: Setting) -> TimestepSampler:
    c = s.config.sampler
    options = dataclasses.asdict(c.proportional)
    weighting = _weighting(s)
    if weighting is not None:
        options |= {"schedule": s.schedule, "weighting": weighting}
    return samplers.loss_proportional(s.grid, coupling=c.coupling, **options)


def _entropy_rate(s: Setting) -> TimestepSampler:
    c, prediction = s.config.sampler, s.config.model.prediction
    options = dataclasses.asdict(c.entropy_rate)
    options["gate"] = (options["gate"], 3.0)
    weighting = _weighting(s)
    if weighting is not None:
        weighting = weightings.convert(weighting, prediction, "x0")
    if not options.pop("per_loss"):
        weighting = jnp.ones_like
    return samplers.entropy_rate(
        s.grid,
        s.schedule,
        prediction=prediction,
        weighting=weighting,
        coupling=c.coupling,
        **options,
    )


def _shared_buckets(s: Setting) -> NamedSharding | None:
    return sharding.split(s.mesh) if s.mesh.size > 1 else None


SAMPLERS: Mapping[str, Callable[[Setting], TimestepSampler]] = {
    "adaptive": _adaptive,
    "beta": _beta,
    "cosmap": _cosmap,
    "curriculum": _curriculum,
    "entropy_rate": _entropy_rate,
    "impact": _impact,
    "log_normal_sigma": _log_normal_sigma,
    "log_snr_cauchy": _log_snr_cauchy,
    "log_snr_cosine": _log_snr_cosine,
    "log_snr_laplace": _log_snr_laplace,
    "logit_normal": _logit_normal,
    "lognorm_timestep": _lognorm_timestep,
    "loss_proportional": _loss_proportional,
    "loss_second_moment": _loss_second_moment,
    "mode": _mode,
    "speed": _speed,
    "uniform": _uniform,
}
PROBING = ("adaptive", "impact")


def _gamma(c: WeightingConfig) -> dict[str, float]:
    return _given({"gamma": c.gamma})


# (options, model, schedule) -> weighting
WEIGHTINGS: Mapping[
    str, Callable[[WeightingConfig, ModelConfig, NoiseSchedule], Weighting | None]
] = {
    "change_aware": lambda c, m, s: weightings.change_aware(
        s, tau=c.tau, lam=c.lam, as_published=c.as_published, prediction=m.prediction
    ),
    "debiased": lambda c, m, s: weightings.debiased(
        max_snr=c.max_snr, prediction=m.prediction, as_published=c.as_published
    ),
    "edm": lambda c, m, s: weightings.edm(c.sigma_data, prediction=m.prediction),
    "max_snr": lambda c, m, s: weightings.max_snr(**_gamma(c), prediction=m.prediction),
    "min_snr": lambda c, m, s: weightings.min_snr(
        **_gamma(c), prediction=m.prediction, as_published=c.as_published
    ),
    "none": lambda c, m, s: None,
    "p2": lambda c, m, s: weightings.p2(
        **_gamma(c), k=c.k, prediction=m.prediction, as_published=c.as_published
    ),
    "sigmoid": lambda c, m, s: weightings.sigmoid(
        c.bias, schedule=s if c.derivative else None, prediction=m.prediction
    ),
    "snr": lambda c, m, s: weightings.snr(prediction=m.prediction),
    "snr_plus_one": lambda c, m, s: weightings.snr_plus_one(prediction=m.prediction),
    "soft_min_snr": lambda c, m, s: weightings.soft_min_snr(**_gamma(c), prediction=m.prediction),
    "truncated_snr": lambda c, m, s: weightings.truncated_snr(prediction=m.prediction),
    "vlb": lambda c, m, s: weightings.vlb(s, variance=m.variance, prediction=m.prediction),
}


def make_sampler(s: Setting) -> TimestepSampler:
    """The config's sampler, with its wrappers and its weighting."""
    sampler = SAMPLERS[s.config.sampler.name](s)
    if s.config.sampler.uniform_prob > 0:
        sampler = samplers.mixed_with_uniform(sampler, s.config.sampler.uniform_prob)
    if s.config.sampler.importance_weighted:
        sampler = samplers.importance_weighted(sampler)
    below = s.config.sampler.on_top_of
    if below is not None:
        known(below, tuple(name for name in SAMPLERS if name not in PROBING), "sampler.on_top_of")
        sampler = samplers.with_density_of(sampler, SAMPLERS[below](s))
    weighting = _weighting(s)
    if weighting is None:
        return sampler
    return samplers.with_weighting(sampler, weighting, s.schedule)


def _weighting(s: Setting) -> Weighting | None:
    c = s.config
    return WEIGHTINGS[c.weighting.name](c.weighting, c.model, s.schedule)
