"""Laws of log-SNR against scipy, in discrete and continuous time; the golden of "lognorm"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from static_laws import BATCH, probabilities, pull, relative_density

import adaptive_ts as ats
from adaptive_ts.samplers import log_snr
from adaptive_ts.samplers.log_snr import (
    log_normal_sigma,
    log_snr_cauchy,
    log_snr_cosine,
    log_snr_laplace,
    lognorm_timestep,
)
from adaptive_ts.schedules.base import log_alphas_bar
from adaptive_ts.schedules.continuous import rectified_flow, vdm_linear, vp_cosine
from adaptive_ts.schedules.discrete import cosine, jsd, linear, quad
from adaptive_ts.testing import check_sampler
from adaptive_ts.timesteps.laws import interval_mass, truncated

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000), "jsd": jsd(1000)}
CONTINUOUS = ats.continuous(20, t_min=1e-3, t_max=1.0)
GRIDS = {
    "T1000": (ats.discrete(1000), SCHEDULES["linear"]),
    "T50_nearest": (ats.discrete(50, rounding="nearest"), linear(50)),
    "continuous": (CONTINUOUS, rectified_flow()),
}
LAWS = {  # the sampler, and scipy's law of log-SNR
    "log_normal_sigma": (log_normal_sigma, stats.norm(2.4, 2.4)),
    "laplace": (
        lambda grid, schedule, **options: log_snr_laplace(grid, schedule, 0.3, 0.75, **options),
        stats.laplace(0.3, 0.75),
    ),
    "cauchy": (log_snr_cauchy, stats.cauchy(0, 1)),
    "cosine": (
        lambda grid, schedule, **options: log_snr_cosine(
            grid, schedule, shift=-1.0, scale=1.3, **options
        ),
        stats.hypsecant(-1.0, 2 / 1.3),  # sech(x) / pi, so that log-SNR / 2 has it
    ),
}


def log_snr_of(schedule):
    abar = np.cumprod(1 - schedule.betas)
    return np.log(abar) - np.log1p(-abar)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *[(name, grid) for name in LAWS for grid in ("T1000", "continuous")],
        ("log_normal_sigma", "T50_nearest"),
    ],
)
def test_sampler_keeps_the_contract(name, grid):
    sampler = LAWS[name][0](*GRIDS[grid], coupling="stratified")
    # Importance weights have no bounded variance: the z-scores are not tested. In continuous
    # time the Cauchy law keeps a percent at the last of the checker's 4,096 midpoints.
    report = check_sampler(sampler, BATCH, num_steps=1, num_draws=256, max_z_score=np.inf)
    assert report.total_mass == pytest.approx(1, abs=0.01 if name == "cauchy" else 1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", LAWS)
def test_a_timestep_has_the_mass_between_the_midpoints_in_log_snr(name, schedule):
    make, law = LAWS[name]
    lam = log_snr_of(SCHEDULES[schedule])
    edges = np.concatenate([[np.inf], (lam[1:] + lam[:-1]) / 2, [-np.inf]])
    expected = np.where(
        edges[1:] > law.median(),
        law.sf(edges[1:]) - law.sf(edges[:-1]),
        law.cdf(edges[:-1]) - law.cdf(edges[1:]),
    )
    found = probabilities(make(ats.discrete(1000), SCHEDULES[schedule]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-15)
    assert found.sum() == pytest.approx(1, abs=1e-6)


def test_cauchy_tails_fall_on_the_end_timesteps():
    p = probabilities(log_snr_cauchy(ats.discrete(1000), SCHEDULES["linear"]))
    assert p[0] == pytest.approx(0.036, abs=5e-4) and p[999] == pytest.approx(0.031, abs=5e-4)


def test_nearest_sigma_is_the_argmin():
    schedule, grid = linear(20), ats.discrete(20)
    sigma = np.exp(-log_snr_of(schedule) / 2)
    drawn = np.exp(stats.norm(-1.2, 1.2).ppf((np.arange(20_000) + 0.5) / 20_000))
    nearest = np.abs(drawn[:, None] - sigma).argmin(1)
    expected = np.bincount(nearest, minlength=20) / 20_000
    found = probabilities(log_normal_sigma(grid, schedule, placement="nearest"))
    np.testing.assert_allclose(found, expected, atol=1.01 / 20_000)
    # The midpoints in log-SNR are those in ln sigma: another law.
    nearest = np.abs(np.log(drawn)[:, None] - np.log(sigma)).argmin(1)
    expected = np.bincount(nearest, minlength=20) / 20_000
    other = probabilities(log_normal_sigma(grid, schedule))
    np.testing.assert_allclose(other, expected, atol=1.01 / 20_000)
    assert np.abs(found - other).max() > 0.004


def test_a_density_without_the_jacobian_is_another_law():
    for name, (make, law) in LAWS.items():
        naive = law.pdf(log_snr_of(SCHEDULES["linear"]))
        found = probabilities(make(ats.discrete(1000), SCHEDULES["linear"]))
        assert np.abs(found - naive / naive.sum()).sum() > 0.1, name


@pytest.mark.parametrize("schedule", [rectified_flow(), vp_cosine(), vdm_linear()])
@pytest.mark.parametrize("name", LAWS)
def test_continuous_law_is_conditioned_on_the_grid(name, schedule):
    make, law = LAWS[name]
    grid = ats.continuous(20, t_min=0.02, t_max=0.9)
    ends = np.asarray(schedule.log_snr(jnp.asarray([0.9, 0.02])), np.float64)
    inside = np.diff(law.cdf(ends))[0]
    sampler = make(grid, schedule)
    v = np.linspace(1e-4, 1 - 1e-4, 499)
    draw = pull(sampler, v)
    lam = law.ppf(law.cdf(ends[1]) - v * inside)
    found = np.asarray(schedule.log_snr(draw.t), np.float64)
    np.testing.assert_allclose(found, lam, rtol=2e-5, atol=5e-5)
    assert np.all((draw.t > 0.02) & (draw.t < 0.9)) and np.all(np.diff(draw.t) >= 0)
    # The slope of v in t, relative to the uniform density 1 / 0.88.
    slope = np.gradient(v, np.asarray(draw.t, np.float64))[5:-5]
    density = relative_density(sampler, draw.t)
    np.testing.assert_allclose(density[5:-5], slope * 0.88, rtol=0.02)
    exact = law.pdf(found) / inside * 0.88
    t = np.asarray(draw.t, np.float64)
    if schedule.name == "rectified_flow":
        exact *= 2 / (t * (1 - t))
    elif schedule.name == "vp_cosine":
        exact *= 2 * np.pi / np.sin(np.pi * t)
    else:
        exact *= 18.3
    np.testing.assert_allclose(density, exact, rtol=1e-4)


def test_no_atoms_where_the_time_axis_ends():
    sampler = log_snr_cauchy(ats.continuous(20), rectified_flow())
    t = sampler.sample(jax.random.key(0), (), {"image": jnp.zeros((4096, 1))}).t
    assert t.min() > 0 and t.max() < 1
    # About 1 percent lies within 1e-4 of either end, and float32 has only 1,700 numbers in the
    # upper one, the last of them with 1 / 30 of it.
    assert np.mean(t == t.min()) < 1e-3 and np.mean(t == t.max()) < 2e-3


def test_own_schedule_gives_uniform_timesteps():
    sampler = log_snr_cosine(ats.continuous(20, t_min=0.01, t_max=0.99), vp_cosine())
    t = np.linspace(0.02, 0.98, 49, dtype=np.float32)
    np.testing.assert_allclose(relative_density(sampler, t), 1, atol=1e-5)


STANDARD = {
    "normal": (log_snr.NORMAL, stats.norm),
    "laplace": (log_snr.LAPLACE, stats.laplace),
    "cauchy": (log_snr.CAUCHY, stats.cauchy),
    "sech": (log_snr.SECH, stats.hypsecant(0, 2)),
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_laws_are_those_of_scipy(name):
    base, law = STANDARD[name]
    z = np.array([-30, -5, -1, -0.1, 0, 0.1, 2, 5])
    np.testing.assert_allclose(base.cdf(z), law.cdf(z), rtol=1e-9)
    assert base.cdf(-np.inf) == 0 and base.cdf(np.inf) == 1
    p = np.array([1e-30, 1e-7, 1e-3, 0.2, 0.49, 0.5])
    found = base.lower_quantile(jnp.asarray(p, jnp.float32))
    np.testing.assert_allclose(found, law.ppf(p), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        base.log_pdf(jnp.asarray(z, jnp.float32)), law.logpdf(z), rtol=1e-5, atol=1e-6
    )


def test_masses_and_quantiles_keep_their_digits_in_both_tails():
    law = stats.norm
    for lo, hi in ((6.0, 7.0), (-7.0, -6.0), (-1.0, 2.0)):
        mass = law.sf(lo) - law.sf(hi) if lo > 0 else law.cdf(hi) - law.cdf(lo)
        assert interval_mass(log_snr.NORMAL, lo, hi) == pytest.approx(mass, rel=1e-9)
        held = truncated(log_snr.NORMAL, 0.0, 1.0, lo, hi)
        v = np.linspace(0.001, 0.999, 99)
        exact = stats.truncnorm(lo, hi).ppf(v)
        np.testing.assert_allclose(
            held.quantile(jnp.asarray(v, jnp.float32)), exact, rtol=1e-5, atol=2e-7
        )


def test_zero_terminal_snr_has_finite_tables():
    grid = ats.discrete(1000)
    for make in (*(make for make, _ in LAWS.values()), lognorm_timestep):
        p = probabilities(make(grid, SCHEDULES["jsd"]))
        assert np.all(np.isfinite(p)) and p.sum() == pytest.approx(1, abs=1e-5)


def test_lognorm_is_that_of_speed(golden):
    arrays = golden("lognorm_speed_repo")
    for name, schedule in (
        ("linear", linear(1000)),
        ("squaredcos_cap_v2", cosine(1000)),
        ("quad", quad(1000)),
    ):
        found = probabilities(lognorm_timestep(ats.discrete(1000), schedule))
        np.testing.assert_allclose(
            found[arrays["index"]], arrays[f"{name}__p"], rtol=2e-6, atol=1e-37
        )


def test_lognorm_is_neither_of_the_laws_it_is_named_after():
    grid, schedule = ats.discrete(1000), linear(1000)
    p = probabilities(lognorm_timestep(grid, schedule))
    assert p.argmax() == 348 and p @ np.arange(1000) == pytest.approx(332, abs=0.5)
    np.testing.assert_allclose(
        np.cumsum(p)[[100, 250, 500, 700]], [0.019, 0.246, 0.933, 0.99995], atol=6e-4
    )
    s = np.sqrt(-np.expm1(log_alphas_bar(schedule.betas)))
    with_jacobian = np.gradient(stats.norm.cdf(np.log(s / (1 - s))))
    assert np.abs(p - with_jacobian / with_jacobian.sum()).sum() > 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, s: log_normal_sigma(g, s, np.nan), "p_mean=nan.*must be finite"),
        (lambda g, s: log_normal_sigma(g, s, p_std=0.0), "p_std=0.0.*positive"),
        (lambda g, s: log_normal_sigma(g, s, placement="argmin"), "'argmin' is unknown"),
        (lambda g, s: log_snr_laplace(g, s, scale=-1.0), "scale=-1.0"),
        (lambda g, s: log_snr_cauchy(g, s, np.inf), "loc=inf"),
        (lambda g, s: log_snr_cosine(g, s, scale=0.0), "scale=0.0"),
        (lambda g, s: log_snr_cosine(g, linear(10)), "give both the same"),
        (lambda g, s: lognorm_timestep(g, linear(10)), "give both the same"),
        (lambda g, s: log_snr_laplace(CONTINUOUS, s), "give both the same"),
        (
            lambda g, s: log_normal_sigma(CONTINUOUS, rectified_flow(), placement="nearest"),
            "needs timesteps",
        ),
        (lambda g, s: lognorm_timestep(CONTINUOUS, rectified_flow()), "continuous grid"),
        (
            lambda g, s: log_snr_laplace(CONTINUOUS, rectified_flow(), 60.0),
            "mass_inside=.*move the law",
        ),
        (
            lambda g, s: log_snr_cauchy(CONTINUOUS, rectified_flow()._replace(from_log_snr=None)),
            "no from_log_snr",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(ats.discrete(1000), SCHEDULES["linear"])


def test_strict_dtype_promotion(strict):
    with strict():
        for grid, schedule in GRIDS.values():
            for make, _ in LAWS.values():
                sampler = make(grid, schedule)
                draw = jax.eval_shape(sampler.sample, jax.random.key(1), (), BATCH)
                density = jax.eval_shape(sampler.log_density, (), draw, BATCH)
                assert density.dtype == jnp.float32
