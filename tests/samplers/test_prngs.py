"""Keys of JAX's other generators: what is drawn for an example is its own all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats
from adaptive_ts import collectives
from adaptive_ts.experiment.solvers.generator import make_generator
from adaptive_ts.weightings.uncertainty import edm2_uncertainty

GRID = ats.discrete(50)
IMAGES = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
KINDS = ["rbg typed", "unsafe_rbg typed", "unsafe_rbg old"]


@pytest.fixture(params=KINDS)
def key_of(request):
    """seed -> a key of one of the kinds, under a configuration that takes it."""
    impl, style = request.param.split()
    with jax.default_prng_impl(impl):
        yield jax.random.key if style == "typed" else jax.random.PRNGKey


SAMPLERS = {
    "uniform": ats.uniform(GRID),
    "published_speed": ats.speed(GRID, ats.schedules.linear(50), as_published=True),
    "curriculum": ats.curriculum(GRID, steps=10),
    "loss_second_moment": ats.loss_second_moment(GRID),
    "adaptive": ats.adaptive(
        GRID, ats.learning.conv_beta_policy(channels=(2,), hidden=(3,)), optax.sgd(0.1)
    ),
    "mixed": ats.mixed_with_uniform(ats.beta(GRID, 1.0, 2.0), 0.5),
    "two": ats.with_density_of(ats.uniform(GRID), ats.beta(GRID, 1.0, 2.0)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_example_s_draw_is_its_own(name, key_of):
    sampler, batch = SAMPLERS[name], {"image": IMAGES}
    state = sampler.init(key_of(1), batch)
    keys = jnp.stack([key_of(seed) for seed in (2, 3, 4)])
    several = jax.jit(jax.vmap(lambda key: sampler.sample(key, state, batch).u))(keys)
    for key, u in zip(keys, several, strict=True):
        np.testing.assert_allclose(sampler.sample(key, state, batch).u, u, rtol=1e-6)
    drawn = several[:, :5]  # of the published speed the others are mirror images
    assert len(np.unique(drawn)) == drawn.size
    few = sampler.sample(keys[0], state, {"image": IMAGES[:3]}).u
    np.testing.assert_allclose(few[:2], several[0, :2], rtol=1e-6)


def test_first_states_are_their_seeds(key_of):
    keys, batch = jnp.stack([key_of(seed) for seed in (2, 3)]), {"image": IMAGES}
    sampler = SAMPLERS["adaptive"]
    for init in (lambda key: sampler.init(key, batch), edm2_uncertainty(channels=4).init):
        both = jax.vmap(init)(keys)
        for i, key in enumerate(keys):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, 1e-5), both, init(key))


def test_the_noise_of_a_loss_is_the_example_s(key_of):
    schedule, batch = ats.schedules.linear(50), {"image": IMAGES}
    seen = ats.denoising_loss(lambda p, x, t, batch, key: 0 * x, schedule)
    keys, t = jnp.stack([key_of(seed) for seed in (2, 3)]), jnp.arange(8)
    both = jax.vmap(lambda key: seen(None, batch, t, key))(keys)
    for key, losses in zip(keys, both, strict=True):
        np.testing.assert_allclose(seen(None, batch, t, key), losses, rtol=1e-6)
    few = seen.at(None, {"image": IMAGES[5:6]}, t[5:6], keys[0], jnp.asarray([5]))
    np.testing.assert_allclose(few, both[0, 5:6], rtol=1e-6)
    assert len(np.unique(both)) == 16


def test_the_model_s_key_stays_with_its_generator(key_of):
    met = []

    def predict(params, x, t, batch, key):
        met.append(key.dtype)
        return 0 * x

    loss = ats.denoising_loss(predict, ats.schedules.linear(50))
    loss(None, {"image": IMAGES}, jnp.arange(8), key_of(0))
    assert met == [key_of(0).dtype]


def test_an_image_is_that_of_its_seed_and_number(key_of):
    generate = make_generator(
        lambda params, x, t: 0.1 * x, ats.schedules.linear(50), (2, 2, 1), solver="ddpm", steps=3,
        clip=False,
    )  # fmt: skip
    whole = generate(None, key_of(7), jnp.arange(6))
    two = generate(None, key_of(7), jnp.asarray([4, 2]))
    np.testing.assert_allclose(two, whole[jnp.asarray([4, 2])], rtol=1e-5)
    assert len(np.unique(whole)) == whole.size


def test_the_folds_of_examples_have_an_order(key_of):
    keys = collectives.example_keys(key_of(7), jnp.asarray([256, 512]))
    one, other = jax.random.fold_in(keys[0], 512), jax.random.fold_in(keys[1], 256)
    assert float(jax.random.normal(one)) != float(jax.random.normal(other))


@pytest.mark.parametrize("common_noise", [True, False])
def test_probes_take_the_key(common_noise, key_of):
    """Each bucket and example meets the noise that it would meet alone."""

    def loss_fn(params, batch, t, key):
        return params + jax.random.normal(key, t.shape)

    args = loss_fn, jnp.float32(1), jnp.float32(0.5), {"image": IMAGES}
    t, keys = jnp.arange(4), jnp.stack([key_of(seed) for seed in (2, 3)])

    def decrease(key):
        return ats.learning.decrease_on_batch(*args, t, key, common_noise=common_noise)

    def profile(key):
        args = loss_fn, jnp.float32(1), jnp.float32(0.5), {"image": IMAGES[:1]}
        return ats.learning.decrease_profile(*args, t, key, common_noise=common_noise)

    for f in (decrease, profile):
        both = jax.vmap(f)(keys)
        np.testing.assert_allclose(both[0], f(keys[0]), rtol=1e-5)
        np.testing.assert_allclose(both[1], f(keys[1]), rtol=1e-5)
        if common_noise:
            np.testing.assert_allclose(both, 0.5, rtol=1e-5)
        else:
            assert len(np.unique(both)) == both.size


def test_a_threefry_key_stays_and_others_are_folded_word_by_word():
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        assert collectives.threefry(key) is key
    for impl in ("rbg", "unsafe_rbg"):
        words = jnp.asarray([5, 6, 7, 8], jnp.uint32)
        found = collectives.threefry(jax.random.wrap_key_data(words, impl=impl))
        first = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        expected = jax.random.fold_in(jax.random.fold_in(first, 7), 8)
        assert found == expected == collectives.threefry(words)
    assert collectives.seed_key(3) == jax.random.key(3)
