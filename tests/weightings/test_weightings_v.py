"""Every pair of predictions against closed forms in float64, on VP, VE and flow schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts import weightings as w
from adaptive_ts.diffusion.corruption import PREDICTIONS

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULES = {
    "linear": ats.schedules.linear(1000),
    "cosine": ats.schedules.cosine(1000),
    "vp_cosine": ats.schedules.vp_cosine(),
    "ve": ats.schedules.ve_log_linear(),
    "flow": ats.schedules.rectified_flow(),
}
PLAIN = {
    "p2": w.p2,
    "min_snr": w.min_snr,
    "soft_min_snr": w.plain.soft_min_snr,
    "max_snr": w.plain.max_snr,
    "truncated_snr": w.plain.truncated_snr,
    "snr": w.plain.snr,
    "snr_plus_one": w.plain.snr_plus_one,
    "debiased": w.plain.debiased,
    "edm": w.plain.edm,
}
GIVEN = {  # schedule -> the weighting, as a function of prediction
    **{name: lambda s, f=f: functools.partial(f, schedule=s) for name, f in PLAIN.items()},
    "sigmoid": lambda s: functools.partial(w.sigmoid, schedule=s),
    "vlb": lambda s: functools.partial(w.vlb, s),
    "change_aware": lambda s: functools.partial(w.change_aware, s),
}


def some(schedule):
    """Timesteps, alpha and sigma in float64."""
    if schedule.num_timesteps is None:
        t = np.linspace(0.02, 0.98, 25).astype(np.float32)
    else:
        t = np.arange(0, schedule.num_timesteps, 37)
    amplitudes = (np.asarray(f(jnp.asarray(t)), np.float64) for f in schedule[3:5])
    return jnp.asarray(t), *amplitudes


def ratio(prediction, alpha, sigma):
    """||prediction's error||^2 / ||x_0 error||^2, where x_t is the same and eps is off by d eps.

    x_0 is then off by -(sigma / alpha) d eps.
    """
    d_eps, d_x0 = -alpha / sigma, 1.0
    of = {"x0": d_x0, "eps": d_eps, "v": alpha * d_eps - sigma * d_x0, "flow": d_eps - d_x0}
    return np.broadcast_to(of[prediction], alpha.shape) ** 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_convert(name):
    schedule = SCHEDULES[name]
    t, alpha, sigma = some(schedule)
    base, log_snr = w.constant(), schedule.log_snr(t)
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            found = w.convert(base, source, target, schedule=schedule)(log_snr)
            want = ratio(source, alpha, sigma) / ratio(target, alpha, sigma)
            np.testing.assert_allclose(found, want, rtol=2e-4, err_msg=f"{source} {target}")
    there = w.convert(base, "v", "flow", schedule=schedule)
    back = w.convert(there, "flow", "v", schedule=schedule)(log_snr)
    np.testing.assert_allclose(back, 1, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("weighting", GIVEN)
def test_every_weighting_is_one_objective(name, weighting):
    schedule = SCHEDULES[name]
    if weighting == "change_aware" and schedule.num_timesteps is None:
        return  # discrete schedules only
    t, alpha, sigma = some(schedule)
    log_snr, make = schedule.log_snr(t), GIVEN[weighting](schedule)
    on_x0 = np.asarray(make(prediction="x0")(log_snr), np.float64)
    assert on_x0.max() > 0
    for prediction in PREDICTIONS:
        found = make(prediction=prediction)(log_snr)
        want = on_x0 / ratio(prediction, alpha, sigma)
        np.testing.assert_allclose(found, want, rtol=2e-4, err_msg=prediction)


def test_the_example_of_the_flow():
    """Issue 15: wrong by alpha^2 + sigma^2, from 1/2 to 1."""
    schedule = SCHEDULES["flow"]
    t = jnp.asarray([0.5])
    found = w.sigmoid(schedule=schedule, prediction="v")(schedule.log_snr(t))
    rate, eps_over_v = 8.0, 1 / (0.5**2 + 0.5**2) ** 2 * 0.5**2  # at alpha = sigma = 1/2
    np.testing.assert_allclose(found, 0.5 * rate * eps_over_v, rtol=1e-5)


@pytest.mark.parametrize("name", ["flow", "ve", "vp_cosine"])
def test_what_knows_the_schedule_names_it(name):
    """The wrapper, the density and the table-learned samplers: as if it had been given."""
    schedule, grid = SCHEDULES[name], ats.continuous(20, t_min=0.02, t_max=0.98)
    bare, given = w.min_snr(prediction="v"), w.min_snr(prediction="v", schedule=schedule)
    twice = w.convert(w.convert(bare, "v", "eps"), "eps", "v")
    batch = {"image": jnp.zeros((16, 2))}
    draw = ats.uniform(grid).sample(jax.random.key(0), (), batch)
    expected = given(schedule.log_snr(draw.t))
    changed = not np.allclose(bare(schedule.log_snr(draw.t)), expected, rtol=1e-3)
    assert changed == (name != "vp_cosine")
    for weighting in (bare, given, twice):
        sampler = ats.with_weighting(ats.uniform(grid), weighting, schedule)
        found = sampler.sample(jax.random.key(0), (), batch).weight
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        shares = [ats.effective_density(ats.uniform(grid), x, schedule) for x in (weighting, given)]
        np.testing.assert_allclose(*shares, rtol=1e-4)
        for make in (
            lambda x: ats.loss_proportional(grid, schedule=schedule, weighting=x),
            lambda x: ats.entropy_rate(grid, schedule, prediction="v", weighting=x),
        ):
            states = [
                make(x).update(make(x).init(None, None), draw, draw.u)[0]
                for x in (weighting, given)
            ]
            np.testing.assert_allclose(states[0].total, states[1].total, rtol=1e-4)


def test_entropy_rate_of_v_is_that_of_x0():
    schedule, grid = SCHEDULES["flow"], ats.continuous(20, t_min=0.02, t_max=0.98)
    draw = ats.uniform(grid).sample(jax.random.key(0), (), {"image": jnp.zeros((64, 2))})
    alpha, sigma = (np.asarray(f(draw.t), np.float64) for f in schedule[3:5])
    found = {}
    for prediction in ("x0", "v", "flow"):
        losses = jnp.asarray(0.01 * ratio(prediction, alpha, sigma), jnp.float32)
        sampler = ats.entropy_rate(grid, schedule, prediction=prediction, weighting=jnp.ones_like)
        found[prediction] = sampler.update(sampler.init(None, None), draw, losses)[0].total
    for prediction in ("v", "flow"):
        np.testing.assert_allclose(found[prediction], found["x0"], rtol=1e-3)


def test_a_schedule_without_an_inverse():
    flow, grid = SCHEDULES["flow"]._replace(from_log_snr=None), ats.continuous(20)
    said = r"has no from_log_snr, which a weighting of v needs where alpha\^2 \+ sigma\^2 is not 1"
    for call in (
        lambda: w.p2(prediction="v", schedule=flow),
        lambda: w.convert(w.p2(), "eps", "v", schedule=flow),
        lambda: ats.with_weighting(ats.uniform(grid), w.p2(prediction="v"), flow),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert w.p2(prediction="flow", schedule=flow)(jnp.zeros(1)) == w.p2(prediction="flow")(
        jnp.zeros(1)
    )
    w.p2(prediction="v", schedule=SCHEDULES["cosine"]._replace(from_log_snr=None))
