"""What an optimizer makes of a gradient: its preconditioner, seen from outside."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive_ts.types import Params, Scalar

_SQUARES = {"nu", "exp_avg_sq", "v_row", "sum_of_squares"}  # fields of second moments
_MOMENTA = {"mu", "momentum", "exp_avg", "acc_grads"}
_SMALL, _LARGE = 0.1, 1e3


def optimizer_response(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
    scale: Scalar | float = 1.0,
) -> Params:
    """What of the optimizer's step is owed to these gradients: the part of it that is odd in them.

      (update(c g) - update(-c g)) / (2 c)

    Momentum and weight decay, which come whatever the gradient is, cancel, and so does what the
    gradient adds to the second moments: Adam's is -lr (1 - b1) g / (sqrt(nu) + eps), with nu of
    c g. It points downhill, as optax's updates do.

    Args:
      optimizer: any optax one; called with gradients, state and params.
      grads: of params' structure; 0 for integer leaves.
      opt_state: from before the step.
      params: likewise.
      scale: c, () float32; `memory_scale` for a response that is linear in the gradient.

    Returns:
      Of params' structure and dtypes; 0 everywhere in a step that only accumulates.

    Raises:
      ValueError: an optimizer that needs more than these (``contrib.momo``: the loss).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adaptive_ts.learning.response import optimizer_response
      >>> tx, params, g = optax.sgd(0.5, momentum=0.9), jnp.ones(2), jnp.asarray([1.0, -2.0])
      >>> _, state = tx.update(jnp.asarray([3.0, 3.0]), tx.init(params), params)
      >>> print(optimizer_response(tx, g, state, params))
      [-0.5  1. ]

    Source: this library's own.
    """
    scale = jnp.asarray(scale, jnp.float32)
    # In float32 throughout: a difference of two bfloat16 updates is rounding.
    grads, opt_state, wide = jax.tree.map(_widened, (grads, opt_state, params))

    def moved(sign: int) -> Params:
        signed = jax.tree.map(lambda g: (sign * scale).astype(g.dtype) * g, grads)
        try:
            with jax.numpy_dtype_promotion("standard"):  # optax multiplies counters by floats
                return optimizer.update(signed, opt_state, wide)[0]
        except TypeError as error:
            raise ValueError(
                "impact calls the optimizer's update with gradients, state and params, and it "
                f"answers: {error}; give impact one that needs no more, or take adaptive, which "
                "needs none"
            ) from error

    def odd(ahead: jax.Array, behind: jax.Array, param: jax.Array) -> jax.Array:
        half = (ahead - behind).astype(jnp.float32) / 2
        return (half / scale).astype(jnp.result_type(param))

    return jax.tree.map(odd, moved(1), moved(-1), params)


def memory_scale(opt_state: optax.OptState, grads: Params) -> Scalar:
    """The c at which c g is to an optimizer as its own past gradients are, whatever g's scale.

    Where it remembers squares (Adam, RMSprop, Adafactor, Prodigy, Muon beside Adam), a tenth of
    their root: too little to change them, so that the response is P g with P of the past. Where it
    remembers momentum only (Lion, Muon alone), far more than it: the response is that to a
    gradient that stays, sign(g) or its orthogonal factor. Else, and at the first step, the c at
    which c g has a root mean square of 1: no epsilon decides.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adaptive_ts.learning.response import memory_scale
      >>> tx, g = optax.adam(1e-3, b2=0.75), jnp.asarray([3.0, -3.0])
      >>> _, state = tx.update(g, tx.init(g), g)
      >>> print(memory_scale(state, g), memory_scale(state, 100 * g))
      0.05 0.0005
    """
    fields = _fields(opt_state)
    squares = [x for name, xs in fields.items() if name in _SQUARES for x in xs]
    if "v_row" in fields:  # Adafactor's of small parameters
        squares += fields.get("v", [])
    momenta = [x for name, xs in fields.items() if name in _MOMENTA for x in xs]
    size = _root_mean(jnp.square(x.astype(jnp.float32)) for x in jax.tree.leaves(grads))
    memory = _LARGE * _root_mean(jnp.square(x.astype(jnp.float32)) for x in momenta)
    root = _root_mean(squares)
    if "estim_lr" in fields:  # Prodigy's are of gradients times its estimate
        root = root / fields["estim_lr"][0]
    memory = jnp.where(root > 0, _SMALL * root, memory)
    memory = jnp.where(memory > 0, memory, 1)
    return jnp.where(size > 0, memory / jnp.where(size > 0, size, 1), 1).astype(jnp.float32)


def _widened(x: jax.Array) -> jax.Array:
    kind = jnp.result_type(x)
    low = jnp.issubdtype(kind, jnp.floating) and kind.itemsize < 4
    return jnp.asarray(x, jnp.float32) if low else x


def _fields(opt_state: optax.OptState) -> dict[str, list[jax.Array]]:
    """The arrays of an optimizer's state by the innermost named field that they lie in."""
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        names = [str(key.name) for key in path if hasattr(key, "name")]
        if names and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            found.setdefault(names[-1], []).append(leaf)
    return found


def _root_mean(arrays: Iterable[Any]) -> jax.Array:
    arrays = [x.astype(jnp.float32) for x in arrays]
    total = sum(jnp.sum(x) for x in arrays)
    mean = jnp.asarray(total, jnp.float32) / max(sum(x.size for x in arrays), 1)
    return jnp.sqrt(jnp.maximum(mean, 0))
