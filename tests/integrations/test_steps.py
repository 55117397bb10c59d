"""A loss that draws: the same numbers as the seven lines, in fewer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats

SCHEDULE = ats.schedules.cosine(100)
GRID = ats.discrete(100)
SAMPLERS = {
    "uniform": lambda: ats.uniform(GRID),
    "second_moment": lambda: ats.loss_second_moment(GRID, history=1),
    "weighted": lambda: ats.with_weighting(ats.uniform(GRID), ats.weightings.min_snr(), SCHEDULE),
    "adaptive": lambda: ats.adaptive(
        GRID, ats.learning.conv_beta_policy(), optax.adam(1e-2), every=1
    ),
    "impact": lambda: ats.impact(GRID, optax.sgd(0.1), every=1),
}
BATCH = {"image": jax.random.normal(jax.random.key(0), (8, 8, 8, 1))}
OPT_STATE = optax.sgd(0.1).init({})  # empty, and all that impact asks for
PARAMS = {"scale": jnp.float32(0.5), "shift": jnp.float32(0.1)}


def elements(params, batch, t, key):
    """(b, H, W, C): the squares, whose means the facade takes."""
    noise = jax.random.normal(key, batch["image"].shape)
    x_t = ats.corrupt(SCHEDULE, batch["image"], noise, t)
    return (params["scale"] * x_t + params["shift"] - noise) ** 2


def examples(params, batch, t, key):
    return jnp.mean(elements(params, batch, t, key), axis=(1, 2, 3))


def seven_lines(sampler, params, state, batch, key):
    k_t, k_loss, k_up = jax.random.split(key, 3)
    draw = sampler.sample(k_t, state, batch)

    def mean_loss(params):
        losses = examples(params, batch, draw.t, k_loss)
        return jnp.mean(draw.weight * losses), losses

    (loss, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    state, metrics = sampler.update(
        state,
        draw,
        losses,
        key=k_up,
        batch=batch,
        loss_fn=examples,
        params=params,
        new_params=new,
        opt_state=OPT_STATE,
    )
    return new, state, loss, metrics


def few_lines(sampler, params, state, batch, key):
    sampled = ats.integrations.sampled_loss(sampler, elements)
    grad_fn = jax.value_and_grad(sampled.loss, has_aux=True)
    (loss, drawn), grads = grad_fn(params, state, batch, key)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    state, metrics = sampled.update(state, drawn, batch, params, new, opt_state=OPT_STATE)
    return new, state, loss, metrics


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_numbers_are_the_seven_lines_s(name, quick_compilation):
    sampler = SAMPLERS[name]()
    state = sampler.init(jax.random.key(1), BATCH)
    found = wanted = (PARAMS, state)
    steps = [jax.jit(lambda *args, f=f: f(sampler, *args)) for f in (few_lines, seven_lines)]
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(2), number)
        found, wanted = (
            step(*carried[:2], BATCH, key)
            for step, carried in zip(steps, (found, wanted), strict=True)
        )
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    assert all(np.isfinite(value) for value in found[3].values())


def test_what_the_loss_returns_beside():
    def with_info(params, batch, t, key):
        losses = elements(params, batch, t, key)
        return losses, {"largest": jnp.max(losses)}

    sampler = SAMPLERS["weighted"]()
    sampled = ats.integrations.sampled_loss(sampler, with_info, has_aux=True)
    loss, drawn = sampled.loss(PARAMS, (), BATCH, jax.random.key(3))
    assert drawn.aux["largest"] >= jnp.max(drawn.losses) and drawn.losses.shape == (8,)
    np.testing.assert_allclose(loss, np.mean(drawn.sample.weight * drawn.losses), rtol=1e-6)
    plain = ats.integrations.sampled_loss(sampler, elements)
    assert plain.loss(PARAMS, (), BATCH, jax.random.key(3))[0] == loss


def test_a_loss_in_bfloat16_is_averaged_in_float32():
    def low(params, batch, t, key):
        return elements(params, batch, t, key).astype(jnp.bfloat16)

    sampled = ats.integrations.sampled_loss(ats.uniform(GRID), low)
    loss, drawn = sampled.loss(PARAMS, (), BATCH, jax.random.key(3))
    assert loss.dtype == drawn.losses.dtype == jnp.float32
    _, k_loss, _ = jax.random.split(jax.random.key(3), 3)
    squares = low(PARAMS, BATCH, drawn.sample.t, k_loss)
    wanted = np.asarray(squares, np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(drawn.losses, wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 8)])
def test_a_loss_that_is_not_of_the_examples_is_refused(shape):
    sampled = ats.integrations.sampled_loss(ats.uniform(GRID), lambda *args: jnp.ones(shape))
    wrong = r"the loss has shape \(.*\) for timesteps of shape \(8,\): return it before its mean"
    with pytest.raises(ValueError, match=wrong):
        sampled.loss(PARAMS, (), BATCH, jax.random.key(3))


def test_a_loss_with_noise_by_example_is_handed_on_whole():
    """A probe then gives all timesteps one noise, as it does without the facade."""
    seen = {}

    def spy(state, sample, losses, *, loss_fn, **extra):
        seen.update(loss_fn=loss_fn)
        return state, {}

    loss_fn = ats.denoising_loss(lambda params, x, t, batch, key: params["scale"] * x, SCHEDULE)
    sampler = ats.uniform(GRID)._replace(update=spy)
    sampled = ats.integrations.sampled_loss(sampler, loss_fn)
    _, drawn = sampled.loss(PARAMS, (), BATCH, jax.random.key(3))
    sampled.update((), drawn, BATCH, PARAMS, PARAMS)
    assert seen["loss_fn"] is loss_fn


def test_it_is_for_shard_map_too(mesh8):
    """Each device draws for its own examples; the gradient is the global batch's."""
    P = jax.sharding.PartitionSpec

    def gradient(axis_name):
        sampler = ats.uniform(GRID, coupling="stratified", axis_name=axis_name)
        loss_fn = ats.denoising_loss(
            lambda params, x, t, batch, key: params["scale"] * x, SCHEDULE, axis_name=axis_name
        )
        sampled = ats.integrations.sampled_loss(sampler, loss_fn)

        def local(params, batch, key):
            grads, drawn = jax.grad(sampled.loss, has_aux=True)(params, (), batch, key)
            return grads if axis_name is None else jax.lax.pmean(grads, axis_name), drawn.losses

        return local

    whole = gradient(None)(PARAMS, BATCH, jax.random.key(5))
    split = jax.shard_map(
        gradient("data"),
        mesh=mesh8,
        in_specs=(P(), P("data"), P()),
        out_specs=(P(), P("data")),
        check_vma=False,
    )(PARAMS, BATCH, jax.random.key(5))
    for a, b in zip(*map(jax.tree.leaves, (whole, split)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_times_per_frame():
    video = {"image": jax.random.normal(jax.random.key(6), (8, 3, 4, 4, 1))}
    loss_fn = ats.denoising_loss(lambda params, x, t, batch, key: params["scale"] * x, SCHEDULE)
    sampler = SAMPLERS["second_moment"]()
    state = sampler.init(jax.random.key(1), video)
    sampled = ats.integrations.sampled_loss(sampler, loss_fn, shape=(3,), along="increasing")
    loss, drawn = sampled.loss(PARAMS, state, video, jax.random.key(3))
    assert drawn.sample.t.shape == drawn.losses.shape == (8, 3)
    assert np.all(np.diff(drawn.sample.t, axis=1) >= 0)
    np.testing.assert_allclose(loss, np.mean(drawn.sample.weight * drawn.losses), rtol=1e-6)
    state, _ = sampled.update(state, drawn, video, PARAMS, PARAMS)
    assert int(state.count.sum()) == 8 * 3
