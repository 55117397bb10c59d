"""What a sampler costs: wall-clock and FLOPs per step, over uniform, in one run."""

import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig
from adaptive_ts.experiment.costs.race import Trainer, in_turn, make_trainers
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError

CYCLES = 5


class Overhead(NamedTuple):
    """Attributes:
    ratios: wall-clock of a cycle, the sampler over uniform, cycle by cycle.
    seconds: per step, the median over cycles, of uniform and the sampler.
    flops: of one step, by the compiler's cost analysis: of uniform, of the sampler without a
      probe ("plain") and with one ("probe", if it has any).
    every: f_S, the length of a cycle.
    batch_size: images per step.
    """

    ratios: tuple[float, ...]
    seconds: tuple[float, float]
    flops: dict[str, float]
    every: int
    batch_size: int


def measure(config: Config, *, cycles: int = CYCLES) -> Overhead:
    """Trains uniform and the config's sampler side by side for ``cycles`` cycles of f_S steps.

    Raises:
      UserError: the devices' memory is short.
    """
    trainers, every = _trainers(config, sharding.make_mesh()), config.sampler.every
    race = in_turn(dict(trainers), cycles)
    for name, why in race.failures.items():
        raise UserError(f"{name}: {why}: give a smaller --train.batch_size", exit_code=1)
    times = list(zip(race.seconds["uniform"], race.seconds["sampler"], strict=True))
    return Overhead(
        ratios=tuple(b / a for a, b in times),
        seconds=tuple(statistics.median(column) / every for column in zip(*times, strict=True)),
        flops=_flops_of(trainers),
        every=every,
        batch_size=config.train.batch_size,
    )


def flops(config: Config, mesh: Mesh) -> dict[str, float]:
    """FLOPs of one step of uniform ("uniform"), and of the sampler ("plain", "probe")."""
    return _flops_of(_trainers(config, mesh))


def flops_ratio(flops: dict[str, float], every: int) -> float:
    """FLOPs per step over uniform's, the probe's share spread over f_S steps."""
    plain = flops["plain"]
    return (plain + (flops.get("probe", plain) - plain) / every) / flops["uniform"]


def _trainers(config: Config, mesh: Mesh) -> dict[str, Trainer]:
    sharding.check_batch_size(config.train.batch_size, mesh)
    uniform = SamplerConfig(name="uniform", every=config.sampler.every)
    plain = dataclasses.replace(config, sampler=uniform)
    return make_trainers({"uniform": plain, "sampler": config}, mesh)


def _flops_of(trainers: dict[str, Trainer]) -> dict[str, float]:
    own = {name: _flops(step) for name, step in trainers["sampler"].steps.items()}
    return {"uniform": _flops(trainers["uniform"].steps["plain"]), **own}


def _flops(compiled: Any) -> float:
    cost = compiled.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def text(result: Overhead, config: Config) -> str:
    """The report, a few lines."""
    ratios, c = sorted(result.ratios), config.sampler
    device = jax.devices()[0].device_kind
    counts = ", ".join(f"{name} {value / 1e9:.3f} G" for name, value in result.flops.items())
    lines = [
        f"{c.name} over uniform, {config.data.name}, batch {result.batch_size}, "
        f"f_S={result.every}, on {jax.device_count()} x {device}, jaxlib {jax.lib.__version__}:",
        f"  wall-clock per step  {statistics.median(ratios):.3f} x  (min {ratios[0]:.3f}, "
        f"max {ratios[-1]:.3f} of {len(ratios)} cycles; {1e3 * result.seconds[1]:.1f} ms over "
        f"{1e3 * result.seconds[0]:.1f} ms)",
        f"  FLOPs per step       {flops_ratio(result.flops, result.every):.3f} x  ({counts})",
    ]
    if c.name == "adaptive":
        probed = 2 * c.num_buckets + 2 * c.num_selected * result.batch_size
        lines.append(
            f"  extra forwards       {probed / result.every:.1f} images per step ({c.num_buckets} "
            f"buckets, |S|={c.num_selected}), beside {result.batch_size} forwards and backwards"
        )
    return "\n".join(lines)
