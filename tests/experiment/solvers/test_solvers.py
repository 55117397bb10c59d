"""The solvers against exact scores: moments of what they make, orders of convergence, guidance."""

import doctest
import functools
import itertools

import exact_scores as exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts.experiment.solvers import generator
from adaptive_ts.experiment.solvers import steps as solver_tables
from adaptive_ts.experiment.solvers.generator import guided, make_generator
from adaptive_ts.experiment.solvers.steps import solver_timesteps
from adaptive_ts.schedules.discrete import zero_terminal_snr

pytestmark = pytest.mark.usefixtures("quick_compilation")
IMAGES = 4096
KEY = jax.random.key(7)


def make(denoise, schedule, *, shape=exact.SHAPE, kind="eps", label=(), images=IMAGES, **options):
    """(images, d), not clipped."""
    model = exact.as_model(schedule, denoise, kind)
    generate = make_generator(model, schedule, shape, clip=False, prediction=kind, **options)
    made = generate(None, KEY, jnp.arange(images), *label)
    return np.asarray(made, np.float64).reshape(images, -1)


def check_moments(x, mean, covariance, *, slack):
    """Five standard errors (p < 1e-5 for all of them), and the solver's own error in units of s."""
    s = np.sqrt(np.diag(covariance))
    error = 5 / np.sqrt(len(x))
    assert np.all(np.abs(x.mean(0) - mean) < s * (error + slack))
    # An entry of the sample covariance has the variance (c_ij^2 + c_ii c_jj) / n <= 2 c_ii c_jj / n
    units = np.outer(s, s)
    off = np.abs(np.cov(x.T) - covariance)
    assert np.all(off < units * (np.sqrt(2) * error + 2 * slack)), off / units


LINEAR = functools.cache(lambda: ats.schedules.linear(1000))
DISCRETE = [
    ("ddpm", {"steps": 1000, "variance": "fixed_large", "slack": 0.01}),
    ("ddpm", {"steps": 1000, "variance": "fixed_small", "slack": 0.01}),
    ("ddim", {"steps": 250, "slack": 0.02}),
    ("ddim", {"steps": 1000, "eta": 1.0, "slack": 0.01}),
    ("ddim", {"steps": 100, "spacing": "quadratic", "slack": 0.02}),
    ("dpmpp_2m", {"steps": 50, "slack": 0.02}),
    ("euler", {"steps": 250, "slack": 0.02}),
    ("heun", {"steps": 25, "slack": 0.02}),
]


@pytest.mark.parametrize(("solver", "options"), DISCRETE)
def test_a_gaussian_comes_out_with_its_mean_and_covariance(solver, options):
    slack = options["slack"]
    options = {k: v for k, v in options.items() if k != "slack"}
    x = make(exact.gaussian, LINEAR(), solver=solver, **options)
    check_moments(x, exact.MEAN, exact.COVARIANCE, slack=slack)


MIXTURE = exact.Mixture([0.3, 0.7], [[-0.8, 0.4], [0.5, -0.3]], 0.15)


@pytest.mark.parametrize(
    ("solver", "schedule", "kind", "steps"),
    [
        ("ddpm", LINEAR(), "eps", 1000),
        ("ddim", LINEAR(), "eps", 200),
        ("dpmpp_2m", LINEAR(), "eps", 50),
        ("heun", LINEAR(), "eps", 30),
        ("euler", ats.schedules.rectified_flow(), "flow", 200),
        ("heun", ats.schedules.rectified_flow(), "flow", 40),
        ("dpmpp_2m", ats.schedules.vp_cosine(), "v", 60),
        ("heun", ats.schedules.ve_log_linear(), "x0", 60),
    ],
)
def test_a_mixture_comes_out_with_its_weights_and_widths(solver, schedule, kind, steps):
    x = make(MIXTURE.denoise, schedule, shape=(1, 2, 1), kind=kind, solver=solver, steps=steps)
    check_moments(x, MIXTURE.mean, MIXTURE.covariance, slack=0.03)
    nearest = np.argmin(((x[:, None] - MIXTURE.means) ** 2).sum(-1), axis=1)
    spread = np.sqrt(0.3 * 0.7 / IMAGES)
    assert abs(np.mean(nearest == 0) - 0.3) < 5 * spread + 0.01, "the share of each component"
    width = np.sqrt(np.mean((x - MIXTURE.means[nearest]) ** 2))
    assert abs(width / MIXTURE.width - 1) < 5 / np.sqrt(4 * IMAGES) + 0.03


