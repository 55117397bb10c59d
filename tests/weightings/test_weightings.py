"""weightings.py against the authors' numbers, closed forms in float64 and hand-made errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import expit

from adaptive_ts import schedules
from adaptive_ts import weightings as w
from adaptive_ts.schedules.continuous import rectified_flow, vdm_linear, vp_cosine
from adaptive_ts.schedules.discrete import jsd

PREDICTIONS = ("eps", "x0", "v", "flow")
SCHEDULES = {
    "linear": schedules.linear(),
    "quad": schedules.quad(),
    "cosine": schedules.cosine(),
}
LOG_SNR = np.linspace(-30, 30, 241).astype(np.float32)


def at(schedule, weighting, t=None):
    """The weights of timesteps t, or of all, in float64."""
    t = np.arange(schedule.num_timesteps) if t is None else t
    return np.asarray(weighting(schedule.log_snr(jnp.asarray(t, jnp.int32))), np.float64)


def ratio(prediction, snr):
    """||prediction's error||^2 / ||x_0 error||^2, by hand."""
    of = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1, "flow": (1 + np.sqrt(snr)) ** 2}
    return of[prediction]


# name -> (factory, the weight on the x_0 error as a function of the SNR)
CLOSED_FORMS = {
    "p2": (w.p2, lambda s: s / (1 + s)),
    "p2_half": (functools.partial(w.p2, 0.5, 2.0), lambda s: s / (2 + s) ** 0.5),
    "min_snr": (w.min_snr, lambda s: np.minimum(s, 5)),
    "min_snr_1": (functools.partial(w.min_snr, 1.0), lambda s: np.minimum(s, 1)),
    "soft_min_snr": (w.soft_min_snr, lambda s: s * 4 / (s + 4)),
    "max_snr": (w.max_snr, lambda s: np.maximum(s, 5)),
    "truncated_snr": (w.truncated_snr, lambda s: np.maximum(s, 1)),
    "snr": (w.snr, lambda s: s),
    "snr_plus_one": (w.snr_plus_one, lambda s: s + 1),
    "debiased": (w.debiased, lambda s: s / np.sqrt(s)),
    "debiased_capped": (
        functools.partial(w.debiased, max_snr=1000.0),
        lambda s: s / np.sqrt(np.minimum(s, 1000)),
    ),
    "sigmoid": (w.sigmoid, lambda s: s * expit(-np.log(s))),
    "sigmoid_2": (functools.partial(w.sigmoid, 2.0), lambda s: np.exp(2) * expit(np.log(s) - 2)),
    "edm": (w.edm, lambda s: (1 / s + 0.25) / (0.25 / s)),
    "edm_1": (functools.partial(w.edm, 1.0), lambda s: s + 1),
}
SCHEDULED = {
    "sigmoid_discrete": functools.partial(w.sigmoid, 1.0, schedule=SCHEDULES["linear"]),
    "sigmoid_flow": functools.partial(w.sigmoid, schedule=rectified_flow()),
    "vlb": functools.partial(w.vlb, SCHEDULES["cosine"]),
    "vlb_continuous": functools.partial(w.vlb, vdm_linear()),
    "change_aware": functools.partial(w.change_aware, SCHEDULES["quad"], lam=1.0),
}
FACTORIES = {name: factory for name, (factory, _) in CLOSED_FORMS.items()} | SCHEDULED


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_in_every_prediction(name):
    factory, on_x0 = CLOSED_FORMS[name]
    snr = np.exp(LOG_SNR.astype(np.float64))
    for prediction in PREDICTIONS:
        found = factory(prediction=prediction)(jnp.asarray(LOG_SNR))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, on_x0(snr) / ratio(prediction, snr), rtol=6e-6)


@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduled_weights_are_one_objective(name):
    snr = np.exp(LOG_SNR.astype(np.float64))
    kinds = [p for p in PREDICTIONS if (name, p) != ("sigmoid_flow", "v")]  # test_weightings_v
    on_x0 = {
        p: np.asarray(SCHEDULED[name](prediction=p)(jnp.asarray(LOG_SNR))) * ratio(p, snr)
        for p in kinds
    }
    assert on_x0["x0"].max() > 0
    for prediction in kinds:
        np.testing.assert_allclose(on_x0[prediction], on_x0["x0"], rtol=6e-6)


