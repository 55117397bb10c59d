"""What a type checker says: of the package, and of a user's file beside the built wheel."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USERS_FILE = """
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adaptive_ts as ats
from adaptive_ts.types import Batch, Metrics, Params, State

grid, schedule, optimizer = ats.discrete(1000), ats.schedules.cosine(1000), optax.adam(1e-3)


def init(key: jax.Array, batch: Batch) -> jax.Array:
    return jnp.int32(0)


def sample(key: jax.Array, state: jax.Array, batch: Batch) -> ats.TimestepSample:
    u = (jax.random.uniform(key, batch["image"].shape[:1]) + state % 2) / 2
    return ats.TimestepSample(grid.to_t(u), u, jnp.ones_like(u))


def log_density(state: jax.Array, sample: ats.TimestepSample, batch: Batch) -> jax.Array:
    return jnp.where(jnp.floor(2 * sample.u) == state % 2, jnp.log(2.0), -jnp.inf)


def update(
    state: jax.Array, sample: ats.TimestepSample, losses: jax.Array, **extra: Any
) -> tuple[jax.Array, Metrics]:
    return state + 1, {"loss": losses.mean()}


def loss_fn(weights: Params, images: Batch, times: jax.Array, rng: jax.Array) -> jax.Array:
    noise = jax.random.normal(rng, images["image"].shape)
    x_t = ats.corrupt(schedule, images["image"], noise, times)
    return jnp.mean((weights["scale"] * x_t - noise) ** 2, axis=(1, 2, 3))


halves = ats.TimestepSampler(init, sample, log_density, update)
learned = ats.adaptive(grid, ats.learning.conv_beta_policy(), optax.adam(1e-3), every=40)
sampler = ats.with_density_of(learned, halves)
state = sampler.init(jax.random.key(0), {"image": jnp.zeros((8, 32, 32, 3))})


@jax.jit
def train_step(
    params: Params, opt_state: optax.OptState, state: State, batch: Batch, key: jax.Array
) -> tuple[Params, optax.OptState, State, Metrics]:
    key_draw, key_loss, key_update = jax.random.split(key, 3)
    draw = sampler.sample(key_draw, state, batch)

    def objective(params: Params) -> tuple[jax.Array, jax.Array]:
        losses = loss_fn(params, batch, draw.t, key_loss)
        return jnp.mean(draw.weight * losses), losses

    grads, losses = jax.grad(objective, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates)
    state, metrics = sampler.update(
        state, draw, losses, key=key_update, batch=batch, loss_fn=loss_fn, params=params,
        new_params=new,
    )
    return new, opt_state, state, metrics
"""

INDEXED = """

class Indexed:
    def __call__(self, params: Params, batch: Batch, t: jax.Array, key: jax.Array) -> jax.Array:
        return t

    def at(
        self, params: Params, batch: Batch, t: jax.Array, key: jax.Array, index: jax.Array
    ) -> jax.Array:
        return t


def of_the_library(loss: ats.ExampleLoss) -> ats.IndexedLossFn:
    return loss


def of_the_user() -> ats.IndexedLossFn:
    return Indexed()
"""

MISTAKES = {
    "ats.unifrom(grid)": "missing-attribute",
    "ats.learning.conv_beta_polcy()": "missing-attribute",
    "sampler.smaple": "missing-attribute",
    "ats.uniform('1000')": "bad-argument-type",
    "ats.adaptive(grid, ats.learning.conv_beta_policy(), optimizer, evry=40)": (
        "unexpected-keyword"
    ),
    "ats.discrete(1000, rounding='ceil')": "bad-argument-type",
    "ats.TimestepSampler(init, sample, log_density, init)": "bad-argument-type",
    "ats.learning.decrease_on_batch(init, 0, 0, 0, grid.to_t(state), state)": "bad-argument-type",
    "indexed: ats.IndexedLossFn = loss_fn": "bad-assignment",
}


def _check(folder: Path, *arguments: str) -> list[dict]:
    """The errors of pyrefly."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-m", "pyrefly", "check", "--output-format", "json", *arguments],
        cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr
    errors = [e for e in json.loads(run.stdout)["errors"] if e["severity"] == "error"]
    assert run.returncode == bool(errors), run.stderr
    return errors


def _told(errors: list[dict]) -> list[str]:
    return [f"{e['path']}:{e['line']}: {e['description']} [{e['name']}]" for e in errors]


def test_the_package_passes():
    assert _told(_check(ROOT, "--python-interpreter-path", sys.executable)) == []


@pytest.fixture
def user(wheel, tmp_path):
    """A folder whose checker is at its strictest, and has the wheel among installed packages."""
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert {"py.typed", "__init__.pyi"} <= {p.name for p in (installed / "adaptive_ts").iterdir()}
    # Without a query of the interpreter a checkout installed for development stays out of sight.
    folders = json.dumps([str(installed), sysconfig.get_path("purelib")])
    (tmp_path / "pyrefly.toml").write_text(
        f'preset = "strict"\nskip-interpreter-query = true\nsite-package-path = {folders}\n'
    )
    return tmp_path


def test_a_users_file_passes_the_strictest_preset(user):
    (user / "train.py").write_text(USERS_FILE + INDEXED)
    assert _told(_check(user, "train.py")) == []


def test_a_users_mistakes_are_told(user):
    (user / "train.py").write_text(USERS_FILE + "\n" + "\n".join(MISTAKES) + "\n")
    first = USERS_FILE.count("\n") + 2
    found = {error["line"] - first: error["name"] for error in _check(user, "train.py")}
    assert found == dict(enumerate(MISTAKES.values()))


def test_the_users_file_runs():
    """Or else what the checker is shown would be no use of the library."""
    names: dict = {}
    exec(compile(USERS_FILE, "train.py", "exec"), names)
    import jax
    import jax.numpy as jnp

    batch, key = {"image": jnp.zeros((8, 32, 32, 3))}, jax.random.key(1)
    params = {"scale": jnp.float32(1.0)}
    opt_state = names["optimizer"].init(params)
    found = jax.eval_shape(names["train_step"], params, opt_state, names["state"], batch, key)
    assert jax.tree.structure(found[2]) == jax.tree.structure(names["state"])
