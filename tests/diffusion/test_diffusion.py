"""diffusion.py against the reference implementations (goldens), algebra and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from adaptive_ts import diffusion, schedules
from adaptive_ts.diffusion.corruption import PREDICTIONS
from adaptive_ts.schedules.base import VARIANCES
from adaptive_ts.schedules.continuous import rectified_flow

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULES = {
    "linear": schedules.linear(),
    "quad": schedules.quad(),
    "cosine": schedules.cosine(),
    "linear_openai": schedules.linear(rescale=True),
}


def scaled(params, x_t, t, batch, key):
    """The goldens' model: 0.9 x_t."""
    return params * x_t


def arrays(seed, shape=(8, 6, 6, 2)):
    rng = np.random.default_rng(seed)
    x0 = rng.uniform(-1, 1, shape).astype(np.float32)
    return jnp.asarray(x0), jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["linear", "quad", "cosine"])
def test_golden_posterior_tables(golden, name, variance):
    g = golden("ddpm_posterior_vlb")
    tables, index = schedules.posterior_tables(SCHEDULES[name], variance), g["index"]
    for ours, theirs in (
        ("posterior_variance", "posterior_var"),
        ("posterior_log_variance_clipped", "posterior_logvar_clipped"),
        ("model_variance", f"{variance}__model_var"),
        ("model_log_variance", f"{variance}__model_logvar"),
        ("loss_coef", f"{variance}__loss_coef"),
    ):
        # The reference forms 1 - abar by subtraction: 1e-16 / 1e-4 at the first timesteps.
        got, want = getattr(tables, ours)[index], g[f"{name}__{theirs}"]
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_golden_official_losses(golden, strict, precision):
    g = golden("official_losses_kl_linear")
    double = precision == "f64"
    schedule, dtype = SCHEDULES["linear"], np.float64 if double else np.float32
    x0, noise = (g[k].transpose(0, 2, 3, 1).astype(dtype) for k in ("x0", "noise"))
    abar = np.cumprod(1 - schedule.betas)
    for row, t in enumerate(g["t"]):
        x_t = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise
        noise_hat = (0.9 * x_t).astype(dtype)
        for decoder, name in ((False, "kl_bits"), (True, "loss_type_kl_bpd")):
            with jax.enable_x64(double), strict():
                got = diffusion.vlb_terms(
                    schedule,
                    jnp.asarray(x0),
                    jnp.asarray(noise),
                    jnp.asarray(noise_hat),
                    jnp.full(4, t, jnp.int32),
                    decoder_nll=decoder,
                )
            assert got.dtype == dtype
            want = g[f"linear__fixed_large__f64__{name}"][row]
            np.testing.assert_allclose(got, want, rtol=1e-9 if double else 1e-5)
            if decoder or not double:
                reference = g[f"linear__fixed_large__f32__{name}"][row]
                np.testing.assert_allclose(got, reference, rtol=1e-4)
        single = [jnp.asarray(v.astype(np.float32)) for v in (x0, noise)]
        with strict():
            mine = diffusion.corrupt(schedule, *single, jnp.full(4, t, jnp.int32))
        np.testing.assert_allclose(mine, x_t, rtol=1e-5, atol=1e-6)
        mse = np.mean((0.9 * np.asarray(mine) - noise) ** 2, (1, 2, 3))
        np.testing.assert_allclose(mse, g["linear__fixed_large__f64__mse"][row], rtol=1e-5)


