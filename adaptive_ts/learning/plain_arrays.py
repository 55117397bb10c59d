"""What a sampler is told of the model must stay what it was when the model is changed in place."""

import sys
from typing import Any

import jax


def check_plain(**trees: Any) -> None:
    """Raises ValueError for a tree that holds variables of Flax NNX in place of arrays.

    An optimizer's update changes these in place: parameters from before it would be those from
    after, and what is learned from the difference nothing, without a word.

    Args:
      trees: pytrees by the name that they have for the caller.

    Raises:
      ValueError: with the name, and how arrays are got.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from adaptive_ts.learning.plain_arrays import check_plain
      >>> state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
      >>> check_plain(params=nnx.as_pure(state))
      >>> try:
      ...     check_plain(params=state)
      ... except ValueError as error:
      ...     print(str(error)[:36])
      params holds NNX variables (a Param)
    """
    nnx = sys.modules.get("flax.nnx")  # where it was never imported there are none
    if nnx is None:
        return

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    for name, tree in trees.items():
        for leaf in jax.tree.leaves(tree, is_leaf=is_variable):
            if is_variable(leaf):
                raise ValueError(
                    f"{name} holds NNX variables (a {type(leaf).__name__}), which are "
                    "changed in place: give nnx.as_pure of them (params and opt_state before the "
                    "optimizer's update, new_params after it)"
                )
