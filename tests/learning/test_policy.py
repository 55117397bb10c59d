"""policy.py against the official network (golden), scipy and torch (golden beta_dist)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import special, stats

from adaptive_ts import collectives
from adaptive_ts.learning import policy

pytestmark = pytest.mark.usefixtures("quick_compilation")
EDGE_PARAMETERS = (1e-5, 1e-3, 0.5, 1.0, 7.9, 8.0, 300.0, 1e5)


def assert_close(found, want, a, b, rtol=2e-6, atol=1e-5):
    """Equal but for the rounding of float32, and of the log-gammas that cancel in log B(a, b)."""
    allowed = rtol * np.abs(want) + atol + 4e-7 * np.abs(special.gammaln(a + b))
    error = np.abs(np.asarray(found, np.float64) - want)
    assert np.all(error <= allowed), (error / allowed).max()


def official_params():
    """The golden's weights, by its rule, as our tree: OIHW -> HWIO, and C,H,W -> H,W,C rows."""
    shapes = {
        "conv_layers.0": (32, 3, 3, 3),
        "conv_layers.3": (64, 32, 3, 3),
        "conv_layers.6": (128, 64, 3, 3),
        "mlps.0": (256, 2048),
        "mlps.2": (256, 256),
        "mlps.4": (2, 256),
    }
    rng, weights = np.random.default_rng(2), {}
    for name, shape in sorted(shapes.items()):
        for kind, of in (("bias", shape[:1]), ("weight", shape)):
            weights[f"{name}.{kind}"] = (rng.standard_normal(of) * 0.05).astype(np.float32)
    params = {}
    for i, name in enumerate(("conv_layers.0", "conv_layers.3", "conv_layers.6")):
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        params[f"Conv_{i}"] = {"kernel": kernel, "bias": weights[f"{name}.bias"]}
    for i, name in enumerate(("mlps.0", "mlps.2", "mlps.4")):
        kernel = weights[f"{name}.weight"].T
        if i == 0:
            kernel = kernel.reshape(128, 4, 4, 256).transpose(1, 2, 0, 3).reshape(2048, 256)
        params[f"Dense_{i}"] = {"kernel": kernel, "bias": weights[f"{name}.bias"]}
    return jax.tree.map(jnp.asarray, params)


