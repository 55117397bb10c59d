"""The schedules against the reference implementations (golden) and independent closed forms."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_ts import diffusion, schedules
from adaptive_ts.schedules.base import VARIANCES

DISCRETE = {
    "linear": schedules.linear(),
    "quad": schedules.quad(),
    "cosine": schedules.cosine(),
    "linear_openai": schedules.linear(rescale=True),
    "const": schedules.constant_beta(),
    "jsd": schedules.jsd(),
    "warmup10": schedules.warmup(),
    "warmup50": schedules.warmup(fraction=0.5),
    "sigmoid_ddim": schedules.sigmoid_beta(),
}
OTHERS = {
    "sigmoid_lucidrains": schedules.sigmoid(),
    "sigmoid_jabri": schedules.sigmoid(max_beta=1.0),
    "zero_terminal": schedules.zero_terminal_snr(schedules.linear()),
}
CONTINUOUS = {
    "rectified_flow": schedules.rectified_flow(),
    "rectified_flow_shift3": schedules.rectified_flow(shift=3.0),
    "vp_linear": schedules.vp_linear(),
    "vp_cosine": schedules.vp_cosine(),
    "vdm_linear": schedules.vdm_linear(),
    "ve_log_linear": schedules.ve_log_linear(),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_golden_schedules(golden, strict, name):
    g, schedule = golden("schedules"), DISCRETE[name]
    np.testing.assert_allclose(schedule.betas[g["index"]], g[f"betas_{name}"], rtol=1e-12)
    t = jnp.asarray(g["index"], jnp.int32)
    with strict():
        alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    abar, snr = g[f"alphas_bar_{name}"], g[f"snr_{name}"]
    assert alpha.dtype == sigma.dtype == log_snr.dtype == jnp.float32
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-7)
    np.testing.assert_allclose(np.square(alpha / sigma, dtype=np.float64), snr, rtol=1e-6)
    held = np.maximum(g[f"logsnr_{name}"], -40)  # jsd ends at -inf
    np.testing.assert_allclose(log_snr, held, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["const", "warmup10", "warmup50", "sigmoid_ddim"])
def test_golden_posterior_of_the_rarer_schedules(golden, name):
    g = golden("schedules")
    for variance in VARIANCES:
        tables = schedules.posterior_tables(DISCRETE[name], variance)
        for got, key in (
            (tables.posterior_variance, f"{name}__posterior_var"),
            (tables.loss_coef, f"{name}__{variance}__loss_coef"),
        ):
            np.testing.assert_allclose(got[g["index"]], g[key], rtol=1e-10)


@pytest.mark.parametrize("T", [2, 10, 100, 4000])
def test_any_number_of_timesteps(T):
    """Against closed forms written down independently."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    rescale = T >= 100
    ends = np.array([1e-4, 0.02]) * (1000 / T if rescale else 1)
    steps = np.arange(T) / (T - 1)
    warm = np.full(T, ends[1])
    if T > 2:  # 0.3 T of 2 timesteps is none
        k = 3 * T // 10
        warm[:k] = ends[0] + (ends[1] - ends[0]) * np.arange(k) / (k - 1)
    bend = 1 / (1 + np.exp(6 - 12 * steps))
    g = np.tanh(1.5 * (1 - 2 * np.arange(T + 1) / T)) / np.tanh(1.5) / 2 + 0.5
    want = {
        "linear": ends[0] + (ends[1] - ends[0]) * steps,
        "quad": (np.sqrt(ends[0]) + (np.sqrt(ends[1]) - np.sqrt(ends[0])) * steps) ** 2,
        "cosine": np.minimum(1 - f[1:] / f[:-1], 0.999),
        "constant_beta": np.full(T, ends[1]),
        "jsd": 1 / (T - np.arange(T)),
        "warmup": warm,
        "sigmoid_beta": ends[0] * (1 - bend) + ends[1] * bend,
        "sigmoid": np.minimum(1 - g[1:] / g[:-1], 0.999),
    }
    got = {
        "linear": schedules.linear(T, rescale=rescale),
        "quad": schedules.quad(T, rescale=rescale),
        "cosine": schedules.cosine(T),
        "constant_beta": schedules.constant_beta(T, rescale=rescale),
        "jsd": schedules.jsd(T),
        "warmup": schedules.warmup(T, fraction=0.3, rescale=rescale),
        "sigmoid_beta": schedules.sigmoid_beta(T, rescale=rescale),
        "sigmoid": schedules.sigmoid(T),
    }
    for name, schedule in got.items():
        np.testing.assert_allclose(schedule.betas, want[name], rtol=1e-9)
        assert schedule.num_timesteps == T
        t = jnp.arange(T, dtype=jnp.int32)
        abar = np.cumprod(1 - want[name])
        np.testing.assert_allclose(schedule.alpha(t) ** 2, abar, rtol=1e-6)
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-6)
        assert np.all(np.diff(schedule.log_snr(t)) < 0)  # t grows with noise


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (-3, 3, 0.3), (0, 3, 0.7)])
def test_sigmoid_is_the_gamma_of_jabri_and_chen(start, end, tau):
    """abar itself, to the floor of 1e-9 at the last timestep, where no beta is held at 0.999."""

    def logistic(x):
        return 1 / (1 + np.exp(-np.asarray(x, np.longdouble)))

    u = np.arange(1, 1001) / np.longdouble(1000)
    top, bottom = logistic(end / tau), logistic(start / tau)
    gamma = (top - logistic((u * (end - start) + start) / tau)) / (top - bottom)
    schedule = schedules.sigmoid(start=start, end=end, tau=tau, max_beta=1.0)
    abar = np.cumprod(1 - schedule.betas)
    np.testing.assert_allclose(abar, np.clip(gamma, 1e-9, 1).astype(float), rtol=1e-7)
    assert abar[-1] == pytest.approx(1e-9, rel=1e-6)


