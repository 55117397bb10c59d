"""Timing several things in turn, so that a machine whose speed drifts slows all of them alike."""

import functools
import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.assembly.build import Built, build, first_state
from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.assembly.step import StepFn, Variant, make_step, train_steps
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.errors import one_line
from adaptive_ts.types import Batch, Key

K = TypeVar("K", bound=Hashable)


class CannotRunError(Exception):
    """One of the turns cannot run on this machine; the others can. Its text is one line."""


class Race(NamedTuple):
    """Attributes:
    seconds: of each turn, by name, one for each round that was finished.
    failures: name -> why it cannot run.
    cpu_seconds: as ``seconds``, of all of the process's threads on the host.
    """

    seconds: dict[Any, list[float]]
    failures: dict[Any, str]
    cpu_seconds: Mapping[Any, list[float]] = {}


class Trainer:
    """Trains on one batch that lies on the devices: a call is a whole cycle of f_S steps.

    Calling it raises `CannotRunError` where memory is short.

    Args:
      state: to begin with; it is donated to the first step.
      steps: "plain" and, if the sampler probes, "probe" -> the compiled step.
      batch: of `put_images`.
      key: of the steps' randomness.
      every: f_S; the last step of a cycle probes.
    """

    def __init__(
        self,
        state: TrainState,
        steps: Mapping[str, Callable[..., Any]],
        batch: Batch,
        key: Key,
        every: int,
    ):
        self.steps, self.every = dict(steps), every
        self._state, self._batch, self._key = state, batch, key

    def variants(self) -> dict[str, Callable[[], Any]]:
        """Name of a step -> one such step, to its end."""
        return {
            name: functools.partial(self._take, lambda probe, step=step: step, 1)
            for name, step in self.steps.items()
        }

    def __call__(self) -> None:
        with_memory(lambda: self._take(self._variant, self.every))

    def _take(self, functions: Callable[[Variant], StepFn], count: int) -> None:
        batches = itertools.repeat(self._batch)
        every = self.every if "probe" in self.steps else None
        steps = train_steps(functions, self._state, batches, self._key, stop=count, every=every)
        for taken in steps:
            self._state = taken.state
        jax.block_until_ready((taken.state, taken.metrics))

    def _variant(self, probe: Variant) -> StepFn:
        return self.steps["probe" if probe else "plain"]


def with_memory(run: Callable[[], Any]) -> Any:
    """``run()``; raises CannotRunError where JAX says that memory is short."""
    try:
        return run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CannotRunError(f"out of memory ({one_line(error)})") from None


def step_functions(built: Built) -> dict[str, StepFn]:
    """The variants of the step that ``train`` compiles: "plain" and, if it probes, "probe"."""
    if not built.probe_every:
        return {"plain": make_step(built.parts, probe=None)}
    return {name: make_step(built.parts, probe=name == "probe") for name in ("plain", "probe")}


def put_images(images: np.ndarray, mesh: Mesh) -> Batch:
    """The batch of images (b, H, W, C), as they are stored, on the devices; all of class 0."""
    labels = np.zeros(images.shape[:1], np.int32)
    return sharding.put_batch({"image": images, "label": labels}, mesh)


def make_trainers(
    configs: Mapping[K, Config], mesh: Mesh, progress: Callable[[K], Any] = lambda name: None
) -> dict[K, Trainer]:
    """What trains by each config, compiled side by side, on the first images of the first's set.

    Args:
      configs: name -> config; of one data set and one batch size.
      mesh: the devices.
      progress: hears a name when its steps are compiled.
    """
    first = next(iter(configs.values()))
    dataset = load_split(first.data, "train", lambda line: None)
    images, _ = dataset.rows(np.arange(first.train.batch_size) % dataset.images.shape[0])
    batch, key = put_images(images, mesh), seed_key(first.seed)
    states, jobs, whole = {}, {}, sharding.replicated(mesh)
    for name, config in configs.items():
        built = build(config, mesh)
        init, _ = first_state(built, images.shape, key, mesh)
        states[name] = jax.jit(init, out_shardings=whole)(key)
        for variant, step in step_functions(built).items():
            jobs[name, variant] = (step, (states[name], batch, key))
    trainers = {}
    with compiling(jobs) as compiled:
        for name, config in configs.items():
            own = [variant for owner, variant in jobs if owner == name]
            steps = {variant: compiled((name, variant)) for variant in own}
            trainers[name] = Trainer(states[name], steps, batch, key, config.sampler.every)
            progress(name)
    return trainers


def in_turn(
    turns: dict[K, Callable[[], Any]],
    rounds: int,
    *,
    after_turn: Callable[[K], Any] = lambda name: None,
    after_round: Callable[[Race], Any] = lambda race: None,
) -> Race:
    """One round without a clock, then ``rounds`` rounds of all of them, one after the other.

    Args:
      turns: name -> what is timed, which returns when its work is done. One that raises
        `CannotRunError` is taken out, and its memory with it.
      rounds: how many count.
      after_turn: hears the name after each turn.
      after_round: hears of what there is so far after each round that counts.
    """
    race = Race({name: [] for name in turns}, {}, {name: [] for name in turns})
    for number in range(rounds + 1):
        for name in list(turns):
            began, cpu_began = time.perf_counter(), time.process_time()
            try:
                turns[name]()
            except CannotRunError as error:
                race.failures[name] = str(error)
                del turns[name]
            else:
                if number:
                    race.seconds[name].append(time.perf_counter() - began)
                    race.cpu_seconds[name].append(time.process_time() - cpu_began)
            after_turn(name)
        if number:
            after_round(race)
    return race
