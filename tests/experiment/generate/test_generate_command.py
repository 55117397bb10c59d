"""The command that makes images of a run: what it leaves, what does not matter, and bad input."""

import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditional_run import conditional_config, conditional_run
from PIL import Image
from small_run import ROOT, tree

from adaptive_ts.experiment.assembly import build
from adaptive_ts.experiment.assembly.state import final_keys
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.generate import making
from adaptive_ts.experiment.generate.trained import Trained
from adaptive_ts.experiment.generate.writing import write_images
from adaptive_ts.experiment.main import generate
from adaptive_ts.experiment.pictures import to_uint8


@pytest.fixture(scope="module")
def shared(run_data, once):
    return conditional_run(run_data, once)


@pytest.fixture
def run(shared, tmp_path):
    """A copy of the run, elsewhere."""
    return shutil.copytree(shared, tmp_path / "copy")


def made(folder):
    with np.load(folder / "images.npz") as file:
        return file["images"]


def info(folder):
    return json.loads((folder / "info.json").read_text())


def test_without_options_the_run_s_own_images_come_out_again(run, run_data, capsys):
    before = tree(run)
    assert generate.main([str(run)]) == 0
    out = run / "generated" / "step_00000005-ddim-3-seed0"
    assert capsys.readouterr().out == f"24 images of {run} at step 5: {out}\n"
    grid = (run / "samples" / "step_00000005.png").read_bytes()
    assert (out / "grid.png").read_bytes() == grid
    names = {f"{number:06d}.png" for number in range(24)}
    assert {p.name for p in out.iterdir()} == names | {"images.npz", "grid.png", "info.json"}
    pixels = made(out)
    assert pixels.shape == (24, 8, 8, 1) and pixels.dtype == np.uint8
    for number in range(24):
        with Image.open(out / f"{number:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels[number, ..., 0])
    said = info(out)
    assert said["run"] == str(run) and said["weights"] == "ema" and said["image_shape"] == [8, 8, 1]
    names = ("step", "solver", "steps", "eta", "seed", "num_images", "spacing")
    assert [said[name] for name in names] == [5, "ddim", 3, 0.0, 0, 24, "linear"]
    after = {k: v for k, v in tree(run).items() if not k.startswith("generated/")}
    assert after == before, "the run itself is left alone"


def test_options_and_an_earlier_step(run, run_data, tmp_path):
    line = "--solver heun --steps 4 --spacing quadratic --seed 3 --num_images 10 --batch_size 3"
    for step in (4, 5):
        out = tmp_path / str(step)
        argv = [str(run), *line.split(), "--step", str(step), "--out", str(out), "--no_png"]
        assert generate.main(argv) == 0
        assert {p.name for p in out.iterdir()} == {"images.npz", "grid.png", "info.json"}
        assert made(out).shape == (10, 8, 8, 1)
        said = info(out)
        names = ("step", "solver", "steps", "eta", "seed", "num_images", "spacing")
        assert [said[name] for name in names] == [step, "heun", 4, None, 3, 10, "quadratic"]
    assert (made(tmp_path / "4") != made(tmp_path / "5")).any()


def test_a_damaged_checkpoint_is_passed_over_and_named(run, run_data, tmp_path, capsys):
    meta = run / "checkpoints" / "5" / "meta" / "metadata"  # with the checksums of the rest
    assert '"step": 5' in meta.read_text()
    meta.write_text(meta.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(UserError) as error:
        generate.main([str(run), "--step", "5", "--out", str(tmp_path / "five")])
    text = str(error.value)
    assert f"no usable checkpoint in {run}" in text and "\n" not in text and "workdir" not in text
    assert generate.main([str(run), "--out", str(tmp_path / "newest"), "--no_png"]) == 0
    assert "checkpoint 5 is damaged" in capsys.readouterr().out
    assert info(tmp_path / "newest")["step"] == 4


def test_an_image_is_the_same_in_any_batch_on_any_number_of_devices(run_data):
    """In uint8 all equal here; where a rounding falls on an edge, one level apart."""
    options = {"generate__steps": 8, "generate__solver": "ddpm", "generate__num_images": 20}
    config = conditional_config(run_data, **options, generate__guidance=2.0)
    meshes = {n: sharding.make_mesh(jax.devices()[:n]) for n in (1, 8)}
    built = build.build(config, meshes[1])
    shapes = jax.eval_shape(built.init_params, jax.random.key(0), {"image": np.zeros((1, 8, 8, 1))})
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * draw.standard_normal(x.shape, np.float32), shapes)

    def make(devices, batch_size):
        batches = making.image_batches(
            config, built, (8, 8, 1), meshes[devices], batch_size=batch_size, labels=(3, 7, 1)
        )
        parts = list(batches(params, final_keys(0)[1]))
        assert all(len(part) == len(parts[0]) for part in parts[:-1]), "only the last is shorter"
        return to_uint8(np.concatenate(parts)).astype(int)

    whole = make(8, 16)
    assert whole.shape == (20, 8, 8, 1) and len(np.unique(whole)) > 50
    for devices, batch_size in ((1, 3), (8, 3)):
        other = make(devices, batch_size)
        print(devices, batch_size, np.abs(other - whole).max(), np.mean(other != whole))
        assert np.abs(other - whole).max() <= 1 and np.mean(other != whole) < 0.002


def test_pixels():
    values = np.array([-1.5, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0], np.float32)
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 128, 191, 255, 255])