def test_golden_network_losses_and_gradients(golden, strict):
    g, net, params = golden("actor_network"), policy.conv_beta_policy(), official_params()
    batch = {"image": jnp.asarray(g["x"].transpose(0, 2, 3, 1))}
    shapes = jax.tree.map(jnp.shape, net.init(jax.random.key(0), batch))
    assert shapes == jax.tree.map(jnp.shape, params)
    u, reward = (jnp.asarray(g[k], jnp.float32) for k in ("action", "reward"))

    @jax.jit
    def pull(params, cotangent):
        out, vjp = jax.vjp(lambda params: net.apply(params, batch), params)
        return out, vjp(cotangent)[0]

    @functools.partial(jax.jit, static_argnums=2)
    def loss(a, b, kind):
        log_prob, entropy = policy.beta_log_prob(a, b, u), policy.beta_entropy(a, b)
        if kind == "in_reward":
            value = -jnp.mean(log_prob * (reward + 0.01 * entropy))
        else:
            value = -jnp.mean(log_prob * reward) - 0.01 * jnp.mean(entropy)
        return value, (a, b, log_prob, entropy)

    (a, b), _ = pull(params, (reward, reward))
    for kind in ("in_reward", "bonus"):
        with strict():
            (value, got), to_ab = jax.value_and_grad(loss, (0, 1), has_aux=True)(a, b, kind)
            _, grads = pull(params, to_ab)
        for name, array in zip(("alpha", "beta", "log_prob", "entropy"), got, strict=True):
            np.testing.assert_allclose(array, g[f"{name}_f64"], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(value, g[f"loss_{kind}_f64"], rtol=2e-5)
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
        np.testing.assert_allclose(norm, g[f"grad_norm_{kind}_f64"], rtol=2e-5)
        last, want = grads["Dense_2"], g[f"grad_last_weight_{kind}_f64"]
        atol = 2e-5 * np.abs(want).max()
        np.testing.assert_allclose(last["kernel"].T, want, rtol=1e-4, atol=atol)
        np.testing.assert_allclose(last["bias"], g[f"grad_last_bias_{kind}_f64"], rtol=1e-4)


def test_golden_beta_distribution(golden, strict):
    g = golden("beta_dist")
    a, b = (g["ab"][:, i].astype(np.float32) for i in (0, 1))
    x = g["x"].astype(np.float32)
    grid = [np.ascontiguousarray(v) for v in np.broadcast_arrays(a[:, None], b[:, None], x)]
    exact = [v.astype(np.float64) for v in grid]  # x = 0.999999 is not a float32
    with strict():
        got = jax.jit(policy.beta_log_prob)(*grid)
        entropy = jax.jit(policy.beta_entropy)(a, b)
        d_log_prob = jax.jit(jax.vmap(jax.grad(policy.beta_log_prob, (0, 1)), (0, 0, None)))(
            a, b, jnp.float32(0.3)
        )
        d_entropy = jax.jit(jax.vmap(jax.grad(policy.beta_entropy, (0, 1))))(a, b)
    assert_close(got, stats.beta.logpdf(exact[2], *exact[:2]), *exact[:2])
    middle = slice(1, -1)
    want = g["log_prob_scipy"][:, middle]
    assert_close(got[:, middle], want, exact[0][:, middle], exact[1][:, middle], 1e-5, 1e-4)
    assert_close(entropy, g["entropy_scipy"], *g["ab"].T)
    for ours, want in zip(d_log_prob, ("dlogp_da_at_0p3", "dlogp_db_at_0p3"), strict=True):
        np.testing.assert_allclose(ours, g[want], rtol=1e-4, atol=1e-4)
    for ours, want in zip(d_entropy, ("dH_da", "dH_db"), strict=True):
        np.testing.assert_allclose(ours, g[want], rtol=1e-3, atol=2e-5)


def test_log_prob_and_entropy_against_scipy():
    values = np.float32([1e-4, 0.3, 1.0, 8.0, 40.0, 3000.0])
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    exact = (a.astype(np.float64), b.astype(np.float64))
    assert_close(policy.beta_entropy(a, b), stats.beta.entropy(*exact), *exact)
    mean = np.clip((a / (a + b)).astype(np.float32), 1e-6, 1 - 1e-6)
    want = stats.beta.logpdf(mean.astype(np.float64), *exact)
    assert_close(policy.beta_log_prob(a, b, mean), want, *exact)


def test_edges_are_finite():
    a, b, u = (
        jnp.asarray(x.ravel(), jnp.float32)
        for x in np.meshgrid(EDGE_PARAMETERS, EDGE_PARAMETERS, [0.0, 1e-45, 0.5, 1 - 2**-24, 1.0])
    )
    with_grads = jax.jit(jax.vmap(jax.value_and_grad(policy.beta_log_prob, (0, 1, 2))))(a, b, u)
    entropy = jax.jit(jax.vmap(jax.value_and_grad(policy.beta_entropy, (0, 1))))(a, b)
    for x in jax.tree.leaves((with_grads, entropy)):
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1), (7, 5, 3), (1, 9, 2), (256, 256, 3)],
        *[pytest.param(s, marks=pytest.mark.slow) for s in ((2, 2, 3), (8, 8, 1), (28, 28, 1))],
    ],
)
def test_any_image_size(shape, strict):
    net = policy.conv_beta_policy()
    struct = {"image": jax.ShapeDtypeStruct((2, *shape), jnp.float32)}
    images = np.random.default_rng(0).uniform(-1, 1, (2, *shape)).astype(np.float32)
    with strict():
        params = jax.jit(lambda key: net.init(key, struct))(jax.random.key(0))
        low_images = jnp.asarray(images, jnp.bfloat16)
        (a, b), low = jax.jit(
            lambda p, x, y: (net.apply(p, {"image": x}), net.apply(p, {"image": y}))
        )(params, images, low_images)
    for x in (a, b, *low):
        assert x.shape == (2,) and x.dtype == jnp.float32
        np.testing.assert_allclose(x, 0.97408698, rtol=1e-6)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert params["Dense_0"]["kernel"].shape[0] <= 8192