def solve(table, denoise, x):
    """What the module of the tables says that they mean, in float64 NumPy."""
    memory = 0.0
    for i in range(len(table["t"])):
        row = {name: column[i] for name, column in table.items()}
        x0 = denoise(x, row["alpha"], row["sigma"])
        eps = (x - row["alpha"] * x0) / row["sigma"]
        x = row["to_x0"] * x0 + row["to_eps"] * eps + row.get("memory", 0) * memory
        memory = row.get("keep_x0", 0) * x0 + row.get("keep_eps", 0) * eps
    return x


def ode_error(schedule, solver, steps, spacing):
    """From 64 draws of noise to t = 0, against the exact end: root mean square."""
    path = solver_tables.make_path(schedule, steps, spacing=spacing)
    alpha, sigma = np.sqrt(path.signal[0]), np.sqrt(path.noise[0])
    noise = np.random.default_rng(0).normal(size=(64, 3))
    x = solve(solver_tables.solver_table(path, solver), exact.gaussian, noise)
    return np.sqrt(np.mean((x - exact.ode_end(noise, alpha, sigma)) ** 2))


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [
        (ats.schedules.rectified_flow(), "linear"),
        (ats.schedules.rectified_flow(shift=3.0), "quadratic"),
        (ats.schedules.vp_cosine(), "linear"),
        (ats.schedules.vp_linear(), "quadratic"),  # sigma falls like sqrt(t)
    ],
)
@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2), ("heun", 2)]
)
def test_order_of_convergence(schedule, spacing, solver, order):
    """The slope of the error over steps.

    DPM-Solver++ has it up to a logarithm of the steps with linear spacing, where its own measure of
    a step grows without bound towards the ends.
    """
    spacing = "quadratic" if solver == "dpmpp_2m" else spacing
    steps = np.array([32, 64, 128, 256])
    with jax.enable_x64(True):
        errors = [ode_error(schedule, solver, int(n), spacing) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(schedule.name, spacing, solver, errors, slope)
    assert order - 0.15 < slope < order + 0.3


def test_on_discrete_timesteps_the_second_order_is_worth_it():
    """20 evaluations each (Heun: 19)."""
    error = {
        solver: ode_error(LINEAR(), solver, steps, "linear")
        for solver, steps in (("ddim", 20), ("dpmpp_2m", 20), ("heun", 10))
    }
    print(error)
    assert error["dpmpp_2m"] < 0.6 * error["ddim"] and error["heun"] < 0.3 * error["ddim"]


def plain_heun(noise, steps):
    """Rectified flow by the textbook: dx / dt = v, and at t = 0 the slope is not looked at."""
    x, times = noise, np.linspace(1, 0, steps + 1)

    def velocity(x, t):
        return (x - exact.gaussian(x, 1 - t, t)) / t

    for t, s in itertools.pairwise(times):
        slope = velocity(x, t)
        ahead = x + (s - t) * slope
        x = ahead if s == 0 else x + (s - t) * (slope + velocity(ahead, s)) / 2
    return x


def test_heun_is_the_textbook_s_on_the_straight_path():
    schedule = ats.schedules.rectified_flow()
    with jax.enable_x64(True):
        noise = exact.first_noise(KEY, 16, 0)
        for steps in (1, 2, 7):
            wanted = plain_heun(noise, steps)
            options = {"solver": "heun", "steps": steps, "images": 16}
            got = make(exact.gaussian, schedule, kind="flow", **options)
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_the_model_is_evaluated_inside_the_path_and_as_often_as_said():
    for solver, evaluations in (("ddim", 6), ("dpmpp_2m", 6), ("euler", 6), ("heun", 11)):
        path = solver_tables.make_path(ats.schedules.rectified_flow(), 6)
        t = solver_tables.solver_table(path, solver)["t"]
        assert len(t) == evaluations and t.min() > 0 and np.all(np.diff(t) <= 0)


def plain_multistep(alpha, sigma, denoise, x):
    """DPM-Solver++ 2M as in the paper: lambda, h, r; a first-order step first and last.

    But for r, which is not let below 1/2.
    """
    before = None
    for i in range(len(alpha) - 1):
        x0 = denoise(x, alpha[i], sigma[i])
        if before is None or sigma[i + 1] == 0:
            d = x0
        else:
            lam = np.log(alpha[i - 1 : i + 2] / sigma[i - 1 : i + 2])
            r = max((lam[1] - lam[0]) / (lam[2] - lam[1]), 0.5)
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        fall = alpha[i] / sigma[i] * sigma[i + 1] / alpha[i + 1]  # exp(-h)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (fall - 1) * d
        before = x0
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_dpmpp_2m_is_the_paper_s(steps):
    schedule = LINEAR()
    abar = np.cumprod(1 - schedule.betas)[solver_timesteps(1000, steps)]
    alpha, sigma = np.sqrt(np.append(abar, 1)), np.sqrt(np.append(1 - abar, 0))
    noise = exact.first_noise(KEY, 16, 1000)

    wanted = plain_multistep(alpha, sigma, exact.gaussian, noise)
    got = make(exact.gaussian, schedule, images=16, solver="dpmpp_2m", steps=steps)
    # The first alpha is 0.006: float32's rounding of eps is 160 times that in x0.
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_quadratic_timesteps_are_the_published_ones():
    for T, steps in ((1000, 10), (1000, 20), (1000, 50), (1000, 100), (4000, 25), (7, 4)):
        published = [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), steps) ** 2]
        got = solver_timesteps(T, steps, "quadratic")
        assert got.tolist() == sorted(set(published), reverse=True)
        assert got[0] < T and got[-1] == 0 and got.dtype == np.int32