@pytest.mark.parametrize("schedule", [schedules.cosine(50), rectified_flow()], ids=lambda s: s.name)
def test_weighted_errors_agree(schedule):
    """Errors made by hand: one x_t, one wrong x_0, and what it means for the other predictions."""
    rng = np.random.default_rng(0)
    discrete = schedule.num_timesteps is not None
    t = np.arange(50) if discrete else rng.uniform(0.01, 0.99, 50).astype(np.float32)
    alpha, sigma = (np.asarray(f(jnp.asarray(t)), np.float64) for f in schedule[3:5])
    x0, eps, wrong_x0 = rng.standard_normal((3, 50))
    wrong_eps = (alpha * x0 + sigma * eps - alpha * wrong_x0) / sigma
    error = {
        "eps": wrong_eps - eps,
        "x0": wrong_x0 - x0,
        "v": alpha * (wrong_eps - eps) - sigma * (wrong_x0 - x0),
        "flow": (wrong_eps - wrong_x0) - (eps - x0),
    }
    log_snr = schedule.log_snr(jnp.asarray(t))
    weighted = [
        w.min_snr(prediction=p, schedule=schedule)(log_snr) * e**2 for p, e in error.items()
    ]
    for other in weighted[1:]:
        np.testing.assert_allclose(other, weighted[0], rtol=2e-5)


def test_convert_is_the_factories_own_conversion():
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            found = w.convert(w.min_snr(prediction=source), source, target)(jnp.asarray(LOG_SNR))
            want = w.min_snr(prediction=target)(jnp.asarray(LOG_SNR))
            np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_constant_is_one_on_the_models_own_error(prediction):
    assert np.all(np.asarray(w.constant(prediction=prediction)(jnp.asarray(LOG_SNR))) == 1)


@pytest.mark.parametrize("name", ["linear", "quad", "cosine"])
def test_golden_p2(golden, name):
    g, schedule = golden("p2"), SCHEDULES[name]
    for gamma in (1, 0.5, 0):
        found = at(schedule, w.p2(gamma), g["index"])
        np.testing.assert_allclose(found, g[f"{name}__gamma{gamma:g}_k1"], rtol=3e-6)
    abar = np.cumprod(1 - schedule.betas)
    np.testing.assert_allclose(at(schedule, w.p2(1.0, 1.0)), 1 - abar, rtol=3e-6)


def test_p2_as_published_ignores_the_prediction():
    for prediction in PREDICTIONS:
        found = w.p2(prediction=prediction, as_published=True)(jnp.asarray(LOG_SNR))
        np.testing.assert_array_equal(found, w.p2()(jnp.asarray(LOG_SNR)))
        if prediction != "eps":
            assert np.any(w.p2(prediction=prediction)(jnp.asarray(LOG_SNR)) != found)


def test_five_p2_is_not_min_snr():
    """SpeeD's code takes the first element of the minimum, 5, and so gives 5 / (SNR + 1)."""
    schedule = SCHEDULES["linear"]
    assert 5 * at(schedule, w.p2()).sum() == pytest.approx(3622.43, rel=1e-5)
    ours = at(schedule, w.min_snr(prediction="v"))
    np.testing.assert_allclose(ours[:130], 5 * at(schedule, w.p2())[:130], rtol=1e-5)
    assert np.all(ours[130:] < 5 * at(schedule, w.p2())[130:])


@pytest.mark.parametrize("name", ["linear", "quad", "cosine"])
def test_golden_min_snr(golden, name):
    """The authors' three forms, and what their code gives "min_snr" on v: the form of eps."""
    g, schedule = golden("min_snr"), SCHEDULES[name]
    cases = {
        "eps_min_snr_5": w.min_snr(),
        "eps_min_snr_1": w.min_snr(1.0),
        "x0_min_snr_5": w.min_snr(prediction="x0"),
        "v_vmin_snr_5": w.min_snr(prediction="v"),
        "v_min_snr_5": w.min_snr(prediction="v", as_published=True),
        "eps_max_snr_5": w.max_snr(),
        "x0_max_snr_5": w.max_snr(prediction="x0"),
        "x0_trunc_snr": w.truncated_snr(prediction="x0"),
        "x0_snr": w.snr(prediction="x0"),
    }
    for key, weighting in cases.items():
        found = at(schedule, weighting, g["index"])
        np.testing.assert_allclose(found, g[f"{name}__{key}"], rtol=3e-6, err_msg=key)
        as_run = g[f"{name}__{key}__f32_as_run"]  # the authors' own rounding is 2e-5
        np.testing.assert_allclose(found, as_run, rtol=3e-5, err_msg=key)


