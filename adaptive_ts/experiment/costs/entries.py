"""From a plan to what takes turns in `throughput`: compiled, and with its state on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.experiment.assembly.build import build, first_state
from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.assembly.step import make_step
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig
from adaptive_ts.experiment.costs import torch_trainer
from adaptive_ts.experiment.costs.race import (
    CannotRunError,
    Trainer,
    put_images,
    step_functions,
    with_memory,
)
from adaptive_ts.experiment.costs.throughput_report import Entry
from adaptive_ts.experiment.data.catalogue import RECIPES
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.generate.request import label_cycle
from adaptive_ts.experiment.solvers.generator import guided, make_generator
from adaptive_ts.types import Key

Turn = Callable[[], Any]
Progress = Callable[[int, str], contextlib.AbstractContextManager[Callable[[], Any]]]


class Plan(NamedTuple):
    """What is measured.

    Attributes:
      config: of the row; dtype, batch size and sampler are replaced by those below.
      dtypes: of the network.
      batch_sizes: images at once.
      samplers: by name; the config's own has the config's options.
      torch: PyTorch too.
      generate: generation too.
      cycles: how many count.
    """

    config: Config
    dtypes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    samplers: tuple[str, ...]
    torch: bool
    generate: bool
    cycles: int

    def entries(self) -> list[Entry]:
        """All that is timed, in the order of the report."""
        return [*self._of_training(), *(self._of_generation() if self.generate else ())]

    def _of_training(self) -> list[Entry]:
        names = [("jax", name) for name in self.samplers]
        names += [("torch", name) for name in torch_trainer.FLAVOURS if self.torch]
        return [
            Entry("train", framework, name, dtype, size)
            for dtype in self.dtypes
            for size in self.batch_sizes
            for framework, name in names
        ]

    def _of_generation(self) -> list[Entry]:
        solver = self.config.generate.solver
        return [
            Entry("generate", "jax", solver, dtype, size)
            for dtype in self.dtypes
            for size in self.batch_sizes
        ]

    def config_of(self, sampler: str, dtype: str, batch_size: int) -> Config:
        """The row's config with these instead of its own."""
        own = self.config.sampler
        if sampler == "uniform":  # the options of the row's sampler may mean nothing to it
            chosen = SamplerConfig(name="uniform", every=own.every)
        else:
            chosen = dataclasses.replace(own, name=sampler)
        changes = {"sampler": chosen, "model.dtype": dtype, "train.batch_size": batch_size}
        return replace(self.config, changes)


class Generator:
    """Makes a batch of images. Calling it raises CannotRunError where memory is short."""

    def __init__(self, generate: Callable[..., jax.Array], *args: Any):
        self._generate, self._args = generate, args

    def __call__(self) -> None:
        with_memory(lambda: jax.block_until_ready(self._generate(*self._args)))


def image_of(config: Config) -> jax.ShapeDtypeStruct:
    """(H, W, C) of one of the row's images, as it is stored; data are read only to find that out.

    Raises:
      UserError: they are not there.
    """
    c = config.data
    if c.name in ("cifar10", "digits") and c.downsample == 1 and c.image_size is None:
        return jax.ShapeDtypeStruct(RECIPES[c.name](None).shape, np.uint8)
    images = load_split(c, "train", log=lambda line: None).images
    return jax.ShapeDtypeStruct(images.shape[1:], images.dtype)


def make_pixels(image: jax.ShapeDtypeStruct, size: int) -> np.ndarray:
    """Random images: their values do not change how long anything takes."""
    rng = np.random.default_rng(0)
    if jnp.issubdtype(image.dtype, jnp.floating):
        return rng.standard_normal((size, *image.shape)).astype(image.dtype)
    return rng.integers(0, 256, (size, *image.shape), np.uint8)


def flops_per_image(plan: Plan, mesh: Mesh, image: jax.ShapeDtypeStruct) -> float:
    """FLOPs of the uniform step at the largest batch, by the compiler's count, over its images.

    Of the program as it is before the compiler's own changes: on a GPU these put convolutions and
    products into calls of libraries, of which its count knows nothing.

    Raises:
      UserError: the network cannot take images of this shape.
    """
    size = max(plan.batch_sizes)
    built, key = build(plan.config_of("uniform", "float32", size), mesh), seed_key(0)
    _, state = first_state(built, (size, *image.shape), key, mesh)
    batch = put_images(make_pixels(image, size), mesh)
    cost: Any = make_step(built.parts, probe=None).lower(state, batch, key).cost_analysis()
    return float(cost["flops"]) / size


