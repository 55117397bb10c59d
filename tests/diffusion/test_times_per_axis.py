"""A time for each of the leading axes: losses, schedules and weightings as of a longer batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_ts as ats

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, FRAMES = 4, 3
VIDEO = np.random.default_rng(0).uniform(-1, 1, (B, FRAMES, 4, 4, 1)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=VIDEO.shape).astype(np.float32)
GUESS = np.random.default_rng(2).normal(size=VIDEO.shape).astype(np.float32)
SCHEDULES = {
    "discrete": ats.schedules.linear(1000),
    "continuous": ats.schedules.vp_cosine(),
    "flow": ats.schedules.rectified_flow(),
    "exploding": ats.schedules.ve_log_linear(),
}
TIMES = {
    True: jnp.asarray(np.random.default_rng(3).integers(0, 1000, (B, FRAMES)), jnp.int32),
    False: jnp.asarray(np.random.default_rng(3).uniform(0.01, 0.99, (B, FRAMES)), jnp.float32),
}


def times_of(schedule):
    return TIMES[schedule.num_timesteps is not None]


def flat(x):
    """Frames as examples."""
    return jnp.reshape(x, (B * FRAMES, *x.shape[2:]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_corruption_and_targets_are_those_of_frames_as_examples(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule)
    for f in (
        ats.corrupt,
        *(
            lambda s, x, y, t, p=p: ats.diffusion.prediction_target(s, p, x, y, t)
            for p in ("eps", "x0", "v", "flow")
        ),
        *(
            lambda s, x, y, t, p=p: ats.diffusion.predicted_eps(s, p, x, y, t)
            for p in ("eps", "x0", "v", "flow")
        ),
    ):
        found, expected = (
            f(schedule, VIDEO, NOISE, t),
            f(schedule, flat(VIDEO), flat(NOISE), flat(t)),
        )
        assert found.shape == VIDEO.shape
        np.testing.assert_allclose(flat(found), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decoder_nll", [False, True])
def test_vlb_terms_are_those_of_frames_as_examples(decoder_nll):
    schedule, t = SCHEDULES["discrete"], TIMES[True].at[0, 1].set(0)
    args = (VIDEO, NOISE, GUESS, t)
    found = ats.diffusion.vlb_terms(schedule, *args, decoder_nll=decoder_nll)
    expected = ats.diffusion.vlb_terms(schedule, *map(flat, args), decoder_nll=decoder_nll)
    assert found.shape == (B, FRAMES)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


def test_denoising_loss_has_the_shape_of_t():
    schedule, batch, key = SCHEDULES["discrete"], {"image": VIDEO}, jax.random.key(0)
    seen = []

    def predict(scale, x_t, t, batch, key):
        seen.append((x_t, t))
        return scale * x_t

    loss = ats.denoising_loss(predict, schedule)
    t = times_of(schedule)
    found = loss(0.5, batch, t, key)
    x_t, given = seen[0]
    np.testing.assert_array_equal(given, t)
    alpha, sigma = (f(t)[..., None, None, None] for f in (schedule.alpha, schedule.sigma))
    noise = (x_t - alpha * VIDEO) / sigma
    assert abs(float(noise.std()) - 1) < 0.15  # the noise that was drawn, not 0
    expected = jnp.mean((0.5 * x_t - noise) ** 2, axis=(2, 3, 4))
    # sigma is small where t is: the noise comes back with fewer digits.
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    # Equal times are one time per example, whose loss is the mean over the frames.
    one = jnp.asarray([0, 20, 500, 999])
    many = loss(0.5, batch, jnp.broadcast_to(one[:, None], (B, FRAMES)), key)
    np.testing.assert_allclose(many.mean(1), loss(0.5, batch, one, key), rtol=1e-5)
    bits = ats.vlb_loss(predict, schedule)
    np.testing.assert_allclose(
        bits(0.5, batch, jnp.broadcast_to(one[:, None], (B, FRAMES)), key).mean(1),
        bits(0.5, batch, one, key),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("times", "images"),
    [((3,), (4, 8, 1)), ((4, 8), (4, 3, 8)), ((4, 8), (4, 8)), ((), (4, 8)), ((4, 1), (4, 3, 8))],
)
def test_times_that_are_of_other_axes_are_refused(times, images):
    x = jnp.zeros(images)
    with pytest.raises(ValueError, match=r"t \(.*\) and images \(.*\): need \(b,\) and \(b, ...\)"):
        ats.corrupt(SCHEDULES["discrete"], x, x, jnp.zeros(times, jnp.int32))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_weightings_go_element_by_element(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule)
    log_snr = schedule.log_snr(t)
    weightings = [
        ats.weightings.min_snr(),
        ats.weightings.p2(),
        ats.weightings.edm(),
        ats.weightings.convert(ats.weightings.debiased(), "eps", "flow"),
        ats.weightings.sigmoid(1.0, schedule=schedule),
        ats.weightings.vlb(schedule),
    ]
    if schedule.num_timesteps is not None:
        weightings.append(ats.weightings.change_aware(schedule))
    uncertainty = ats.weightings.edm2_uncertainty(channels=8)
    params = uncertainty.init(jax.random.key(0))
    functions = [(f, t) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)]
    functions += [(f, log_snr) for f in (schedule.from_log_snr, *weightings)]
    functions += [
        (lambda x: uncertainty.apply(params, x), log_snr),
        (lambda x: uncertainty.loss(params, x, jnp.abs(x)), log_snr),
    ]
    for f, x in functions:
        found = f(x)
        assert found.shape == (B, FRAMES)
        np.testing.assert_allclose(found.ravel(), f(x.ravel()), rtol=1e-6)
