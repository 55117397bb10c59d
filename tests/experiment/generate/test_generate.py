"""Image generation, on data whose best noise prediction is known in closed form: N(m, s^2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts.experiment.solvers.generator import make_generator
from adaptive_ts.experiment.solvers.steps import solver_timesteps

pytestmark = pytest.mark.usefixtures("quick_compilation")
M, S = 0.2, 0.15  # five deviations from 1: the clip to [-1, 1] does not touch it
SHAPE, IMAGES, T = (8, 8, 1), 256, 200
PIXELS = IMAGES * 64


def gaussian_eps(schedule):
    """E[eps | x_t] for x_0 = m + s z: sigma (x - alpha m) / (alpha^2 s^2 + sigma^2)."""

    def eps_fn(params, x, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        return sigma * (x - alpha * params) / (alpha**2 * S**2 + sigma**2)

    return eps_fn


def sample(indices, *, name="linear", T=T, seed=0, shape=SHAPE, **options):
    generate = generator(name, T, shape, **options)
    return np.asarray(generate(jnp.float32(M), jax.random.key(seed), jnp.asarray(indices)))


@functools.cache
def generator(name, T, shape, **options):
    schedule = getattr(ats.schedules, name)(T)
    return make_generator(gaussian_eps(schedule), schedule, shape, **options)


def exact(schedule, steps, eta, noise):
    """Mean and deviation that the solver reaches from N(0, 1) noise, in float64.

    Each step is linear in x: x0 = m + k (x - alpha m), with k = alpha s^2 / (alpha^2 s^2 + sigma^2)
    (Tweedie), so mean and variance follow by two recursions, written from the papers' formulas:
    DDIM's Eq. 12, and for "fixed_large" Eq. 7 of DDPM with beta of the step.
    """
    abar = np.cumprod(1 - np.asarray(schedule.betas, np.float64))
    t = solver_timesteps(len(abar), steps)
    mean, var = 0.0, 1.0
    for i, now in enumerate(abar[t]):
        then = abar[t[i + 1]] if i + 1 < steps else 1.0
        beta = 1 - now / then
        posterior = beta * (1 - then) / (1 - now)
        k = np.sqrt(now) * S**2 / (now * S**2 + 1 - now)
        if noise == "ddim":
            added = eta**2 * posterior
            c_eps = np.sqrt(1 - then - added) / np.sqrt(1 - now)
            c_x0, c_x = np.sqrt(then) - np.sqrt(now) * c_eps, c_eps
        else:
            added = 0.0 if then == 1.0 else {"fixed_small": posterior, "fixed_large": beta}[noise]
            c_x0 = np.sqrt(then) * beta / (1 - now)
            c_x = np.sqrt(now / then) * (1 - then) / (1 - now)
        slope = c_x0 * k + c_x
        mean = slope * mean + c_x0 * (M - k * np.sqrt(now) * M)
        var = slope**2 * var + added
    return mean, np.sqrt(var)


@pytest.mark.parametrize(
    ("solver", "steps", "eta", "variance", "deviation"),
    [
        # (.., how far the solver's own deviation may be from s, relative)
        ("ddpm", T, 0.0, "fixed_large", 0.06),
        ("ddpm", T, 0.0, "fixed_small", 0.06),
        ("ddpm", 20, 0.0, "fixed_small", 0.5),
        ("ddim", T, 0.0, "fixed_large", 0.06),
        ("ddim", T, 1.0, "fixed_large", 0.06),
        ("ddim", 20, 0.5, "fixed_large", 0.5),
    ],
)
def test_gaussian_data_come_out_with_their_mean_and_deviation(
    solver, steps, eta, variance, deviation
):
    options = {"solver": solver, "steps": steps, "eta": eta, "variance": variance}
    images = sample(np.arange(IMAGES), **options).astype(np.float64)
    mean, std = exact(ats.schedules.linear(T), steps, eta, "ddim" if solver == "ddim" else variance)
    assert abs(std / S - 1) < deviation and abs(mean - M) < 0.02, "the solver's own error"
    # Five standard errors of the mean and of the deviation of independent pixels: p < 1e-6.
    assert abs(images.mean() - mean) < 5 * std / np.sqrt(PIXELS)
    assert abs(images.std() / std - 1) < 5 / np.sqrt(2 * PIXELS)
    assert np.abs(images).max() <= 1
    flat = images.reshape(IMAGES, -1)
    near = np.corrcoef(flat[:-1].ravel(), flat[1:].ravel())[0, 1]
    assert abs(near) < 5 / np.sqrt(PIXELS), "neighbouring images share no noise"


@pytest.mark.parametrize("options", [{"solver": "ddpm"}, {"solver": "ddim"}, {"eta": 1.0}])
def test_an_image_depends_on_its_index_and_the_key_alone(options):
    def make(indices, seed=0):
        return sample(indices, name="cosine", T=40, seed=seed, steps=10, shape=(4, 4, 3), **options)

    whole = make(np.arange(8))
    parts = np.concatenate([make(np.arange(4)), make(np.arange(4, 8))])
    np.testing.assert_allclose(whole, parts, atol=1e-6)
    assert whole.shape == (8, 4, 4, 3) and len(np.unique(whole[:, 0, 0, 0])) == 8
    assert np.abs(make(np.arange(8), seed=1) - whole).max() > 0.01


def by_hand(schedule, steps, eta, large, indices):
    """The same images in float64: image i's noise at t is normal(fold_in(fold_in(key, i), t))."""
    abar = np.append(np.cumprod(1 - np.asarray(schedule.betas, np.float64)), 1.0)
    t = [*np.round(np.linspace(T - 1, 0, steps)).astype(int), T]  # abar[T] = 1, the clean image

    def noise(number):
        keys = [
            jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), number) for i in indices
        ]
        return np.stack([np.asarray(jax.random.normal(k, (2, 2, 1)), np.float64) for k in keys])

    x = noise(T)
    for i in range(steps):
        now, then = abar[t[i]], abar[t[i + 1]]
        score = (x - np.sqrt(now) * M) / (now * S**2 + 1 - now)
        x0 = np.clip((x - (1 - now) * score) / np.sqrt(now), -1, 1)
        eps = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        beta = 1 - now / then
        v = eta**2 * beta * (1 - then) / (1 - now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then - v) * eps
        x = x + np.sqrt(beta if large and then < 1 else v) * noise(t[i])
    return np.clip(x, -1, 1)


