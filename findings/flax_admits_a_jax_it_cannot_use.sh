#!/usr/bin/env bash
# flax 0.12.0 and 0.12.1 ask for jax without an upper bound, and pip finds nothing wrong with them
# beside jax 0.10.0. Plain flax.linen works there. But flax.linen.remat passes an option to
# jax.checkpoint that this jax refuses; `import flax.nnx` of 0.12.0 takes a name from jax that is
# gone; and flax.nnx.jit of 0.12.1 passes an option to jax.jit that it does not know.
# flax 0.12.2 does all of it. So a program that declares flax>=0.12 and jax>=0.10 is installable at
# its lowest versions, passes its plain Linen tests, and fails in NNX and in remat.
# Seen with jax and jaxlib 0.10.0 on Python 3.11. Output seen:
#   flax 0.12.0: no broken requirements; linen fine; remat NotImplementedError; nnx ImportError; nnx.jit ImportError
#   flax 0.12.1: no broken requirements; linen fine; remat NotImplementedError; nnx fine; nnx.jit TypeError
#   flax 0.12.2: no broken requirements; linen fine; remat fine; nnx fine; nnx.jit fine
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv env
cat >look.py <<'P'
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp


def linen(dense=nn.Dense):
    x = jnp.ones((2, 3))
    model = dense(4)
    params = model.init(jax.random.key(0), x)
    jax.grad(lambda p: model.apply(p, x).sum())(params)


def nnx_jit():
    nnx = importlib.import_module("flax.nnx")
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    nnx.jit(lambda m, x: m(x))(model, jnp.ones((2, 3)))


def said(name, action):
    try:
        action()
    except Exception as error:
        return f"{name} {type(error).__name__}"
    return f"{name} fine"

parts = [
    said("linen", linen),
    said("remat", lambda: linen(nn.remat(nn.Dense))),
    said("nnx", lambda: importlib.import_module("flax.nnx")),
    said("nnx.jit", nnx_jit),
]
print("; ".join(parts))
P
for version in 0.12.0 0.12.1 0.12.2; do
  env/bin/python -m pip install -q "flax==$version" jax==0.10.0 jaxlib==0.10.0
  env/bin/python -m pip check >/dev/null
  echo "flax $version: no broken requirements; $(env/bin/python look.py)"
done | tee found
cat >wanted <<'W'
flax 0.12.0: no broken requirements; linen fine; remat NotImplementedError; nnx ImportError; nnx.jit ImportError
flax 0.12.1: no broken requirements; linen fine; remat NotImplementedError; nnx fine; nnx.jit TypeError
flax 0.12.2: no broken requirements; linen fine; remat fine; nnx fine; nnx.jit fine
W
diff wanted found
