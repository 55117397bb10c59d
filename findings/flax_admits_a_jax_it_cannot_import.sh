#!/usr/bin/env bash
# flax 0.12.0 asks for "jax>=0.7.1" without an upper bound, and pip finds nothing wrong with it
# beside jax 0.10.0; `import flax` and flax.linen work there. But `import flax.nnx` fails: it takes
# jax._src.core.mutable_array, which that jax no longer has. flax 0.12.1 imports.
# So a program that declares flax>=0.12 and jax>=0.10 is installable at its lowest versions, passes
# its Linen tests, and fails in NNX. Seen with: flax 0.12.0 and 0.12.1, jax and jaxlib 0.10.0.
# Output seen:
#   No broken requirements found.
#   flax.linen: fine
#   flax.nnx: ImportError: cannot import name 'mutable_array' from 'jax._src.core'
#   flax.nnx of 0.12.1: fine
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv env
env/bin/python -m pip install -q flax==0.12.0 jax==0.10.0 jaxlib==0.10.0
env/bin/python -m pip check
cat >look.py <<'P'
import importlib
import sys

try:
    importlib.import_module(sys.argv[1])
except ImportError as error:
    print(f"{sys.argv[1]}: ImportError: {str(error).partition(' (')[0]}")
else:
    print(f"{sys.argv[1]}: fine")
P
env/bin/python look.py flax.linen | tee linen
env/bin/python look.py flax.nnx | tee nnx
env/bin/python -m pip install -q flax==0.12.1 jax==0.10.0 jaxlib==0.10.0
env/bin/python look.py flax.nnx >later
echo "flax.nnx of 0.12.1:$(cut -d: -f2 later)"
grep -qx "flax.linen: fine" linen
grep -qx "flax.nnx: ImportError: cannot import name 'mutable_array' from 'jax._src.core'" nnx
grep -qx "flax.nnx: fine" later