def test_a_repeated_timestep_changes_nothing_so_it_is_left_out():
    path = solver_tables.make_path(LINEAR(), 50, spacing="quadratic")
    assert len(path.t) < 50
    twice = np.append(np.arange(len(path.t)), len(path.t))
    twice = np.insert(twice, 5, 5)
    again = path._replace(
        t=path.t[twice[:-1]], number=path.t[twice[:-1]], signal=path.signal[twice],
        noise=path.noise[twice],
    )  # fmt: skip
    table = solver_tables.solver_table(again, "ddim", eta=1.0)
    assert table["noise"][5] == 0
    np.testing.assert_allclose(table["to_x0"][5], table["alpha"][5])
    np.testing.assert_allclose(table["to_eps"][5], table["sigma"][5])


def test_a_start_without_signal_takes_a_prediction_that_says_something():
    """From an SNR of 0 exactly, v, x0 and flow lead to the same place."""
    schedule = zero_terminal_snr(ats.schedules.linear(100))
    with pytest.raises(ValueError, match=r"SNR of 0 at t=99.*predict x0, v or flow"):
        make(exact.gaussian, schedule, images=4, steps=10)
    for solver in ("ddim", "ddpm", "dpmpp_2m", "heun"):
        ends = [
            make(exact.gaussian, schedule, kind=kind, images=64, solver=solver, steps=10)
            for kind in ("v", "x0", "flow")
        ]
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)
        np.testing.assert_allclose(ends[0], ends[2], atol=1e-4)
        assert np.isfinite(ends[0]).all()


# --- guidance ---

CENTRES = np.array([[0.5, 0.1], [-0.4, 0.6], [0.0, 0.0]])  # two classes, and none
WIDTH = 0.3


