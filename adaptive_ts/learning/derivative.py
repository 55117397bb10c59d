"""Derivatives along a direction, through whatever a model is made of; and where they are needed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_ts.types import Params

_AMPLITUDE = 3e-3  # of the parameters' norm: curvature and bfloat16's rounding are both small
_Leaves: TypeAlias = Sequence[jax.Array]
_Along: TypeAlias = Callable[[Callable[..., jax.Array], _Leaves, _Leaves], Any]


def derivative_along(
    f: Callable[[Params], jax.Array], params: Params, tangent: Params
) -> tuple[jax.Array, jax.Array]:
    """(f(params), d/ds f(params + s tangent) at s = 0).

    By forward mode where every operation of ``f`` has it. An operation with a backward rule of
    its own (``jax.custom_vjp``: flash attention, fused norms) has none; then, with one warning
    that names it, by the transpose of reverse mode, which is exact too, or, where the rule can't
    be transposed (a kernel), by a central difference of 0.3% of the parameters' norm (correlation
    .998 with the derivative on a U-Net in bfloat16).

    Args:
      f: of the parameters.
      params: a pytree of arrays; integer leaves stay as they are.
      tangent: of the params' structure, shapes and dtypes; integer leaves are not looked at.

    Returns:
      Two arrays of f's shape.

    Raises:
      ValueError: a tangent of another shape or dtype than its parameter. Errors of ``f`` are its
        own.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning.derivative import derivative_along
      >>> value, slope = derivative_along(lambda p: p**2, jnp.float32(3.0), jnp.float32(0.5))
      >>> print(value, slope)
      9.0 3.0

    Source: the transpose of the transpose: Frostig et al. 2021 (arXiv 2204.10923), section 2.
    """
    leaves, treedef = jax.tree.flatten(params)
    moves = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def of_moving(*moving: jax.Array) -> jax.Array:
        left = iter(moving)
        full = [next(left) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        return f(jax.tree.unflatten(treedef, full))

    start, direction = (
        [leaf for m, leaf in zip(moves, jax.tree.leaves(tree), strict=True) if m]
        for tree in (params, tangent)
    )
    for param, move in zip(start, direction, strict=True):
        if (param.shape, param.dtype) != (move.shape, move.dtype):
            raise ValueError(
                f"a parameter is {param.dtype}{list(param.shape)} and its tangent {move.dtype}"
                f"{list(move.shape)}: give both the same"
            )
    if not start:
        value = f(params)
        return value, jnp.zeros_like(value)
    obstacle = _obstacle(of_moving, start, direction)
    if obstacle is None:
        return _forward(of_moving, start, direction)
    exact = [f for f in (_transposed, _varying) if _traceable(f, of_moving, start, direction)]
    found = exact[0] if exact else _central
    way = "the transpose of reverse mode"
    if not exact:
        way = f"a difference of {_AMPLITUDE:.1%} of the parameters' norm"
    warnings.warn(
        f"{obstacle} of the loss has no forward-mode derivative: {way} takes its place",
        stacklevel=2,
    )
    return found(of_moving, start, direction)


def midpoint(params: Params, new_params: Params) -> tuple[Params, Params]:
    """(their midpoint, new_params - params); integer leaves stay, their difference is 0."""

    def middle(old: jax.Array, new: jax.Array) -> jax.Array:
        return old + (new - old) / 2 if jnp.issubdtype(old.dtype, jnp.inexact) else old

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        moves = jnp.issubdtype(old.dtype, jnp.inexact)
        return new - old if moves else jnp.zeros_like(old)

    trees = (jax.tree.map(jnp.asarray, tree) for tree in (params, new_params))
    old, new = trees
    return jax.tree.map(middle, old, new), jax.tree.map(step, old, new)


def computes_low(f: Callable[..., Any], *args: Any, platform: str | None = None) -> bool:
    """Whether a matrix product or convolution of f computes in less than float32.

    Its operands' types say so, or its precision: by default TPUs round float32 operands to
    bfloat16, and GPUs to TensorFloat-32.

    Args:
      f: is traced, not run.
      args: pytrees of arrays.
      platform: "cpu", "gpu" or "tpu"; None for JAX's default backend.

    Example:
      >>> import jax.numpy as jnp
      >>> from adaptive_ts.learning.derivative import computes_low
      >>> x = jnp.ones((2, 2))
      >>> for dtype in (jnp.float32, jnp.bfloat16):
      ...     print(computes_low(lambda x: x @ x, x.astype(dtype), platform="cpu"))
      False
      True
    """
    exact = (platform or jax.default_backend()) == "cpu"
    return any(
        _rounds(eqn, exact)
        for eqn in _equations(jax.make_jaxpr(f)(*args))
        if any(word in eqn.primitive.name for word in ("dot", "conv_general", "attention"))
    )


def _rounds(eqn: Any, exact: bool) -> bool:
    types = [x.aval.dtype for x in eqn.invars if hasattr(x.aval, "dtype")]
    numbers = [t for t in types if jnp.issubdtype(t, jnp.number)]
    if any(t.itemsize < 4 for t in numbers):
        return True
    precision = eqn.params.get("precision")
    if isinstance(precision, lax.DotAlgorithmPreset):
        return not precision.name.endswith(("F32_F32_F32", "F64_F64_F64"))
    asked = precision if isinstance(precision, tuple) else (precision,)
    single = any(t == jnp.float32 for t in numbers)
    return single and not exact and any(p != lax.Precision.HIGHEST for p in asked)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of nested programs too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from _equations(inner)


def _obstacle(f: Callable[..., jax.Array], start: _Leaves, direction: _Leaves) -> str | None:
    """What of f has no forward mode, in words; None where all has.

    Looked for in the traced program: under jit it is raised only when the program is lowered.
    """
    try:
        program = jax.make_jaxpr(lambda p, d: _forward(f, p, d))(start, direction)
    except (TypeError, ValueError, NotImplementedError) as error:
        jax.eval_shape(f, *start)  # what is wrong with f itself is raised as it is
        return f"an operation ({' '.join(str(error).split())[:80]})"
    if all(eqn.primitive.name != "custom_lin" for eqn in _equations(program)):
        return None
    sources = []
    for eqn in _equations(jax.make_jaxpr(f)(*start)):
        if eqn.primitive.name.startswith("custom_vjp_call"):
            body = getattr(eqn.params.get("call_jaxpr"), "jaxpr", eqn.params.get("call_jaxpr"))
            sources.append(getattr(getattr(body, "debug_info", None), "func_src_info", None))
    names = dict.fromkeys(name for name in sources if name)
    return "the jax.custom_vjp " + (", ".join(names) or "operation")


def _traceable(along: _Along, f: Callable[..., jax.Array], start: _Leaves, move: _Leaves) -> bool:
    try:
        jax.make_jaxpr(lambda p, d: along(f, p, d))(start, move)
    except Exception:  # whatever a rule does that was not written to be transposed
        return False
    return True


def _forward(f: Callable[..., jax.Array], start: _Leaves, direction: _Leaves) -> Any:
    return jax.jvp(f, tuple(start), tuple(direction))


def _transposed(f: Callable[..., jax.Array], start: _Leaves, direction: _Leaves) -> Any:
    value, pullback = jax.vjp(f, *start)
    (slope,) = jax.linear_transpose(pullback, value)(tuple(direction))
    return value, slope


def _varying(f: Callable[..., jax.Array], start: _Leaves, direction: _Leaves) -> Any:
    """In ``shard_map`` a backward rule gives each device's own part of what all devices share."""

    def axes(kind: Any) -> frozenset[str]:
        return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma

    wanted = axes(jax.eval_shape(f, *start))

    def own(x: jax.Array) -> jax.Array:
        missing = tuple(wanted - axes(jax.typeof(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return _transposed(f, [own(x) for x in start], [own(x) for x in direction])


def _central(f: Callable[..., jax.Array], start: _Leaves, direction: _Leaves) -> Any:
    norm, length = (
        jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(x.astype(jnp.float32)))) for x in xs))
        for xs in (start, direction)
    )
    wide = _AMPLITUDE * norm / jnp.where(length > 0, length, 1)
    step = jnp.maximum(wide, 0.5)  # no less than what is asked about: from one end to the other

    def at(sign: int) -> jax.Array:
        return f(
            *(p + (sign * step).astype(d.dtype) * d for p, d in zip(start, direction, strict=True))
        )

    ahead, behind = at(1).astype(jnp.float32), at(-1).astype(jnp.float32)
    return (ahead + behind) / 2, (ahead - behind) / (2 * step)
