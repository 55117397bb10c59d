"""Diagnostics of a run: a linear model whose gradients NumPy knows, on one device and on eight."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptive_ts.diffusion.losses import ExampleLoss
from adaptive_ts.experiment.config.groups import Config, ScheduleConfig
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.data.decoding import Records
from adaptive_ts.experiment.data.loading import from_arrays
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.evaluate import measure

T, RATE = 200, 0.1
SLOPES = np.linspace(0.5, 3, T).astype(np.float32)


def at(params, batch, t, key, index):
    """(slope[t] p - pixel)^2 / 2, without noise."""
    return 0.5 * (jnp.asarray(SLOPES)[t] * params - batch["image"][:, 0, 0, 0]) ** 2


def linear_run(params):
    optimizer = optax.sgd(RATE)
    parts = SimpleNamespace(loss_fn=ExampleLoss(at), optimizer=optimizer)
    state = SimpleNamespace(params=params, opt_state=optimizer.init(params))
    return SimpleNamespace(built=SimpleNamespace(parts=parts, loss=ExampleLoss(at)), state=state)


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 1), np.uint8)


@pytest.mark.parametrize("devices", [1, 8])
def test_diagnostics_in_closed_form(devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    params = jax.device_put(jnp.float32(0.7), sharding.replicated(mesh))
    config = Config(schedule=ScheduleConfig(num_timesteps=T))
    train, other = from_arrays(images(200, 0)), from_arrays(images(40, 1))
    told = []
    found = measure.diagnose(config, linear_run(params), train, other, mesh, tell=told.append)
    t = measure.diagnostic_timesteps(T)
    assert sum(told) == 2 * len(t) and 20 < len(t) <= 28
    np.testing.assert_array_equal(found.timesteps, t)

    slopes = SLOPES[t].astype(np.float64)[:, None]
    on = train.images[np.arange(64) * 200 // 64, 0, 0, 0] / 127.5 - 1
    off = other.images[:, 0, 0, 0] / 127.5 - 1  # of fewer than 64, all
    grads = slopes * (0.7 * slopes - on)
    np.testing.assert_allclose(found.noise.variance, grads.var(1, ddof=1), rtol=1e-4)
    square = grads.mean(1) ** 2 - grads.var(1, ddof=1) / 64
    np.testing.assert_allclose(found.noise.mean_square, square, rtol=1e-3, atol=1e-4)

    after = 0.7 - RATE * grads.mean(1)
    losses = [0.5 * ((slopes * p - off) ** 2).mean(1) for p in (0.7, *after)]
    np.testing.assert_allclose(found.effects, losses[0] - np.array(losses[1:]), atol=2e-6)


def test_examples_in_record_files_with_their_labels():
    mesh, data = sharding.make_mesh(), from_arrays(images(200, 0), np.arange(200) % 7)
    records = Records(data.images.shape, lambda index: (data.images[index], data.labels[index]))
    for dataset in (data, data._replace(images=records, labels=data.labels[:0])):
        batch = measure._examples(dataset, mesh)
        index = np.arange(64) * 200 // 64
        np.testing.assert_allclose(batch["image"], data.images[index] / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(batch["label"], index % 7)


def test_the_bound_has_the_noise_of_the_run_s_end(monkeypatch):
    asked = {}

    def evaluate(built, params, dataset, size, key, mesh, **options):
        asked.update(options, size=size, key=jax.random.key_data(key).tolist())

    monkeypatch.setattr(measure, "evaluate", evaluate)
    trained = SimpleNamespace(built=None, state=SimpleNamespace(ema=None))
    config = replace(Config(), {"train.batch_size": 12, "seed": 5})
    mesh = sharding.make_mesh()
    measure.held_out_likelihood(config, trained, None, mesh, num_images=9, tell=print)
    assert (asked["size"], asked["max_images"], asked["tell"]) == (16, 9, print)
    _, key = jax.random.split(jax.random.key(5))
    expected = jax.random.split(jax.random.fold_in(key, 2**31 - 1))[0]
    assert asked["key"] == jax.random.key_data(expected).tolist()
