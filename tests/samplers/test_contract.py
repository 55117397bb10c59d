"""One table of all samplers, one set of checks; and the checker is checked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import adaptive_ts as ats
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)), jnp.float32)}
GRIDS = {
    "T1000": ats.discrete(1000),
    "T50_nearest": ats.discrete(50, rounding="nearest"),
    "continuous": ats.continuous(20, t_min=1e-3, t_max=1.0),
}


def policy_far_from_uniform():
    """(a, b) about (1.5, 2.5), different from image to image."""
    base = ats.learning.conv_beta_policy(channels=(4,), hidden=(8,))

    def init(key, batch):
        params = base.init(key, batch)
        head = params["Dense_1"]
        kernel = 0.1 * jax.random.normal(jax.random.key(7), head["kernel"].shape)
        params["Dense_1"] = {"kernel": kernel, "bias": jnp.asarray([1.2, 2.4])}
        return params

    return ats.learning.Policy(init, base.apply)


def adaptive(grid, **options):
    return ats.adaptive(
        grid, policy_far_from_uniform(), optax.adam(1e-3), every=2, num_buckets=10, **options
    )


SAMPLERS = {
    "uniform": ats.uniform,
    "stratified": lambda grid: ats.uniform(grid, stratified=True),
    "adaptive": adaptive,
    "adaptive_as_published": lambda grid: adaptive(
        grid,
        common_noise=False,
        entropy="in_reward",
        reduce="sum",
        normalize_reward=False,
        lagged_selection=True,
    ),
    "adaptive_weighted": lambda grid: ats.importance_weighted(adaptive(grid, relative=True)),
    "adaptive_mixed": lambda grid: ats.mixed_with_uniform(adaptive(grid, jitter=True), 0.3),
    "weighted_mixed": lambda grid: ats.importance_weighted(
        ats.mixed_with_uniform(adaptive(grid, chunk=3), 0.3)
    ),
}


CASES = [
    *[(name, grid) for name in ("uniform", "stratified") for grid in GRIDS],
    # All of the adaptive sampler's functions.
    ("weighted_mixed", "T50_nearest"),
    ("weighted_mixed", "continuous"),
    pytest.param("weighted_mixed", "T1000", marks=pytest.mark.slow),
    ("adaptive", "T1000"),
    *[
        pytest.param(name, "T1000", marks=pytest.mark.slow)
        for name in SAMPLERS
        if name.startswith("adaptive_")
    ],
]


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_sampler_keeps_the_contract(name, grid):
    report = check_sampler(SAMPLERS[name](GRIDS[grid]), BATCH, num_steps=2)
    assert report.total_mass == pytest.approx(1, abs=0.01)


def test_strict_dtype_promotion(strict):
    sampler = ats.importance_weighted(ats.mixed_with_uniform(adaptive(GRIDS["T1000"]), 0.1))
    key = jax.random.key(1)
    state = jax.eval_shape(sampler.init, key, BATCH)
    with strict():
        draw = jax.eval_shape(sampler.sample, key, state, BATCH)
        jax.eval_shape(sampler.log_density, state, draw, BATCH)
        jax.eval_shape(ats.uniform(GRIDS["continuous"], stratified=True).sample, key, (), BATCH)


def test_old_style_keys_work():
    sampler = adaptive(GRIDS["T1000"])
    state = sampler.init(jax.random.PRNGKey(0), BATCH)
    assert sampler.sample(jax.random.PRNGKey(1), state, BATCH).t.shape == (8,)


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_adaptive_log_density_is_the_probability_of_t(rounding):
    T = 200
    sampler = adaptive(ats.discrete(T, rounding=rounding))
    state = sampler.init(jax.random.key(0), BATCH)
    a, b = policy_far_from_uniform().apply(state.policy, BATCH)
    edges = np.arange(T + 1) / T
    if rounding == "nearest":
        edges = np.clip((np.arange(T + 1) - 0.5) / (T - 1), 0, 1)
    for t in (0, 1, 57, 199):
        sample = ats.TimestepSample(jnp.full((8,), t), jnp.full((8,), 0.5), jnp.ones((8,)))
        found = np.exp(sampler.log_density(state, sample, BATCH)) / T
        law = stats.beta(np.asarray(a, np.float64), np.asarray(b, np.float64))
        np.testing.assert_allclose(found, law.cdf(edges[t + 1]) - law.cdf(edges[t]), rtol=2e-3)


def test_stratified_covers_the_strata_of_the_batch():
    sampler = ats.uniform(ats.discrete(800), stratified=True)
    orders = set()
    for i in range(20):
        t = np.asarray(sampler.sample(jax.random.key(i), (), BATCH).t)
        assert sorted(t // 100) == list(range(8))
        orders.add(tuple(t // 100))
    assert len(orders) > 15  # the place in the batch says nothing about t


def test_mixture_bounds_the_importance_weights():
    sampler = ats.importance_weighted(ats.mixed_with_uniform(adaptive(ats.discrete(1000)), 0.25))
    state = sampler.init(jax.random.key(0), BATCH)
    draw = jax.jit(jax.vmap(lambda k: sampler.sample(k, state, BATCH)))
    weight = draw(jax.random.split(jax.random.key(1), 500)).weight
    assert weight.max() <= 4.0001 and weight.min() > 0
    assert weight.mean() == pytest.approx(1, abs=0.02)


def test_wrapper_errors():
    sampler = ats.uniform(ats.discrete(10))
    for prob in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"got {prob}"):
            ats.mixed_with_uniform(sampler, prob)
    bare = sampler._replace(sample=sampler.sample.draw)  # as other people's samplers are
    with pytest.raises(ValueError, match="grid="):
        ats.mixed_with_uniform(bare, 0.5)
    assert ats.mixed_with_uniform(bare, 0.5, grid=ats.discrete(10)).sample.grid.num_buckets == 10
    check_sampler(bare, BATCH, grid=ats.discrete(10))


def _broken(**changes):
    return ats.uniform(ats.discrete(100))._replace(**changes)


def _squared_draws(key, state, batch):
    u = jax.random.uniform(key, (8,), minval=1e-6) ** 2
    return ats.TimestepSample((u * 100).astype(jnp.int32), u, jnp.ones((8,)))


BROKEN = {
    "log_density": (
        _broken(log_density=lambda state, sample, batch: 0.0 * sample.u + 0.5),
        "probabilities sum to",
    ),
    "draws": (
        _broken(sample=ats.GridSample(ats.discrete(100), _squared_draws)),
        "chi-square",
    ),
    "state": (
        _broken(
            init=lambda key, batch: jnp.int32(0),
            update=lambda state, sample, losses, **extra: (state.astype(jnp.float32), {}),
        ),
        "state's structure",
    ),
    "callback": (
        _broken(
            update=lambda state, sample, losses, **extra: (
                state,
                {
                    "m": jax.pure_callback(
                        lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), losses[0]
                    )
                },
            )
        ),
        "host callback",
    ),
    "metrics": (
        _broken(update=lambda state, sample, losses, **extra: (state, {"loss": losses})),
        "metrics",
    ),
    "keys": (
        _broken(
            sample=ats.GridSample(
                ats.discrete(100),
                lambda key, state, batch: ats.TimestepSample(
                    jnp.arange(8), jnp.linspace(0.1, 0.9, 8), jnp.ones((8,))
                ),
            )
        ),
        "same draws",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_checker_finds_what_is_broken(name):
    sampler, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, BATCH)
