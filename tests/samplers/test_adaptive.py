"""The paper's sampler: what it learns, what it selects, each option, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.feature_selection import SelectKBest, f_regression

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE, T = 16, 100
GRID = ats.discrete(T)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (SIZE, 4, 4, 1)), jnp.float32)
BATCH = {"image": IMAGES, "id": jnp.arange(SIZE)}


def make(**options):
    policy = ats.learning.conv_beta_policy(channels=(4,), hidden=(8,))
    optimizer = options.pop("optimizer", optax.adam(3e-2))
    options = {"every": 1, "num_buckets": 20, "num_selected": 3, **options}
    return ats.adaptive(options.pop("grid", GRID), policy, optimizer, **options)


def gain_loss(params, batch, t, key):
    """Example i's loss is params["gain"][i] at any t: its decrease is chosen by the test."""
    return params["gain"][batch["id"]] + 0.0 * t


def rewarded(sampler, state, key, reward, **extra):
    """One draw and one update whose reward for the draws u is reward(u)."""
    k_draw, k_update = jax.random.split(key)
    draw = sampler.sample(k_draw, state, BATCH)
    zero = jnp.zeros((SIZE,))
    return sampler.update(
        state,
        draw,
        zero,
        key=k_update,
        batch=BATCH,
        loss_fn=gain_loss,
        params={"gain": zero, "other": jnp.float32(0)},
        new_params={"gain": -reward(draw.u), "other": jnp.float32(1)},
        **extra,
    )


@functools.cache
def jitted(**options):
    """(the first state, a step rewarded with slope * u + offset, a draw), compiled once."""
    sampler = make(**options)

    @functools.partial(jax.jit, static_argnames="probe")
    def compiled(state, key, slope, offset, probe):
        return rewarded(sampler, state, key, lambda u: slope * u + offset, probe=probe)

    def step(state, key, slope, offset=0.0, probe=None):
        of_each = (np.broadcast_to(np.asarray(x, np.float32), (SIZE,)) for x in (slope, offset))
        return compiled(state, key, *of_each, probe)

    step.compiled = compiled
    draw = jax.jit(lambda key, state: sampler.sample(key, state, BATCH))
    return jax.jit(sampler.init)(jax.random.key(0), BATCH), step, draw


def table_loss(params, batch, t, key):
    """The loss at t is a table's entry: the profile is chosen by the test."""
    return params[t // (T // 20)] + 0.0 * batch["id"]


def profiled(sampler, state, key, row, **extra):
    draw = sampler.sample(key, state, BATCH)
    return sampler.update(
        state,
        draw,
        jnp.zeros((SIZE,)),
        key=key,
        batch=BATCH,
        loss_fn=table_loss,
        params=jnp.append(jnp.asarray(row, jnp.float32), 0),
        new_params=jnp.zeros((21,)).at[20].set(1),
        **extra,
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_reward": False, "entropy_coef": 0.0}, {"entropy": "in_reward"}],
    ids=["default", "raw", "in_reward"],
)
def test_policy_moves_to_what_is_rewarded(sign, options):
    state, step, draw = jitted(**options)
    before = draw(jax.random.key(9), state).u.mean()
    for i in range(60):
        state, metrics = step(state, jax.random.fold_in(jax.random.key(1), i), sign)
    after = draw(jax.random.key(9), state).u.mean()
    assert sign * (after - before) > 0.15
    assert sign * (metrics["alpha_mean"] - metrics["beta_mean"]) > 0.3


def test_policy_tells_images_apart():
    state, step, draw = jitted()
    bright = IMAGES.mean((1, 2, 3)) > jnp.median(IMAGES.mean((1, 2, 3)))
    for i in range(200):
        key = jax.random.fold_in(jax.random.key(1), i)
        state, _ = step(state, key, jnp.where(bright, 1.0, -1.0))
    u = np.mean([draw(key, state).u for key in jax.random.split(jax.random.key(2), 20)], axis=0)
    assert u[bright].mean() - u[~bright].mean() > 0.15


def test_entropy_bonus_keeps_a_policy_without_reward_uniform():
    state, step, _ = jitted(entropy_coef=1.0)
    for i in range(100):
        state, metrics = step(state, jax.random.fold_in(jax.random.key(1), i), 0.0)
    assert metrics["alpha_mean"] == pytest.approx(1, abs=0.02)
    assert metrics["beta_mean"] == pytest.approx(1, abs=0.02)


def test_selection_equals_scikit_learn_on_the_queue():
    sampler = make(history=5, num_selected=4)
    state = sampler.init(jax.random.key(0), BATCH)
    rng, rows = np.random.default_rng(3), []
    first = np.asarray(state.selected)
    np.testing.assert_array_equal(first, [2, 7, 12, 17])
    step = jax.jit(lambda s, k, row: profiled(sampler, s, k, row))
    for i in range(9):
        rows.append(rng.normal(size=20) * np.linspace(0.5, 2, 20))
        state, metrics = step(state, jax.random.key(i), rows[-1])
        kept = np.asarray(rows[-5:], np.float32).astype(np.float64)
        stored = np.asarray(state.queue.rows)[: len(kept)]
        np.testing.assert_allclose(np.sort(stored.sum(1)), np.sort(kept.sum(1)), atol=1e-5)
        if len(rows) < 3:
            np.testing.assert_array_equal(state.selected, first)
            continue
        best = SelectKBest(f_regression, k=4).fit(kept, kept.sum(1)).get_support(indices=True)
        np.testing.assert_array_equal(state.selected, best)
        expected = np.mean([rows[-1][k] for k in best])
        assert metrics["reward_mean"] == pytest.approx(expected, abs=1e-5)


def test_lagged_selection_rewards_by_the_previous_one():
    sampler = make(history=5, lagged_selection=True, reduce="sum")
    state = sampler.init(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(state.selected, [0, 1, 2])
    rng = np.random.default_rng(4)
    step = jax.jit(lambda s, k, row: profiled(sampler, s, k, row))
    for i in range(4):
        row, used = rng.normal(size=20), np.asarray(state.selected)
        state, metrics = step(state, jax.random.key(i), row)
        assert metrics["reward_mean"] == pytest.approx(row[used].sum(), abs=1e-4)
        if i == 1:  # two rows: no degrees of freedom, all tie, the largest indices win
            np.testing.assert_array_equal(state.selected, [17, 18, 19])


def test_a_profile_of_zeros_selects_nothing():
    sampler = make()
    state = sampler.init(jax.random.key(0), BATCH)
    step = jax.jit(lambda s, k: profiled(sampler, s, k, np.zeros(20)))
    for i in range(5):
        state, _ = step(state, jax.random.key(i))
    np.testing.assert_array_equal(state.selected, [3, 10, 16])


def test_counter_probes_on_every_kth_step_and_static_choice_agrees_each_compiled_once():
    first, step, _ = jitted(every=3)
    counted = fixed = first
    probed = []
    for i in range(9):
        counted, metrics = step(counted, jax.random.key(i), 1.0)
        probed.append(int(metrics["probed"]))
        fixed, fixed_metrics = step(fixed, jax.random.key(i), 1.0, probe=(i + 1) % 3 == 0)
        assert metrics.keys() == fixed_metrics.keys()
        for name in metrics:
            np.testing.assert_allclose(metrics[name], fixed_metrics[name], rtol=1e-4, atol=1e-5)
    assert probed == [0, 0, 1] * 3
    assert counted.step == fixed.step == 9 and counted.queue.count == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), counted, fixed
    )
    assert step.compiled._cache_size() == 3, "the counter's and either choice, each once"
    jaxpr = str(jax.make_jaxpr(lambda s, k: step(s, k, 1.0))(counted, jax.random.key(0)))
    assert "cond" in jaxpr and "callback" not in jaxpr