def test_decoder_matches_float64_gaussian_bins():
    """The tanh CDF is within 3e-4 of the normal one; all 256 levels, both edges, far means."""
    schedule = SCHEDULES["linear"]
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32).reshape(1, 16, 16, 1)
    scale = np.exp(0.5 * schedules.posterior_tables(schedule).model_log_variance[0])
    for shift in (0.0, 0.5, -1.5, 2.0):  # in standard deviations of the model
        error = np.full_like(levels, shift * scale)
        ratio = np.sqrt(schedule.betas[0] / (1 - schedule.betas[0]))
        got = diffusion.vlb_terms(
            schedule,
            levels,
            0 * levels,
            error / np.float32(ratio),
            jnp.zeros(1, jnp.int32),
            decoder_nll=True,
        )
        mean = levels.astype(np.float64) - error
        upper = np.where(levels > 0.999, np.inf, levels + 1 / 255)
        lower = np.where(levels < -0.999, -np.inf, levels - 1 / 255)
        mass = stats.norm.cdf(upper, mean, scale) - stats.norm.cdf(lower, mean, scale)
        np.testing.assert_allclose(got[0], -np.log2(mass).mean(), atol=0.02)


@pytest.mark.parametrize("name", ["linear", "quad", "cosine"])
def test_targets_and_conversions(strict, name):
    schedule = SCHEDULES[name]
    x0, noise = arrays(0)
    t = jnp.asarray([0, 1, 10, 100, 300, 500, 900, 999 if name != "cosine" else 990], jnp.int32)
    with strict():
        x_t = diffusion.corrupt(schedule, x0, noise, t)
        alpha, sigma = (f(t).reshape(8, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        target = {p: diffusion.prediction_target(schedule, p, x0, noise, t) for p in PREDICTIONS}
        eps = {p: diffusion.predicted_eps(schedule, p, target[p], x_t, t) for p in PREDICTIONS}
    np.testing.assert_array_equal(target["eps"], noise)
    np.testing.assert_array_equal(target["x0"], x0)
    np.testing.assert_allclose(target["v"], alpha * noise - sigma * x0, atol=1e-6)
    np.testing.assert_allclose(alpha * x_t - sigma * target["v"], x0, atol=1e-5)
    np.testing.assert_array_equal(target["flow"], noise - x0)
    np.testing.assert_allclose(eps["v"], noise, atol=1e-5)
    np.testing.assert_allclose(eps["flow"], noise, atol=1e-5)
    np.testing.assert_allclose(eps["x0"], noise, atol=1e-4)  # divides by sigma_0 = 0.0064


def test_vlb_is_the_same_for_every_prediction():
    """A model that says the same thing in three languages has one bound."""
    schedule = SCHEDULES["quad"]
    x0, _ = arrays(1)
    t = jnp.asarray([0, 1, 5, 50, 200, 500, 800, 999], jnp.int32)

    def speak(prediction):
        def predict(params, x_t, t, batch, key):
            alpha, sigma = (f(t).reshape(8, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            eps = 0.9 * x_t
            guess = (x_t - sigma * eps) / alpha
            return {"eps": eps, "x0": guess, "v": alpha * eps - sigma * guess}[prediction]

        loss = diffusion.vlb_loss(predict, schedule, prediction=prediction)
        return jax.jit(loss.__call__)(None, {"image": x0}, t, jax.random.key(0))

    for prediction in ("x0", "v"):
        np.testing.assert_allclose(speak(prediction), speak("eps"), rtol=2e-4)


def test_loss_draws_noise_by_index_and_hands_on_the_model_key(strict):
    x0, _ = arrays(2)
    batch, key, t = {"image": x0}, jax.random.key(3), jnp.arange(8, dtype=jnp.int32) * 100
    schedule, seen = SCHEDULES["linear"], []

    def predict(params, x_t, t, batch, key):
        seen.append((x_t, key))
        return 0.9 * x_t

    loss = diffusion.denoising_loss(predict, schedule)
    with strict():
        whole = loss(None, batch, t, key)
        swapped = loss.at(None, {"image": x0[::-1]}, t[::-1], key, jnp.arange(8)[::-1])
        one = jnp.full(8, 5, jnp.int32)
        loss.at(None, {"image": jnp.broadcast_to(x0[:1], x0.shape)}, t * 0, key, one)
    np.testing.assert_array_equal(swapped[::-1], whole)
    x_t = np.asarray(seen[-1][0])
    assert np.all(x_t == x_t[:1])  # one index, one noise
    noise = np.asarray(
        jax.random.normal(jax.random.fold_in(jax.random.split(key)[0], 3), (6, 6, 2))
    )
    want = diffusion.corrupt(schedule, x0[3:4], noise[None], t[3:4])
    np.testing.assert_allclose(seen[0][0][3], want[0], rtol=1e-6)
    np.testing.assert_allclose(whole[3], np.mean((0.9 * want[0] - noise) ** 2), rtol=1e-5)
    assert not np.array_equal(*(jax.random.key_data(k) for _, k in seen[:2]))


def test_loss_is_float32_under_a_bfloat16_model():
    x0, _ = arrays(4)

    def predict(params, x_t, t, batch, key):
        return (0.9 * x_t).astype(jnp.bfloat16)

    for make in (diffusion.denoising_loss, diffusion.vlb_loss):
        low = make(predict, SCHEDULES["linear"])
        high = make(scaled, SCHEDULES["linear"])
        t, key = jnp.full(8, 300, jnp.int32), jax.random.key(0)
        images = {"image": x0.astype(jnp.bfloat16)}
        got, want = low(0.9, images, t, key), high(0.9, images, t, key)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-2)
        assert not np.array_equal(got, got.astype(jnp.bfloat16))


@pytest.mark.parametrize("make", [diffusion.denoising_loss, diffusion.vlb_loss])
def test_shard_map_equals_global_view(mesh8, strict, make):
    x0, _ = arrays(5, (16, 6, 6, 2))
    t, key = jnp.arange(16, dtype=jnp.int32) * 60, jax.random.key(1)
    local = make(scaled, SCHEDULES["quad"], axis_name="data")
    with strict():
        want = jax.jit(make(scaled, SCHEDULES["quad"]).__call__)(0.9, {"image": x0}, t, key)
        spec = (P(), P("data"), P("data"), P())
        sharded = jax.shard_map(local.__call__, mesh=mesh8, in_specs=spec, out_specs=P("data"))
        got = jax.jit(sharded)(jnp.float32(0.9), {"image": x0}, t, key)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_shard_map_gives_each_device_its_own_model_key(mesh8):
    def dropout(params, x_t, t, batch, key):
        return jnp.broadcast_to(jax.random.uniform(key), x_t.shape)

    zeros = {"image": jnp.zeros((8, 2, 2, 1))}
    loss = diffusion.denoising_loss(dropout, SCHEDULES["linear"], prediction="x0", axis_name="data")
    sharded = jax.shard_map(
        loss.__call__, mesh=mesh8, in_specs=(P(), P("data"), P("data"), P()), out_specs=P("data")
    )
    out = jax.jit(sharded)(jnp.zeros(()), zeros, jnp.zeros(8, jnp.int32), jax.random.key(0))
    assert len(set(out.tolist())) == 8


@pytest.mark.parametrize("T", [50, 1000])
def test_total_bits_telescope_for_gaussian_data(T):
    """x_0 ~ N(0, 1), eps_hat = sigma_t x_t and variance beta: the model IS q(x_{t-1} | x_t).

    Then E KL_t = I(x_0; x_{t-1}) - I(x_0; x_t), and the terms t >= 1 and the prior sum to
    I(x_0; x_0 + noise of t = 0) = -log(beta_0) / 2 nats. Checked exactly, then by Monte Carlo.
    """
    schedule = schedules.linear(T, rescale=True)
    betas, noise = schedule.betas, 1 - np.cumprod(1 - schedule.betas)
    tables = schedules.posterior_tables(schedule)
    mse = 1 - noise  # Var(eps | x_t) = abar
    gap = tables.posterior_log_variance_clipped - tables.model_log_variance
    kl = tables.loss_coef * mse + 0.5 * (np.expm1(gap) - gap)
    np.testing.assert_allclose(kl[1:].sum() - np.log(noise[-1]) / 2, -np.log(betas[0]) / 2)

    def predict(params, x_t, t, batch, key):
        return schedule.sigma(t).reshape(-1, 1, 1, 1) * x_t

    loss = diffusion.vlb_loss(predict, schedule)
    x0 = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    first = 0.5 * betas[0] / np.exp(tables.model_log_variance[0]) / (1 - betas[0]) * mse[0]
    want = (first - np.log(betas[0]) / 2) / np.log(2)
    key, batch = jax.random.key(1), {"image": x0}

    @functools.partial(jax.jit, static_argnames="chunk")
    def total(batch, timesteps=None, chunk=100):
        options = {"timesteps": timesteps, "chunk": chunk}
        return diffusion.total_bits_per_dim(loss, schedule, None, batch, key, **options)

    got = total(batch)
    assert got.shape == (16,)
    error = np.std(got) / 4
    assert abs(np.mean(got) - want) < 4 * error < 0.05 * want
    if T > 50:
        return
    # A subset, in chunks that don't divide it: T times the mean of its terms.
    rest = total(batch, jnp.arange(1, T, dtype=jnp.int32), chunk=30)
    prior = diffusion.prior_bits_per_dim(schedule, x0)
    t0 = jax.jit(loss.__call__)(None, batch, jnp.zeros(16, jnp.int32), jax.random.fold_in(key, 0))
    np.testing.assert_allclose((rest - prior) * (T - 1) / T + t0 + prior, got, rtol=1e-4)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_kl_against_gaussians_written_out(name, variance):
    """KL(q(x_{t-1} | x_t, x_0) || p), from the tabulated means and variances, in float64."""
    schedule = schedules.linear(40, rescale=True) if name == "linear" else schedules.cosine(40)
    tables = schedules.posterior_tables(schedule, variance)
    x0, noise = (np.asarray(x, np.float64) for x in arrays(6))
    t = np.array([0, 1, 2, 10, 20, 30, 38, 39])
    pick = lambda table: table[t].reshape(8, 1, 1, 1)  # noqa: E731
    abar = pick(np.cumprod(1 - schedule.betas))
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    x0_hat = (x_t - np.sqrt(1 - abar) * 0.9 * x_t) / np.sqrt(abar)
    lq, lp = pick(tables.posterior_log_variance_clipped), pick(tables.model_log_variance)
    before = pick(np.cumprod(np.append(1.0, 1 - schedule.betas[:-1])))
    shift = np.sqrt(before) * pick(schedule.betas) / (1 - abar) * (x0_hat - x0)
    kl = 0.5 * (lp - lq - 1 + np.exp(lq - lp) + shift**2 * np.exp(-lp))
    want = kl.mean((1, 2, 3)) / np.log(2)
    with jax.enable_x64(True):
        got = diffusion.vlb_terms(schedule, x0, noise, 0.9 * x_t, t, variance=variance)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    single = (jnp.asarray(x, jnp.float32) for x in (x0, noise, 0.9 * x_t))
    got = diffusion.vlb_terms(schedule, *single, jnp.asarray(t, jnp.int32), variance=variance)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_prior_against_scipy_entropy(name):
    x0, _ = arrays(7)
    for schedule in (SCHEDULES[name], schedules.linear(20)):
        abar = np.exp(np.log1p(-schedule.betas).sum())
        exact = np.asarray(x0, np.float64)
        kl = -np.log1p(-abar) - 1 + (1 - abar) + abar * exact**2
        want = kl.mean((1, 2, 3)) / 2 / np.log(2)
        got = diffusion.prior_bits_per_dim(schedule, x0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-16)


def test_losses_differentiate_jit_and_vmap(strict):
    x0, _ = arrays(8)
    loss = diffusion.vlb_loss(scaled, SCHEDULES["linear"], decoder_nll=True)
    t, key = jnp.asarray([0, 0, 1, 5, 50, 100, 500, 999], jnp.int32), jax.random.key(0)

    def total(params, t):
        return jnp.mean(loss(params, {"image": x0}, t, key))

    with strict():
        value, grad = jax.jit(jax.value_and_grad(total))(jnp.float32(0.9), t)
        two = jax.jit(jax.vmap(total, (None, 0)))(jnp.float32(0.9), jnp.stack([t, t[::-1]]))
    h = 1e-2
    numeric = (total(0.9 + h, t) - total(0.9 - h, t)) / (2 * h)
    np.testing.assert_allclose(grad, numeric, rtol=2e-2)
    np.testing.assert_allclose(two[0], value, rtol=1e-5)


def test_messages():
    schedule = SCHEDULES["linear"]
    x0, noise = arrays(9)
    t, key = jnp.zeros(8, jnp.int32), jax.random.key(0)
    with pytest.raises(ValueError, match="num_timesteps is 1"):
        schedules.linear(1, rescale=True)
    with pytest.raises(ValueError, match="T >= 2"):
        schedules.linear(1)
    with pytest.raises(ValueError, match=r"raise num_timesteps"):
        schedules.quad(10, rescale=True)
    with pytest.raises(ValueError, match=r"beta_end=1.5"):
        schedules.linear(beta_end=1.5)
    with pytest.raises(ValueError, match="max_beta=1"):
        schedules.cosine(max_beta=1)
    with pytest.raises(ValueError, match=r"mine: betas span \[0, 0.1\]"):
        schedules.from_betas("mine", [0.0, 0.1])
    with pytest.raises(ValueError, match=r"did you mean 'eps'.*'x0', 'v'"):
        diffusion.denoising_loss(scaled, schedule, prediction="epsilon")
    with pytest.raises(ValueError, match="did you mean 'fixed_large'"):
        diffusion.vlb_loss(scaled, schedule, variance="fixed-large")
    loss = diffusion.denoising_loss(scaled, schedule)
    with pytest.raises(ValueError, match=r"x / 127.5 - 1"):
        jax.eval_shape(loss.__call__, 0.9, {"image": jnp.zeros((8, 2, 2, 1), jnp.uint8)}, t, key)
    with pytest.raises(ValueError, match=r"t \(3,\)"):
        diffusion.corrupt(schedule, x0, noise, t[:3])
    with pytest.raises(ValueError, match="learned variance"):
        diffusion.denoising_loss(lambda p, x, t, b, k: jnp.concatenate([x, x], -1), schedule)(
            None, {"image": x0}, t, key
        )
    with pytest.raises(ValueError, match="takes integers"):
        schedule.alpha(jnp.zeros(3))
    flowing = schedule._replace(name="flow", betas=None, num_timesteps=None)
    with pytest.raises(ValueError, match="flow is continuous"):
        diffusion.vlb_loss(scaled, flowing)
    with pytest.raises(ValueError, match="chunk 0"):
        diffusion.total_bits_per_dim(loss, schedule, 0.9, {"image": x0}, key, chunk=0)


def test_continuous_schedules_fit_the_same_slots(strict):
    """No betas, float t: corruption, targets and the mean squared error need nothing more."""
    flow = rectified_flow()
    x0, noise = arrays(10)
    t = jnp.linspace(0.1, 0.9, 8)
    t4 = t.reshape(8, 1, 1, 1)
    with strict():
        x_t = diffusion.corrupt(flow, x0, noise, t)
        target = diffusion.prediction_target(flow, "flow", x0, noise, t)
        eps = diffusion.predicted_eps(flow, "flow", target, x_t, t)
    np.testing.assert_allclose(x_t, (1 - t4) * x0 + t4 * noise, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(target, noise - x0)
    np.testing.assert_allclose(eps, noise, atol=1e-6)

    def straight(params, x_t, t, batch, key):
        """The best linear flow for one image: (x_t - x0) / t, so that the loss is 0."""
        return (x_t - batch["image"]) / t.reshape(8, 1, 1, 1) + params

    loss = diffusion.denoising_loss(straight, flow, prediction="flow")
    with strict():
        got = jax.jit(loss.__call__)(jnp.float32(0.5), {"image": x0}, t, jax.random.key(0))
    # (x_t - x0) / t = eps - x0, the target: what is left is params^2.
    np.testing.assert_allclose(got, 0.25, rtol=1e-4)
