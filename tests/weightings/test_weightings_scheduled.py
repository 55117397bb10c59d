"""weightings_scheduled.py against the authors' numbers and closed forms in float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from adaptive_ts import diffusion, schedules
from adaptive_ts import weightings as w
from adaptive_ts.schedules.continuous import rectified_flow, vdm_linear, vp_cosine, vp_linear
from adaptive_ts.schedules.discrete import constant_beta, jsd

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULES = {
    "linear": schedules.linear(),
    "quad": schedules.quad(),
    "cosine": schedules.cosine(),
    "const": constant_beta(),
}
SHORT = {f"{f.__name__}20": f(20) for f in (schedules.linear, schedules.quad, schedules.cosine)}


def at(schedule, weighting, t=None):
    """The weights of timesteps t, or of all, in float64."""
    t = np.arange(schedule.num_timesteps) if t is None else t
    return np.asarray(weighting(schedule.log_snr(jnp.asarray(t, jnp.int32))), np.float64)


# The rate -d log SNR / dt as a function of the log-SNR, by hand.
RATES = {
    "rectified_flow": (rectified_flow(), lambda lam: 4 + 4 * np.cosh(lam / 2)),
    "shifted": (
        rectified_flow(shift=3.0),
        lambda lam: 2 * np.exp(-lam / 2) * (1 + 3 * np.exp(lam / 2)) ** 2 / 3,
    ),
    "vp_cosine": (vp_cosine(), lambda lam: 2 * np.pi * np.cosh(lam / 2)),
    "vdm_linear": (vdm_linear(), lambda lam: 18.3 + 0 * lam),
    "vp_linear": (
        vp_linear(),
        lambda lam: np.sqrt(0.01 + 2 * 19.9 * np.log1p(np.exp(-lam))) * (1 + np.exp(lam)),
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_of_continuous_schedules(name):
    schedule, rate = RATES[name]
    t = np.r_[1e-6, 1e-4, np.linspace(0.01, 0.99, 99), 0.999, 1 - 1e-4].astype(np.float32)
    log_snr = schedule.log_snr(jnp.asarray(t))
    lam = np.asarray(log_snr, np.float64)
    found = w.vlb(schedule)(log_snr) / (rate(lam) / 2)
    assert np.all(np.abs(found - 1) < 1e-5 + 2e-7 / (1 - t))  # t itself is rounded near 1
    found = w.sigmoid(1.5, schedule=schedule, prediction="x0")(log_snr)
    found = found / (np.exp(1.5) * expit(lam - 1.5) * rate(lam))
    assert np.all(np.abs(found - 1) < 1e-5 + 2e-7 / (1 - t))


def test_rate_at_the_ends_of_the_schedule():
    """t = 0 and 1 themselves, and a log-SNR that rounding puts outside the range."""
    lam = jnp.asarray([-5.000001, -5.0, 13.3, 13.300002])
    np.testing.assert_allclose(w.vlb(vdm_linear())(lam), 9.15, rtol=1e-5)
    ends = w.vlb(rectified_flow())(jnp.asarray([-40.0, 40.0]))  # t = 1 - 2**-24 and 2**-24
    np.testing.assert_allclose(ends, 2.0**24, rtol=1e-5)


@pytest.mark.parametrize("name", ["rectified_flow", "vp_cosine", "vp_linear"])
def test_derivative_makes_the_objective_independent_of_the_schedule(name):
    """Mean over uniform t of w f = the integral of sigmoid(b - lam) f over lam."""
    schedule, b = RATES[name][0], 1.0

    def f(lam):
        return np.exp(-((lam - 1) ** 2) / 4)

    lam = np.linspace(-12, 14, 20001)
    want = np.trapezoid(expit(b - lam) * f(lam), lam)
    t = (np.arange(4000, dtype=np.float32) + 0.5) / 4000
    lam = schedule.log_snr(jnp.asarray(t))
    found = np.mean(w.sigmoid(b, schedule=schedule)(lam) * f(np.asarray(lam)))
    assert found == pytest.approx(want, rel=1e-3)
    for discrete in SCHEDULES.values():
        lam = np.asarray(discrete.log_snr(jnp.arange(1000)))
        mean = np.mean(at(discrete, w.sigmoid(b, schedule=discrete)) * f(lam))
        assert mean == pytest.approx(want, rel=5e-3), discrete.name


@pytest.mark.parametrize("name", [*SCHEDULES, *SHORT])
def test_tables_are_exact_at_every_timestep(name):
    schedule = (SCHEDULES | SHORT)[name]
    T, abar = schedule.num_timesteps, np.cumprod(1 - schedule.betas)
    lam = np.log(abar) - np.log1p(-abar)
    want = expit(1 - lam) * -np.gradient(lam) * T
    np.testing.assert_allclose(at(schedule, w.sigmoid(1.0, schedule=schedule)), want, rtol=5e-6)
    clipped = np.append(schedule.betas[1] * (1 - abar[0]) / (1 - abar[1]), schedule.betas[1:])
    want = schedule.betas**2 / (2 * clipped * (1 - schedule.betas) * (1 - abar))
    np.testing.assert_allclose(at(schedule, w.vlb(schedule)), want, rtol=5e-6)
    g = np.gradient(1 - abar)
    want = 0.2 + 0.6 * (g - g.min()) / np.ptp(g)
    first = round(0.7 * T)
    found = at(schedule, w.change_aware(schedule, lam=0.8))
    np.testing.assert_allclose(found[:first], want[:first], rtol=5e-6)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_vlb_is_the_slope_of_the_vlb_terms(variance):
    schedule, t = schedules.quad(), jnp.asarray([0, 1, 2, 100, 998, 999])
    zero = jnp.zeros((6, 4, 1))
    terms = [
        diffusion.vlb_terms(schedule, zero, zero, zero + e, t, variance=variance) for e in (2.0, 0)
    ]
    nats = (np.asarray(terms[0]) - np.asarray(terms[1])) * np.log(2)
    found = w.vlb(schedule, variance=variance)(schedule.log_snr(t))
    np.testing.assert_allclose(4 * found, nats, rtol=2e-5)
    assert np.all(np.isfinite(found))


def test_vlb_against_the_authors_sums():
    """Finite sums of the unclipped coefficients; ours differ at t = 0 alone."""
    large = {"linear": 9.861047, "quad": 8.491235, "cosine": 512.609}
    small = {"linear": 10.170493, "quad": 8.569501, "cosine": 512.822}  # infinite at t = 0
    for name, total in large.items():
        schedule = SCHEDULES[name]
        first = schedules.posterior_tables(schedule).loss_coef[0]
        found = at(schedule, w.vlb(schedule))[1:].sum() + first
        assert found == pytest.approx(total, rel=1e-6)
        found = at(schedule, w.vlb(schedule, variance="fixed_small"))[1:].sum()
        assert found == pytest.approx(small[name], rel=1e-6)


def test_vlb_of_many_timesteps_is_the_continuous_one():
    many, limit = schedules.linear(4000, rescale=True), vp_linear()
    t = np.array([400, 1000, 2000, 3000, 3800])
    continuous = w.vlb(limit)(limit.log_snr(jnp.asarray((t + 1) / 4000, jnp.float32)))
    np.testing.assert_allclose(4000 * at(many, w.vlb(many), t), continuous, rtol=5e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_change_aware(golden, name):
    g, schedule = golden("speed_weights"), SCHEDULES[name]
    key = "squaredcos_cap_v2" if name == "cosine" else name
    early = g["index"] < 700
    for lam in (0.5, 0.6, 0.8, 1):
        want = g[f"{key}__weight_ours_lam{lam}"]
        weighting = w.change_aware(schedule, lam=lam, as_published=True)
        np.testing.assert_allclose(at(schedule, weighting, g["index"]), want, rtol=5e-6, atol=1e-9)
        found = at(schedule, w.change_aware(schedule, lam=lam), g["index"])
        np.testing.assert_allclose(found[early], want[early], rtol=5e-6, atol=1e-9)


def test_change_aware_puts_the_weight_where_the_noise_changes():
    """Their code gives the convergence area 1, more than the fastest change, lam."""
    schedule = SCHEDULES["linear"]
    published = at(schedule, w.change_aware(schedule, as_published=True))
    assert np.all(published[700:] == 1) and published[:700].max() == pytest.approx(0.6)
    found = at(schedule, w.change_aware(schedule))
    assert found.argmax() == 219 and found.max() == pytest.approx(0.6)
    assert found[700:].max() <= found[700] < 0.408 and found.min() == pytest.approx(0.4)
    change = np.gradient(1 - np.cumprod(1 - schedule.betas))
    assert np.all(np.diff(found[np.argsort(change)]) >= -1e-6)  # in the order of the change


def test_change_aware_holds_the_convergence_area():
    betas = np.full(100, 1e-3)
    betas[60:90] = 0.2  # a burst of noise after tau
    schedule = schedules.from_betas("late", betas)
    found = at(schedule, w.change_aware(schedule, tau=0.5))
    assert found[50:].max() <= found[50]
    assert at(schedule, w.change_aware(schedule, tau=1.0))[60:].max() == pytest.approx(0.6)


def test_change_aware_where_all_changes_are_equal():
    for lam in (0.5, 0.6, 1.0):
        np.testing.assert_allclose(at(jsd(), w.change_aware(jsd(), lam=lam)), 0.5, rtol=1e-6)
    schedule = SCHEDULES["linear"]
    np.testing.assert_allclose(at(schedule, w.change_aware(schedule, lam=0.5)), 0.5, rtol=1e-6)


def test_change_aware_as_published_ignores_the_prediction():
    schedule = SCHEDULES["linear"]
    make = functools.partial(w.change_aware, schedule, as_published=True)
    for prediction in ("eps", "x0", "v", "flow"):
        np.testing.assert_array_equal(
            at(schedule, make(prediction=prediction)), at(schedule, make())
        )


def test_sigmoid_where_the_last_snr_is_zero():
    """The slope there is the neighbour's, not that of a log-SNR held at -40."""
    schedule = jsd()
    weights = at(schedule, w.sigmoid(schedule=schedule))
    assert np.all(np.isfinite(weights)) and weights[999] == pytest.approx(weights[998], rel=2e-3)
    on_x0 = at(schedule, w.sigmoid(schedule=schedule, prediction="x0"))
    assert on_x0[999] < 1e-12
