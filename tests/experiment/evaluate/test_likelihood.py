"""Held-out loss and VLB of a model that predicts a constant: against NumPy's own arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import adaptive_ts as ats
from adaptive_ts import diffusion
from adaptive_ts.experiment.assembly import build
from adaptive_ts.experiment.config.groups import Config, ModelConfig, ScheduleConfig
from adaptive_ts.experiment.config.sampler_groups import SamplerConfig
from adaptive_ts.experiment.data.loading import from_arrays
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.evaluate.likelihood import evaluate, geometric_strata

pytestmark = pytest.mark.usefixtures("quick_compilation")
T, C = 40, 0.3


def constant(params, x, t, batch, key):
    return jnp.full_like(x, params)


def setup(mesh, prediction="eps", variance="fixed_large", num_timesteps=T):
    config = Config(
        model=ModelConfig(channels=4, multipliers=(1,), attention=(False,)),
        sampler=SamplerConfig(name="uniform"),
        schedule=ScheduleConfig(num_timesteps=num_timesteps),
    )
    built = build.build(config, mesh)
    loss = diffusion.denoising_loss(constant, built.schedule, prediction=prediction)
    vlb = diffusion.vlb_loss(constant, built.schedule, prediction=prediction, variance=variance)
    return built._replace(loss=loss, vlb=vlb)


def digits_like(count, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return from_arrays(images, name="noise")


def numpy_vlb(betas, mse, variance):
    """(T,) bits/dim: Ho et al. 2020, Eq. 12 with KL between Gaussians of different variances."""
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    posterior = betas * (1 - before) / (1 - abar)
    clipped = np.append(posterior[1], posterior[1:])
    model = np.append(posterior[1], betas[1:]) if variance == "fixed_large" else clipped
    squared_mean_error = betas**2 / ((1 - betas) * (1 - abar)) * mse
    ratio = clipped / model
    return (squared_mean_error / model + ratio - 1 - np.log(ratio)) / (2 * np.log(2))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_constant_noise_prediction(mesh8, variance):
    data = digits_like(64)
    built = setup(mesh8, variance=variance)
    result = evaluate(built, jnp.float32(C), data, 32, jax.random.key(1), mesh8)
    assert result.num_images == 64
    np.testing.assert_array_equal(result.timesteps, np.arange(T))
    # E (c - eps)^2 = c^2 + 1, of variance 4 c^2 + 2 per pixel; every timestep has the same noise.
    expected, error = C**2 + 1, np.sqrt((4 * C**2 + 2) / (64 * 64))
    np.testing.assert_allclose(result.loss, expected, atol=5 * error)
    np.testing.assert_allclose(result.total_loss, result.loss.mean(), rtol=1e-12)
    betas = np.asarray(built.schedule.betas, np.float64)
    np.testing.assert_allclose(result.vlb, numpy_vlb(betas, result.loss, variance), rtol=1e-4)
    abar = np.prod(1 - betas)
    x0 = data.images / 127.5 - 1
    prior = (abar * np.mean(x0**2) - abar - np.log1p(-abar)) / (2 * np.log(2))
    np.testing.assert_allclose(result.total_vlb, T * result.vlb.mean() + prior, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_constant_prediction_of_the_image_or_the_velocity(mesh8, prediction):
    data = digits_like(128)
    built = setup(mesh8, prediction)
    result = evaluate(built, jnp.float32(C), data, 128, jax.random.key(1), mesh8)
    x0 = data.images / 127.5 - 1
    if prediction == "x0":
        np.testing.assert_allclose(result.loss, np.mean((C - x0) ** 2), rtol=1e-5)
        return
    abar = np.cumprod(1 - np.asarray(built.schedule.betas, np.float64))
    expected = abar + (1 - abar) * np.mean(x0**2) + C**2 + 2 * C * np.sqrt(1 - abar) * x0.mean()
    np.testing.assert_allclose(result.loss, expected, atol=5 * 2 / np.sqrt(128 * 64))


@pytest.mark.parametrize(
    "schedule", [ats.schedules.linear(1000), ats.schedules.quad(1000), ats.schedules.cosine(1000)]
)
def test_geometric_strata_integrate_the_vlb(schedule):
    """Of an eps-MSE that falls like 1 / (1 + t / 20), as trained models' do: within 1%."""
    strata = geometric_strata(1000)
    assert strata.sizes.sum() == 1000 and len(strata.sizes) < 48
    ends = strata.timesteps[[0, -1]], strata.sizes[[0, -1]]
    np.testing.assert_array_equal(ends, [[0, 999], [1, 1]])
    t = np.arange(1000)
    mse = np.sqrt(1 / (1 + t / 20))[:, None].astype(np.float32)
    bits = np.asarray(
        ats.diffusion.vlb_terms(schedule, 0 * mse, 0 * mse, mse, jnp.asarray(t)), np.float64
    )
    assert strata.sizes @ bits[strata.timesteps] == pytest.approx(bits.sum(), rel=0.01)


