"""Data whose best predictions are known in closed form, as models for the solvers."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts.diffusion.corruption import prediction_target

SHAPE = (1, 3, 1)  # three dimensions, as an image
MEAN = np.array([0.3, -0.5, 0.1])
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
SPREAD = np.array([0.6, 0.4, 0.25])  # standard deviations along the columns of TURN
COVARIANCE = TURN @ np.diag(SPREAD**2) @ TURN.T


def as_model(schedule, denoise, kind="eps"):
    """From denoise(x (b, d), alpha (b, 1), sigma (b, 1), *label) = E[x0 | x_t] to a model."""

    def predict(params, x, t, *label):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        flat = x.reshape(len(x), -1)
        x0 = denoise(flat, alpha, sigma, *label)
        output = prediction_target(schedule, kind, x0, (flat - alpha * x0) / sigma, t)
        return output.reshape(x.shape)

    return predict


def gaussian(x, alpha, sigma):
    """Of N(MEAN, COVARIANCE), for jax and NumPy; alpha and sigma may be numbers."""
    # Constants in the type of x: float64 ones would make jax's float32 arrays strict or wide.
    turn, mean, variance = (v.astype(x.dtype) for v in (TURN, MEAN[None], SPREAD[None] ** 2))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return mean + (gain * ((x - alpha * mean) @ turn)) @ turn.T


def ode_end(start, alpha, sigma):
    """Where the probability flow takes x (b, 3) at (alpha, sigma): the same quantiles, at t = 0."""
    turned = (start - alpha * MEAN) @ TURN
    return MEAN + (turned * SPREAD / np.sqrt(alpha**2 * SPREAD**2 + sigma**2)) @ TURN.T


class Mixture:
    """Some isotropic Gaussians of one width: weights (k,), means (k, d)."""

    def __init__(self, weights, means, width):
        self.weights, self.means, self.width = np.asarray(weights), np.asarray(means), width
        self.mean = self.weights @ self.means
        centred = self.means - self.mean
        self.covariance = (centred.T * self.weights) @ centred + width**2 * np.eye(len(self.mean))

    def denoise(self, x, alpha, sigma):
        means = self.means.astype(x.dtype)[None]
        total = alpha**2 * self.width**2 + sigma**2
        away = x[:, None] - alpha[..., None] * means
        logits = np.log(self.weights).astype(x.dtype)[None]
        share = jax.nn.softmax(logits - jnp.sum(away**2, axis=-1) / (2 * total), axis=-1)
        inside = means + (alpha * self.width**2 / total)[..., None] * away
        return jnp.sum(share[..., None] * inside, axis=1)


def first_noise(key, count, number, shape=SHAPE):
    """(count, d): the noise that images 0, 1, .. begin with, drawn as the generator does."""

    def draw(index):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index), number), shape)

    return np.asarray(jax.vmap(draw)(jnp.arange(count))).reshape(count, -1)
