"""with_weighting and effective_density: p(t) w(t), against products made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats
from adaptive_ts import weightings
from adaptive_ts.density import relative_density
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
GRID, SCHEDULE = ats.discrete(1000), ats.schedules.linear(1000)
T = jnp.arange(1000)
BATCH = {"image": jnp.zeros((8, 8, 8, 1))}


def normalised(x):
    x = np.asarray(x, np.float64)
    return x / x.sum()


def test_weighting_multiplies_the_weights_of_the_drawn_timesteps(strict):
    weighting = weightings.min_snr(5.0)
    sampler = ats.with_weighting(ats.uniform(GRID), weighting, SCHEDULE)
    with strict():
        draw = jax.jit(sampler.sample)(jax.random.key(0), (), BATCH)
    plain = ats.uniform(GRID).sample(jax.random.key(0), (), BATCH)
    np.testing.assert_array_equal(draw.t, plain.t)
    snr = np.exp(np.asarray(SCHEDULE.log_snr(draw.t), np.float64))
    np.testing.assert_allclose(draw.weight, np.minimum(snr, 5) / snr, rtol=1e-5)
    twice = ats.with_weighting(sampler, weighting, SCHEDULE)
    again = twice.sample(jax.random.key(0), (), BATCH)
    np.testing.assert_allclose(again.weight, draw.weight**2, rtol=1e-6)


def test_weighting_works_on_a_sampler_that_names_no_grid():
    named = ats.uniform(GRID)
    bare = named._replace(sample=named.sample.draw)  # as other people's samplers are
    for wrap in (
        lambda s: ats.with_weighting(s, weightings.p2(), SCHEDULE),
        ats.importance_weighted,
    ):
        found, expected = (wrap(s).sample(jax.random.key(1), (), BATCH) for s in (bare, named))
        np.testing.assert_array_equal(found.weight, expected.weight)


def test_density_is_p_times_w():
    """Uniform timesteps under p2, and timesteps drawn like p2's weights, are one objective."""
    weight = weightings.p2()(SCHEDULE.log_snr(T))
    expected = normalised(weight)
    drawn = ats.from_probabilities(GRID, expected)
    for found in (
        ats.effective_density(ats.uniform(GRID), weightings.p2(), SCHEDULE),
        ats.effective_density(ats.with_weighting(ats.uniform(GRID), weightings.p2(), SCHEDULE)),
        ats.effective_density(drawn),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    both = ats.effective_density(drawn, weightings.snr_plus_one(), SCHEDULE)
    snr = np.exp(np.asarray(SCHEDULE.log_snr(T), np.float64))
    np.testing.assert_allclose(both, normalised(expected * (1 + 1 / snr)), rtol=1e-3)


def test_importance_weights_make_it_uniform():
    for sampler in (
        ats.importance_weighted(ats.beta(GRID, 1.0, 2.0)),
        ats.mixed_with_uniform(ats.importance_weighted(ats.beta(GRID, 1.0, 2.0)), 0.3),
        ats.importance_weighted(ats.importance_weighted(ats.beta(GRID, 1.0, 2.0))),
    ):
        np.testing.assert_allclose(ats.effective_density(sampler), 1e-3, rtol=1e-4)
    weighted = ats.with_weighting(
        ats.importance_weighted(ats.beta(GRID, 1.0, 2.0)), weightings.p2(), SCHEDULE
    )
    expected = normalised(weightings.p2()(SCHEDULE.log_snr(T)))
    np.testing.assert_allclose(ats.effective_density(weighted), expected, rtol=1e-3)


def test_what_is_never_drawn_counts_for_nothing():
    for sampler in (
        ats.from_probabilities(ats.discrete(3), [0.0, 0.5, 0.5]),
        ats.logit_normal(GRID, 0.0, 0.2),
    ):
        share = ats.effective_density(ats.importance_weighted(sampler))
        drawn = np.asarray(ats.effective_density(sampler)) > 0
        np.testing.assert_allclose(share, drawn / drawn.sum(), rtol=1e-3)


def test_a_mixture_of_an_importance_weighted_sampler_is_weighted_by_the_mixture():
    sampler = ats.mixed_with_uniform(ats.importance_weighted(ats.beta(GRID, 1.0, 2.0)), 0.25)
    draw = sampler.sample(jax.random.key(0), (), {"image": jnp.zeros((500, 8, 8, 1))})
    expected = np.exp(-sampler.log_density((), draw, None))
    np.testing.assert_allclose(draw.weight, expected, rtol=1e-5)
    assert draw.weight.max() <= 4.001 and draw.weight.mean() == pytest.approx(1, abs=0.1)


def test_density_in_continuous_time_and_of_a_state():
    grid, flow = ats.continuous(50, t_min=1e-3, t_max=0.999), ats.schedules.rectified_flow()
    found = ats.effective_density(ats.logit_normal(grid), weightings.snr(prediction="flow"), flow)
    u = (np.arange(50) + 0.5) / 50
    t, logit = 1e-3 + 0.998 * u, np.log(u / (1 - u))
    density = np.exp(-(logit**2) / 2) / (u * (1 - u))
    weight = (1 - t) ** 2  # weight 1 of the eps error, on the error of the flow
    np.testing.assert_allclose(found, normalised(density * weight), rtol=1e-3)

    sampler = ats.loss_second_moment(ats.discrete(4), history=1, uniform_prob=0.0)
    state = sampler.init(jax.random.key(0), BATCH)
    draw = ats.TimestepSample(jnp.arange(4), jnp.arange(4) / 4, jnp.ones(4))
    state, _ = sampler.update(state, draw, jnp.asarray([1.0, 2.0, 3.0, 4.0]))
    p, weighted = relative_density(sampler, state, BATCH, jnp.arange(4), jnp.arange(4) / 4)
    np.testing.assert_allclose(p, [0.4, 0.8, 1.2, 1.6], rtol=1e-5)
    np.testing.assert_allclose(weighted, np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(ats.effective_density(sampler, state=state), 0.25, rtol=1e-5)


def test_errors():
    uniform = ats.uniform(GRID)
    with pytest.raises(ValueError, match="the grid has 1000 timesteps, the linear schedule 100"):
        ats.with_weighting(uniform, weightings.p2(), ats.schedules.linear(100))
    with pytest.raises(ValueError, match="the rectified_flow schedule continuous time"):
        ats.effective_density(uniform, weightings.p2(), ats.schedules.rectified_flow())
    with pytest.raises(ValueError, match="give weighting and schedule both"):
        ats.effective_density(uniform, weightings.p2())
    bare = uniform._replace(sample=uniform.sample.draw)
    with pytest.raises(ValueError, match="does not name its time grid"):
        ats.effective_density(bare)


def test_on_top_of_another_sampler_its_density_is_a_weighting():
    """Objective of the one, draws of the other; states, weights and wrappers of both."""
    law = ats.beta(GRID, 1.0, 2.0)
    p = normalised(1 - GRID.to_u(T))  # Beta(1, 2)
    found = ats.effective_density(ats.with_density_of(ats.uniform(GRID), law))
    np.testing.assert_allclose(found, p, rtol=1e-3)
    twice = ats.with_density_of(law, law)
    np.testing.assert_allclose(ats.effective_density(twice), normalised(p**2), rtol=1e-3)
    weighted = ats.with_weighting(law, weightings.p2(), SCHEDULE)
    expected = normalised(p * np.asarray(weightings.p2()(SCHEDULE.log_snr(T)), np.float64))
    for sampler in (
        ats.with_density_of(ats.uniform(GRID), weighted),
        ats.importance_weighted(ats.with_density_of(ats.beta(GRID, 0.8, 1.0), weighted)),
        ats.with_density_of(ats.importance_weighted(ats.beta(GRID, 0.8, 1.0)), weighted),
    ):
        np.testing.assert_allclose(ats.effective_density(sampler), expected, rtol=2e-3)


def test_on_top_of_a_curriculum_the_weighting_follows_it(strict):
    sampler = ats.with_density_of(ats.beta(GRID, 1.0, 2.0), ats.curriculum(GRID, steps=10))
    check_sampler(sampler, BATCH)
    state = sampler.init(jax.random.key(0), BATCH)
    with strict():
        first = jax.jit(sampler.sample)(jax.random.key(1), state, BATCH)
        for _ in range(20):
            state, _ = sampler.update(state, first, jnp.ones(8), key=jax.random.key(2))
        last = jax.jit(sampler.sample)(jax.random.key(1), state, BATCH)
    np.testing.assert_array_equal(first.t, last.t)
    np.testing.assert_allclose(first.weight, 1.0, rtol=1e-5)
    law = ats.curriculum(GRID, steps=10)
    expected = jnp.exp(law.log_density(state[1], last, BATCH))
    np.testing.assert_allclose(last.weight, expected, rtol=1e-6)
    assert jnp.std(last.weight) > 0.1


def test_on_top_of_needs_one_grid():
    with pytest.raises(ValueError, match=r"same grid, got .*\(1000, 1000\) and \(50, 50\)"):
        ats.with_density_of(ats.uniform(GRID), ats.uniform(ats.discrete(50)))
