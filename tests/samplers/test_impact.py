"""Forward-mode impact against closed forms, finite differences and differences of losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
IMAGES = {"image": jnp.asarray(RNG.uniform(-1, 1, (16, 8, 8, 1)), jnp.float32)}
SCHEDULE = ats.schedules.linear(1000)
N = 8  # buckets of the linear model: one timestep each
FEATURES = RNG.normal(size=(N, 3))
TARGETS = RNG.normal(size=16)


def linear_loss(params, batch, t, key):
    """l_t(x) = (w . f_t - x)^2 / 2: no noise, so that all is in closed form."""
    return 0.5 * (jnp.asarray(FEATURES, params.dtype)[t] @ params - batch["x"]) ** 2


def network():
    rng = np.random.default_rng(42)
    return {
        "in": np.float32(rng.normal(size=(66, 32)) / 8),
        "out": np.float32(rng.normal(size=(32, 64)) / 20),
    }


def predict(params, x, t, batch, key):
    """A small network of the noisy image and the noise level."""
    level = jnp.stack([SCHEDULE.alpha(t), SCHEDULE.sigma(t)], axis=1).astype(x.dtype)
    h = jnp.concatenate([x.reshape(x.shape[0], -1), level], axis=1)
    return x + (jax.nn.silu(h @ params["in"]) @ params["out"]).reshape(x.shape)


def direction_of(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) / 10), params)


def examples_of(batch, index):
    return jax.tree.map(lambda x: x[jnp.asarray(index)][:, None], batch)


def test_impact_of_a_linear_model_in_closed_form():
    w, d = RNG.normal(size=3), RNG.normal(size=3)
    index = [3, 5, 11]
    examples = {"x": jnp.asarray(TARGETS, jnp.float32)[jnp.asarray(index)][:, None]}
    found = jax.jit(ats.learning.forward_impact, static_argnums=0)(
        linear_loss, jnp.asarray(w, jnp.float32), jnp.asarray(d, jnp.float32), examples,
        jnp.arange(N), jax.random.key(0),
    )  # fmt: skip
    residual = FEATURES @ w - TARGETS[index].mean()
    np.testing.assert_allclose(found, -residual * (FEATURES @ d), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_a_probe_of_a_linear_model_in_closed_form(kappa):
    """SGD, each bucket twice in the stratified batch, one x: all randomness drops out."""
    rate, x = 0.1, 0.7
    batch = {"x": jnp.full((2 * N,), x)}
    optimizer = optax.sgd(rate)
    sampler = ats.impact(
        ats.discrete(N), optimizer, kappa=kappa, num_buckets=N, smooth=1, uniform_prob=0.2,
        temperature=1.5,
    )  # fmt: skip
    w = RNG.normal(size=3)
    params = jnp.asarray(w, jnp.float32)
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    state, metrics = jax.jit(sampler.update, static_argnames=("loss_fn", "probe"))(
        state, draw, jnp.zeros((2 * N,)), key=jax.random.key(2), batch=batch,
        loss_fn=linear_loss, params=params, opt_state=optimizer.init(params), probe=True,
    )  # fmt: skip
    residual = FEATURES @ w - x
    loss = 0.5 * residual**2
    gradients = residual[:, None] * FEATURES  # of the losses, (N, 3)
    # of J = mean over buckets of loss^kappa / kappa
    g = (loss ** (kappa - 1) @ gradients) / N
    impact = rate * gradients @ g
    scaled = impact / np.abs(impact).mean()
    np.testing.assert_allclose(state.impact, scaled, rtol=2e-4, atol=1e-5)
    p = 0.8 * np.exp(scaled / 1.5) / np.exp(scaled / 1.5).sum() + 0.2 / N
    t = jnp.arange(N)
    sample = ats.TimestepSample(t, t / N, jnp.ones((N,)))
    found = np.exp(sampler.log_density(state, sample, batch)) / N
    np.testing.assert_allclose(found, p, rtol=1e-3)
    np.testing.assert_allclose(metrics["reward_mean"], impact.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -(p * np.log(p * N)).sum(), rtol=1e-3)


def test_the_direction_is_the_optimizer_s_response():
    """With Adam, after five steps: P g, P the inverse root of the second moments."""
    batch = {"x": jnp.full((2 * N,), 0.7)}
    optimizer = optax.adam(1e-2)
    params = jnp.asarray([0.1, -0.4, 0.8])
    opt_state = optimizer.init(params)
    for i in range(5):
        _, opt_state = optimizer.update(jnp.asarray([1.0, -2.0, 0.5]) * (i + 1), opt_state)
    sampler = ats.impact(ats.discrete(N), optimizer, num_buckets=N)
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    state, _ = sampler.update(
        state, draw, jnp.zeros((2 * N,)), key=jax.random.key(2), batch=batch,
        loss_fn=linear_loss, params=params, opt_state=opt_state, probe=True,
    )  # fmt: skip
    residual = FEATURES @ np.asarray(params, np.float64) - 0.7
    gradients = residual[:, None] * FEATURES
    g = gradients.mean(0)
    nu_hat = 0.999 * np.asarray(opt_state[0].nu, np.float64) / (1 - 0.999**6)
    impact = gradients @ (g / (np.sqrt(nu_hat) + 1e-8))
    np.testing.assert_allclose(state.impact, impact / np.abs(impact).mean(), rtol=1e-3, atol=1e-4)


def test_impact_agrees_with_finite_differences():
    """float64 within 1e-5 of a central difference; float32 within 1e-3 of float64."""
    taus, key, index = np.arange(25, 1000, 125), jax.random.key(3), np.arange(4)
    with jax.enable_x64(True):
        noise = jax.random.normal(key, (4, 8, 8, 1), jnp.float64)

    def fixed_noise(params, batch, t, key):  # the same in both precisions
        eps = noise.astype(batch["image"].dtype)[batch["which"][0]][None]
        x_t = ats.corrupt(SCHEDULE, batch["image"], eps, t)
        return jnp.mean((predict(params, x_t, t, batch, key) - eps) ** 2, axis=(1, 2, 3))

    def run(dtype):
        params, d = (jax.tree.map(lambda x: jnp.asarray(x, dtype), p)
                     for p in (network(), direction_of(network())))  # fmt: skip
        batch = {"image": IMAGES["image"].astype(dtype), "which": jnp.arange(16)}
        examples = examples_of(batch, index)
        found = ats.learning.forward_impact(
            fixed_noise, params, d, examples, jnp.asarray(taus), key
        )

        def loss(s, t):
            moved = jax.tree.map(lambda p, d: p + s * d, params, d)
            one = jax.tree.map(lambda x: x[:4], batch)
            values = [
                fixed_noise(moved, jax.tree.map(lambda x: x[i : i + 1], one), t[None], key)[0]
                for i in range(4)
            ]
            return jnp.mean(jnp.stack(values))

        return np.asarray(found), loss

    with jax.enable_x64(True):
        exact, loss = run(jnp.float64)
        h = 1e-5
        difference = jax.jit(lambda t: (loss(-h, t) - loss(h, t)) / (2 * h))
        central = np.asarray([difference(jnp.asarray(t)) for t in taus])
    np.testing.assert_allclose(exact, central, rtol=1e-5)
    single, _ = run(jnp.float32)
    np.testing.assert_allclose(single, exact, rtol=1e-3)


def test_impact_correlates_with_the_profile_of_a_small_step():
    """One example, the same noise: the profile is the impact times the length of the step."""
    loss_fn = ats.denoising_loss(predict, SCHEDULE)
    params, d = network(), direction_of(network())
    new = jax.tree.map(lambda p, d: p + 1e-3 * d, params, d)
    taus, key = ats.timesteps.strata(ats.discrete(1000), 40), jax.random.key(5)
    profile = ats.learning.decrease_profile(
        loss_fn, params, new, jax.tree.map(lambda x: x[2:3], IMAGES), taus, key
    )
    impact = ats.learning.forward_impact(loss_fn, params, d, examples_of(IMAGES, [2]), taus, key)
    assert np.corrcoef(profile, impact)[0, 1] >= 0.99
    np.testing.assert_allclose(profile, 1e-3 * np.asarray(impact), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(100, marks=pytest.mark.slow)]
)
def test_chunks_change_nothing(chunk):
    loss_fn = ats.denoising_loss(predict, SCHEDULE)
    args = (loss_fn, network(), direction_of(network()), examples_of(IMAGES, [2, 7]),
            jnp.arange(0, 1000, 100), jax.random.key(5))  # fmt: skip
    whole = ats.learning.forward_impact(*args)
    np.testing.assert_allclose(
        ats.learning.forward_impact(*args, chunk=chunk), whole, rtol=1e-5, atol=1e-7
    )


def make_update(axis_name=None, bucket_sharding=None, **options):
    optimizer = optax.adam(1e-2)
    sampler = ats.impact(
        ats.discrete(1000), optimizer, every=2, num_buckets=20, num_examples=3, kappa=0.5,
        objective=ats.vlb_loss(predict, SCHEDULE, axis_name=axis_name),
        axis_name=axis_name, bucket_sharding=bucket_sharding, **options,
    )  # fmt: skip
    loss_fn = ats.denoising_loss(predict, SCHEDULE, axis_name=axis_name)

    def steps(params, opt_state, state, batch):
        for i in range(2):  # the second one probes
            key = jax.random.fold_in(jax.random.key(8), i)
            draw = sampler.sample(key, state, batch)
            losses = loss_fn(params, batch, draw.t, key)
            state, metrics = sampler.update(
                state, draw, losses, key=key, batch=batch, loss_fn=loss_fn,
                params=params, opt_state=opt_state,
            )  # fmt: skip
        return state, metrics, sampler.sample(jax.random.key(9), state, batch).t

    params = jax.tree.map(jnp.asarray, network())
    first = params, optimizer.init(params), sampler.init(jax.random.key(0), IMAGES)
    return steps, first


@functools.cache
def on_one_device():
    steps, first = make_update()
    return jax.jit(steps)(*first, IMAGES)


@pytest.mark.parametrize(
    "mode", ["shard_map", pytest.param("global", marks=pytest.mark.slow), "global_shared"]
)
def test_eight_devices_equal_one(mesh8, mode):
    state1, metrics1, t1 = on_one_device()
    rows, whole = NamedSharding(mesh8, P("data")), NamedSharding(mesh8, P())
    if mode == "shard_map":
        steps, first = make_update("data")
        specs = {"in_specs": (P(), P(), P(), P("data")), "out_specs": (P(), P(), P("data"))}
        run = jax.jit(jax.shard_map(steps, mesh=mesh8, **specs))
        state, metrics, t = run(*first, IMAGES)
    else:
        steps, first = make_update(bucket_sharding=rows if mode == "global_shared" else None)
        state, metrics, t = jax.jit(steps)(
            *jax.device_put(first, whole), jax.device_put(IMAGES, rows)
        )
    assert float(metrics["probed"]) == 1.0
    np.testing.assert_allclose(state.impact, state1.impact, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.loss, state1.loss, rtol=1e-5)
    for name in metrics1:
        np.testing.assert_allclose(metrics[name], metrics1[name], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(t, t1)
    assert np.ptp(np.asarray(state1.impact)) > 0.5  # it has learned something


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_counted_and_changes_nothing(bad):
    def loss_fn(params, batch, t, key):
        return jnp.where(t > 500, bad, params * batch["image"][:, 0, 0, 0])

    optimizer = optax.sgd(0.1)
    sampler = ats.impact(ats.discrete(1000), optimizer)
    params = jnp.float32(1.0)
    state = sampler.init(jax.random.key(0), IMAGES)
    draw = sampler.sample(jax.random.key(1), state, IMAGES)
    new, metrics = sampler.update(
        state, draw, jnp.ones((16,)), key=jax.random.key(2), batch=IMAGES, loss_fn=loss_fn,
        params=params, opt_state=optimizer.init(params), probe=True,
    )  # fmt: skip
    assert metrics["nonfinite"] > 0
    np.testing.assert_array_equal(new.impact, state.impact)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new))


def test_an_extreme_temperature_leaves_the_state_finite():
    """All of p on one bucket: 0 log 0 is 0."""
    batch, optimizer = {"x": jnp.full((2 * N,), 0.7)}, optax.sgd(0.1)
    options = {"temperature": 1e-3, "uniform_prob": 0.0, "smooth": 1}
    sampler = ats.impact(ats.discrete(N), optimizer, num_buckets=N, **options)
    params = jnp.ones((3,), jnp.bfloat16)  # whose updates come in float32
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    adam = optax.adam(1e-2, mu_dtype=jnp.float32)
    sampler = ats.impact(ats.discrete(N), adam, num_buckets=N, **options)
    state, metrics = sampler.update(
        state, draw, jnp.zeros((2 * N,)), key=jax.random.key(2), batch=batch, loss_fn=linear_loss,
        params=params, opt_state=adam.init(params), probe=True,
    )  # fmt: skip
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    assert metrics["entropy"] == pytest.approx(-np.log(N), abs=1e-3)


def test_a_first_step_of_learning_rate_zero_leaves_it_uniform():
    optimizer = optax.sgd(optax.linear_schedule(0.0, 0.1, 10))
    sampler = ats.impact(ats.discrete(N), optimizer, num_buckets=N)
    batch, params = {"x": jnp.ones((4,))}, jnp.ones((3,))
    state = sampler.init(jax.random.key(0), batch)
    draw = sampler.sample(jax.random.key(1), state, batch)
    state, _ = sampler.update(
        state, draw, jnp.ones((4,)), key=jax.random.key(2), batch=batch, loss_fn=linear_loss,
        params=params, opt_state=optimizer.init(params), probe=True,
    )  # fmt: skip
    np.testing.assert_array_equal(sampler.log_density(state, draw, batch), np.zeros(4))


def test_smoothing_and_the_beta_fit():
    """The smoothed law is that of the averaged impacts; the Beta has the softmax's moments."""
    num, batch = 20, {"x": jnp.ones((4,))}
    bump = np.exp(-0.5 * ((np.arange(num) - 5) / 3) ** 2)
    t = jnp.arange(num)
    sample = ats.TimestepSample(t, (t + 0.5) / num, jnp.ones((num,)))

    def law(**options):
        sampler = ats.impact(
            ats.discrete(num),
            optax.sgd(0.1),
            num_buckets=num,
            uniform_prob=0.0,
            temperature=1,
            **options,
        )
        state = sampler.init(jax.random.key(0), batch)
        state = state._replace(impact=jnp.asarray(bump, jnp.float32), impact_weight=jnp.float32(1))
        return np.exp(jax.jit(sampler.log_density)(state, sample, batch)) / num

    free = np.exp(bump) / np.exp(bump).sum()
    np.testing.assert_allclose(law(smooth=1), free, rtol=1e-4)
    smooth = [bump[max(i - 1, 0) : i + 2].mean() for i in range(num)]
    np.testing.assert_allclose(law(smooth=3), np.exp(smooth) / np.exp(smooth).sum(), rtol=1e-4)
    u = (np.arange(num) + 0.5) / num
    fitted = law(smooth=1, fit="beta")
    assert fitted.sum() == pytest.approx(1, abs=1e-4)
    assert fitted @ u == pytest.approx(free @ u, abs=2e-3)
    spread = [p @ u**2 - (p @ u) ** 2 for p in (fitted, free)]
    assert spread[0] == pytest.approx(spread[1], rel=0.02)


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param(ats.discrete(1000), marks=pytest.mark.slow, id="T1000"),
        pytest.param(ats.discrete(50, rounding="nearest"), id="T50_nearest"),
        pytest.param(ats.continuous(20, t_min=1e-3), marks=pytest.mark.slow, id="continuous"),
    ],
)
def test_impact_keeps_the_contract(grid):
    optimizer = optax.sgd(0.1)
    sampler = ats.impact(grid, optimizer, every=2, jitter=True, fit="beta")
    extras = {"opt_state": optimizer.init(jnp.float32(1.0))}
    check_sampler(sampler, IMAGES, extras=extras, num_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"num_examples": 1.5}, "num_examples .* got 1.5"),
        ({"smooth": 4}, "smooth must be odd.* got 4"),
        ({"temperature": 0.0}, "temperature .* got 0.0"),
        ({"kappa": np.nan}, "kappa must be finite, got nan"),
        ({"kappa": "log"}, "kappa must be a number, got 'log'"),
        ({"uniform_prob": 1.5}, "uniform_prob .* got 1.5"),
        ({"decay": 1.0}, "decay must be in .* got 1.0"),
        ({"fit": "gamma"}, "fit .* got 'gamma'"),
        ({"objective": "vlb"}, "objective must be a per-example loss such as vlb_loss"),
        ({"coupling": "none"}, "coupling .* got 'none'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ats.impact(ats.discrete(100), optax.adam(1e-3), **options)
