"""One entry of a table: trained for some seeds, measured on the way and at the end."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.diffusion.losses import prior_bits_per_dim
from adaptive_ts.experiment.assembly.build import Built, build, check_classes
from adaptive_ts.experiment.assembly.state import TrainState, abstract
from adaptive_ts.experiment.assembly.step import density_timesteps, prepare, train_steps
from adaptive_ts.experiment.checkpoints.folder import Checkpoints, open_checkpoints
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset, is_latent
from adaptive_ts.experiment.data.loading import batches, load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.evaluate.likelihood import Strata, geometric_strata
from adaptive_ts.experiment.generate.making import image_batches
from adaptive_ts.experiment.quality.features import FeatureChoice, ImageFeatures, image_features
from adaptive_ts.experiment.quality.metrics import frechet_distance, gaussian
from adaptive_ts.experiment.tables.programs import functions_of, held_out_batch
from adaptive_ts.types import Key, Params

EVALUATIONS = 12  # on the way, on one batch of held-out images
BATCHES = 4  # of held-out images at the end
_DENSITY_POINTS = 25
_USUAL = FeatureChoice()


class _Entry(NamedTuple):
    """What the runs of all seeds share; everything in it is compiled once."""

    config: Config
    mesh: Mesh
    built: Built
    train: Dataset
    test: Dataset
    functions: Mapping[Any, Callable[..., Any]]
    target: TrainState
    generate: Callable[[Params, Key], Iterator[np.ndarray]]
    features: ImageFeatures
    strata: Strata
    prior: float
    image_evaluations: int
    folder: Path | None
    on_steps: Callable[[int], None]


class _Progress(NamedTuple):
    """What a run has measured so far; it goes into its checkpoints."""

    curve: list[list[float]]
    frechet_curve: list[list[float]]
    seconds: float


def contest(
    config: Config,
    seeds: Sequence[int],
    *,
    image_evaluations: int = 1,
    features: FeatureChoice = _USUAL,
    folder: Path | None = None,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Iterator[dict[str, Any]]:
    """Trains a config for each seed; yields one record per run, as soon as it is done.

    A record holds ``seed``; ``curve``, rows of (step, seconds of training, VLB in bits/dim,
    eps-MSE) on 64 held-out images; ``seconds`` of training; ``vlb`` and ``mse`` on 256 of them;
    ``mse_by_timestep`` (at ``timesteps``); ``frechet``, of ``generate.num_images`` images against
    the training images, and ``frechet_curve``, rows of (step, seconds, Frechet distance);
    ``density``, T p(t) at the end, at 25 evenly spaced timesteps; ``data``, the images'
    fingerprint. The held-out images, their noise and the noise that images are made from are the
    same in all runs.

    Args:
      config: of the runs but for the seed.
      seeds: of the runs.
      image_evaluations: how often images are made, evenly spaced, the end included.
      features: what images are compared in.
      folder: where runs are saved every ``train.save_every`` steps until they are done, and found
        again; None: nowhere.
      on_steps: told now and then how many steps were done since it was told last.
    """
    entry = _prepare(config, image_evaluations, features, folder, on_steps)
    for seed in seeds:
        yield {"seed": seed, **_run(entry, seed)}


def _prepare(
    config: Config,
    image_evaluations: int,
    features: FeatureChoice,
    folder: Path | None,
    on_steps: Callable[[int], None],
) -> _Entry:
    mesh = sharding.make_mesh()
    built = build(config, mesh)
    train, test = (load_split(config.data, split, lambda line: None) for split in ("train", "test"))
    check_classes(config, train)
    strata = geometric_strata(built.parts.grid.num_buckets)
    jobs, init = functions_of(config, built, train, mesh)
    with compiling(jobs, once=("init",)) as compiled:
        functions = {name: compiled(name) for name in jobs}
    held_out = [prepare(held_out_batch(test, i)[0], None)["image"] for i in range(BATCHES)]
    prior = np.mean([prior_bits_per_dim(built.schedule, jnp.asarray(x)) for x in held_out])
    return _Entry(
        config=config,
        mesh=mesh,
        built=built,
        train=train,
        test=test,
        functions=functions,
        target=abstract(init, seed_key(0), mesh),
        generate=image_batches(
            config, built, train.images.shape[1:], mesh, latents=is_latent(train.images.dtype)
        ),
        features=image_features(config.data, features, mesh, lambda line: None),
        strata=strata,
        prior=float(prior),
        image_evaluations=image_evaluations,
        folder=folder,
        on_steps=on_steps,
    )


def _run(entry: _Entry, seed: int) -> dict[str, Any]:
    with _saving(entry, seed) as checkpoints:
        return _trained(entry, seed, checkpoints)


def _trained(entry: _Entry, seed: int, checkpoints: Checkpoints | None) -> dict[str, Any]:
    config, total, every = entry.config, entry.config.train.steps, entry.built.probe_every
    key_init, key = jax.random.split(seed_key(seed))
    start, state, progress = 0, None, _Progress([], [], 0.0)
    found = checkpoints and checkpoints.restore_latest(entry.target, lambda line: None)
    if found:
        start, state, progress = found[0], found[1], _Progress(*found[2]["progress"])
    else:
        state = entry.functions["init"](key_init)
    data = batches(entry.train, batch_size=config.train.batch_size, seed=seed, start_step=start)
    likelihood_at, images_at = _marks(total, EVALUATIONS), _marks(total, entry.image_evaluations)
    entry.on_steps(start)
    told, began = start, time.perf_counter()
    placed = (sharding.put_batch(batch, entry.mesh) for batch in data)
    steps = train_steps(
        entry.functions.__getitem__, state, placed, key, start=start, stop=total, every=every
    )
    for taken in steps:
        number, state = taken.number, taken.state
        save = checkpoints is not None and number % config.train.save_every == 0 and number < total
        if not (save or number in likelihood_at or number in images_at):
            continue
        jax.block_until_ready(state)
        progress = progress._replace(seconds=progress.seconds + time.perf_counter() - began)
        here = [number, round(progress.seconds, 2)]
        if number in likelihood_at:
            mse, vlb = _measure(entry, state.ema, 1)
            progress.curve.append([*here, *_totals(entry, vlb, mse)])
        if number in images_at:
            progress.frechet_curve.append([*here, _frechet(entry, state.ema)])
        if save and checkpoints is not None:
            checkpoints.save(number, state, {"progress": list(progress)})
        entry.on_steps(number - told)
        told, began = number, time.perf_counter()
    return _record(entry, state, taken.batch, progress)


def _record(
    entry: _Entry, state: TrainState, batch: dict[str, jax.Array], progress: _Progress
) -> dict[str, Any]:
    mse, vlb = _measure(entry, state.ema, BATCHES)
    total_vlb, total_mse = _totals(entry, vlb, mse)
    density = np.asarray(entry.functions["density"](state.sampler, batch))
    at = np.linspace(0, len(density) - 1, _DENSITY_POINTS).round().astype(int)
    return {
        "steps": entry.config.train.steps,
        "seconds": round(progress.seconds, 2),
        "vlb": total_vlb,
        "mse": total_mse,
        "frechet": progress.frechet_curve[-1][2],
        "features": entry.features.about,
        "data": entry.train.fingerprint,
        "curve": progress.curve,
        "frechet_curve": progress.frechet_curve,
        "timesteps": entry.strata.timesteps.tolist(),
        "mse_by_timestep": [_rounded(x) for x in mse],
        "density": [_rounded(density[i]) for i in at],
        "density_timesteps": np.asarray(density_timesteps(entry.built.parts.grid))[at].tolist(),
    }


@contextlib.contextmanager
def _saving(entry: _Entry, seed: int) -> Iterator[Checkpoints | None]:
    """Where a run is saved while it goes on; removed when it is done."""
    if entry.folder is None or entry.config.train.save_every >= entry.config.train.steps:
        yield None
        return
    folder = entry.folder / f"seed{seed}"
    # To pyrefly a field that holds a function is no method.
    # pyrefly: ignore[bad-specialization]
    with contextlib.closing(open_checkpoints(folder, max_to_keep=1)) as checkpoints:
        yield checkpoints
        checkpoints.wait()
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # not empty: another seed's is still there
        entry.folder.rmdir()
        entry.folder.parent.rmdir()


def _marks(total: int, count: int) -> set[int]:
    return {round(total * (i + 1) / count) for i in range(count)}


def _measure(entry: _Entry, params: Params, num: int) -> tuple[np.ndarray, np.ndarray]:
    """(k,) mean eps-MSE and (k,) mean VLB term at each stratum, over the first batches."""
    found = []
    for i in range(num):
        batch, index = sharding.put_whole(held_out_batch(entry.test, i), entry.mesh)
        found.append(np.asarray(entry.functions["errors"](params, batch, index)))
    mse = np.mean(found, axis=0)
    return mse.astype(np.float64), np.asarray(entry.functions["bits"](mse), np.float64)


def _frechet(entry: _Entry, params: Params) -> float:
    made = entry.generate(params, seed_key(2**31 - 2))
    features = np.concatenate([entry.features.extract(images) for images in made])
    return _rounded(frechet_distance(gaussian(features), entry.features.reference))


def _totals(entry: _Entry, vlb: np.ndarray, mse: np.ndarray) -> tuple[float, float]:
    """The VLB, bits/dim, and the mean over all timesteps of the eps-MSE."""
    sizes = entry.strata.sizes
    return _rounded(sizes @ vlb + entry.prior), _rounded(sizes @ mse / sizes.sum())


def _rounded(x: float | np.ndarray) -> float:
    return float(f"{float(x):.5g}")
