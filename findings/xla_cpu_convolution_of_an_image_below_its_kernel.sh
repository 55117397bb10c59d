#!/usr/bin/env bash
# On CPUs, a 3x3 convolution (padding 1) of 2x2 pixels takes many times as long as of 4x4 pixels, which
# is four times the arithmetic: where the image is smaller than the kernel XLA exchanges the two, and
# the result (dimension labels 01fb_o01i) goes to a naive loop. A matrix product over the shifted
# copies of the image, which is the same convolution, takes a small part of it.
# Seen with jax and jaxlib 0.10.2 (Python 3.11), with and without YNNPACK, Linux x86-64. Output seen:
#   2x2 over 4x4 pixels: above 3 times; 2x2 over the matrix product: above 5 times; exchanged: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv env
env/bin/python -m pip install --quiet --no-input "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.2.6"
cat >look.py <<'P'
import time

import jax
import jax.numpy as jnp
import numpy as np

kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 64, 128)), jnp.float32)


def conv(x):
    labels = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=labels)


def product(x):
    p = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [p[:, i : i + 2, j : j + 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(576, 128)


def seconds(f, side):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, side, side, 64)), jnp.float32)
    g = jax.jit(f).lower(x).compile()
    g(x).block_until_ready()
    times = []
    for _ in range(30):
        began = time.perf_counter()
        g(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times), np.asarray(g(x)), g.as_text()


small, found, text = seconds(conv, 2)
large, _, _ = seconds(conv, 4)
other, same, _ = seconds(product, 2)
assert np.allclose(found, same, atol=1e-3)
print(
    f"2x2 over 4x4 pixels: {'above' if small > 3 * large else 'below'} 3 times; "
    f"2x2 over the matrix product: {'above' if small > 5 * other else 'below'} 5 times; "
    f"exchanged: {'01fb_o01i->f01b' in text}"
)
P
found=$(env/bin/python look.py)
echo "jax 0.10.2: $found"
test "$found" = "2x2 over 4x4 pixels: above 3 times; 2x2 over the matrix product: above 5 times; exchanged: True"
