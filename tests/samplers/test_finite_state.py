"""No loss, gradient or parameter leaves a number in a sampler's state that is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptive_ts as ats
from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.methods import SAMPLERS
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.devices import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, SIZE, STEPS = 8, 8, 4  # timesteps, examples, updates
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (SIZE, 4, 4, 1)), jnp.float32)
}
DISCRETE, CONTINUOUS = ats.discrete(T), ats.continuous(T, t_min=1e-3, t_max=1 - 1e-3)
LINEAR, MODEL_S = (
    ats.schedules.linear(T),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
)

NUMBERS = st.sampled_from([0.0, -0.0, 1e-42, -1e-42, 1e-30, 1.0, 1e9, -1e9]) | st.floats(
    -1e3, 1e3, width=32
)
NOT_FINITE = st.sampled_from([np.nan, np.inf, -np.inf])
HUGE = st.sampled_from([1e18, 1e30, -1e30, 3e38, -3e38])  # the squares and sums of most overflow


def policy():
    return ats.learning.conv_beta_policy(channels=(2,), hidden=(4,))


def adaptive(grid, **options):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    return ats.adaptive(grid, policy(), optimizer, every=2, num_buckets=6, **options)


def impact(grid, **options):
    return ats.impact(grid, MODEL_S, every=2, num_buckets=6, smooth=3, **options)


def straight_line():
    log_snr = lambda t: 2 * (jnp.log1p(-t) - jnp.log(t))  # noqa: E731
    return ats.NoiseSchedule("straight", None, None, lambda t: 1 - t, lambda t: t, log_snr)


OF_LOSSES = {
    "loss_second_moment": lambda: ats.loss_second_moment(DISCRETE, history=2),
    "loss_second_moment_alone": lambda: ats.loss_second_moment(
        CONTINUOUS, history=1, uniform_prob=0.0
    ),
    "loss_proportional": lambda: ats.loss_proportional(
        DISCRETE, LINEAR, weighting=ats.weightings.min_snr(), gamma=2.0, num_buckets=5
    ),
    "loss_proportional_alone": lambda: ats.loss_proportional(
        CONTINUOUS, gamma=0.5, uniform_prob=0.0
    ),
    "entropy_rate": lambda: ats.entropy_rate(DISCRETE, LINEAR, importance_weighted=True),
    "entropy_rate_alone": lambda: ats.entropy_rate(
        CONTINUOUS, straight_line(), prediction="flow", data_variance=None, uniform_prob=0.0
    ),
    "curriculum": lambda: ats.curriculum(DISCRETE, steps=2),
    "curriculum_switch": lambda: ats.curriculum(CONTINUOUS, kind="switch", steps=2),
    "mixed_with_uniform": lambda: ats.mixed_with_uniform(ats.loss_second_moment(DISCRETE), 0.1),
    "with_density_of": lambda: ats.with_density_of(
        ats.with_weighting(ats.loss_proportional(DISCRETE), ats.weightings.p2(), LINEAR),
        ats.importance_weighted(ats.curriculum(DISCRETE)),
    ),
}
PROBING = {
    "adaptive": lambda: adaptive(DISCRETE),
    "adaptive_as_published": lambda: ats.importance_weighted(
        adaptive(
            CONTINUOUS,
            common_noise=False,
            entropy="in_reward",
            reduce="sum",
            normalize_reward=False,
            lagged_selection=True,
            relative=True,
        )
    ),
    "impact": lambda: impact(DISCRETE),
    "impact_of_relative_decrease": lambda: ats.importance_weighted(
        impact(CONTINUOUS, kappa=0.0, fit="beta", uniform_prob=0.0)
    ),
}


class Drawn(NamedTuple):
    """What an update is given."""

    losses: Any
    params: Any
    new_params: Any
    moments: Any  # of the model's optimizer


SHAPES = Drawn((STEPS, SIZE), (STEPS, T + 1), (STEPS, T + 1), (STEPS, 2, T + 1))
NOTHING = Drawn(*(np.zeros(shape, np.float32) for shape in SHAPES))


def arrays(elements):
    return st.builds(Drawn, *(hnp.arrays(np.float32, s, elements=elements) for s in SHAPES))


def losses(elements):
    drawn = hnp.arrays(np.float32, SHAPES.losses, elements=elements)
    return st.builds(lambda losses: NOTHING._replace(losses=losses), drawn)


def loss_fn(params, batch, t, key):
    """Anything at each timestep, times a factor that all share."""
    t = t if jnp.issubdtype(t.dtype, jnp.integer) else jnp.floor(t * T).astype(jnp.int32)
    return params[t] * params[T] + 0.0 * batch["image"][:, 0, 0, 0]


def step_of(sampler) -> Callable[..., Any]:
    """(state, key, drawn) -> (state, metrics, a draw after it), compiled."""

    @jax.jit
    def step(state, key, drawn):
        k_sample, k_update, k_next = jax.random.split(key, 3)
        opt_state = MODEL_S.init(drawn.params)
        adam = opt_state[1][0]._replace(mu=drawn.moments[0], nu=jnp.abs(drawn.moments[1]))
        state, metrics = sampler.update(
            state,
            sampler.sample(k_sample, state, BATCH),
            drawn.losses,
            key=k_update,
            batch=BATCH,
            loss_fn=loss_fn,
            params=drawn.params,
            new_params=drawn.new_params,
            opt_state=(opt_state[0], (adam, *opt_state[1][1:])),
            probe=True,
        )
        return state, metrics, sampler.sample(k_next, state, BATCH)

    return step


def not_finite(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in leaves if not np.isfinite(leaf).all()
    }


def check_updates(sampler, step, drawn):
    state = sampler.init(jax.random.key(0), BATCH)
    for i in range(STEPS):
        part = Drawn(*(x[i] for x in drawn))
        state, metrics, draw = step(state, jax.random.key(i), part)
        assert not not_finite((state, metrics)), (i, not_finite((state, metrics)))
        assert not not_finite(draw) and (draw.weight >= 0).all(), draw
        assert ((draw.u > 0) & (draw.u < 1)).all(), draw.u
        grid = sampler.sample.grid
        low, high = (0, T - 1) if grid is DISCRETE else (1e-3, 1 - 1e-3)
        assert ((draw.t >= low) & (draw.t <= high)).all(), draw.t


def check(sampler, strategy):
    step = step_of(sampler)  # compiled once, for all that is drawn

    @settings(max_examples=30, derandomize=True, deadline=None, database=None)
    @given(strategy)
    def property_test(drawn):
        check_updates(sampler, step, drawn)

    property_test()


@pytest.mark.parametrize("name", OF_LOSSES)
def test_any_loss_leaves_a_finite_state(name):
    check(OF_LOSSES[name](), losses(NUMBERS | NOT_FINITE | HUGE))


@pytest.mark.parametrize("name", PROBING)
def test_any_profile_and_any_gradient_leave_a_finite_state(name):
    check(PROBING[name](), arrays(NUMBERS | NOT_FINITE | HUGE))


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_huge_profiles_leave_a_finite_state(name):
    def square(params, batch, t, key):  # its gradient is of the usual size
        return params[T] ** 2 + jnp.zeros((SIZE,))

    table = 1e30 * np.random.default_rng(0).normal(size=SHAPES.params).astype(np.float32)
    table[..., T] = 1
    sampler = adaptive(DISCRETE) if name == "adaptive" else impact(DISCRETE, objective=square)
    drawn = NOTHING._replace(params=table, moments=np.ones(SHAPES.moments, np.float32))
    check_updates(sampler, step_of(sampler), drawn)


def test_huge_losses_leave_finite_statistics():
    """Those of the training loss, which are saved with the model: no sampler draws from them."""
    statistics = ats.learning.init_statistics(2)
    huge = jnp.asarray([1.0, 1e30])
    statistics = ats.learning.update_statistics(statistics, jnp.asarray([0, 0]), huge, decay=0.999)
    assert not not_finite(statistics)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_with_a_state_is_checked_here(name):
    config = replace(Config(), {"sampler.name": name, "schedule.num_timesteps": 50})
    built = build(config, sharding.make_mesh(jax.devices()[:1]))
    state = jax.eval_shape(built.parts.sampler.init, jax.random.key(0), BATCH)
    assert not jax.tree.leaves(state) or name in OF_LOSSES | PROBING