def test_images_of_a_model_without_classes_have_no_labels(run_data, tmp_path):
    """And of guidance nothing is said."""
    options = {"model__transformer__num_classes": None, "model__transformer__class_dropout": 0.1}
    config = conditional_config(run_data, generate__num_images=3, **options)
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build.build(config, mesh)
    params = jax.jit(built.init_params)(jax.random.key(0), {"image": jnp.zeros((1, 8, 8, 1))})
    state = types.SimpleNamespace(ema=params)
    trained = Trained(built=built, state=state, step=0, shape=(8, 8, 1))
    args = generate.make_parser().parse_args(["elsewhere"])
    said = making.describe(config, trained, args)
    assert said["guidance"] is None and said["labels"] is None
    batches = making.make_images(config, trained, mesh, args)
    write_images(tmp_path, batches, said, png=False)
    with np.load(tmp_path / "images.npz") as file:
        assert file.files == ["images"] and file["images"].shape == (3, 8, 8, 1)


def test_images_that_are_not_finite_are_not_written(run, tmp_path, monkeypatch):
    batches = [np.zeros((2, 8, 8, 1)), np.full((2, 8, 8, 1), np.nan)]
    monkeypatch.setattr(making, "image_batches", lambda *args, **kwargs: lambda *_: iter(batches))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not finite numbers, the first among 2 to 3") as error:
        generate.main([str(run), "--out", str(out), "--no_png"])
    assert error.value.exit_code == 1 and not list(out.iterdir())


@pytest.mark.parametrize("latents", [False, True])
def test_images_are_pixels_or_latents(latents, monkeypatch):
    made = np.random.default_rng(0).uniform(-2, 2, (2, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(making, "image_batches", lambda *args, **kwargs: lambda *_: iter([made]))
    state = types.SimpleNamespace(ema=None)
    trained = types.SimpleNamespace(built=None, shape=made.shape[1:], state=state, latents=latents)
    args = types.SimpleNamespace(batch_size=2, spacing="linear", labels=None)
    given = next(making.make_images(Config(), trained, None, args))
    np.testing.assert_array_equal(given, made if latents else to_uint8(made))
    assert given.dtype == (np.float32 if latents else np.uint8)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--step", "7"], "has no checkpoint of step 7: it has 4, 5"),
        (["--steps", "51"], "--steps: 51 is out of range: must be in 1..50"),
        (["--steps", "1", "--spacing", "quadratic"], "steps must be from 2 to 50, got 1"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--solver", "hune"], "--solver: expected one of ddpm, ddim, dpmpp_2m, heun; got 'hune'"),
        (["--solver", "heun", "--eta", "0.5"], "--eta: 0.5 means nothing to heun"),
        (["--eta", "1.5"], "--eta: 1.5 is out of range: must be in [0, 1]"),
        (["--spacing", "log"], "invalid choice: 'log'"),
        (["--num_images", "0"], "--num_images: 0 is out of range: must be at least 1"),
        (["--batch_size", "0"], "--batch_size: 0 is out of range: must be at least 1"),
        (["--seed", "-1"], "--seed: -1 is out of range: must be in 0..4294967295"),
        (["--guidance", "-1"], "--guidance: -1.0 is out of range: must be at least 0 and finite"),
        (["--guidance", "x"], "argument --guidance: invalid float value: 'x'"),
        (["--labels", "3", "10"], "--labels: 10 is out of range: must be in 0..9"),
        (["--labels", "-1"], "--labels: -1 is out of range: must be in 0..9"),
        (["--labels"], "argument --labels: expected at least one argument"),
        (["--gidance", "2"], "unrecognized arguments: --gidance 2"),
        (["--out", str(ROOT / "tests")], "tests is not empty: give a new folder"),
        (["--out", __file__], "--out: cannot use"),
        (["--out", f"{__file__}/below"], "--out: cannot use"),
    ],
)
def test_mistakes_cost_one_line(shared, argv, words):
    before = tree(shared)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        generate.main([str(shared), *argv])
    assert words in str(error.value) and error.value.exit_code == 2
    assert tree(shared) == before


def test_a_folder_that_is_no_run(tmp_path):
    def message(*argv):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            generate.main([str(tmp_path), *argv])
        assert error.value.exit_code == 2
        return str(error.value)

    assert "the following arguments are required: RUN" in _failure([])
    assert f"no run at {tmp_path / 'none'}" in _failure([str(tmp_path / "none")])
    assert "holds no config.json of a run" in message()
    for content, words in (
        ("[1]", "holds no config.json of a run"),
        ("{", "config.json is damaged"),
        ('{"trian": 1}', "not a config of this version: trian: unknown field"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert words in message()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    assert f"{tmp_path} has no checkpoint" in message()


def _failure(argv):
    with pytest.raises(UserError) as error:
        generate.main(argv)
    return str(error.value)


@pytest.mark.slow  # test_train has it too, and the messages are tested in this process
def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "adaptive_ts.experiment.main", "generate"]
    command.append(str(tmp_path / "none"))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    where = tmp_path / "none"
    assert done.stderr == (
        f"adaptive-ts generate: no run at {where}: give the folder of a run (its --workdir)\n"
    )
