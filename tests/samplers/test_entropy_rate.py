"""InfoNoise on Gaussian data, whose conditional entropy is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learned_laws import BATCH, GRIDS, LINEAR, learn, probabilities, straight_line

import adaptive_ts as ats
from adaptive_ts.samplers.tabular import entropy_rate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def gaussian_losses(log_snr, prediction, variance):
    """The exact losses for x_0 ~ N(0, variance): mmse = variance sigma^2 / (variance + sigma^2)."""
    snr = np.exp(np.asarray(log_snr, np.float64))
    mmse = variance / (variance * snr + 1)
    return mmse * {"eps": snr, "x0": 1, "v": snr + 1, "flow": (1 + np.sqrt(snr)) ** 2}[prediction]


def entropy_lost(log_snr, variance):
    """The integral of mmse / sigma^3 from sigma = 0, plus a constant: H(x_0 | x_t)."""
    sigma = np.exp(-np.asarray(log_snr, np.float64) / 2)
    return np.log(sigma) - np.log(variance + sigma**2) / 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("num_buckets", [1000, 100])
def test_entropy_rate_of_gaussian_data(prediction, num_buckets):
    variance = 0.25
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    sampler = entropy_rate(
        ats.discrete(1000), LINEAR, prediction=prediction, gate=None, num_buckets=num_buckets,
        uniform_prob=0.0, weighting=jnp.ones_like,
    )  # fmt: skip
    losses = gaussian_losses(log_snr, prediction, variance)
    state, _ = learn(sampler, (np.arange(1000), losses))
    middle = (log_snr[1:] + log_snr[:-1]) / 2
    ends = 2 * log_snr[[0, -1]] - middle[[0, -1]]
    entropy = entropy_lost(np.concatenate([ends[:1], middle, ends[1:]]), variance)
    expected = np.diff(entropy)[::1].reshape(num_buckets, -1).sum(1) / np.ptp(entropy)
    found = probabilities(sampler, state).reshape(num_buckets, -1).sum(1)
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=1e-6)
    np.testing.assert_allclose(found[num_buckets // 20 :], expected[num_buckets // 20 :], rtol=2e-3)


def test_entropy_rate_in_continuous_time():
    variance, grid = 0.25, GRIDS["continuous"]
    schedule = straight_line()
    sampler = entropy_rate(
        grid, schedule, prediction="flow", gate=None, num_buckets=200, uniform_prob=0.0,
        weighting=jnp.ones_like,
    )  # fmt: skip
    t = grid.to_t((jnp.arange(20_000, dtype=jnp.float32) + 0.5) / 20_000)
    state, _ = learn(sampler, (t, gaussian_losses(schedule.log_snr(t), "flow", variance)))
    edges = np.linspace(1e-3, 1 - 1e-3, 201)
    entropy = entropy_lost(2 * np.log((1 - edges) / edges), variance)
    found = probabilities(sampler, state).reshape(200, -1).sum(1)
    np.testing.assert_allclose(found, np.diff(entropy) / np.ptp(entropy), rtol=0.01, atol=1e-6)


def test_entropy_rate_divides_by_the_weight_of_the_x0_error_and_gates_low_noise():
    grid, c, n = ats.discrete(1000), 0.3, 2.0
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    sigma = np.exp(-log_snr / 2)
    losses = gaussian_losses(log_snr, "eps", 0.25)

    def law(**options):
        sampler = entropy_rate(grid, LINEAR, num_buckets=1000, uniform_prob=0.0, **options)
        return probabilities(sampler, learn(sampler, (np.arange(1000), losses))[0])

    alone = {"weighting": jnp.ones_like}
    rate = law(gate=None, **alone)
    for options, factor in (
        ({"gate": (c, n), **alone}, sigma**n / (sigma**n + c**n)),
        (alone, sigma**3 / (sigma**3 + 0.15**3)),
        ({"gate": None}, sigma**2),  # the plain loss's own weight on the x_0 error is SNR
        (
            {"gate": None, "weighting": lambda x: jnp.minimum(jnp.exp(x), 5)},
            1 / np.minimum(sigma**-2, 5),
        ),
    ):
        expected = rate * factor
        np.testing.assert_allclose(law(**options), expected / expected.sum(), rtol=1e-4)


def test_entropy_rate_bounds_the_error_by_the_variance_of_the_data():
    """An eps model that has learned nothing: its implied error of x_0 is 1 / SNR without end."""
    grid = ats.discrete(1000)
    log_snr = np.asarray(LINEAR.log_snr(jnp.arange(1000)), np.float64)
    width = np.abs(np.gradient(log_snr))
    for variance in (1.0, 0.3, None):
        sampler = entropy_rate(
            grid, LINEAR, num_buckets=1000, uniform_prob=0.0, gate=None, data_variance=variance
        )
        state, _ = learn(sampler, (np.arange(1000), np.ones(1000)))
        mmse = np.minimum(np.exp(-log_snr), np.inf if variance is None else variance)
        expected = width * mmse
        np.testing.assert_allclose(
            probabilities(sampler, state), expected / expected.sum(), rtol=1e-3
        )
    _, metrics = learn(sampler, ([0, 1], [np.inf, 1.0]))
    assert metrics["nonfinite"] == 1  # a bound does not make it finite


def test_entropy_rate_shifts_the_objective_unless_told_otherwise():
    for importance_weighted in (False, True):
        sampler = entropy_rate(ats.discrete(1000), LINEAR, importance_weighted=importance_weighted)
        state, _ = learn(sampler, (np.arange(1000), np.ones(1000)))
        draw = sampler.sample(jax.random.key(0), state, BATCH)
        p = probabilities(sampler, state)[draw.t]
        expected = 1 / (1000 * p) if importance_weighted else np.ones(8)
        np.testing.assert_allclose(draw.weight, expected, rtol=1e-4)
