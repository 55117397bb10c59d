"""The digest and the checksums of a state: the same wherever it lies, another for another bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved import make_state

from adaptive_ts.experiment.checkpoints.checksums import checksums, state_digest


def test_digest_sees_everything():
    state = make_state(0)
    digest = state_digest(state)
    assert digest == state_digest(make_state(0)) == state_digest(jax.device_get(state))
    assert len(digest) == 64
    bits = np.asarray(state["params"]["w"]).copy()
    bits.view(np.uint32)[3, 4] ^= 1
    changes = {
        "one bit": {**state, "params": {**state["params"], "w": bits}},
        "key": {**state, "key": jax.random.key(6)},
        "dtype": {**state, "step": jnp.uint32(0)},
        "shape": {**state, "bytes": jnp.arange(7, dtype=jnp.uint8)[None]},
        "path": {**{k: v for k, v in state.items() if k != "step"}, "stop": state["step"]},
    }
    digests = {name: state_digest(tree) for name, tree in changes.items()}
    assert len({digest, *digests.values()}) == len(changes) + 1, digests
    with pytest.raises(TypeError, match=r"\['x'\] is object"):
        state_digest({"x": object()})


@pytest.mark.parametrize(
    "dtype", ["uint8", "bool", "bfloat16", "float16", "int32", "float32", "complex64"]
)
def test_checksum_does_not_depend_on_sharding(mesh8, dtype):
    x = (jax.random.normal(jax.random.key(0), (16, 24, 3)) * 50).astype(dtype)
    specs = [P(), P("data"), P(None, "data")]
    placed = [{"x": jax.device_put(x, NamedSharding(mesh8, spec))} for spec in specs]
    host = np.asarray(x)
    words = host.view(np.uint32 if host.itemsize >= 4 else f"u{host.itemsize}").astype(np.uint64)
    weights = 2 * np.arange(words.size, dtype=np.uint64).reshape(words.shape) + 1
    want = {"['x']": int((words * weights).sum() % 2**32)}
    for tree in ({"x": x}, *placed):
        assert checksums(tree, on_device=True) == want
        assert checksums(tree) == checksums(tree, on_device=False) == want


def test_checksum_of_eight_bytes():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (5, 7), jnp.float64)
        words = np.asarray(x).view(np.uint32).astype(np.uint64).ravel()
        want = int((words * (2 * np.arange(70, dtype=np.uint64) + 1)).sum() % 2**32)
        assert checksums([x]) == checksums([x], on_device=True) == {"[0]": want}