@pytest.mark.parametrize("num_timesteps", [2, 5, 10, 48])
def test_short_schedules_have_every_timestep(num_timesteps):
    strata = geometric_strata(num_timesteps)
    np.testing.assert_array_equal(strata.timesteps, np.arange(num_timesteps))
    np.testing.assert_array_equal(strata.sizes, np.ones(num_timesteps))


def test_strata_of_many_timesteps(mesh8):
    """A constant prediction has the same loss everywhere: the total is that of all timesteps."""
    built = setup(mesh8, num_timesteps=1000)
    result = evaluate(built, jnp.float32(C), digits_like(16), 16, jax.random.key(1), mesh8)
    strata = geometric_strata(1000)
    np.testing.assert_array_equal(result.timesteps, strata.timesteps)
    assert 0 < result.total_vlb - strata.sizes @ result.vlb < 1e-3, "the prior"
    betas = np.asarray(built.schedule.betas, np.float64)
    whole = numpy_vlb(betas, result.total_loss, "fixed_large").sum()
    assert result.total_vlb == pytest.approx(whole, rel=0.01)


def test_the_number_of_devices_and_the_batch_size_do_not_matter(mesh8):
    data = digits_like(32)
    one = sharding.make_mesh(jax.devices()[:1])
    key = jax.random.key(1)
    results = [
        evaluate(setup(mesh), jnp.float32(C), data, size, key, mesh)
        for mesh, size in ((mesh8, 32), (mesh8, 8), (one, 32))
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.loss, results[0].loss, rtol=1e-5)
        np.testing.assert_allclose(other.total_vlb, results[0].total_vlb, rtol=1e-5)


@pytest.mark.parametrize(("count", "size", "used"), [(300, 128, 256), (20, 8, 16), (3, 8, 8)])
def test_how_many_images_are_used(mesh8, count, size, used):
    built = setup(mesh8, num_timesteps=25)
    result = evaluate(built, jnp.float32(C), digits_like(count), size, jax.random.key(1), mesh8)
    assert result.num_images == used


def test_the_intervals_are_those_of_a_mean_over_images(mesh8):
    """Against scipy's standard error of each image's own sum over all T timesteps."""
    built, data, key = setup(mesh8), digits_like(24), jax.random.key(1)
    result = evaluate(built, jnp.float32(C), data, 8, key, mesh8)
    batch = {"image": data.images.astype(np.float32) / 127.5 - 1}
    index = jnp.arange(24, dtype=jnp.int32)
    terms = np.asarray(
        jax.lax.map(
            lambda t: built.vlb.at(jnp.float32(C), batch, jnp.full(24, t), key, index),
            jnp.arange(T),
        ),
        np.float64,
    )
    np.testing.assert_allclose(result.vlb_error, 1.96 * scipy.stats.sem(terms, axis=1), rtol=1e-3)
    prior = diffusion.prior_bits_per_dim(built.schedule, batch["image"])
    total = terms.sum(0) + np.asarray(prior)
    np.testing.assert_allclose(result.total_vlb_error, 1.96 * scipy.stats.sem(total), rtol=1e-3)
    few = evaluate(built, jnp.float32(C), data, 8, key, mesh8, max_images=8)
    assert few.num_images == 8 and few.total_vlb_error > result.total_vlb_error
