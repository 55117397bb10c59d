"""The built wheel with its core dependencies only: an empty environment, another folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from built_wheel import find_uv, run_outside

import adaptive_ts
from adaptive_ts.experiment.main.command import COMMANDS

ROOT = Path(__file__).parent.parent
ROWS = "adaptive_ts/experiment/rows"  # where the wheel has configs/
TRAINING_ONLY = ["tensorflow_datasets", "grain", "matplotlib", "sklearn", "tyro", "tqdm", "PIL"]
# Flax itself brings orbax, so it is there; the core must not import it.
NOT_IMPORTED = [*TRAINING_ONLY, "orbax", "tensorflow", "array_record", "tensorboardX"]

SEVEN_LINES = """
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_ts as ats

images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
batch, key = {"image": jnp.asarray(images)}, jax.random.key(0)
signal = jnp.asarray(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), jnp.float32)
optimizer = optax.adam(1e-2)


def loss_fn(params, batch, t, key):
    x, a = batch["image"], signal[t][:, None, None, None]
    noise = jax.random.normal(key, x.shape)
    noisy = jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise
    predicted = jnp.sqrt(1 - a) * params["scale"] * noisy + params["shift"]
    return jnp.mean((predicted - noise) ** 2, axis=(1, 2, 3))


policy = ats.learning.conv_beta_policy()
sampler = ats.adaptive(ats.discrete(1000), policy, optax.adam(1e-3), every=4)  # 1
sampler_state = sampler.init(key, batch)  # 2


@jax.jit
def train_step(params, opt_state, sampler_state, batch, key):
    k_t, k_loss, k_up = jax.random.split(key, 3)  # 3
    draw = sampler.sample(k_t, sampler_state, batch)  # 4

    def mean_loss(params):
        losses = loss_fn(params, batch, draw.t, k_loss)
        return jnp.mean(draw.weight * losses), losses  # 5

    (loss, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates)
    sampler_state, metrics = sampler.update(
        sampler_state, draw, losses, key=k_up, batch=batch,  # 6
        loss_fn=loss_fn, params=params, new_params=new,  # 7
    )
    return new, opt_state, sampler_state, loss, metrics


params = {"scale": jnp.float32(0.0), "shift": jnp.float32(0.5)}
opt_state, losses, probed = optimizer.init(params), [], []
for step in range(16):
    params, opt_state, sampler_state, loss, metrics = train_step(
        params, opt_state, sampler_state, batch, jax.random.fold_in(key, step)
    )
    losses.append(float(loss))
    probed.append(int(metrics["probed"]))
names = sys.argv[1].split(",")
print(
    json.dumps(
        {
            "file": ats.__file__,
            "versions": [ats.__version__, version("adaptive-ts")],
            "losses": losses,
            "probed": probed,
            "profiles": int(sampler_state.queue.count),
            "reward_mean": float(metrics["reward_mean"]),
            "installed": [name for name in names if find_spec(name)],
            "imported": [name for name in names if name in sys.modules],
        }
    )
)
"""


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and what it asks for, nothing else."""
    folder, uv = tmp_path_factory.mktemp("empty") / "env", find_uv()
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if uv:
        run_outside([*uv, "venv", "--no-project", "--python", sys.executable, folder], wheel.parent)
        run_outside([*uv, "pip", "install", "--python", python, wheel], wheel.parent)
    else:
        run_outside([sys.executable, "-m", "venv", folder], wheel.parent)
        run_outside([python, "-m", "pip", "install", wheel], wheel.parent)
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(archive.read(metadata).decode())
    assert header["Name"] == "adaptive-ts" and header["Version"] == adaptive_ts.__version__
    assert wheel.name.startswith(f"adaptive_ts-{adaptive_ts.__version__}-py3-none-any")
    core = {re.split(r"[<>=!~ \[;]", d)[0] for d in header.get_all("Requires-Dist")
            if "extra ==" not in d}  # fmt: skip
    assert core == {"jax", "flax", "lazy-loader", "optax", "numpy", "scipy"}

    typed = {"adaptive_ts/__init__.pyi", "adaptive_ts/py.typed"}
    assert {"adaptive_ts/__init__.py", "adaptive_ts/types.py", *typed} <= names
    info = metadata.rpartition("/")[0]
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)
    for name in names:
        assert name.startswith(("adaptive_ts/", f"{info}/")), name
        if name.startswith("adaptive_ts/"):
            assert name.endswith(".py") or name in typed, name
            parts = name.split("/")
            assert "tests" not in parts and not parts[-1].startswith("test_"), name
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adaptive_ts").rglob("*.py")}
    rows = {f"{ROWS}/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert here | rows == {name for name in names if name.endswith(".py")}


def test_seven_lines_from_another_folder(python, wheel, tmp_path):
    (tmp_path / "seven_lines.py").write_text(SEVEN_LINES)
    said = run_outside([python, "seven_lines.py", ",".join(NOT_IMPORTED)], tmp_path)
    report = json.loads(said.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(python.parent.parent)  # not this checkout
    assert report["versions"] == [adaptive_ts.__version__] * 2
    assert report["imported"] == []
    assert not set(report["installed"]) & set(TRAINING_ONLY)
    assert report["probed"] == [0, 0, 0, 1] * 4 and report["profiles"] == 4
    assert report["reward_mean"] != 0
    first, last = (sum(losses) / 4 for losses in (report["losses"][:4], report["losses"][-4:]))
    assert last < 0.95 * first


def test_the_console_script_says_what_is_missing(python, tmp_path):
    """Without the extra [train] its help is there, and one line says what to install."""
    script = python.parent / "adaptive-ts"
    assert (
        run_outside([script, "--version"], tmp_path) == f"adaptive-ts {adaptive_ts.__version__}\n"
    )
    assert all(f"\n  {name} " in run_outside([script, "--help"], tmp_path) for name in COMMANDS)
    assert "--num_images" in run_outside([script, "generate", "--help"], tmp_path)
    done = subprocess.run(
        [str(script), "train"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "adaptive-ts train: tyro is not installed: pip install 'adaptive-ts[train]'\n"
    )


def test_the_rows_are_found_from_an_empty_folder(wheel, tmp_path, run_data):
    """With the wheel instead of this checkout, and the packages that the tests run with."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "adaptive_ts.experiment.main", "train"]
    options = ["--data.dir", str(run_data), "--train.steps", "2", "--model.channels", "4"]
    options += ["--sampler.num_buckets", "4", "--schedule.num_timesteps", "50"]
    options += ["--generate.steps", "2", "--generate.num_images", "4", "--train.batch_size", "8"]
    done = subprocess.run(
        [*command, "digits", *options], cwd=tmp_path / "empty", env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "empty").glob("runs/digits/*/summary.json"))
    listed = subprocess.run(
        [*command, "--list"], cwd=tmp_path / "empty", env=env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert {"digits", "cifar10"} <= {line.split()[0] for line in listed.stdout.splitlines()}