def test_golden_sigmoid_of_lucidrains(golden):
    """Their S(start) and S(end) are float32: our betas are theirs to what that changes."""
    g, schedule = golden("schedules"), OTHERS["sigmoid_lucidrains"]

    def betas(ends):
        low, high = (float(x) for x in ends)
        x = np.arange(1001) / 1000 * 6 - 3
        gamma = (high - 1 / (1 + np.exp(-x))) / (high - low)
        return np.clip(1 - gamma[1:] / gamma[:-1], 0, 0.999)

    exact = 1 / (1 + np.exp([3.0, -3.0]))
    theirs = g["betas_sigmoid_lucidrains"]
    np.testing.assert_allclose(betas(exact.astype(np.float32))[g["index"]], theirs, rtol=1e-9)
    np.testing.assert_allclose(betas(exact), schedule.betas, rtol=1e-9)
    np.testing.assert_allclose(schedule.betas[g["index"]], theirs, rtol=2e-5)
    log_snr = schedule.log_snr(jnp.asarray(g["index"]))
    np.testing.assert_allclose(log_snr, g["logsnr_sigmoid_lucidrains"], rtol=1e-6, atol=1e-4)


def test_two_schedules_are_called_sigmoid():
    """At t = 100, where abar of one is 0.960 (lucidrains) and of the other 0.980 (DDIM)."""
    t = jnp.asarray([100])
    of_abar, of_beta = schedules.sigmoid().alpha(t) ** 2, schedules.sigmoid_beta().alpha(t) ** 2
    np.testing.assert_allclose([of_abar[0], of_beta[0]], [0.96000048, 0.98049173], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "quad", "cosine", "const", "jsd"])
def test_zero_terminal_snr_is_algorithm_1(strict, name):
    schedule = DISCRETE[name]
    root = np.sqrt(np.cumprod(1 - schedule.betas))
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    fixed = schedules.zero_terminal_snr(schedule)
    t = jnp.arange(1000, dtype=jnp.int32)
    with strict():
        alpha, log_snr = np.asarray(fixed.alpha(t)), np.asarray(fixed.log_snr(t))
    np.testing.assert_allclose(alpha[:-1], want[:-1], rtol=1e-6)
    assert alpha[-1] == 0 and fixed.betas[-1] == 1 and log_snr[-1] == -40
    assert fixed.betas[0] == schedule.betas[0]
    assert np.all(np.diff(log_snr) < 0)
    again = schedules.zero_terminal_snr(fixed)
    np.testing.assert_allclose(again.betas, fixed.betas, rtol=1e-9)


