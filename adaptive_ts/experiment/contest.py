"""One entry of the comparison bench: trained for some seeds, measured on the way and at the end."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.diffusion import prior_bits_per_dim, vlb_terms
from adaptive_ts.experiment import sharding
from adaptive_ts.experiment.compiling import compiling
from adaptive_ts.experiment.config import Config
from adaptive_ts.experiment.data import Dataset, batches, load_split
from adaptive_ts.experiment.factory import Built, build
from adaptive_ts.experiment.finish import image_maker
from adaptive_ts.experiment.frechet import Features, classifier_features, frechet_distance, gaussian
from adaptive_ts.experiment.likelihood import Strata, geometric_strata
from adaptive_ts.experiment.state import TrainState, abstract, make_init
from adaptive_ts.experiment.step import density_timesteps, make_density, make_step, prepare
from adaptive_ts.types import Key, Params

EVALUATIONS = 12  # on the way, on one batch of held-out images
BATCHES = 4  # of held-out images at the end
_BATCH = 64
_DENSITY_POINTS = 25


class _Entry(NamedTuple):
    """What the runs of all seeds share; everything in it is compiled once."""

    config: Config
    mesh: Mesh
    built: Built
    train: Dataset
    init: Callable[[Key], TrainState]
    steps: dict[bool | None, Callable[..., Any]]
    density: Callable[..., jax.Array]
    measure: Callable[[Params, int], tuple[np.ndarray, np.ndarray]]
    generate: Callable[[Params, Key], np.ndarray]
    features: Features
    strata: Strata
    prior: float


def contest(config: Config, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Trains a config for each seed; yields one record per run, as soon as it is done.

    A record holds ``seed``; ``curve``, rows of (step, seconds of training, VLB in bits/dim,
    eps-MSE) on 64 held-out images; ``seconds`` of training; ``vlb`` and ``mse`` on 256 of them;
    ``mse_by_timestep`` (at ``timesteps``); ``frechet``, of ``generate.num_images`` images against
    the training images; and ``density``, T p(t) at the end, at 25 evenly spaced timesteps. The
    held-out images, their noise and the noise that images are made from are the same in all runs.
    """
    entry = _prepare(config)
    for seed in seeds:
        yield {"seed": seed, **_run(entry, seed)}


def _prepare(config: Config) -> _Entry:
    mesh = sharding.make_mesh()
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    built = build(config, mesh)
    train, test = (load_split(config.data, split, lambda line: None) for split in ("train", "test"))
    shape = (config.train.batch_size, *train.images.shape[1:])
    example = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    init = make_init(built.init_params, built.parts.optimizer, built.parts.sampler, example)
    key = jax.random.key(0)
    state = abstract(init, key, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    variants = (False, True) if built.probe_every else (None,)
    jobs = {v: (make_step(built.parts, probe=v), (state, batch, key)) for v in variants}
    jobs |= {
        "init": (jax.jit(init, out_shardings=whole), (key,)),
        "density": (make_density(built.parts), (state.sampler, batch)),
    }
    with compiling(jobs) as compiled:
        functions = {name: compiled(name) for name in jobs}
    strata = geometric_strata(built.schedule.num_timesteps)
    return _Entry(
        config=config,
        mesh=mesh,
        built=built,
        train=train,
        init=functions["init"],
        steps={v: functions[v] for v in variants},
        density=functions["density"],
        measure=_measurer(config, built, test, strata),
        generate=image_maker(config, built, shape[1:], mesh),
        features=classifier_features(config.data, lambda line: None),
        strata=strata,
        prior=_prior(built, test),
    )


def _run(entry: _Entry, seed: int) -> dict[str, Any]:
    total, every = entry.config.train.steps, entry.built.probe_every
    key_init, key = jax.random.split(jax.random.key(seed))
    state = entry.init(key_init)
    data = batches(entry.train, batch_size=entry.config.train.batch_size, seed=seed)
    marks = {round(total * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    curve, seconds, began = [], 0.0, time.perf_counter()
    for number in range(1, total + 1):
        batch = sharding.put_batch(next(data), entry.mesh)
        variant = None if every is None else number % every == 0
        state, _ = entry.steps[variant](state, batch, key)
        if number in marks:
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            mse, vlb = entry.measure(state.ema, 1)
            curve.append([number, round(seconds, 2), *_totals(entry, vlb, mse)])
            began = time.perf_counter()
    mse, vlb = entry.measure(state.ema, BATCHES)
    total_vlb, total_mse = _totals(entry, vlb, mse)
    features = entry.features
    made = gaussian(features.extract(entry.generate(state.ema, jax.random.key(2**31 - 2))))
    density = np.asarray(entry.density(state.sampler, batch))
    at = np.linspace(0, len(density) - 1, _DENSITY_POINTS).round().astype(int)
    return {
        "steps": total,
        "seconds": round(seconds, 2),
        "vlb": total_vlb,
        "mse": total_mse,
        "frechet": _rounded(frechet_distance(made, features.reference)),
        "accuracy": _rounded(features.accuracy),
        "curve": curve,
        "timesteps": entry.strata.timesteps.tolist(),
        "mse_by_timestep": [_rounded(x) for x in mse],
        "density": [_rounded(x) for x in density[at]],
        "density_timesteps": np.asarray(density_timesteps(entry.built.parts.grid))[at].tolist(),
    }


def _totals(entry: _Entry, vlb: np.ndarray, mse: np.ndarray) -> tuple[float, float]:
    """The VLB, bits/dim, and the mean over all timesteps of the eps-MSE."""
    sizes = entry.strata.sizes
    return _rounded(sizes @ vlb + entry.prior), _rounded(sizes @ mse / sizes.sum())


def _prior(built: Built, test: Dataset) -> float:
    images = prepare({"image": jnp.asarray(test.images[: BATCHES * _BATCH])}, None)["image"]
    return float(jnp.mean(prior_bits_per_dim(built.schedule, images)))


def _rounded(x: float) -> float:
    return float(f"{float(x):.5g}")


def _measurer(
    config: Config, built: Built, test: Dataset, strata: Strata
) -> Callable[[Params, int], tuple[np.ndarray, np.ndarray]]:
    """(params, batches) -> (k,) mean eps-MSE and (k,) mean VLB term at each stratum."""
    timesteps, key = jnp.asarray(strata.timesteps), jax.random.key(2**31 - 1)

    @jax.jit
    def errors(params: Params, images: jax.Array, index: jax.Array) -> jax.Array:
        batch = prepare({"image": images}, None)

        def at(t: jax.Array) -> jax.Array:  # the same noise at every t
            losses = built.eps_loss.at(params, batch, jnp.full(index.shape, t), key, index)
            return jnp.mean(losses)

        return jax.lax.map(at, timesteps)

    @jax.jit
    def bits(mse: jax.Array) -> jax.Array:
        # The term is affine in the squared error: that of the mean error is the mean term.
        error = jnp.sqrt(mse)[:, None]
        zero, variance = jnp.zeros_like(error), config.model.variance
        return vlb_terms(built.schedule, zero, zero, error, timesteps, variance=variance)

    def measure(params: Params, num: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for i in range(num):
            index = np.arange(i * _BATCH, (i + 1) * _BATCH, dtype=np.int32)
            found.append(np.asarray(errors(params, test.images[index % len(test.images)], index)))
        mse = np.mean(found, axis=0)
        return mse.astype(np.float64), np.asarray(bits(jnp.asarray(mse)), np.float64)

    return measure