@pytest.mark.parametrize(
    ("options", "eta"), [({"solver": "ddpm"}, 1.0), ({"eta": 0.6}, 0.6), ({"eta": 0.0}, 0.0)]
)
def test_the_numbers_are_those_of_the_published_steps_and_of_these_keys(options, eta):
    """What images were made of before they can be made of again."""
    got = sample([3, 11], steps=4, shape=(2, 2, 1), **options)
    wanted = by_hand(ats.schedules.linear(T), 4, eta, "solver" in options, [3, 11])
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_ddim_without_noise_is_deterministic_after_the_first_draw():
    """The whole image is the first noise moved: the correlation with any eta 0 run is one."""
    coarse = sample(np.arange(8), steps=50).ravel()
    fine = sample(np.arange(8), steps=T).ravel()
    noisy = sample(np.arange(8), steps=T, eta=1.0).ravel()
    assert np.corrcoef(coarse, fine)[0, 1] > 0.9999
    assert abs(np.corrcoef(fine, noisy)[0, 1]) < 0.5


def test_images_are_clipped():
    schedule = ats.schedules.linear(20)
    generate = make_generator(lambda p, x, t: -5 * x, schedule, (2, 2, 1), solver="ddpm", steps=20)
    images = np.asarray(generate(None, jax.random.key(0), jnp.arange(4)))
    assert np.isfinite(images).all() and np.abs(images).max() <= 1


def test_solver_timesteps():
    np.testing.assert_array_equal(solver_timesteps(1000, 1000), np.arange(999, -1, -1))
    few = solver_timesteps(1000, 7)
    assert few[0] == 999 and few[-1] == 0 and len(set(few)) == 7 and few.dtype == np.int32
    np.testing.assert_array_equal(solver_timesteps(50, 1), [49])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be from 1 to 20, got 0"),
        ({"steps": 21}, "steps must be from 1 to 20, got 21"),
        ({"eta": -0.5}, "eta must be >= 0, got -0.5"),
        ({"solver": "dppm"}, "solver 'dppm' is unknown; did you mean 'ddpm'"),
        ({"variance": "learned"}, "'learned'"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        make_generator(
            lambda p, x, t: x, ats.schedules.linear(20), SHAPE, **{"steps": 5, **options}
        )
