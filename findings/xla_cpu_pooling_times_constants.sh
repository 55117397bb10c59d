#!/usr/bin/env bash
# On CPUs, jax.jit of pooling (a sum or a maximum over windows), flattened, then multiplied by a
# matrix of equal numbers that the compiler knows (zeros, ones: a last layer as it is initialised,
# in a program that also initialises it) gives garbage: other numbers from run to run, 1e20 or NaN
# where 0 is right. No warning. The same matrix as an argument, or a known one of unequal numbers,
# or jit without XLA's YNNPACK fusions, is right.
# Seen with jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.13), Linux x86-64. Output seen:
#   constant zeros: wrong; constant ones: wrong; unequal constants: right; argument: right; no YNNPACK: right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv env
env/bin/python -m pip install --quiet --no-input "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.2.6"
cat >look.py <<'P'
import jax
import jax.numpy as jnp
import numpy as np

x = jnp.asarray(np.random.default_rng(0).normal(size=(128, 4, 4, 32)), jnp.float32)
pooled = np.asarray(x).reshape(128, 2, 2, 2, 2, 32).sum((2, 4)).reshape(128, 128)


def f(x, w):
    window = (1, 2, 2, 1)
    h = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID")
    return h.reshape(128, 128) @ w


def verdict(w, compute, **options):
    found = np.asarray(jax.jit(compute, compiler_options=options or None)(x, w))
    right = np.allclose(found, pooled @ np.asarray(w), atol=1e-2)
    return "right" if right else "wrong"


zeros, ones = jnp.zeros((128, 2)), jnp.ones((128, 2))
unequal = jnp.asarray(np.random.default_rng(1).normal(size=(128, 2)), jnp.float32)
off = {"xla_cpu_experimental_ynn_fusion_type": ""}
print(
    f"constant zeros: {verdict(zeros, lambda x, _: f(x, zeros))}; "
    f"constant ones: {verdict(ones, lambda x, _: f(x, ones))}; "
    f"unequal constants: {verdict(unequal, lambda x, _: f(x, unequal))}; "
    f"argument: {verdict(zeros, f)}; "
    f"no YNNPACK: {verdict(ones, lambda x, _: f(x, ones), **off)}"
)
P
found=$(env/bin/python look.py)
echo "jax 0.10.2: $found"
test "$found" = "constant zeros: wrong; constant ones: wrong; unequal constants: right; argument: right; no YNNPACK: right"