def test_rewards_that_are_not_finite_are_left_out_and_counted():
    state, step, _ = jitted()
    slope = jnp.ones((SIZE,))
    spoilt = jnp.zeros((SIZE,)).at[:3].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    state, metrics = step(state, jax.random.key(1), slope, spoilt)
    assert metrics["nonfinite"] >= 3
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()
    state, metrics = step(state, jax.random.key(2), slope, jnp.full((SIZE,), jnp.nan))
    assert metrics["nonfinite"] == SIZE + 20
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()


def test_buckets_are_at_most_the_timesteps():
    sampler = make(grid=ats.discrete(7), num_buckets=100)
    state = sampler.init(jax.random.key(0), BATCH)
    assert state.queue.rows.shape == (20, 7)


@pytest.mark.parametrize("field", ["every", "num_selected", "history", "num_buckets", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_integers_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be an integer .* got {value}"):
        make(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_selected": 21}, "at most the number of buckets, 20, got 21"),
        ({"history": 2}, "history must be an integer of at least 3, got 2"),
        ({"entropy_coef": -1.0}, "entropy_coef must be finite and >= 0, got -1.0"),
        ({"entropy": "none"}, "'bonus' or 'in_reward', got 'none'"),
        ({"reduce": "max"}, "'mean' or 'sum', got 'max'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_update_names_what_is_missing():
    sampler = make()
    state = sampler.init(jax.random.key(0), BATCH)
    draw = sampler.sample(jax.random.key(1), state, BATCH)
    with pytest.raises(TypeError, match="new_params"):
        sampler.update(
            state, draw, draw.u, key=jax.random.key(2), batch=BATCH, loss_fn=gain_loss, params={}
        )


def test_images_of_the_wrong_rank():
    with pytest.raises(ValueError, match=r"\(b, H, W, C\)"):
        make().init(jax.random.key(0), {"image": jnp.zeros((4, 8, 8))})


def test_init_and_draw_in_one_program():
    """The compiler then knows how the policy starts: jaxlib's CPU backend got that wrong."""
    sampler = ats.adaptive(GRID, ats.learning.conv_beta_policy(), optax.adam(1e-3))
    batch, key = {"image": jnp.tile(IMAGES, (8, 2, 2, 1))}, jax.random.key(0)
    state = sampler.init(key, batch)
    apart = sampler.sample(key, state, batch).u
    at_once = jax.jit(lambda key: sampler.sample(key, sampler.init(key, batch), batch).u)(key)
    np.testing.assert_allclose(at_once, apart, atol=1e-6)
