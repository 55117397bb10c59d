"""hackable_diffusion itself, version 1.0.1 or later, with our laws and our learned samplers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import adaptive_ts as ats

pytest.importorskip("hackable_diffusion", reason="the extra [hackable-diffusion], Python 3.12")

from hackable_diffusion import hd
from hackable_parts import BATCH, LOSS, TIME, applied, diffusion

from adaptive_ts.integrations.hackable_diffusion import (
    GivenTimes,
    LawTimeSampler,
    example_loss,
)

DATA = jnp.zeros((4096, 2, 2, 1))
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def as_their_code_has_it():
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        yield


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "beta"])
def test_the_times_follow_the_law(law):
    """Kolmogorov and Smirnov, p > 1e-3 with a fixed key."""
    sampler, cdf = {
        "uniform": (ats.uniform(TIME), stats.uniform.cdf),
        "logit_normal": (
            ats.logit_normal(TIME, -0.5, 0.8),
            lambda u: stats.norm.cdf((np.log(u / (1 - u)) + 0.5) / 0.8),
        ),
        "beta": (ats.beta(TIME, 2.0, 1.0), stats.beta(2.0, 1.0).cdf),
    }[law]
    times = jax.jit(LawTimeSampler(sampler=sampler))(KEY, DATA)
    assert times.shape == (4096, 1, 1, 1) and times.dtype == jnp.float32
    u = (np.asarray(times, np.float64).ravel() - 1e-3) / (1 - 2e-3)
    assert stats.kstest(u, cdf).pvalue > 1e-3


def test_the_draws_are_the_sampler_s():
    sampler = ats.logit_normal(TIME, coupling="stratified")
    times = LawTimeSampler(sampler=sampler)(KEY, DATA)
    drawn = sampler.sample(KEY, (), {"image": DATA})
    np.testing.assert_array_equal(times.ravel(), drawn.t)


def test_their_uniform_sampler_has_the_same_law_and_shape():
    theirs = hd.training.time_sampling.UniformTimeSampler(
        span=hd.jax_helpers.SafeSpan(safety_epsilon=1e-3)
    )(KEY, DATA)
    ours = LawTimeSampler(sampler=ats.uniform(TIME))(KEY, DATA)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert stats.ks_2samp(np.ravel(ours), np.ravel(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("sampler", ["uniform", "beta"])
def test_diffusion_trains_on_them(sampler):
    made = {"uniform": ats.uniform(TIME), "beta": ats.beta(TIME, 2.0, 1.0)}[sampler]
    times = LawTimeSampler(sampler=made)
    model = diffusion(times)
    params = applied(model, None)

    @jax.jit
    def mean_loss(params):
        out = applied(model, params)
        info = out["noise_info"]
        losses = LOSS(preds=out["output"], targets=out["target"], time=info["time"])
        return jnp.mean(losses), info["time"]

    (loss, time), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    assert time.shape == (8, 1, 1, 1) and jnp.all((time > 1e-3) & (time < 1 - 1e-3))
    assert np.isfinite(loss) and loss > 0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (lambda: ats.uniform(ats.discrete(1000)), "integer timesteps below T=1000.*continuous"),
        (
            lambda: ats.importance_weighted(ats.beta(TIME, 1.0, 2.0)),
            "importance weighted.*no channel for weights.*without importance_weighted",
        ),
        (
            lambda: ats.with_density_of(ats.uniform(TIME), ats.beta(TIME, 1.0, 2.0)),
            "with_density_of.*no channel for weights: put the weighting into the loss",
        ),
        (
            lambda: ats.with_weighting(
                ats.uniform(TIME), ats.weightings.min_snr(), ats.schedules.vp_cosine()
            ),
            "with_weighting.*no channel for weights",
        ),
        (lambda: ats.loss_proportional(TIME), "has a state.*sampled_loss"),
        (
            lambda: ats.adaptive(TIME, ats.learning.conv_beta_policy(), optax.adam(1e-3)),
            "has a state.*sampled_loss",
        ),
        (lambda: ats.impact(TIME, optax.sgd(0.1)), "has a state.*sampled_loss"),
        (lambda: ats.uniform(ats.continuous(t_max=80.0)), r"from 0 to 80.*in \[0, 1\].*t_min"),
        (
            lambda: ats.uniform(TIME)._replace(sample=lambda key, state, batch: None),
            "does not name its time grid.*GridSample",
        ),
    ],
)
def test_what_it_cannot_carry_is_refused_when_built(sampler, words):
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        LawTimeSampler(sampler=sampler())


def test_axes_and_trees_are_checked():
    uniform = ats.uniform(TIME)
    with pytest.raises(ValueError, match=r"axes must have axis 0.*got \(1,\)"):
        LawTimeSampler(sampler=uniform, axes=(1,))
    with pytest.raises(ValueError, match="for one array, got a dict: give NestedTimeSampler"):
        LawTimeSampler(sampler=uniform)(KEY, {"image": DATA})


def test_times_on_kept_axes():
    video = jnp.zeros((512, 4, 2, 2, 1))
    draws = {
        along: LawTimeSampler(sampler=ats.beta(TIME, 2.0, 1.0), axes=(0, 1), along=along)
        for along in ("independent", "equal", "increasing")
    }
    times = {along: np.asarray(draw(KEY, video)) for along, draw in draws.items()}
    for t in times.values():
        assert t.shape == (512, 4, 1, 1, 1) and t.dtype == np.float32
    one = LawTimeSampler(sampler=ats.beta(TIME, 2.0, 1.0), axes=(0, -4))(KEY, video)
    np.testing.assert_array_equal(one, times["independent"])
    u = (times["independent"].ravel() - 1e-3) / (1 - 2e-3)
    assert stats.kstest(u, stats.beta(2.0, 1.0).cdf).pvalue > 1e-3
    assert np.all(times["equal"] == times["equal"][:, :1])
    assert np.all(np.diff(times["increasing"], axis=1) >= 0)
    with pytest.raises(ValueError, match="along"):
        LawTimeSampler(sampler=ats.uniform(TIME), along="decreasing")


def test_nested_samplers():
    """One per leaf: keys of their own, or by the joint one's single key equal times."""
    data = {"image": DATA, "depth": DATA[..., :1]}
    uniform, beta = (LawTimeSampler(sampler=s) for s in (ats.uniform(TIME), ats.beta(TIME, 2, 1)))
    nested = hd.multimodal.NestedTimeSampler(samplers={"image": uniform, "depth": uniform})
    times = nested(KEY, data)
    assert abs(np.corrcoef(times["image"].ravel(), times["depth"].ravel())[0, 1]) < 0.05
    joint = hd.multimodal.JointNestedTimeSampler(samplers={"image": uniform, "depth": beta})
    times = joint(KEY, data)
    np.testing.assert_array_equal(*(np.argsort(t.ravel()) for t in times.values()))
    joint = hd.multimodal.JointNestedTimeSampler(samplers={"image": uniform, "depth": uniform})
    times = joint(KEY, data)
    np.testing.assert_array_equal(times["image"], times["depth"])


def test_the_example_loss_is_the_package_s_own():
    """At given times: what Diffusion and SiD2Loss give when their sampler says the same."""
    t = jnp.linspace(0.1, 0.9, 8)
    model = diffusion(GivenTimes(times=t))
    params = applied(model, None)
    out = applied(model, params)
    wanted = LOSS(preds=out["output"], targets=out["target"], time=t[:, None, None, None])
    np.testing.assert_array_equal(out["noise_info"]["time"].ravel(), t)
    found = example_loss(model, LOSS)(params, BATCH, t, KEY)
    assert found.shape == wanted.shape == (8,)
    # The noise differs; the part that the time determines does not: loss over squared error.
    parts = LOSS(
        preds={"velocity": jnp.ones((8, 8, 8, 1))},
        targets={"velocity": jnp.zeros((8, 8, 8, 1))},
        time=t,
    )
    plain = hd.training.NoWeightGaussianLoss(prediction_type="velocity")
    squares = example_loss(model, plain)(params, BATCH, t, KEY)
    np.testing.assert_allclose(found, parts * squares, rtol=1e-5)
    one = {name: leaf[:1] for name, leaf in BATCH.items()}
    assert example_loss(model, LOSS)(params, one, t[:1], KEY).shape == (1,)