@pytest.mark.parametrize("name", ["jsd", "zero_terminal"])
def test_an_snr_of_zero_is_guarded(name):
    """Finite log-SNR, tables without a warning, losses in every language but that of the bound."""
    schedule = (DISCRETE | OTHERS)[name]
    abar = np.cumprod(1 - schedule.betas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for variance in VARIANCES:
            tables = schedules.posterior_tables(schedule, variance)
            assert tables.loss_coef[-1] == np.inf and np.all(np.isfinite(tables.loss_coef[1:-1]))
            # x_T says nothing: q(x_{T-1} | x_T, x_0) is q(x_{T-1} | x_0).
            np.testing.assert_allclose(tables.posterior_variance[-1], 1 - abar[-2])
        x0 = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
        np.testing.assert_array_equal(diffusion.prior_bits_per_dim(schedule, x0), 0)
    assert schedule.log_snr(jnp.asarray([999]))[0] == -40
    t = jnp.full(2, 999, jnp.int32)
    np.testing.assert_array_equal(diffusion.corrupt(schedule, x0, 2 * x0, t), 2 * x0)
    for prediction, truth in (("x0", x0), ("v", -x0), ("flow", x0)):
        target = diffusion.prediction_target(schedule, prediction, x0, 2 * x0, t)
        np.testing.assert_array_equal(target, truth)
        eps = diffusion.predicted_eps(schedule, prediction, target, 2 * x0, t)
        np.testing.assert_array_equal(eps, 2 * x0)
    with pytest.raises(
        ValueError, match=rf"{schedule.name} ends at an SNR of 0.*last beta is below 1"
    ):
        diffusion.vlb_loss(lambda p, x, t, b, k: x, schedule)
    with pytest.raises(ValueError, match="ends at an SNR of 0"):
        diffusion.vlb_terms(schedule, x0, x0, x0, t)


@pytest.mark.parametrize("name", [*DISCRETE, *OTHERS])
def test_the_nearest_timestep(strict, name):
    """Exactly t from its own log-SNR; from any other, as found by looking at all in float64."""
    schedule = (DISCRETE | OTHERS)[name]
    t = jnp.arange(1000, dtype=jnp.int32)
    with strict():
        levels = schedule.log_snr(t)
        back = schedule.from_log_snr(levels)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, t)
    levels = np.asarray(levels, np.float64)
    values = np.random.default_rng(0).uniform(-45, 15, 2000).astype(np.float32)
    distance = np.abs(values.astype(np.float64)[:, None] - levels)
    first, second = np.partition(distance, 1, axis=1)[:, :2].T
    clear = second - first > 1e-4
    assert clear.mean() > 0.95
    got = np.asarray(schedule.from_log_snr(jnp.asarray(values)))
    np.testing.assert_array_equal(got[clear], distance.argmin(1)[clear])
    ends = schedule.from_log_snr(jnp.asarray([np.inf, 1e9, -1e9, -np.inf], jnp.float32))
    np.testing.assert_array_equal(ends, [0, 0, 999, 999])


@pytest.mark.parametrize("make", [schedules.linear, schedules.quad])
def test_a_hundred_thousand_timesteps(make):
    """Neighbours may share a float32 log-SNR; the inverse is then one of them."""
    schedule = make(100_000, rescale=True)
    t = jnp.arange(100_000, dtype=jnp.int32)
    levels = np.asarray(schedule.log_snr(t))
    assert np.all(np.diff(levels) <= 0) and np.all(np.isfinite(levels))
    back = np.asarray(schedule.from_log_snr(jnp.asarray(levels)))
    np.testing.assert_allclose(levels[back], levels, rtol=0, atol=2e-6)
    assert np.abs(back - np.asarray(t)).max() <= 1


def test_messages():
    for betas in ([0.1, 1.0, 0.5], [0.1, 1.5], [1.0, 1.0], [0.0, 0.5], [np.nan, 0.5]):
        with pytest.raises(ValueError, match=r"mine: betas span .*only the last may be 1"):
            schedules.from_betas("mine", betas)
    for make in (schedules.jsd, schedules.constant_beta, schedules.warmup, schedules.sigmoid):
        with pytest.raises(ValueError, match=r"T >= 2|at least 2"):
            make(1)
    with pytest.raises(ValueError, match=r"fraction is 1.5; keep it in \[0, 1\]"):
        schedules.warmup(fraction=1.5)
    with pytest.raises(ValueError, match=r"constant_beta.*beta_end=1, times 1"):
        schedules.constant_beta(beta=1)
    with pytest.raises(ValueError, match="raise num_timesteps"):
        schedules.sigmoid_beta(10, rescale=True)
    with pytest.raises(ValueError, match=r"tau=0, .*need start < end"):
        schedules.sigmoid(tau=0)
    with pytest.raises(ValueError, match="raise tau or lower clip_min"):
        schedules.sigmoid(tau=0.05)
    with pytest.raises(ValueError, match="vp_cosine is continuous; zero_terminal_snr"):
        schedules.zero_terminal_snr(CONTINUOUS["vp_cosine"])
    with pytest.raises(ValueError, match="its SNR is 0 before the last"):
        schedules.zero_terminal_snr(schedules.constant_beta(5000, beta=0.5))
    with pytest.raises(ValueError, match="rectified_flow: shift=0; need shift > 0"):
        schedules.rectified_flow(shift=0)
    with pytest.raises(ValueError, match="beta_min=2, beta_max=1; need 0 <= beta_min"):
        schedules.vp_linear(beta_min=2, beta_max=1)
    with pytest.raises(
        ValueError, match=r"gamma_max=50.0; need -40 <= gamma_min < gamma_max <= 40"
    ):
        schedules.vdm_linear(gamma_max=50.0)
    with pytest.raises(ValueError, match=r"sigma_min=0.0, .* need 2.1e-09 <= sigma_min"):
        schedules.ve_log_linear(sigma_min=0.0)
    for name in ("alpha", "sigma", "log_snr"):
        with pytest.raises(ValueError, match=r"t is int32; vdm_linear is continuous"):
            getattr(CONTINUOUS["vdm_linear"], name)(jnp.arange(3, dtype=jnp.int32))
    with pytest.raises(ValueError, match="vp_linear is continuous; VLB terms need a discrete"):
        diffusion.vlb_loss(lambda p, x, t, b, k: x, CONTINUOUS["vp_linear"])
