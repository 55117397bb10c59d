"""The one table of the names that a config may use: samplers, loss weightings, noise schedules.

A row names what `adaptive_ts.samplers`, `adaptive_ts.weightings` or `adaptive_ts.schedules` calls
by the same name, and says which options of the config are its arguments. What may be said on the
command line, and which options mean nothing to which method, follows from the rows. Nothing here
imports JAX before something is built.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import adaptive_ts as ats
from adaptive_ts.experiment.config.groups import Config

if TYPE_CHECKING:
    import optax
    from jax.sharding import NamedSharding

Options = dict[str, Any]


class Setting(NamedTuple):
    """What a sampler may be built from.

    Attributes:
      config: of the run.
      grid: the time grid.
      schedule: the noise schedule.
      optimizer: the model's.
      vlb: the VLB terms in bits/dim, deterministic.
      bucket_sharding: by which several devices share the buckets of a probe; None for one device.
    """

    config: Config
    grid: "ats.TimeGrid"
    schedule: "ats.NoiseSchedule"
    optimizer: "optax.GradientTransformation"
    vlb: "ats.ExampleLoss"
    bucket_sharding: "NamedSharding | None"


def _as_they_are(s: Setting, own: Options) -> Options:
    return own


class Sampler(NamedTuple):
    """A sampler, as a config may name it.

    Attributes:
      group: the group ``sampler.GROUP`` whose fields are its keyword arguments, where they are not
        None; None: it has no group.
      arguments: (setting, the group's fields) -> its keyword arguments, where these are others.
      fields: those of the group that mean something to it; None: all.
      schedule: it takes the noise schedule after the grid.
      coupled: it draws by inverse CDF, and takes ``coupling``.
      probes: it probes every ``sampler.every`` steps.
    """

    group: str | None = None
    arguments: Callable[[Setting, Options], Options] = _as_they_are
    fields: tuple[str, ...] | None = None
    schedule: bool = False
    coupled: bool = True
    probes: bool = False


class LossWeighting(NamedTuple):
    """A loss weighting, as a config may name it.

    Attributes:
      options: the fields of ``weighting`` that are its keyword arguments, where they are not None.
      arguments: (options, noise schedule, variance of the model) -> its keyword arguments.
      schedule: it takes the noise schedule first.
    """

    options: tuple[str, ...] = ()
    arguments: "Callable[[Options, ats.NoiseSchedule, str], Options]" = lambda own, s, v: own
    schedule: bool = False


class Schedule(NamedTuple):
    """A noise schedule, as a config may name it.

    Attributes:
      rescale: its betas can be scaled by 1000 / T.
    """

    rescale: bool = False


def _adaptive(s: Setting, own: Options) -> Options:
    import optax

    c = s.config.sampler
    same = (
        *("every", "num_selected", "history", "entropy_coef", "estimate", "common_noise"),
        *(
            "entropy",
            "reduce",
            "normalize_reward",
            "lagged_selection",
            "relative",
            "num_buckets",
            "jitter",
            "chunk",
        ),
    )
    clip = optax.clip_by_global_norm(c.clip_norm)
    return {
        "policy": ats.learning.conv_beta_policy(),
        "optimizer": optax.chain(clip, optax.adam(c.learning_rate)),
        "bucket_sharding": s.bucket_sharding,
        **{name: getattr(c, name) for name in same},
    }


def _impact(s: Setting, own: Options) -> Options:
    c = s.config.sampler
    return {
        **own,
        "optimizer": s.optimizer,
        "objective": s.vlb if own["objective"] == "vlb" else None,
        "bucket_sharding": s.bucket_sharding,
        **{name: getattr(c, name) for name in ("every", "jitter", "chunk")},
    }


def _entropy_rate(s: Setting, own: Options) -> Options:
    import jax.numpy as jnp

    prediction, weighting = s.config.model.prediction, make_weighting(s.config, s.schedule)
    if weighting is not None:
        weighting = ats.weightings.convert(weighting, prediction, "x0")
    if not own.pop("per_loss"):
        weighting = jnp.ones_like
    gate = (own.pop("gate"), 3.0)
    return {**own, "gate": gate, "prediction": prediction, "weighting": weighting}


def _loss_proportional(s: Setting, own: Options) -> Options:
    weighting = make_weighting(s.config, s.schedule)
    if weighting is None:
        return own
    return {**own, "schedule": s.schedule, "weighting": weighting}


def _log_snr(**names: str) -> Sampler:
    """A law of the log-SNR, which has these fields of ``sampler.log_snr`` by its own names."""

    def arguments(s: Setting, own: Options) -> Options:
        return {names[field]: own[field] for field in names if field in own}

    return Sampler("log_snr", arguments, fields=tuple(names), schedule=True)


SAMPLERS: Mapping[str, Sampler] = {
    "adaptive": Sampler(arguments=_adaptive, coupled=False, probes=True),
    "beta": Sampler("beta"),
    "cosmap": Sampler("cosmap"),
    "curriculum": Sampler("curriculum", coupled=False),
    "entropy_rate": Sampler("entropy_rate", _entropy_rate, schedule=True),
    "impact": Sampler("impact", _impact, probes=True),
    "log_normal_sigma": _log_snr(loc="p_mean", scale="p_std", placement="placement"),
    "log_snr_cauchy": _log_snr(loc="loc", scale="scale"),
    "log_snr_cosine": _log_snr(loc="shift", scale="scale"),
    "log_snr_laplace": _log_snr(loc="loc", scale="scale"),
    "logit_normal": Sampler("logit_normal"),
    "lognorm_timestep": Sampler(schedule=True),
    "loss_proportional": Sampler("proportional", _loss_proportional),
    "loss_second_moment": Sampler("second_moment"),
    "mode": Sampler("mode"),
    "speed": Sampler("speed", schedule=True, coupled=False),
    "uniform": Sampler(arguments=lambda s, own: {"stratified": s.config.sampler.stratified}),
}

WEIGHTINGS: Mapping[str, LossWeighting | None] = {
    "change_aware": LossWeighting(("tau", "lam", "as_published"), schedule=True),
    "debiased": LossWeighting(("max_snr", "as_published")),
    "edm": LossWeighting(("sigma_data",)),
    "max_snr": LossWeighting(("gamma",)),
    "min_snr": LossWeighting(("gamma", "as_published")),
    "none": None,
    "p2": LossWeighting(("gamma", "k", "as_published")),
    "sigmoid": LossWeighting(
        ("bias", "derivative"),
        lambda own, s, v: {"bias": own["bias"], "schedule": s if own["derivative"] else None},
    ),
    "snr": LossWeighting(),
    "snr_plus_one": LossWeighting(),
    "soft_min_snr": LossWeighting(("gamma",)),
    "truncated_snr": LossWeighting(),
    "vlb": LossWeighting(arguments=lambda own, s, v: {"variance": v}, schedule=True),
}

# Those that end at an SNR of 0 (jsd, zero_terminal_snr) have an infinite VLB, and DDIM cannot
# start from them: they are for loops of one's own.
SCHEDULES: Mapping[str, Schedule] = {
    "constant_beta": Schedule(rescale=True),
    "cosine": Schedule(),
    "linear": Schedule(rescale=True),
    "quad": Schedule(rescale=True),
    "sigmoid": Schedule(),
    "sigmoid_beta": Schedule(rescale=True),
    "warmup": Schedule(rescale=True),
}

NAMES: Mapping[str, tuple[str, ...]] = {
    "sampler.name": tuple(SAMPLERS),
    "sampler.on_top_of": tuple(name for name, row in SAMPLERS.items() if not row.probes),
    "schedule.name": tuple(SCHEDULES),
    "weighting.name": tuple(WEIGHTINGS),
}
"""Field path -> the names it may take."""


def make_schedule(config: Config) -> "ats.NoiseSchedule":
    """The config's noise schedule."""
    c = config.schedule
    options = {"rescale": c.rescale} if SCHEDULES[c.name].rescale else {}
    return getattr(ats.schedules, c.name)(c.num_timesteps, **options)


def make_weighting(config: Config, schedule: "ats.NoiseSchedule") -> "ats.Weighting | None":
    """The config's loss weighting, of the error that its model makes; None for none."""
    c, row = config.weighting, WEIGHTINGS[config.weighting.name]
    if row is None:
        return None
    own = {name: getattr(c, name) for name in row.options if getattr(c, name) is not None}
    options = row.arguments(own, schedule, config.model.variance)
    first = (schedule,) if row.schedule else ()
    return getattr(ats.weightings, c.name)(*first, prediction=config.model.prediction, **options)


def make_sampler(s: Setting) -> "ats.TimestepSampler":
    """The config's sampler, with its wrappers and its weighting."""
    c = s.config.sampler
    sampler = _plain_sampler(c.name, s)
    if c.uniform_prob > 0:
        sampler = ats.mixed_with_uniform(sampler, c.uniform_prob)
    if c.importance_weighted:
        sampler = ats.importance_weighted(sampler)
    if c.on_top_of is not None:
        sampler = ats.with_density_of(sampler, _plain_sampler(c.on_top_of, s))
    weighting = make_weighting(s.config, s.schedule)
    return sampler if weighting is None else ats.with_weighting(sampler, weighting, s.schedule)


def _plain_sampler(name: str, s: Setting) -> "ats.TimestepSampler":
    row, c = SAMPLERS[name], s.config.sampler
    fields = {} if row.group is None else dataclasses.asdict(getattr(c, row.group))
    own = {field: value for field, value in fields.items() if value is not None}
    options = row.arguments(s, own) | ({"coupling": c.coupling} if row.coupled else {})
    grid_and = (s.grid, s.schedule) if row.schedule else (s.grid,)
    return getattr(ats.samplers, name)(*grid_and, **options)
