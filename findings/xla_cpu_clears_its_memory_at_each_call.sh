#!/usr/bin/env bash
# JAX's CPU backend allocates a program's temporary memory anew at each call, and above 32 MB glibc's
# malloc gives it back to the kernel in between: a program with 41 MB of it had 10,000 page faults a
# call, for ever, a quarter of the CPU time of a small network's training step. Three settings (here by
# the environment, mallopt does as well) end that. Above 64 MB, the most that malloc holds for a
# thread (XLA runs programs on threads of its own), only huge pages help
# (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, glibc 2.35 and later).
# Seen with jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0.1, glibc 2.36, Linux x86-64. Output seen:
#   by itself: thousands; with the settings: few
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv env
env/bin/python -m pip install --quiet --no-input "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.2.6"
cat >look.py <<'P'
import resource

import jax
import jax.numpy as jnp


def f(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return x.sum()


x, w = jnp.ones((8_000, 256)), jnp.ones((256, 256)) / 256
g = jax.jit(jax.grad(f, argnums=1)).lower(x, w).compile()
for _ in range(20):
    g(x, w).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    g(x, w).block_until_ready()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
print("thousands" if faults > 5000 else "few" if faults < 2500 else f"{faults:.0f}", end="")
P
plain=$(env/bin/python look.py)
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864
found="by itself: $plain; with the settings: $(env/bin/python look.py)"
echo "jax 0.10.2: $found"
test "$found" = "by itself: thousands; with the settings: few"