def make_turns(
    plan: Plan, mesh: Mesh, image: jax.ShapeDtypeStruct, progress: Progress
) -> dict[Entry, Turn]:
    """Entry -> its turn, ready to be timed; one that memory is too short for says so when called.

    Args:
      plan: what is measured.
      mesh: the devices.
      image: one, of `image_of`.
      progress: (how many, of what) -> a context whose value is called after each.

    Raises:
      CannotRunError: memory is too short even for the parameters.
    """
    key = seed_key(plan.config.seed)
    batches = {size: put_images(make_pixels(image, size), mesh) for size in plan.batch_sizes}
    names = dict.fromkeys(("uniform", *plan.samplers))
    firsts = {name: _first_state(plan, name, image, mesh, key) for name in names}
    states, whole = {name: state for name, (_, state) in firsts.items()}, sharding.replicated(mesh)
    jobs = {
        ("init", name): (jax.jit(init, out_shardings=whole), (key,))
        for name, (init, _) in firsts.items()
    }
    rows = {size: _rows(size, plan, mesh) for size in plan.batch_sizes}
    for entry in plan.entries():
        if entry.framework == "jax":
            if entry.kind == "generate":
                args = (states["uniform"].params, key, *rows[entry.batch_size])
            else:
                args = (states[entry.name], batches[entry.batch_size], key)
            functions = _functions(entry, plan, mesh, image)
            jobs |= {(entry, name): (function, args) for name, function in functions.items()}
    compiled = _compile(jobs, progress)
    params = compiled["init", "uniform"](key).params if plan.generate else None

    def turn(entry: Entry) -> Turn:
        if entry.framework == "torch":
            pixels, compile_it = make_pixels(image, entry.batch_size), entry.name == "compiled"
            return torch_trainer.TorchTrainer(
                plan.config, pixels, entry.dtype, compiled=compile_it, mesh=mesh
            )
        own = {name: function for (owner, name), function in compiled.items() if owner == entry}
        if entry.kind == "generate":
            return Generator(own["generate"], params, key, *rows[entry.batch_size])
        state = with_memory(lambda: compiled["init", entry.name](key))
        return Trainer(state, own, batches[entry.batch_size], key, plan.config.sampler.every)

    turns: dict[Entry, Turn] = {}
    for entry in plan.entries():
        try:
            turns[entry] = turn(entry)
        except CannotRunError as error:
            turns[entry] = _cannot(str(error))
    return turns


def trace(turns: Mapping[Entry, Turn], folder: Path, progress: Progress) -> None:
    """A profile of one step of each that trains, in ``folder/LABEL`` (and with a probe, if any)."""
    trainable = Trainer | torch_trainer.TorchTrainer
    trainers = {entry: turn for entry, turn in turns.items() if isinstance(turn, trainable)}
    with progress(len(trainers), "profiling") as tell:
        for entry, turn in trainers.items():
            for variant, step in turn.variants().items():
                name = f"{entry.label}-{variant}" if variant != "plain" else entry.label
                with _profile(entry, folder / name):
                    step()
            tell()


def _profile(entry: Entry, folder: Path) -> contextlib.AbstractContextManager[Any]:
    if entry.framework == "torch":
        return torch_trainer.profile(folder)
    return jax.profiler.trace(folder, create_perfetto_trace=True)


def _first_state(
    plan: Plan, sampler: str, image: jax.ShapeDtypeStruct, mesh: Mesh, key: Key
) -> tuple[Callable[[Key], TrainState], TrainState]:
    """The state depends on neither the dtype nor the batch size."""
    config = plan.config_of(sampler, plan.dtypes[0], plan.batch_sizes[0])
    return first_state(build(config, mesh), (plan.batch_sizes[0], *image.shape), key, mesh)


def _functions(
    entry: Entry, plan: Plan, mesh: Mesh, image: jax.ShapeDtypeStruct
) -> dict[str, Callable[..., Any]]:
    if entry.kind == "train":
        return step_functions(
            build(plan.config_of(entry.name, entry.dtype, entry.batch_size), mesh)
        )
    config = plan.config_of("uniform", entry.dtype, entry.batch_size)
    built, c = build(config, mesh), config.generate
    eps_fn = built.eps_fn
    if c.guidance != 1:
        assert built.num_classes is not None  # the config's check has seen to it
        eps_fn = guided(eps_fn, c.guidance, built.num_classes)
    options = {"solver": c.solver, "steps": c.steps, "eta": c.eta}
    variance = config.model.variance
    generate = make_generator(eps_fn, built.schedule, image.shape, variance=variance, **options)
    return {"generate": generate}


def _rows(size: int, plan: Plan, mesh: Mesh) -> tuple[jax.Array, ...]:
    """Index and, for a model that is told classes, label of each image."""
    index = np.arange(size, dtype=np.int32)
    classes = plan.config.model.transformer.num_classes
    cycle = label_cycle(classes)
    rows = (index,) if cycle is None else (index, cycle[index % len(cycle)])
    return sharding.put_whole(rows, mesh)


def _compile(jobs: Mapping[Any, Any], progress: Progress) -> dict[Any, Callable[..., Any]]:
    """Job -> the compiled function; one that memory is too short for says so when called."""
    compiled = {}
    with progress(len(jobs), "compiling") as tell, compiling(jobs) as result:
        for job in jobs:
            try:
                compiled[job] = with_memory(functools.partial(result, job))
            except CannotRunError as error:
                compiled[job] = _cannot(str(error))
            tell()
    return compiled


def _cannot(why: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise CannotRunError(why)

    return run
