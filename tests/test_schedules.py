"""schedules.py against the reference implementations (golden) and independent closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_ts import diffusion

SCHEDULES = {
    "linear": diffusion.linear(),
    "quad": diffusion.quad(),
    "cosine": diffusion.cosine(),
    "linear_openai": diffusion.linear(rescale=True),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_schedules(golden, strict, name):
    g, schedule = golden("schedules"), SCHEDULES[name]
    np.testing.assert_allclose(schedule.betas[g["index"]], g[f"betas_{name}"], rtol=1e-12)
    t = jnp.asarray(g["index"], jnp.int32)
    with strict():
        alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    abar, snr = g[f"alphas_bar_{name}"], g[f"snr_{name}"]
    assert alpha.dtype == sigma.dtype == log_snr.dtype == jnp.float32
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-7)
    np.testing.assert_allclose(np.square(alpha / sigma, dtype=np.float64), snr, rtol=1e-6)
    np.testing.assert_allclose(log_snr, g[f"logsnr_{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [2, 10, 100, 4000])
def test_any_number_of_timesteps(T):
    """Against closed forms written down independently."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    ends = np.array([1e-4, 0.02]) * (1000 / T if T >= 100 else 1)
    steps = np.arange(T) / (T - 1)
    want = {
        "linear": ends[0] + (ends[1] - ends[0]) * steps,
        "quad": (np.sqrt(ends[0]) + (np.sqrt(ends[1]) - np.sqrt(ends[0])) * steps) ** 2,
        "cosine": np.minimum(1 - f[1:] / f[:-1], 0.999),
    }
    got = {
        "linear": diffusion.linear(T, rescale=T >= 100),
        "quad": diffusion.quad(T, rescale=T >= 100),
        "cosine": diffusion.cosine(T),
    }
    for name, schedule in got.items():
        np.testing.assert_allclose(schedule.betas, want[name], rtol=1e-10)
        assert schedule.num_timesteps == T
        t = jnp.arange(T, dtype=jnp.int32)
        abar = np.cumprod(1 - want[name])
        np.testing.assert_allclose(schedule.alpha(t) ** 2, abar, rtol=1e-6)
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-6)
        assert np.all(np.diff(schedule.log_snr(t)) < 0)  # t grows with noise
