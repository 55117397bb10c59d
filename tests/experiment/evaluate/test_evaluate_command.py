"""The command that measures a run: its numbers, its files, what is refused; Inception is a stub."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from classified import classified_digits
from PIL import Image
from small_run import ROOT, lines, summary, tree

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.evaluate import inputs, pictures, report
from adaptive_ts.experiment.evaluate import measure as evaluation
from adaptive_ts.experiment.generate import making, trained
from adaptive_ts.experiment.generate.trained import read_config
from adaptive_ts.experiment.main import evaluate, generate
from adaptive_ts.experiment.quality import metrics, scores
from adaptive_ts.experiment.quality.inception import WEIGHTS_URL, Activations
from adaptive_ts.experiment.quality.reference import FeatureNetwork, reference_features

PICTURES = {"vlb_by_timestep.png", "loss_by_timestep.png"}
DIAGNOSTICS = {"gradient_noise.png", "step_effects.png", "timesteps.png"}


@pytest.fixture
def data_dir(run_data, once):
    return classified_digits(run_data, once)


@pytest.fixture
def run(six, tmp_path):
    """A copy of the run of six steps, elsewhere."""
    return shutil.copytree(six[0], tmp_path / "copy")


@pytest.fixture
def measure(run, data_dir, capsys):
    """measure(*options) -> (what it printed, evaluation.json, the folder)."""

    def call(*options):
        assert evaluate.main([str(run), "--data_dir", str(data_dir), *options]) == 0
        said = capsys.readouterr().out
        if "--out" in options:
            folder = options[options.index("--out") + 1]
        else:
            (folder,) = (run / "evaluation").iterdir()
        return said, json.loads((run / folder / "evaluation.json").read_text()), run / folder

    return call


@pytest.fixture
def stub(monkeypatch):
    """In place of Inception: three features."""

    def extract(images):
        x = images.reshape(len(images), -1).astype(np.float32) / 255
        features = np.stack([x.mean(1), x.std(1), x[:, 20]], 1)
        return Activations(features, 5 * features)

    asked = []

    def make(weights, *, preprocess, mesh):
        asked.append((weights, preprocess))
        return FeatureNetwork("inception", f"a stub, {preprocess}", "stub", 3, extract)

    monkeypatch.setattr(inputs, "NUM_FEATURES", 3)
    monkeypatch.setattr(inputs, "inception_network", make)
    return asked


def refusal(run, *argv):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        evaluate.main([str(run), *map(str, argv)])
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_numbers_of_a_run_and_its_files(run, data_dir, measure, capsys):
    before = tree(run)
    said, found, out = measure("--num_images", "40")
    after = {k: v for k, v in tree(run).items() if not k.startswith("evaluation/")}
    assert after == before, "the run itself is left alone"
    assert {p.name for p in out.iterdir()} == PICTURES | {"evaluation.json", "evaluation.npz"}
    assert out.name.startswith("step_00000006-ddim-3-classifier-")

    data = DataConfig(dir=str(data_dir))
    assert generate.main([str(run), "--num_images", "40", "--out", str(run / "made")]) == 0
    made = np.load(run / "made" / "images.npz")["images"]
    network = scores.classifier_network(data)
    reference = reference_features(data, network, log=lambda line: None)
    expected = scores.image_quality([made], network, reference)
    assert found["quality"] == expected
    x = metrics.gaussian(network.extract(made).features)
    distance = metrics.frechet_distance(x, reference.gaussian)
    assert found["quality"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)

    likelihood, own = found["likelihood"], summary(run)
    assert likelihood["total_vlb"] == pytest.approx(own["vlb_bits_per_dim"], rel=1e-6)
    assert likelihood["total_loss"] == pytest.approx(own["held_out_loss"], rel=1e-6)
    arrays = np.load(out / "evaluation.npz")
    for name in ("vlb", "vlb_error", "loss", "timesteps"):
        np.testing.assert_array_equal(arrays[name], likelihood[name])
    assert arrays["timesteps_stood_for"].sum() == 50
    terms = arrays["timesteps_stood_for"] @ arrays["vlb"]
    assert 0 < likelihood["total_vlb"] - terms < 0.1, "the prior"

    told = said.strip().split("\n")
    block = told[next(i for i, line in enumerate(told) if line.startswith(str(run))) :]
    assert block[0] == f"{run} at step 6, EMA weights (decay 0.995), digits, linear schedule"
    assert block[1].startswith("images: n=40, solver ddim, steps 3, eta 0")
    assert network.about in block[2] and "or --features inception" in block[2]
    assert reference.digest in block[3] and "digits/train, 1,500 images (8, 8, 1)" in block[3]
    assert [line.split("  ")[1] for line in block if line.startswith("  ")] == [
        *("Frechet distance", "KID", "precision", "recall", "VLB, bits/dim", "MSE of eps"),
    ]
    vlb = f"{likelihood['total_vlb']:.5g} ± {likelihood['total_vlb_error']:.2g} "
    assert any(vlb in line and "n=256 held-out images, 95%" in line for line in block)
    conditions = found["conditions"]
    assert (conditions["step"], conditions["weights"], conditions["sampler"]) == (
        6,
        "ema",
        "adaptive",
    )
    assert len(conditions["config_fingerprint"]) == 16 and found["versions"]["jax"]
    assert conditions["data_fingerprint"] == own["data_fingerprint"]

    capsys.readouterr()
    again, _, _ = measure("--num_images", "40")
    assert again.split("\n")[0].startswith(f"{out} has these numbers already")
    assert again.strip().split("\n")[1:] == block
    assert len(list((run / "evaluation").iterdir())) == 1


def test_diagnostics_and_an_earlier_step(run, measure, monkeypatch):
    monkeypatch.setattr(evaluation, "EXAMPLES", 8)
    monkeypatch.setattr(evaluation, "_STRATA", 4)
    drawn = {}
    for name in ("plot_vlb", "plot_loss", "plot_gradient_noise", "plot_step_effects"):
        plot = getattr(pictures, name)

        def draw(path, *arrays, title, plot=plot):
            drawn[path.stem] = arrays
            plot(path, *arrays, title=title)

        monkeypatch.setattr(pictures, name, draw)
    said, found, out = measure("--diagnostics", "--step", "5", "--num_likelihood", "16")
    names = PICTURES | DIAGNOSTICS | {"evaluation.json", "evaluation.npz"}
    assert {p.name for p in out.iterdir()} == names and found["files"] == sorted(names)
    assert "at step 5" in said and "n=16 held-out" in said
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 400 and len(set(image.convert("L").tobytes())) > 20

    arrays = np.load(out / "evaluation.npz")
    t = arrays["diagnostic_timesteps"]
    assert t[0] == 0 and t[-1] == 49 and (np.diff(t) > 0).all()
    effects = arrays["step_effects"]
    assert effects.shape == (len(t), len(t)) and np.isfinite(effects).all()
    assert len(set(effects.ravel())) > len(t)
    assert (arrays["gradient_variance"] > 0).all() and arrays["gradient_variance"].shape == t.shape
    rows = lines(run, "timesteps.jsonl")
    np.testing.assert_array_equal(arrays["density"], [row["density"] for row in rows])
    assert arrays["density_timesteps"].shape == arrays["density"].shape[1:]
    for name, keys in (
        ("vlb_by_timestep", ("timesteps", "timesteps_stood_for", "vlb", "vlb_error")),
        ("loss_by_timestep", ("timesteps", "loss")),
        (
            "gradient_noise",
            ("diagnostic_timesteps", "gradient_variance", "gradient_mean_square"),
        ),
        ("step_effects", ("diagnostic_timesteps", "step_effects")),
    ):
        for shown, key in zip(drawn[name], keys, strict=True):
            np.testing.assert_array_equal(shown, arrays[key])


def test_with_inception_s_features(run, data_dir, measure, stub):
    options = ("--features", "inception", "--inception_weights", "file", "--preprocess", "tf")
    options += ("--num_likelihood", "8", "--split", "test")
    said, found, _ = measure(*options, "--solver", "ddpm", "--steps", "5")
    assert stub == [("file", "tf")]
    assert "  FID " in said and "  Inception Score " in said and "a stub, tf\n" in said
    assert "digits/test, 297 images" in said and "solver ddpm, steps 5" in said
    assert found["quality"]["inception_score"] >= 1 and found["quality"]["accuracy"] is None
    next(data_dir.rglob("features-stub-test-*.npz")).unlink()


def test_a_file_of_statistics_and_a_file_of_images(run, data_dir, measure, stub, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    np.savez(tmp_path / "statistics.npz", mu=np.full(3, 30.0), sigma=np.eye(3))
    options = ["--images", str(tmp_path / "images.npz"), "--num_likelihood", "8"]
    files = [
        *options,
        "--out",
        str(tmp_path / "out"),
        "--reference",
        str(tmp_path / "statistics.npz"),
    ]
    said, found, _ = measure(*files)  # of colour: Inception
    assert stub == [(None, "ref")] and "or --features classifier" in said
    assert f"n=30 of {tmp_path / 'images.npz'}" in said and "unknown: no info.json" in said
    assert f"reference: {tmp_path / 'statistics.npz'}" in said
    assert "no KID, precision or recall" in said and found["quality"]["kid"] is None
    assert found["quality"]["frechet_distance"] > 2500, "of three means about 0.5"
    assert "is not empty" in refusal(run, "--data_dir", data_dir, *files)

    said = refusal(run, "--data_dir", data_dir, *options[:2])
    assert "holds images (20, 20, 3), digits images (8, 8, 1): give" in said
    assert "mu has shape (3,)" in refusal(
        run, "--data_dir", data_dir, "--reference", tmp_path / "statistics.npz"
    ), "a classifier has 32"


def test_images_that_generate_made(run, data_dir, measure, tmp_path):
    made = tmp_path / "made"
    options = ("--num_images", "40", "--seed", "3", "--no_png", "--data_dir", str(data_dir))
    assert generate.main([str(run), *options, "--out", str(made)]) == 0
    said, found, out = measure("--images", str(made / "images.npz"), "--num_likelihood", "8")
    assert "n=40 of" in said and "(solver ddim, steps 3, " in said and "step 6)" in said
    assert found["conditions"]["images"]["seed"] == 3 and "-images-classifier-" in out.name
    network = scores.classifier_network(DataConfig(dir=str(data_dir)))
    images = np.load(made / "images.npz")["images"]
    reference = reference_features(DataConfig(dir=str(data_dir)), network)
    assert found["quality"] == scores.image_quality([images], network, reference)


def test_without_weights_one_line_and_code_2(six, data_dir, monkeypatch):
    monkeypatch.delenv(scores.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(trained, "load_trained", None)  # before anything slow
    before = tree(six[0])
    options = ("--features", "inception", "--data_dir", data_dir)
    assert WEIGHTS_URL in refusal(six[0], *options)
    assert "begins with" in refusal(six[0], *options, "--inception_weights", __file__)
    monkeypatch.setenv(scores.WEIGHTS_VARIABLE, __file__)
    assert "is not the Inception file expected" in refusal(six[0], *options)
    assert tree(six[0]) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_images", "3"], "--num_images: 3 is out of range: must be at least 4"),
        (["--num_likelihood", "1"], "--num_likelihood: 1 is out of range: must be at least 2"),
        (["--features", "clip"], "invalid choice: 'clip'"),
        (["--preprocess", "tf"], "--preprocess: means nothing to a classifier: add --features"),
        (["--inception_weights", "x"], "--inception_weights: means nothing to a classifier"),
        (["--images", "x", "--solver", "heun"], "--solver: means nothing with --images"),
        (["--guidance", "2"], "--guidance: 2.0 "),
        (["--images", "x", "--num_images", "9"], "--num_images: means nothing with --images"),
        (["--images", "none.npz"], "--images: no file none.npz: give an images.npz"),
        (["--images", __file__], "is no .npz file with images"),
        (["--reference", "x", "--split", "test"], "--split: means nothing with --reference"),
        (["--reference", "none.npz"], "no reference statistics at none.npz"),
        (["--split", "valid"], "digits has no split 'valid'"),
        (["--step", "7"], "has no checkpoint of step 7"),
        (["--out", str(ROOT / "tests")], "tests is not empty: give a new folder"),
        (["--out", __file__], "--out: cannot use"),
    ],
)
def test_mistakes_cost_one_line(six, data_dir, argv, words):
    before = tree(six[0])
    assert words in refusal(six[0], "--data_dir", data_dir, *argv)
    assert tree(six[0]) == before


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((5, 8, 8, 1), np.uint8)}, "is no .npz file with images"),
        ({"images": np.zeros((5, 8, 8, 1))}, "images must be uint8"),
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, "holds 3: 4 or more are needed"),
        ({"images": np.zeros((5, 8, 8, 4), np.uint8)}, "C = 1 or 3"),
        ({"images": np.array([{}])}, "is no .npz file with images"),
    ],
)
def test_files_that_hold_no_images(six, data_dir, tmp_path, arrays, words):
    np.savez(tmp_path / "images.npz", **arrays)
    assert words in refusal(six[0], "--data_dir", data_dir, "--images", tmp_path / "images.npz")


def test_latents_are_for_a_classifier_alone(six, data_dir, stub, monkeypatch, tmp_path):
    def latents(config, split, log):
        dataset = load_split(config, split, log)
        return dataset._replace(images=np.zeros((9, 4, 4, 3), np.float32))

    monkeypatch.setattr(inputs, "load_split", latents)
    monkeypatch.setattr(trained, "load_trained", None)
    np.savez(tmp_path / "images.npz", images=np.zeros((9, 4, 4, 3), np.uint8))
    options = ("--data_dir", data_dir)
    said = refusal(six[0], *options, "--features", "inception")
    assert "digits holds latents (4, 4, 3): decode images, and give them by --images" in said
    said = refusal(six[0], *options, "--images", tmp_path / "images.npz")
    assert "holds images (4, 4, 3), digits latents (4, 4, 3): give --features inception" in said
    args = evaluate.make_parser().parse_args([str(six[0])])
    found = inputs.read_inputs(args, read_config(six[0]), None, print)
    assert found.kind == "classifier", "three channels of latents are no colours"


def test_images_that_are_not_finite_have_no_numbers(run, data_dir, monkeypatch):
    batches = [np.zeros((4, 8, 8, 1)), np.full((4, 8, 8, 1), np.nan)]
    monkeypatch.setattr(making, "image_batches", lambda *args, **kwargs: lambda *_: iter(batches))
    with pytest.raises(UserError, match="not finite numbers, the first among 4 to 7") as error:
        evaluate.main([str(run), "--data_dir", str(data_dir)])
    assert error.value.exit_code == 1 and not (run / "evaluation").exists()


def test_what_is_told_of_numbers_and_images():
    assert report._interval(None, None) == "not finite"
    assert report._interval(2.0, 0.125) == "2 ± 0.12"
    images = {"num_images": 1000, "solver": "ddim", "eta": 0.0, "guidance": 1.5, "variance": None}
    said = "n=1,000, solver ddim, eta 0, guidance 1.5, labels "
    assert report._images({**images, "labels": [7, 1]}) == said + "7 1"
    many = report._images({**images, "labels": list(range(1000))})
    assert many == said + "0 .. 999 (1,000 in turn)"


@pytest.mark.slow  # test_train has it too, and the messages are tested in this process
def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "adaptive_ts.experiment.main",
        "evaluate",
        str(tmp_path / "none"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    said = f"adaptive-ts evaluate: no run at {tmp_path / 'none'}: give the folder of a run"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
