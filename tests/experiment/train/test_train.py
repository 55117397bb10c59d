"""A whole run: the files it leaves, what is compiled, the options together, and bad input."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import (
    ROOT,
    arguments,
    compilations,
    lines,
    main,
    parse,
    saved_steps,
    summary,
    train,
    tree,
)

from adaptive_ts.experiment.assembly import build
from adaptive_ts.experiment.assembly.state import abstract, make_init
from adaptive_ts.experiment.assembly.step import make_step
from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError

FILES = {"config.json", "metrics.jsonl", "timesteps.jsonl", "summary.json"}
FILES |= {"timesteps.png", "losses.png", "curve.png"}


def test_a_run_leaves_the_files_that_the_readme_names(six):
    folder = six[0]
    found = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert found == FILES | {"checkpoints", "samples", "tensorboard"}
    assert saved_steps(folder) == [5, 6]  # --train.max_to_keep 2
    pictures = [*folder.glob("*.png"), *folder.glob("samples/*.png")]
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 16, path


def test_logs_have_each_step_once(six):
    folder = six[0]
    metrics, densities = lines(folder), lines(folder, "timesteps.jsonl")
    assert [line["step"] for line in metrics] == [line["step"] for line in densities]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in metrics)
    assert abs(metrics[0]["loss"] - 1) < 0.2, (
        "a new network predicts zero, of noise with variance 1"
    )
    assert [line["probed"] for line in metrics] == [0, 1, 0, 1, 0, 1]
    for line in densities:  # p(t) T, all 50 timesteps, rounded to 5 digits
        assert len(line["density"]) == 50
        np.testing.assert_allclose(np.mean(line["density"]), 1, atol=1e-3)


def test_tensorboard_holds_the_same_scalars(six):
    folder = six[0]
    from tensorboardX import proto
    from tensorboardX.record_writer import masked_crc32c

    found = {}
    for path in sorted((folder / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = proto.event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    for line in lines(folder):
        for name in ("loss", "grad_norm", "reward_mean", "alpha_mean"):
            np.testing.assert_allclose(found[name, line["step"]], line[name], rtol=1e-6)


def test_summary(six):
    content = summary(six[0])
    assert content["steps"] == 6 and content["seed"] == 0
    assert re.fullmatch("[0-9a-f]{64}", content["state_digest"])
    for name in ("wall_clock_s", "loss", "held_out_loss", "vlb_bits_per_dim"):
        assert math.isfinite(content[name]), name
    assert content["versions"]["jax"] == jax.__version__
    assert content["versions"]["python"] == sys.version.split()[0]
    assert content["loss"] == lines(six[0])[-1]["loss"]  # the mean since the last line, log_every 1


def test_a_finished_run_says_so_and_changes_nothing(six, run_data):
    folder = six[0]
    before = tree(folder)
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "This run is complete: 6 steps, nothing to do" in said[-1]
    assert tree(folder) == before


def test_each_step_variant_is_compiled_once(six):
    names = six[1]
    assert names.count("jit(step)") == 2, "with and without the probe"
    assert names.count("jit(density)") == names.count("jit(init)") == 1
    assert names.count("jit(generate)") == 1


# --- the options together, two steps each, without the loop ---


def two_steps(extra, row="digits", probes=(True, True)):
    _, config = parse(arguments("unused", "unused", extra, row))
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build.build(config, mesh)
    example = {"image": jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)}
    parts = built.parts
    init = make_init(built.init_params, parts.optimizer, parts.sampler, example)
    state = jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
    start = jax.device_get(state.params)
    rng = np.random.default_rng(0)
    losses = []
    steps = {probe: make_step(parts, probe=probe) for probe in set(probes)}
    for probe in probes:
        batch = {"image": rng.integers(0, 256, (8, 8, 8, 1), dtype=np.uint8)}
        batch = sharding.put_batch({**batch, "label": np.zeros(8, np.int32)}, mesh)
        state, metrics = steps[probe](state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and int(state.step) == 2
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32), "bfloat16 is for computing only"
        assert bool(jnp.isfinite(leaf).all())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, jax.device_get(state.params))
    assert any(jax.tree.leaves(moved))
    return losses, built


def test_uniform_bfloat16_dropout_and_v_prediction(run_data):
    extra = "--model.dtype bfloat16 --model.dropout 0.5 --model.prediction v --data.flip True"
    losses, built = two_steps(extra, "digits_uniform", probes=(None, None))
    assert built.probe_every is None
    # An untrained network puts out zero: the loss is that of v, alpha eps - sigma x0.
    assert 0.2 < losses[0] < 2


@pytest.mark.slow
def test_importance_weights_mixture_and_x0_prediction(run_data):
    extra = "--sampler.importance_weighted True --sampler.uniform_prob 0.2 --model.prediction x0"
    losses, built = two_steps(f"{extra} --sampler.objective loss --schedule.name cosine")
    assert built.probe_every == 2
    assert 0.1 < losses[0] < 1  # mean x0^2 of uniform pixels, 1/3, at weights around 1


# --- bad input ---

_PATCH_3 = ("--model.transformer.patch_size", "3")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["digit"], "'digit' is not a row: did you mean 'digits'?"),
        (["--sampler.evry", "3"], "--sampler.evry: unknown field: did you mean --sampler.every?"),
        (["--sampler.name", "adaptve"], "'adaptve' is unknown: did you mean 'adaptive'? known: "),
        (["--schedule.name", "linaer"], "'linaer' is unknown: did you mean 'linear'? known: "),
        (["--data.name", "digit"], "did you mean 'digits'? known: cifar10, digits"),
        (["--train.batch_size", "12"], "12 is not divisible by the 8 devices: use 8 or 16"),
        (["--train.batch_size", "4"], "4 is not divisible by the 8 devices: use 8"),
        (["--train.steps", "0"], "--train.steps: 0 is out of range: must be at least 1"),
        (["--sampler.every", "0"], "--sampler.every: 0 is out of range"),
        (["--sampler.history", "2"], "--sampler.history: 2 is out of range: must be at least 3"),
        (["--schedule.num_timesteps", "1"], "--schedule.num_timesteps: 1 is out of range"),
        (["--sampler.num_selected", "101"], "--sampler.num_selected: 101 is out of range"),
        (["--data.image_size", "9"], "sides divisible by 2 (2 levels), got shape (1, 9, 9, 1); th"),
        (
            ["--model.name", "dit", *_PATCH_3],
            "divisible by patch_size=3, got shape (1, 8, 8, 1); t",
        ),
        (["--model.name", "uvit", *_PATCH_3], "the images are 8x8x1: choose another --d"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(argv, words, tmp_path, monkeypatch, run_data):
    monkeypatch.setenv("TFDS_DATA_DIR", str(run_data))
    with pytest.raises(UserError) as error:
        main([*argv, "--workdir", str(tmp_path / "run")])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--train.batch_size", "60"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}  # 8 devices inherited
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "train.py: --train.batch_size: 60 is not divisible by the 8 devices: use 56 or 64\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_config_is_left_alone(six, run_data):
    folder = six[0]
    before = tree(folder)
    with pytest.raises(UserError) as error:
        train(folder, run_data, "--train.steps 9 --seed 3 --schedule.name quad")
    message = str(error.value)
    assert "seed: 0 there, 3 here" in message
    assert "schedule.name: 'linear' there, 'quad' here" in message
    assert "train.steps" not in message, "a run may be made longer"
    assert error.value.exit_code == 2 and tree(folder) == before


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_in_the_place_of_the_workdir(below, tmp_path, run_data):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"--workdir: cannot use .*: Not a directory") as error:
        train(f"{path}{below}", run_data)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert path.read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, run_data):
    extra = "--optimizer.learning_rate 1e30 --optimizer.warmup_steps 0 --train.steps 20"
    with compilations() as names, pytest.raises(UserError) as error:
        train(tmp_path / "run", run_data, extra, "digits_uniform")
    assert names.count("jit(step)") == 1, "uniform sampling has one variant"
    message = str(error.value)
    assert error.value.exit_code == 1 and "\n" not in message
    assert message.endswith("or --train.max_skipped, to go on past a few such steps")
    bad, good = (int(x) for x in re.search(r"at step (\d+): .* is of step (\d+)", message).groups())
    assert good == bad - 1
    assert saved_steps(tmp_path / "run")[-1] == good
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, bad))
    # The last good one is whole.
    _, config = parse(arguments(tmp_path / "run", run_data, extra, "digits_uniform"))
    mesh = sharding.make_mesh()
    built = build.build(config, mesh)
    example = {"image": jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)}
    init = make_init(built.init_params, built.parts.optimizer, built.parts.sampler, example)
    checkpoints, said = open_checkpoints(tmp_path / "run" / "checkpoints"), []
    found = checkpoints.restore_latest(abstract(init, jax.random.key(0), mesh), said.append)
    checkpoints.close()
    assert found[0] == good == int(found[1].step) and not said
