"""Derivatives through operations that have no forward mode, and what computes in low precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from adaptive_ts.learning.derivative import computes_low, derivative_along, midpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
W, D, X = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 5), (4, 5), (3, 4)))
D = 1e-3 * D


def with_rule(backward):
    @jax.custom_vjp
    def fused(x, w):
        return jnp.tanh(x @ w)

    fused.defvjp(lambda x, w: (fused(x, w), (x, w)), backward)
    return fused


def backward(kept, g):
    x, w = kept
    g = g * (1 - jnp.tanh(x @ w) ** 2)
    return g @ w.T, x.T @ g


def kernel(kept, g):
    """The same, out of JAX's sight: can't be transposed."""
    shapes = jax.eval_shape(backward, kept, g)
    return jax.pure_callback(lambda k, g: jax.tree.map(np.asarray, backward(k, g)), shapes, kept, g)


def loss(product):
    return lambda w: jnp.mean(jnp.sin(product(X, w)), axis=1)


PLAIN = loss(lambda x, w: jnp.tanh(x @ w))
WRAPPED = {
    "bare": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": lambda f: lambda w: lax.scan(lambda c, x: (c, f(x)), 0, w[None])[1][0],
    "vmap": lambda f: lambda w: jax.vmap(f)(w[None])[0],
}


def close(found, expected, rtol):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_custom_vjp_falls_back_to_the_transpose_and_says_so(wrap, under):
    f = WRAPPED[wrap](loss(with_rule(backward)))
    with pytest.warns(UserWarning, match="custom_vjp fused .*transpose of reverse mode"):
        found = under(lambda w, d: derivative_along(f, w, d))(W, D)
    close(found, jax.jvp(PLAIN, (W,), (D,)), 1e-5)


def test_a_rule_that_cannot_be_transposed_falls_back_to_a_wide_difference():
    f = loss(with_rule(kernel))
    with pytest.warns(UserWarning, match="fused .*difference of 0.3%"):
        _, slope = jax.jit(lambda w, d: derivative_along(f, w, d))(W, 1e-4 * D)
    expected = jax.jvp(PLAIN, (W,), (1e-4 * D,))[1]
    np.testing.assert_allclose(slope, expected, rtol=5e-3)
    with pytest.warns(UserWarning, match="difference"):
        np.testing.assert_array_equal(derivative_along(f, W, 0 * D)[1], 0)


def test_a_host_callback_is_named():
    def f(w):
        shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
        return jnp.sum(jax.pure_callback(np.sin, shape, w), axis=1)

    with pytest.warns(UserWarning, match="(?i)an operation .*callback.*difference"):
        _, slope = derivative_along(f, W, D)
    np.testing.assert_allclose(slope, jnp.sum(jnp.cos(W) * D, axis=1), rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_inside_shard_map(mesh8, under):
    x = jnp.tile(X, (8, 1))

    def local(product, x, w, d):
        return derivative_along(lambda w: jnp.mean(jnp.sin(product(x, w)), 1), w, d)

    def mapped(product):
        specs = {"in_specs": (P("data"), P(), P()), "out_specs": P("data")}
        return under(jax.shard_map(functools.partial(local, product), mesh=mesh8, **specs))

    expected = jax.jvp(PLAIN, (W,), (D,))
    with pytest.warns(UserWarning, match="fused"):
        found = mapped(with_rule(backward))(x, W, D)
    close(found, [jnp.tile(e, 8) for e in expected], 2e-4)
    close(mapped(lambda x, w: jnp.tanh(x @ w))(x, W, D), [jnp.tile(e, 8) for e in expected], 2e-4)


def test_no_warning_where_the_rule_does_not_meet_the_parameters(recwarn):
    fused = with_rule(backward)
    _, slope = derivative_along(lambda w: jnp.mean(w) * fused(X, W), W, D)
    np.testing.assert_allclose(slope, jnp.mean(D) * jnp.tanh(X @ W), rtol=1e-5)
    assert not recwarn.list


def test_what_is_wrong_with_the_function_is_raised_as_it_is(recwarn):
    def f(w):
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match=r"^no such layer"):
        derivative_along(f, W, D)
    with pytest.raises(TypeError, match="incompatible shapes"):
        derivative_along(lambda w: w + jnp.ones((3, 7)), W, D)
    with pytest.raises(ValueError, match=r"float32\[4, 5\] and its tangent bfloat16\[4, 5\]"):
        derivative_along(jnp.sin, W, D.astype(jnp.bfloat16))
    assert not recwarn.list


def test_integer_leaves_stay():
    params = {"w": W, "step": jnp.int32(3)}
    tangent = {"w": D, "step": jnp.int32(0)}
    value, slope = jax.jit(lambda p, d: derivative_along(lambda p: p["w"] * p["step"], p, d))(
        params, tangent
    )
    np.testing.assert_array_equal(value, W * 3)
    np.testing.assert_allclose(slope, D * 3)
    middle, step = midpoint(params, {"w": W + D, "step": jnp.int32(4)})
    assert (middle["step"], step["step"]) == (3, 0)
    np.testing.assert_allclose(middle["w"], W + D / 2, rtol=1e-6)


LOW = jnp.bfloat16


def low_product(x):
    return (x.astype(LOW) @ x.T.astype(LOW)).astype(jnp.float32)


CASES = {
    "float32": (lambda x: x @ x.T, False),
    "no product": (lambda x: (x.astype(LOW) * 2).sum(), False),
    "cast": (lambda x: x.astype(LOW) @ x.T.astype(LOW), True),
    "accumulated in float32": (
        lambda x: jnp.matmul(x.astype(LOW), x.T.astype(LOW), preferred_element_type=jnp.float32),
        True,
    ),
    "jit": (jax.jit(lambda x: x.astype(LOW) @ x.T.astype(LOW)), True),
    "scan": (lambda x: lax.scan(lambda c, _: (c @ c.T @ c, None), x.astype(LOW), None, 2)[0], True),
    "cond": (lambda x: lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: x @ x.T, x), False),
    "one branch": (lambda x: lax.cond(x.sum() > 0, lambda x: x @ x.T, low_product, x), True),
    "custom_vjp": (lambda x: with_rule(backward)(x.astype(LOW), x.T.astype(LOW)), True),
    "float16": (lambda x: x.astype(jnp.float16) @ x.T.astype(jnp.float16), True),
}


@pytest.mark.parametrize("case", CASES)
def test_what_computes_low_on_a_cpu(case):
    f, expected = CASES[case]
    assert computes_low(f, X, platform="cpu") is expected


def test_convolutions_count():
    image, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))

    def f(dtype):
        return lambda x, k: lax.conv_general_dilated(
            x.astype(dtype),
            k.astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    assert not computes_low(f(jnp.float32), image, kernel, platform="cpu")
    assert computes_low(f(jnp.bfloat16), image, kernel, platform="cpu")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_round_float32_unless_told_not_to(platform):
    def f(precision):
        return lambda x: jnp.matmul(x, x.T, precision=precision)

    assert computes_low(f(None), X, platform=platform)
    assert computes_low(f("high"), X, platform=platform)
    assert not computes_low(f("highest"), X, platform=platform)
    assert not computes_low(f(lax.DotAlgorithmPreset.F32_F32_F32), X, platform=platform)
    assert computes_low(f(lax.DotAlgorithmPreset.BF16_BF16_F32), X, platform=platform)
    with jax.default_matmul_precision("highest"):
        assert not computes_low(f(None), X, platform=platform)
