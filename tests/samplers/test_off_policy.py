"""Draws that are not the policy's own, and weights that are another sampler's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import adaptive_ts as ats
from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE, GRID = 256, ats.discrete(100)
BATCH = {"image": jnp.zeros((SIZE, 4, 4, 1)), "id": jnp.arange(SIZE)}
POLICY = ats.learning.Policy(  # Beta(2, 2) for every image
    lambda key, batch: jnp.full((2,), 2.0),
    lambda p, batch: tuple(jnp.broadcast_to(x, batch["image"].shape[:1]) for x in p),
)


def gradients(wrap, reward, *, num=400, **options):
    """(num, 2) of the policy's (a, b), one per probe; reward is a function of u."""
    options = {"entropy_coef": 0.0, **options}
    options |= {"normalize_reward": False, "num_buckets": 4, "every": 1}
    sampler = wrap(ats.adaptive(GRID, POLICY, optax.sgd(1.0), **options))

    def loss_fn(params, batch, t, key):
        return params["gain"][batch["id"]] + 0.0 * t

    def one(key):
        keys = jax.random.split(key)
        state = sampler.init(keys[0], BATCH)
        draw = sampler.sample(keys[0], state, BATCH)
        zero = jnp.zeros((SIZE,))
        after, _ = sampler.update(
            state, draw, zero, key=keys[1], batch=BATCH, loss_fn=loss_fn, probe=True,
            params={"gain": zero, "other": 0.0},
            new_params={"gain": -reward(draw.u), "other": 1.0},
        )  # fmt: skip
        return after.policy - state.policy

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num)))


def mean_and_error(samples):
    return samples.mean(0), samples.std(0) / np.sqrt(len(samples))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: ats.mixed_with_uniform(s, 0.5),
        lambda s: ats.mixed_with_uniform(ats.mixed_with_uniform(s, 0.3), 0.4),
        lambda s: ats.importance_weighted(ats.mixed_with_uniform(s, 0.5)),
        lambda s: ats.mixed_with_uniform(s, 1.0),
    ],
    ids=["mixed", "twice", "weighted", "all uniform"],
)
@pytest.mark.parametrize("reward", [jnp.ones_like, lambda u: 3 * u * u], ids=["one", "rising"])
def test_a_mixture_s_policy_gradient_is_the_policy_s_own(wrap, reward):
    mean, error = mean_and_error(gradients(wrap, reward))
    own, own_error = mean_and_error(gradients(lambda s: s, reward))
    np.testing.assert_array_less(np.abs(mean - own), 4 * np.hypot(error, own_error))
    assert error.max() < 5e-3
    if reward is jnp.ones_like:  # no reason to move; unweighted it is (-.084, -.083)
        np.testing.assert_allclose(mean, 0, atol=0.02)
    else:
        assert mean[0] > 0.1 > -0.1 > mean[1]


@pytest.mark.parametrize("entropy", ["bonus", "in_reward"])
def test_a_mixture_s_entropy_term_is_the_policy_s_own(entropy):
    """In closed form: c dH, or inside the reward -c H dH."""
    slope = float(2 * special.polygamma(1, 4) - special.polygamma(1, 2))
    value = float(np.log(1 / 6) - 2 * special.digamma(2) + 2 * special.digamma(4))
    expected = 0.5 * slope * (1 if entropy == "bonus" else -value)
    options = {"entropy": entropy, "entropy_coef": 0.5}
    found = gradients(lambda s: ats.mixed_with_uniform(s, 0.5), jnp.zeros_like, **options)
    np.testing.assert_allclose(found.mean(0), expected, atol=2e-3)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, ats.importance_weighted, lambda s: ats.mixed_with_uniform(s, 0.1)]
)
def test_a_policy_does_not_learn_from_another_s_draws(wrap):
    other = wrap(ats.adaptive(GRID, POLICY, optax.sgd(1.0)))
    with pytest.raises(ValueError, match="learns from its own draws only"):
        ats.with_density_of(ats.uniform(GRID), other)


def test_a_config_that_asks_for_it_is_refused():
    with pytest.raises(UserError, match="on_top_of: 'adaptive' is unknown"):
        parse(["digits_uniform", "--sampler.on_top_of", "adaptive"], configs_dir="configs")


SCHEDULE = ats.schedules.linear(100)
OTHERS = {
    "fixed": ats.beta(GRID, 1.0, 2.0),
    "importance weighted": ats.importance_weighted(ats.beta(GRID, 1.0, 2.0)),
    "weighted": ats.with_weighting(ats.beta(GRID, 1.0, 2.0), ats.weightings.min_snr(), SCHEDULE),
    "mixed": ats.mixed_with_uniform(ats.beta(GRID, 1.0, 2.0), 0.3),
    "mixed, importance weighted": ats.importance_weighted(
        ats.mixed_with_uniform(ats.beta(GRID, 1.0, 2.0), 0.3)
    ),
    "table": ats.loss_proportional(GRID, importance_weighted=False),
    "table, importance weighted": ats.loss_second_moment(GRID, history=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_on_top_of_uniform_the_objective_is_the_other_s(name):
    other = OTHERS[name]
    both = ats.with_density_of(ats.uniform(GRID), other)
    state, batch = both.init(jax.random.key(0), BATCH), {"image": jnp.zeros((100, 4, 4, 1))}
    t = jnp.arange(100)
    sample = ats.TimestepSample(t, GRID.to_u(t), jnp.ones(100))
    state, _ = both.update(state, sample, 1 / (1.0 + t))  # what is learned, if anything is
    found = ats.effective_density(both, state=state, batch=batch)
    expected = ats.effective_density(other, state=state[1], batch=batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    if "importance" in name:
        np.testing.assert_allclose(found, 0.01, rtol=1e-4)