def test_min_snr_as_published_is_right_on_eps_and_x0():
    for prediction in ("eps", "x0"):
        found = w.min_snr(prediction=prediction, as_published=True)(jnp.asarray(LOG_SNR))
        want = w.min_snr(prediction=prediction)(jnp.asarray(LOG_SNR))
        np.testing.assert_allclose(found, want, rtol=1e-6)
    v = w.min_snr(prediction="v", as_published=True)(jnp.asarray(LOG_SNR))
    np.testing.assert_array_equal(v, w.min_snr()(jnp.asarray(LOG_SNR)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_at_an_snr_of_zero(prediction):
    """The authors' code jumps to 1 at the last step of a zero-terminal schedule."""
    schedule, last = jsd(), np.array([998, 999])
    before, end = at(schedule, w.min_snr(prediction=prediction, as_published=True), last)
    assert end == 1 and before == pytest.approx(1e-3 if prediction == "x0" else 1, rel=2e-3)
    before, end = at(schedule, w.min_snr(prediction=prediction), last)
    assert (end == 1) if prediction == "eps" else (end < 1e-16 < before < 2e-3)


def test_first_timestep_below_gamma():
    """Where min(1, 5 / SNR) reaches 1."""
    first = {name: int(np.argmax(at(SCHEDULES[name], w.min_snr()) == 1)) for name in SCHEDULES}
    assert (first["linear"], first["quad"], first["cosine"]) == (130, 242, 261)


@pytest.mark.parametrize(
    ("weighting", "total"),
    [
        (w.p2(1.0), 724.48677),
        (w.p2(0.5), 805.89188),
        (w.p2(0.0), 1000),
        (w.min_snr(), 913.07305),
        (w.min_snr(prediction="x0"), 1049.7112),
        (w.min_snr(prediction="v"), 191.86313),
        (w.debiased(), 17817.056),
    ],
)
def test_sums_over_the_linear_schedule(weighting, total):
    assert at(SCHEDULES["linear"], weighting).sum() == pytest.approx(total, rel=1e-6)


def test_debiased_ends_and_cap():
    found = at(SCHEDULES["linear"], w.debiased())
    assert (found[0], found[-1]) == pytest.approx((0.0100005, 157.407), rel=1e-5)
    capped = at(SCHEDULES["linear"], w.debiased(max_snr=1000.0))
    assert capped.min() == pytest.approx(1000**-0.5, rel=1e-6)
    np.testing.assert_array_equal(capped[100:], found[100:])


def test_debiased_as_published_ignores_the_prediction():
    for prediction in PREDICTIONS:
        found = w.debiased(prediction=prediction, as_published=True)(jnp.asarray(LOG_SNR))
        np.testing.assert_array_equal(found, w.debiased()(jnp.asarray(LOG_SNR)))
    on_v = w.debiased(prediction="v")(jnp.asarray([0.0]))
    assert float(on_v[0]) == pytest.approx(0.5)  # not 1, nor 1 / sqrt(SNR + 1)


def test_truncated_snr_on_eps_is_not_one():
    """In Min-SNR's code the type "trunc_snr" gives 1, without a word, unless x_0 is predicted."""
    found = w.truncated_snr()(jnp.log(jnp.asarray([0.1, 10.0])))
    np.testing.assert_allclose(found, [10, 1], rtol=1e-6)


def test_edm_undoes_its_output_scale():
    sigma, sd = np.geomspace(0.002, 80, 41), 0.5
    lam = jnp.asarray(-2 * np.log(sigma), jnp.float32)
    c_out = sigma * sd / np.sqrt(sigma**2 + sd**2)
    np.testing.assert_allclose(w.edm(sd, prediction="x0")(lam) * c_out**2, 1, rtol=4e-6)
    np.testing.assert_allclose(w.edm(sd)(lam), (sigma**2 + sd**2) / sd**2, rtol=4e-6)
    soft = w.soft_min_snr(1 / sd**2, prediction="x0")(lam)
    np.testing.assert_allclose(soft, 1 / (sigma**2 + sd**2), rtol=4e-6)
    for p in PREDICTIONS:
        one = w.edm(1.0, prediction=p)(lam)
        np.testing.assert_allclose(one, w.snr_plus_one(prediction=p)(lam), rtol=4e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_finite_at_any_snr(name):
    extreme = jnp.asarray([np.inf, 1e30, 40.0, -40.0, -1e30, -np.inf, np.nan])
    for prediction in PREDICTIONS:
        found = np.asarray(FACTORIES[name](prediction=prediction)(extreme))
        assert np.all(np.isfinite(found[:6])) and np.all(found >= 0, where=~np.isnan(found))
        assert np.isnan(found[6])
        np.testing.assert_array_equal(found[:6], found[[2, 2, 2, 3, 3, 3]])


def test_limits_at_both_ends():
    ends = jnp.asarray([np.inf, -np.inf])
    for factory, prediction, want in [
        (w.min_snr, "eps", (0, 1)),
        (w.min_snr, "x0", (5, 0)),
        (w.min_snr, "v", (0, 0)),
        (w.p2, "eps", (0, 1)),
        (w.p2, "x0", (1, 0)),
        (w.soft_min_snr, "x0", (4, 0)),
        (w.snr_plus_one, "v", (1, 1)),
        (w.truncated_snr, "flow", (1, 1)),
        (w.sigmoid, "eps", (0, 1)),
        (w.edm, "eps", (1, 4 * np.exp(40.0))),
    ]:
        found = np.asarray(factory(prediction=prediction)(ends), np.float64)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-8, err_msg=str(factory))


def test_transformations(strict, mesh8, quick_compilation):
    """jit, vmap and shard_map give what plain calls give, under strict promotion."""
    factories = {k: f for k, f in FACTORIES.items() if "_" not in k} | SCHEDULED
    chosen = [factory(prediction="v") for factory in factories.values()]

    def stacked(lam):
        return jnp.stack([weighting(lam) for weighting in chosen])

    lam = jnp.asarray(LOG_SNR[1:241:15])
    sharded = jax.shard_map(stacked, mesh=mesh8, in_specs=P("data"), out_specs=P(None, "data"))
    with strict():
        plain = stacked(lam)
        mapped = jax.jit(jax.vmap(stacked, 1, 2))(lam[:, None])
        by_device = jax.jit(sharded)(lam)
    np.testing.assert_allclose(mapped[..., 0], plain, rtol=1e-5)
    np.testing.assert_allclose(by_device, plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: w.p2(gamma=-1), "gamma=-1"),
        (lambda: w.p2(k=0), "k=0"),
        (lambda: w.min_snr(0), "gamma=0"),
        (lambda: w.min_snr(np.nan), "gamma=nan"),
        (lambda: w.soft_min_snr(-2.0), "gamma=-2"),
        (lambda: w.max_snr(np.inf), "gamma=inf"),
        (lambda: w.debiased(max_snr=0.0), "max_snr=0"),
        (lambda: w.edm(0.0), "sigma_data=0"),
        (lambda: w.sigmoid(np.inf), "bias=inf"),
        (lambda: w.change_aware(schedules.linear(), lam=5), "lam=5"),  # the code's own default
        (lambda: w.change_aware(schedules.linear(), tau=0), "tau=0"),
        (lambda: w.change_aware(vp_cosine()), "continuous"),
        (lambda: w.vlb(jsd()), "SNR of 0"),
        (lambda: w.vlb(schedules.linear(), variance="learned"), "learned"),
        (lambda: w.vlb(vp_cosine()._replace(from_log_snr=None)), "from_log_snr"),
        (lambda: w.sigmoid(schedule=vp_cosine()._replace(from_log_snr=None)), "from_log_snr"),
        (lambda: w.convert(w.constant(), "eps", "epsilon"), "did you mean 'eps'"),
        (lambda: w.min_snr()(jnp.arange(4)), "log_snr"),  # timesteps
    ],
)
def test_errors_name_what_they_got(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [*FACTORIES, "constant"])
def test_unknown_predictions_are_refused(name):
    factory = FACTORIES.get(name, w.constant)
    with pytest.raises(ValueError, match="did you mean 'x0'"):
        factory(prediction="x_0")
