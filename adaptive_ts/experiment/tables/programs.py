"""What the runs of a table compile, and a hash of it: which version of the code a result is of."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.collectives import seed_key
from adaptive_ts.diffusion.losses import vlb_terms
from adaptive_ts.experiment.assembly.build import Built, build, first_state
from adaptive_ts.experiment.assembly.state import TrainState
from adaptive_ts.experiment.assembly.step import make_density, make_step, prepare
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.data.decoding import Dataset
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.evaluate.likelihood import geometric_strata
from adaptive_ts.types import Batch, Key, Params, PerBucket

BATCH = 64  # held-out images at once

Jobs = dict[Any, tuple[Any, tuple[Any, ...]]]


def functions_of(
    config: Config, built: Built, train: Dataset, mesh: Mesh
) -> tuple[Jobs, Callable[[Key], TrainState]]:
    """Name -> (jitted function, abstract arguments), and the function that makes the first state.

    The names: the values of ``probe`` that the steps have (False, True; None without probes),
    ``"init"`` (key), ``"density"`` (sampler state, batch), ``"errors"`` (params, held-out batch,
    index) -> (k,) mean eps-MSE by stratum, ``"bits"`` (k,) of these -> (k,) VLB terms.
    """
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    shape = train.images.shape[1:]
    size = config.train.batch_size
    key = seed_key(0)
    init, state = first_state(built, (size, *shape), key, mesh)
    batch, held_out = (
        {
            "image": jax.ShapeDtypeStruct((n, *shape), train.images.dtype, sharding=rows),
            "label": jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows),
        }
        for n in (size, BATCH)
    )
    index = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=rows)
    strata = geometric_strata(built.parts.grid.num_buckets)
    found = jax.ShapeDtypeStruct((len(strata.timesteps),), jnp.float32, sharding=whole)
    timesteps = jnp.asarray(strata.timesteps)
    variants = (False, True) if built.probe_every else (None,)
    jobs = {v: (make_step(built.parts, probe=v), (state, batch, key)) for v in variants}
    jobs |= {
        "init": (jax.jit(init, out_shardings=whole), (key,)),
        "density": (make_density(built.parts), (state.sampler, batch)),
        "errors": (_errors(built, timesteps), (state.ema, held_out, index)),
        "bits": (_bits(config, built, timesteps), (found,)),
    }
    return jobs, init


def held_out_batch(test: Dataset, number: int) -> tuple[Batch, np.ndarray]:
    """The images and labels of one batch, and their index, which their noise follows.

    A set of fewer images begins anew, with other noise.
    """
    index = np.arange(number * BATCH, (number + 1) * BATCH, dtype=np.int32)
    images, labels = test.rows(index % test.images.shape[0])
    return {"image": images, "label": labels}, index


def program(config: Config) -> str:
    """12 hex digits of what the compiler is given for a run: another version of it, other digits.

    Not in it: the order of the data, the solver and the distance of the images, the packages
    underneath JAX.
    Lowered for one CPU device wherever it runs, so that a machine makes no difference.
    """
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build(config, mesh)
    train = load_split(config.data, "train", lambda line: None)
    jobs, _ = functions_of(config, built, train, mesh)
    digest = hashlib.sha256()
    for name, (function, args) in jobs.items():
        text = function.trace(*args).lower(lowering_platforms=("cpu",)).as_text()
        digest.update(f"{name}\n{text}\n".encode())
    return digest.hexdigest()[:12]


def _errors(built: Built, timesteps: PerBucket) -> Callable[..., PerBucket]:
    key = seed_key(2**31 - 1)

    @jax.jit
    def errors(params: Params, batch: Batch, index: jax.Array) -> PerBucket:
        batch = prepare(batch, None)

        def at(t: jax.Array) -> jax.Array:  # the same noise at every t
            losses = built.eps_loss.at(params, batch, jnp.full(index.shape, t), key, index)
            return jnp.mean(losses)

        return jax.lax.map(at, timesteps)

    return errors


def _bits(config: Config, built: Built, timesteps: PerBucket) -> Callable[[PerBucket], PerBucket]:
    @jax.jit
    def bits(mse: PerBucket) -> PerBucket:
        # The term is affine in the squared error: that of the mean error is the mean term.
        error = jnp.sqrt(mse)[:, None]
        zero, variance = jnp.zeros_like(error), config.model.variance
        return vlb_terms(built.schedule, zero, zero, error, timesteps, variance=variance)

    return bits