@pytest.mark.parametrize("side", [1, 2])
def test_convolutions_of_less_than_a_kernel_are_products(side):
    x = jax.random.normal(jax.random.key(0), (3, side, 2, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 4))

    def conv(x, kernel):
        labels = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=labels
        )

    found, back = jax.vjp(policy._conv_by_patches, x, kernel)
    right, right_back = jax.vjp(conv, x, kernel)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(back(right), right_back(right), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    small = policy.conv_beta_policy(hidden=(8,))
    batch = {"image": jnp.zeros((4, side, 2, 1))}
    params = small.init(jax.random.key(2), batch)
    text = jax.jit(small.apply).lower(params, batch).as_text()
    assert "stablehlo.convolution" not in text


def test_large_images_are_pooled_to_max_side():
    net = policy.conv_beta_policy(max_side=4)
    small = np.random.default_rng(0).uniform(-1, 1, (2, 4, 3, 1)).astype(np.float32)
    large = small.repeat(3, 1).repeat(3, 2)
    params = net.init(jax.random.key(0), {"image": large})
    params["Dense_2"]["kernel"] = jnp.ones_like(params["Dense_2"]["kernel"])
    want = net.apply(params, {"image": small})
    np.testing.assert_allclose(net.apply(params, {"image": large}), want, rtol=1e-5)
    # 11 rows: the last window covers 2 of them, and averages what it covers.
    np.testing.assert_allclose(net.apply(params, {"image": large[:, :11]}), want, rtol=1e-5)
    assert not np.allclose(want[0][0], want[0][1])


def test_init_in_abstract_and_under_jit():
    net = policy.conv_beta_policy(image=lambda batch: batch[0] / 2, channels=(4,), hidden=())
    batch = (jax.ShapeDtypeStruct((2, 6, 6, 1), jnp.float32),)
    abstract = jax.eval_shape(net.init, jax.random.key(0), batch)
    params = jax.jit(lambda key: net.init(key, batch))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    gradient = jax.grad(lambda p: jnp.sum(net.apply(p, (jnp.ones((2, 6, 6, 1)),))[0]))(params)
    assert np.all(np.asarray(gradient["Dense_0"]["kernel"])[:, 0] >= 0)
    assert np.any(np.asarray(gradient["Dense_0"]["kernel"])[:, 0] > 0)


def test_samples_follow_the_beta_distribution(strict):
    """Kolmogorov-Smirnov, 20,000 draws each, fixed key: p > 1e-3 for each of five."""
    sample = jax.jit(policy.beta_sample)
    keys = collectives.example_keys(jax.random.key(0), jnp.arange(20_000, dtype=jnp.int32))
    for a, b in ((0.974, 0.974), (0.3, 0.7), (2.0, 5.0), (1.0, 3.0), (50.0, 80.0)):
        with strict():
            u = sample(keys, jnp.full(20_000, a), jnp.full(20_000, b))
        assert u.dtype == jnp.float32
        assert stats.kstest(np.asarray(u, np.float64), stats.beta(a, b).cdf).pvalue > 1e-3


def test_samples_stay_inside_and_belong_to_their_key():
    keys, sample = jax.random.split(jax.random.key(1), 512), jax.jit(policy.beta_sample)
    for a, b in ((1e-5, 1e-5), (1e-5, 0.7), (1e5, 1e-3)):
        u = sample(keys, jnp.full(512, a), jnp.full(512, b))
        assert np.all((u > 0) & (u < 1))
    ones = jnp.ones(512)
    np.testing.assert_array_equal(
        sample(keys, ones, ones)[256:],
        sample(keys[256:], ones[256:], ones[256:]),
    )
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(policy.beta_sample(keys, a, ones))))(ones)
    assert gradient.tolist() == [0] * 512