def by_class(x, alpha, sigma, label):
    centre = jnp.asarray(CENTRES, x.dtype)[label]
    gain = alpha * WIDTH**2 / (alpha**2 * WIDTH**2 + sigma**2)
    return centre + gain * (x - alpha * centre)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance_moves_the_mean_of_gaussians_by_its_weight(weight):
    """Of one width: the guided noise is that of the mean m_null + w (m_label - m_null)."""
    schedule = LINEAR()
    model = guided(exact.as_model(schedule, by_class), weight, 2)
    label = jnp.asarray(np.arange(2048) % 2)
    generate = make_generator(model, schedule, (1, 2, 1), solver="dpmpp_2m", steps=40, clip=False)
    x = np.asarray(generate(None, KEY, jnp.arange(2048), label), np.float64).reshape(-1, 2)
    for one in (0, 1):
        wanted = CENTRES[2] + weight * (CENTRES[one] - CENTRES[2])
        check_moments(x[np.asarray(label) == one], wanted, WIDTH**2 * np.eye(2), slack=0.03)


def test_guidance_of_weight_one_and_zero():
    def eps_fn(params, x, t, label):
        return params * jnp.sin(x + t[:, None] + label[:, None].astype(x.dtype))

    x, t = jax.random.normal(KEY, (5, 3)), jnp.arange(5.0)
    label, none = jnp.array([1, 2, 3, 4, 5]), jnp.full((5,), 9)
    for weight, wanted in ((1.0, label), (0.0, none)):
        got = guided(eps_fn, weight, 9)(2.0, x, t, label)
        np.testing.assert_allclose(got, eps_fn(2.0, x, t, wanted), atol=1e-6)
    between = guided(eps_fn, 3.0, 9)(2.0, x, t, label)
    wanted = 3 * eps_fn(2.0, x, t, label) - 2 * eps_fn(2.0, x, t, none)
    np.testing.assert_allclose(between, wanted, atol=1e-5)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_weight_out_of_range(weight):
    with pytest.raises(ValueError, match=f"must be >= 0 and finite, got {weight}"):
        guided(lambda p, x, t, label: x, weight, 0)


# --- what is refused ---


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ("linear", {"steps": 1001}, "steps must be from 1 to 1000, got 1001"),
        ("linear", {"steps": 1, "spacing": "quadratic"}, "steps must be from 2 to 1000, got 1"),
        ("linear", {"spacing": "quad"}, "spacing 'quad' is unknown; did you mean 'quadratic'"),
        ("linear", {"solver": "huen"}, "solver 'huen' is unknown; did you mean 'heun'"),
        ("linear", {"prediction": "esp"}, "prediction 'esp' is unknown; did you mean 'eps'"),
        ("linear", {"solver": "heun", "eta": 0.5}, "heun adds none; leave it out, got 0.5"),
        ("linear", {"t_max": 0.5}, "t_max is for continuous time, linear is not; got 0.5"),
        ("vp_linear", {"steps": 0}, "steps must be at least 1, got 0"),
        ("vp_linear", {"t_max": 0.0}, "t_max must be in (0, 1], got 0"),
        ("vp_linear", {"t_max": 1.5}, "t_max must be in (0, 1], got 1.5"),
        ("rectified_flow", {}, "SNR of 0 at t=1, .*t_max below 1, such as 0.999"),
    ],
)
def test_bad_arguments(schedule, options, words):
    schedule = LINEAR() if schedule == "linear" else getattr(ats.schedules, schedule)()
    words = words if ".*" in words else words.replace("(", r"\(").replace("]", r"\]")
    with pytest.raises(ValueError, match=words):
        make_generator(lambda p, x, t: x, schedule, exact.SHAPE, **options)


def test_a_schedule_that_is_clean_before_its_end_is_refused():
    early = ats.schedules.vp_cosine()
    early = early._replace(sigma=lambda t: jnp.maximum(t - 0.5, 0.0))
    with pytest.raises(ValueError, match=r"has no noise at t=0\.5"):
        make_generator(lambda p, x, t: x, early, exact.SHAPE, steps=4, prediction="x0")


@pytest.mark.parametrize("module", [generator, solver_tables])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
