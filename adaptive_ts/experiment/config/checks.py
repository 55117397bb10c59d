"""What is wrong with a config: every problem, each with its field, the value and the remedy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from adaptive_ts.experiment.config.groups import Config, HostsConfig, ModelConfig
from adaptive_ts.experiment.config.methods import NAMES, SAMPLERS, WEIGHTINGS
from adaptive_ts.experiment.config.paths import cast, leaf_types, leaves
from adaptive_ts.experiment.errors import nearest

# (fields, test, what the value must be); a field that is None is not tested.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("workdir", bool, "a folder's path"),
    ("seed", lambda v: 0 <= v < 2**32, "in 0..4294967295"),
    ("schedule.num_timesteps", lambda v: 2 <= v <= 100_000, "in 2..100000"),
    ("sampler.history", lambda v: v >= 3, "at least 3"),
    ("optimizer.warmup_steps hosts.process_id train.max_skipped", lambda v: v >= 0, "at least 0"),
    (
        "sampler.entropy_coef generate.guidance",
        lambda v: 0 <= v < math.inf,
        "at least 0 and finite",
    ),
    ("generate.eta", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("model.multipliers", lambda v: bool(v) and min(v) >= 1, "one or more, each at least 1"),
    (
        "data.downsample data.image_size model.channels model.res_blocks model.groups "
        "sampler.every sampler.num_selected sampler.num_buckets sampler.chunk train.steps "
        "train.batch_size train.log_every train.save_every train.max_to_keep generate.num_images "
        "generate.steps hosts.num_processes model.transformer.patch_size "
        "model.transformer.hidden_size model.transformer.depth model.transformer.num_heads "
        "model.transformer.num_classes train.accumulate mesh.data mesh.fsdp hosts.timeout",
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        "sampler.learning_rate sampler.clip_norm optimizer.learning_rate optimizer.clip_norm",
        lambda v: 0 < v < math.inf,
        "above 0 and finite",
    ),
    (
        "model.dropout sampler.uniform_prob optimizer.b1 optimizer.b2 optimizer.ema_decay "
        "model.transformer.class_dropout",
        lambda v: 0 <= v < 1,
        "in [0, 1)",
    ),
)


def validate(config: Config, *, unused: bool = True) -> list[str]:
    """All that is wrong with a config, one line per problem; empty when nothing is.

    Args:
      config: of a run.
      unused: whether an option that means nothing to the chosen method is a problem. It is what
        somebody typed, not what an older run was started with.
    """
    problems, sound, values = [], {}, leaves(config)
    for path, kind in leaf_types(type(config)).items():
        try:
            sound[path] = cast(values[path], kind)
        except TypeError as error:
            problems.append(f"--{path}: {error}")
    for path, names in NAMES.items():
        if sound.get(path) is not None and sound[path] not in names:
            hint = nearest(str(sound[path]), names)
            problems.append(f"--{path}: {sound[path]!r} is unknown: {hint}")
    for paths, test, must_be in _RANGES:
        for path in paths.split():
            value = sound.get(path)
            if value is not None and not test(value):
                problems.append(f"--{path}: {_words(value)} is out of range: must be {must_be}")
    # Comparing fields makes sense only of values that are themselves in order.
    return problems or _conflicts(config) + (_unused(config) if unused else [])


def _conflicts(c: Config) -> list[str]:
    problems = []
    levels, flags = len(c.model.multipliers), len(c.model.attention)
    if levels != flags:
        problems.append(
            f"--model.attention: {_words(c.model.attention)} has {flags} entries for {levels} "
            f"levels: give one True or False for each of --model.multipliers "
            f"{_words(c.model.multipliers)}"
        )
    problems += _model_problems(c.model) + _guidance_problems(c)
    if c.sampler.name == "adaptive" and c.sampler.num_selected > c.sampler.num_buckets:
        problems.append(
            f"--sampler.num_selected: {c.sampler.num_selected} is out of range: must be in "
            f"1..{c.sampler.num_buckets} (--sampler.num_buckets)"
        )
    if c.generate.steps > c.schedule.num_timesteps:
        problems.append(
            f"--generate.steps: {c.generate.steps} is out of range: must be in "
            f"1..{c.schedule.num_timesteps} (--schedule.num_timesteps)"
        )
    if c.generate.eta > 0 and c.generate.solver in ("dpmpp_2m", "heun"):
        problems.append(
            f"--generate.eta: {c.generate.eta} means nothing to {c.generate.solver}, which adds no "
            "noise: leave it out, or add --generate.solver ddim"
        )
    if c.sampler.stratified and c.sampler.name != "uniform":
        problems.append(
            f"--sampler.stratified: True means nothing to the {c.sampler.name} sampler: leave it "
            "out, or add --sampler.name uniform"
        )
    if c.sampler.coupling != "independent" and not SAMPLERS[c.sampler.name].coupled:
        problems.append(
            f"--sampler.coupling: {c.sampler.coupling!r} means nothing to the {c.sampler.name} "
            "sampler, whose draws are its own: leave it out"
        )
    return problems + _host_problems(c.hosts)


def _model_problems(model: ModelConfig) -> list[str]:
    own = model.transformer
    if model.name == "unet":
        if own == type(own)():
            return []
        return [
            "--model.transformer: its options mean nothing to the unet: leave them out, or add "
            "--model.name dit"
        ]
    problems = []
    if own.hidden_size % own.num_heads:
        problems.append(
            f"--model.transformer.hidden_size: {own.hidden_size} is not divisible by the "
            f"{own.num_heads} heads (--model.transformer.num_heads)"
        )
    if model.name == "uvit" and own.depth % 2:
        problems.append(f"--model.transformer.depth: {own.depth} is odd: uvit needs an even number")
    if model.name == "dit" and own.hidden_size % 4:
        problems.append(
            f"--model.transformer.hidden_size: {own.hidden_size} is not divisible by 4, as dit's "
            "position embedding needs"
        )
    if model.dropout:
        problems.append(
            f"--model.dropout: {model.dropout} means nothing to {model.name}: add --model.dropout 0"
        )
    if own.num_classes is None and own.class_dropout != type(own)().class_dropout:
        problems.append(
            f"--model.transformer.class_dropout: {own.class_dropout} means nothing without "
            "classes: leave it out, or add --model.transformer.num_classes NUMBER"
        )
    return problems


def _guidance_problems(c: Config) -> list[str]:
    own, weight = c.model.transformer, c.generate.guidance
    if weight == 1 or (own.num_classes is not None and own.class_dropout > 0):
        return []
    if own.num_classes is None:
        return [
            f"--generate.guidance: {weight} means nothing to a model without classes: leave it "
            "out, or train with --model.transformer.num_classes NUMBER"
        ]
    return [
        f"--generate.guidance: {weight} needs a model that was trained without classes too: leave "
        "it out, or train with --model.transformer.class_dropout above 0"
    ]


def _unused(c: Config) -> list[str]:
    """Options of samplers and weightings that are not the chosen ones."""
    problems, plain = [], Config()
    chosen = {c.sampler.name, c.sampler.on_top_of}
    for field in dataclasses.fields(c.sampler):
        owners = [name for name, row in SAMPLERS.items() if row.group == field.name]
        changed = getattr(c.sampler, field.name) != getattr(plain.sampler, field.name)
        if owners and changed and not chosen & {*owners}:
            problems.append(
                f"--sampler.{field.name}: its options mean nothing to the {c.sampler.name} "
                f"sampler: leave them out, or add --sampler.name {owners[0]}"
            )
    problems += _unused_fields(c, chosen)
    weighting = WEIGHTINGS[c.weighting.name]
    for field in dataclasses.fields(c.weighting):
        value = getattr(c.weighting, field.name)
        if field.name == "name" or value == getattr(plain.weighting, field.name):
            continue
        if weighting is None or field.name not in weighting.options:
            owners = [name for name, row in WEIGHTINGS.items() if row and field.name in row.options]
            to = "without a weighting" if weighting is None else f"to {c.weighting.name}"
            problems.append(
                f"--weighting.{field.name}: {value} means nothing {to}: leave it out, or add "
                f"--weighting.name {' or '.join(owners)}"
            )
    return problems


def _unused_fields(c: Config, chosen: set[str | None]) -> list[str]:
    """Fields of a chosen sampler's group that are another's, who shares the group."""
    rows = [SAMPLERS[name] for name in sorted(name for name in chosen if name is not None)]
    problems = []
    for group in sorted({row.group for row in rows if row.group is not None}):
        used = [row.fields for row in rows if row.group == group]
        own, plain = getattr(c.sampler, group), getattr(Config().sampler, group)
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            known = any(fields is None or field.name in fields for fields in used)
            if value != getattr(plain, field.name) and not known:
                problems.append(
                    f"--sampler.{group}.{field.name}: {value!r} means nothing to the "
                    f"{c.sampler.name} sampler: leave it out"
                )
    return problems


def _host_problems(hosts: HostsConfig) -> list[str]:
    given = [
        f"--hosts.{name}"
        for name in ("coordinator", "num_processes", "process_id")
        if getattr(hosts, name) is not None
    ]
    if hosts.auto and given:
        return [f"--hosts.auto: True finds out {', '.join(given)} by itself: give one or the other"]
    if 0 < len(given) < 3:
        return [
            f"{', '.join(given)}: not enough: give --hosts.coordinator, --hosts.num_processes and "
            "--hosts.process_id together, or --hosts.auto True"
        ]
    coordinator, number, size = hosts.coordinator, hosts.process_id, hosts.num_processes
    if coordinator is None or number is None or size is None:  # none of the three is given
        return []
    problems = []
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        problems.append(f"--hosts.coordinator: {coordinator!r} is not HOST:PORT")
    if number >= size:
        problems.append(
            f"--hosts.process_id: {number} is out of range: must be in "
            f"0..{size - 1} (--hosts.num_processes)"
        )
    return problems


def _words(value: Any) -> str:
    return " ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else repr(value)