def exact_log_mass(a, b, lo, hi):
    """In float64: a difference of scipy's CDFs, or quadrature where it cancels or underflows."""
    from_left = special.betainc(a, b, lo) < 0.5
    mass = np.where(
        from_left,
        special.betainc(a, b, hi) - special.betainc(a, b, lo),
        special.betainc(b, a, 1 - lo) - special.betainc(b, a, 1 - hi),
    )
    whole = np.where(from_left, special.betainc(a, b, hi), special.betainc(b, a, 1 - lo))
    nodes, weights = np.polynomial.legendre.leggauss(100)
    with np.errstate(all="ignore"):
        start, stop = special.logit(lo)[:, None], special.logit(hi)[:, None]
        y = start + (stop - start) * (nodes + 1) / 2
        density = a[:, None] * -np.logaddexp(0, -y) + b[:, None] * -np.logaddexp(0, y)
        quadrature = special.logsumexp(density, b=weights / 2 * np.ones_like(y), axis=1)
        quadrature += np.log(stop - start)[:, 0] - special.betaln(a, b)
        return np.where((mass < 1e-6 * whole) | (mass < 1e-200), quadrature, np.log(mass))


@pytest.mark.parametrize("cells", [1, 2, 10, 1000])
def test_log_mass_against_scipy(cells, strict):
    values = [1e-5, 0.01, 0.5, 0.97408698, 1.0, 2.0, 7.9, 8.1, 30.0, 130.0, 1000.0]
    edges = (np.arange(cells + 1) / cells).astype(np.float32)
    pick = np.unique(np.r_[0:3, np.linspace(0, cells - 1, 40).astype(int), cells - 3 : cells])
    pick = pick[(pick >= 0) & (pick < cells)]
    a, b, i = (x.ravel() for x in np.meshgrid(np.float32(values), np.float32(values), pick))
    lo, hi = edges[:-1][i], edges[1:][i]
    with strict():
        got = np.asarray(jax.jit(policy.beta_log_mass)(a, b, lo, hi))
    want = exact_log_mass(*(x.astype(np.float64) for x in (a, b, lo, hi)))
    known = np.isfinite(want)  # the far end cells, whose mass underflows in float64, are not
    assert known.mean() > 0.9 and not np.any(np.isnan(got))
    # Relative error of the mass for masses that matter, of its logarithm for the others.
    exact = (x.astype(np.float64)[known] for x in (a, b))
    assert_close(got[known], want[known], *exact, rtol=2e-5, atol=2e-5)


def test_log_mass_sums_to_one_and_handles_half_cells(mesh8):
    edges = np.concatenate([[0], (np.arange(999) + 0.5) / 999, [1]]).astype(np.float32)
    mass = jax.jit(policy.beta_log_mass)
    for a, b in ((0.97408698, 0.97408698), (0.3, 2.0), (1e-3, 0.5), (40.0, 3.0)):
        arguments = (jnp.full(1000, a), jnp.full(1000, b), edges[:-1], edges[1:])
        log_p = mass(*arguments)
        np.testing.assert_allclose(np.sum(np.exp(np.asarray(log_p, np.float64))), 1, rtol=2e-5)
    spec = P("data")
    sharded = jax.shard_map(policy.beta_log_mass, mesh=mesh8, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(*arguments), log_p, rtol=1e-5)
    assert mass(*(jnp.float32(x) for x in (1.0, 2.0, 0.3, 0.3))) == -jnp.inf


def test_messages():
    with pytest.raises(ValueError, match="at least one"):
        policy.conv_beta_policy(channels=())
    with pytest.raises(ValueError, match="max_side=0"):
        policy.conv_beta_policy(max_side=0)
    net = policy.conv_beta_policy()
    with pytest.raises(ValueError, match=r"\(b, H, W, C\)"):
        net.init(jax.random.key(0), {"image": jnp.zeros((4, 8, 8))})
    params = net.init(jax.random.key(0), {"image": jnp.zeros((4, 8, 8, 1))})
    with pytest.raises(ValueError, match=r"x / 127.5 - 1"):
        jax.eval_shape(net.apply, params, {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8)})
    with pytest.raises(ValueError, match="one key per example"):
        policy.beta_sample(jax.random.split(jax.random.key(0), 2), jnp.ones(3), jnp.ones(3))
