"""Continuous schedules against long double, closed forms and the golden rectified_flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adaptive_ts import diffusion, schedules
from adaptive_ts.timesteps.grid import continuous as continuous_grid
from adaptive_ts.timesteps.grid import open_unit

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONTINUOUS = {
    "rectified_flow": schedules.rectified_flow(),
    "rectified_flow_shift3": schedules.rectified_flow(shift=3.0),
    "vp_linear": schedules.vp_linear(),
    "vp_cosine": schedules.vp_cosine(),
    "vdm_linear": schedules.vdm_linear(),
    "ve_log_linear": schedules.ve_log_linear(),
}


def _reference(name, t):
    """(alpha, sigma) in long double."""
    t, pi = t.astype(np.longdouble), 4 * np.arctan(np.longdouble(1))
    if name.startswith("rectified_flow"):
        a = 3 if name.endswith("3") else 1
        return (1 - t) / (1 + (a - 1) * t), a * t / (1 + (a - 1) * t)
    if name == "vp_linear":
        b = np.longdouble(19.9) / 2 * t**2 + np.longdouble(0.1) * t
        return np.exp(-b / 2), np.sqrt(-np.expm1(-b))
    if name == "vp_cosine":
        return np.sin(pi / 2 * (1 - t)), np.sin(pi / 2 * t)
    if name == "vdm_linear":
        gamma = np.longdouble(-13.3) + t * np.longdouble(18.3)
        return 1 / np.sqrt(1 + np.exp(gamma)), 1 / np.sqrt(1 + np.exp(-gamma))
    low, high = np.log(np.longdouble(0.002)), np.log(np.longdouble(80))
    return np.ones_like(t), np.exp((1 - t) * low + t * high)


def _times():
    """Dense at both ends, 0 and 1 included: float32 up to the neighbours of 0 and 1."""
    near_0 = np.geomspace(1e-30, 0.5, 400)
    near_1 = 1 - np.geomspace(2.0**-24, 0.5, 400)
    return np.sort(np.concatenate([[0, 1], near_0, near_1]).astype(np.float32))


def _slope(name, t):
    """d log SNR / dt, by hand."""
    if name == "vp_linear":
        return -(0.1 + 19.9 * t) / -np.expm1(-(9.95 * t**2 + 0.1 * t))
    if name == "vp_cosine":
        return -2 * np.pi / np.sin(np.pi * np.minimum(t, 1 - t))
    if name == "vdm_linear":
        return np.full_like(t, -18.3)  # half of it, 9.15, is VDM's weight
    if name == "ve_log_linear":
        return np.full_like(t, -2 * np.log(80 / 0.002))
    return -2 / (t * (1 - t))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_schedules_against_long_double(strict, name):
    schedule, t = CONTINUOUS[name], _times()
    assert schedule.num_timesteps is None and schedule.betas is None

    @jax.jit
    def at(t):
        slope = jax.vmap(jax.grad(schedule.log_snr))(t)
        return schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), slope

    with strict():
        alpha, sigma, log_snr, slope = at(jnp.asarray(t))
    assert alpha.dtype == sigma.dtype == log_snr.dtype == jnp.float32
    with np.errstate(divide="ignore"):
        want_alpha, want_sigma = _reference(name, t)
        lam = np.clip(2 * (np.log(want_alpha) - np.log(want_sigma)), -40, 40).astype(float)
    np.testing.assert_allclose(alpha, want_alpha.astype(float), rtol=1e-6)
    np.testing.assert_allclose(sigma, want_sigma.astype(float), rtol=1e-6)
    np.testing.assert_allclose(log_snr, lam, atol=4e-6, rtol=0)  # float32's spacing at 40
    assert np.all(np.diff(log_snr) <= 0)
    assert np.all(np.isfinite(slope))
    inside = (np.abs(lam) < 39.9) & (t > 0) & (t < 1)
    np.testing.assert_allclose(slope[inside], _slope(name, t[inside].astype(float)), rtol=3e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_log_snr_inverts_both_ways(strict, name):
    """To the roundings of log-SNR and of t, each carried over by the slope."""
    schedule = CONTINUOUS[name]
    inverse, forward = jax.jit(schedule.from_log_snr), jax.jit(schedule.log_snr)
    t = _times()[1:-1]
    with strict():
        levels = forward(jnp.asarray(t))
        back = np.asarray(inverse(levels))
        ends = np.asarray(forward(jnp.asarray([1.0, 0.0])))
        lam = np.linspace(*ends, 1003, dtype=np.float32)[1:-1]
        there = inverse(jnp.asarray(lam))
        again = np.asarray(forward(there))
        outside = inverse(jnp.asarray([np.inf, 100.0, -100.0, -np.inf], jnp.float32))
    free = np.abs(levels) < 40
    error, slope = np.abs(back - t), -_slope(name, t.astype(float))
    np.testing.assert_array_less(error[free], (4e-6 / slope + 2 * np.spacing(t))[free])
    there = np.asarray(there)
    assert there.dtype == np.float32 and np.all((there >= 0) & (there <= 1))
    in_1 = there == 1  # float32 has no t between 1 - 6e-8 and 1
    assert np.all(lam[in_1] < -30) or not in_1.any()
    rounding = -_slope(name, there[~in_1].astype(float)) * 2 * np.spacing(there[~in_1])
    np.testing.assert_array_less(np.abs(again - lam)[~in_1], 4e-6 + rounding)
    np.testing.assert_allclose(outside, [0, 0, 1, 1], atol=1e-7)


def test_continuous_schedules_on_the_grid_in_shard_map(mesh8, strict):
    """Each device its part, equal to the whole; finite for every t that a grid can draw."""
    grid = continuous_grid(100)
    u = jnp.linspace(0, 1, 64)

    def everything(u):
        t = grid.to_t(open_unit(u))
        parts = [f(t) for s in CONTINUOUS.values() for f in (s.alpha, s.sigma, s.log_snr)]
        return jnp.stack(parts)

    with strict():
        want = jax.jit(everything)(u)
        shards = jax.shard_map(
            everything, mesh=mesh8, in_specs=P("data"), out_specs=P(None, "data")
        )
        got = jax.jit(shards)(u)
    assert np.all(np.isfinite(want)) and np.all(want[1::3] > 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_vp_linear_is_the_limit_of_linear_and_of_edms_sigma():
    t = np.arange(2000, 100_000, 7)
    want = schedules.linear(100_000, rescale=True).log_snr(jnp.asarray(t))
    got = CONTINUOUS["vp_linear"].log_snr(jnp.asarray((t + 1) / 1e5, jnp.float32))
    np.testing.assert_allclose(got, want, atol=2e-3)
    s = jnp.linspace(0.01, 1, 100)
    sigma = CONTINUOUS["vp_linear"].sigma(s) / CONTINUOUS["vp_linear"].alpha(s)
    edm = np.sqrt(np.exp(0.5 * 19.9 * np.asarray(s, float) ** 2 + 0.1 * np.asarray(s, float)) - 1)
    np.testing.assert_allclose(sigma, edm, rtol=3e-6)


def test_vp_cosine_is_cosine_without_its_offset():
    t = np.arange(999)  # the last beta of the discrete one is held at 0.999
    want = schedules.cosine(s=0.0).log_snr(jnp.asarray(t))
    got = CONTINUOUS["vp_cosine"].log_snr(jnp.asarray((t + 1) / 1000, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-4)  # of 1 - t, rounded, near t = 1


def test_ends_of_the_published_ranges():
    both = jnp.asarray([0.0, 1.0])
    np.testing.assert_allclose(CONTINUOUS["vdm_linear"].log_snr(both), [13.3, -5], rtol=1e-6)
    np.testing.assert_allclose(CONTINUOUS["ve_log_linear"].sigma(both), [0.002, 80], rtol=1e-6)
    for name in ("rectified_flow", "vp_cosine"):
        np.testing.assert_array_equal(CONTINUOUS[name].log_snr(both), [40, -40])
        np.testing.assert_array_equal(CONTINUOUS[name].alpha(both), [1, 0])


def test_golden_rectified_flow(golden):
    g = golden("rectified_flow")
    s = jnp.asarray(g["sigma"], jnp.float32)
    flow = CONTINUOUS["rectified_flow"]
    np.testing.assert_allclose(flow.sigma(s), g["sigma"], rtol=1e-7)
    np.testing.assert_allclose(flow.alpha(s), g["alpha"], rtol=1e-4, atol=6e-8)  # 1 - float32(s)
    np.testing.assert_allclose(flow.log_snr(s), np.maximum(g["logsnr"], -40), atol=2e-4)
    shifted = CONTINUOUS["rectified_flow_shift3"].sigma(s)
    np.testing.assert_allclose(shifted, g["sigma_shift3"], rtol=2e-7)
    moved = CONTINUOUS["rectified_flow_shift3"].log_snr(s) - flow.log_snr(s)
    np.testing.assert_allclose(moved[:-1], -2 * np.log(3), atol=5e-6)  # a shift is one of log-SNR


def test_errors_of_the_three_predictions_differ_by_a_factor_of_t(golden):
    """||flow err||^2 = ||eps err||^2 / (1 - s)^2 = ||x0 err||^2 / s^2, at the same x_t."""
    g, flow = golden("rectified_flow"), CONTINUOUS["rectified_flow"]
    pick = (g["sigma"] > 0.05) & (g["sigma"] < 0.95)
    s = jnp.asarray(g["sigma"][pick], jnp.float32)
    rng = np.random.default_rng(0)
    x0, noise, error = (
        jnp.asarray(rng.standard_normal((s.size, 4, 4, 1)), jnp.float32) for _ in range(3)
    )
    x_t = diffusion.corrupt(flow, x0, noise, s)
    output = diffusion.prediction_target(flow, "flow", x0, noise, s) + error
    eps = diffusion.predicted_eps(flow, "flow", output, x_t, s)
    s4 = s.reshape(-1, 1, 1, 1)
    guess = (x_t - s4 * eps) / (1 - s4)
    mse = lambda x: np.mean(np.asarray(x, np.float64) ** 2, (1, 2, 3))  # noqa: E731
    np.testing.assert_allclose(mse(error), mse(eps - noise) * g["v_weight_to_eps"][pick], rtol=1e-4)
    np.testing.assert_allclose(mse(error), mse(guess - x0) * g["v_weight_to_x0"][pick], rtol=1e-3)


def test_gnobitabs_rectified_flow_runs_the_other_way(golden):
    """Their x = t data + (1 - t) z_0 and target data - z_0: ours at 1 - t, negated."""
    theirs = golden("rectified_flow")["gnobitab_t"]
    assert theirs.min() == pytest.approx(1e-3)  # they draw t from (1e-3, 1); 1 is data
    rng = np.random.default_rng(1)
    data, z0 = (rng.standard_normal((theirs.size, 3, 3, 1)).astype(np.float32) for _ in range(2))
    t = theirs.reshape(-1, 1, 1, 1)
    ours = jnp.asarray(1 - theirs, jnp.float32)
    x = diffusion.corrupt(CONTINUOUS["rectified_flow"], data, z0, ours)
    target = diffusion.prediction_target(CONTINUOUS["rectified_flow"], "flow", data, z0, ours)
    np.testing.assert_allclose(x, t * data + (1 - t) * z0, atol=1e-6)
    np.testing.assert_array_equal(target, -(data - z0))


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_the_inverse_of_the_cosine_has_the_right_slope(value):
    """t = (2 / pi) arctan(exp(-lambda / 2)): dt / dlambda = -1 / (2 pi cosh(lambda / 2))."""
    slope = jax.grad(schedules.vp_cosine().from_log_snr)(value)
    assert float(slope) == pytest.approx(-1 / (2 * np.pi * np.cosh(value / 2)), rel=1e-5)
