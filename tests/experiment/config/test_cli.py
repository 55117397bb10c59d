"""The command line: rows, overrides, and one line for every mistake."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.config import command_line
from adaptive_ts.experiment.config.checks import validate
from adaptive_ts.experiment.config.methods import SAMPLERS
from adaptive_ts.experiment.config.row_files import load_rows
from adaptive_ts.experiment.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
COMPARED = ("uniform", "p2", "min_snr", "log_normal", "clts", "speed", "adaptive")
COMPARED += tuple(f"adaptive_{name}" for name in COMPARED[1:6])
COMPARED += ("adaptive_as_published", "stratified", "beta_1_2", "logit_normal")
COMPARED += ("loss_second_moment", "entropy_rate", "loss_proportional", "impact")
TABLES = ("celebahq256", "cifar10", "digits", "fashion_mnist", "imagenet256")
ROWS = (*TABLES, "overhead", *(f"{table}_{label}" for table in TABLES for label in COMPARED))


@functools.cache
def rows_of_configs():
    return load_rows(CONFIGS)


def parse(line):
    return command_line.parse(line.split(), configs_dir=CONFIGS)


def message(line, capsys):
    with pytest.raises(UserError) as error:
        parse(line)
    out, err = capsys.readouterr()
    assert out == err == "", "the message is run_cli's to print"
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_arguments_is_the_default_row():
    row, config = parse("")
    assert row == "digits"
    assert config.workdir == "runs/digits/adaptive-linear-seed0"
    assert config.sampler.name == "adaptive"


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_valid_and_has_a_header(row):
    rows = rows_of_configs()
    assert validate(rows[row].config) == []
    assert parse(row)[0] == row
    header = rows[row].path.read_text(encoding="utf-8").split('"""')[1]
    for word in ("Reproduces:", "Command:", "Hardware:", "Expected:", "Measured:"):
        assert word in header
    assert f"{row} " in header or f"{rows[row].path.stem}_LABEL " in header


def test_a_uniform_row_differs_in_the_sampler_only():
    rows = load_rows(CONFIGS)
    for row in ("digits", "cifar10"):
        one, other = rows[row].config, rows[f"{row}_uniform"].config
        assert one.sampler.name == "adaptive" and other.sampler.name == "uniform"
        assert (one.data, one.model) == (other.data, other.model)
        assert one.train.batch_size == other.train.batch_size


def test_cifar10_is_the_published_setting():
    _, c = parse("cifar10")
    assert (c.model.channels, c.model.multipliers, c.model.res_blocks) == (128, (1, 2, 2, 2), 2)
    assert c.model.attention == (False, True, False, False)
    assert (c.model.dropout, c.model.variance, c.data.flip) == (0.1, "fixed_large", True)
    assert (c.schedule.name, c.schedule.num_timesteps) == ("quad", 1000)
    assert (c.optimizer.learning_rate, c.optimizer.warmup_steps) == (2e-4, 5000)
    assert (c.optimizer.clip_norm, c.optimizer.ema_decay) == (1.0, 0.9999)
    assert (c.train.batch_size, c.train.steps) == (128, 795_600)
    assert (c.sampler.every, c.sampler.num_selected, c.sampler.history) == (40, 3, 20)


def test_overrides():
    line = "cifar10 --workdir w --seed 3 --train.steps=9 --train.batch-size 4 --data.flip false"
    line += " --model.multipliers 1 2 --model.attention true False --data.image_size None"
    row, c = parse(
        line + " --sampler.name uniform --optimizer.learning_rate 1e-4 --sampler.chunk 5"
    )
    assert (row, c.workdir, c.seed, c.train.steps, c.train.batch_size) == ("cifar10", "w", 3, 9, 4)
    assert (c.data.flip, c.model.multipliers, c.model.attention) == (False, (1, 2), (True, False))
    assert (c.data.image_size, c.sampler.name, c.sampler.chunk) == (None, "uniform", 5)
    assert c.optimizer.learning_rate == 1e-4
    assert c.model.channels == 128, "the rest is the row's"
    assert parse("--workdir=a=b --seed 1 --seed 2")[1].workdir == "a=b"


def test_a_transformer_that_is_told_classes():
    line = "--model.name uvit --model.transformer.depth 2 --model.transformer.num_classes 10"
    c = parse(f"{line} --model.transformer.class_dropout 0.2 --generate.guidance 3")[1]
    own = c.model.transformer
    assert (c.model.name, own.depth, own.num_heads) == ("uvit", 2, 6)
    assert (own.num_classes, own.class_dropout, c.generate.guidance) == (10, 0.2, 3.0)
    assert parse(f"{line} --model.transformer.num_classes None")[1].generate.guidance == 1.0


def test_changed_fields_get_a_folder_of_their_own():
    plain, changed = parse("--train.steps 5")[1], parse("--train.batch_size 5")[1]
    assert plain.workdir == "runs/digits/adaptive-linear-seed0"
    assert changed.workdir.startswith("runs/digits/adaptive-linear-seed0-")


USAGE = "[ROW] [--field.path VALUE ...]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("digts", "'digts' is not a row: did you mean 'digits'? --list shows them"),
        ("zzz", "'zzz' is not a row: --list shows them"),
        ("--trian.steps 5", "--trian.steps: unknown field: did you mean --train.steps?"),
        ("--trian.steps=5", "--trian.steps: unknown field: did you mean --train.steps?"),
        ("--batch-size 5", "--batch_size: unknown field: did you mean --train.batch_size?"),
        ("--batchsize 5", "--batchsize: unknown field: did you mean --train.batch_size?"),
        ("--qqqqq 5", "--qqqqq: unknown field: see --help"),
        ("--model unet", "--model: unknown field: did you mean --model.name?"),
        ("--model.dtype int8", "--model.dtype: expected one of float32, bfloat16; got 'int8'"),
        ("--model.name vit", "--model.name: expected one of unet, dit, uvit; got 'vit'"),
        (
            "--model.name dit --model.transformer.num_classes x",
            "--model.transformer.num_classes: expected an integer, or None; got 'x'",
        ),
        (
            "--num_classes 10",
            "--num_classes: unknown field: did you mean --model.transformer.num_classes?",
        ),
        (
            "--model.transformer.num_classes 10",
            "--model.transformer: its options mean nothing to the unet: leave them out, or add "
            "--model.name dit",
        ),
        (
            "--model.name uvit --model.transformer.depth 3",
            "--model.transformer.depth: 3 is odd: uvit needs an even number",
        ),
        ("--seed x", "--seed: expected an integer; got 'x'"),
        ("--seed 1.5", "--seed: expected an integer; got '1.5'"),
        ("--seed 1 --optimizer.b1 x", "--optimizer.b1: expected a number; got 'x'"),
        ("--data.image_size x", "--data.image_size: expected an integer, or None; got 'x'"),
        ("--data.flip", "--data.flip: expected True or False; got nothing"),
        ("--data.flip=maybe", "--data.flip: expected True or False; got 'maybe'"),
        (
            "--model.multipliers 1,2",
            "--model.multipliers: expected integers, separated by spaces; got '1,2'",
        ),
        ("--seed", "--seed: expected an integer; got nothing"),
        ("--workdir --seed 5", "--workdir: expected text, or None; got nothing"),
        ("digits extra", f"'extra' is not an option: {USAGE}"),
        ("--seed 3 digits", f"'digits' after --seed 3 is not an option: {USAGE}"),
        ("-x", f"'-x' is not an option: {USAGE}"),
        (
            "--sampler.name adaptve --train.steps 0",
            "--sampler.name: 'adaptve' is unknown: did you mean 'adaptive'? known: "
            f"{', '.join(SAMPLERS)}; --train.steps: 0 is out of range: must be at least 1",
        ),
    ],
)
def test_a_mistake_is_one_line(line, expected, capsys):
    assert message(line, capsys) == expected


def test_list(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--list")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(ROWS)
    (line,) = (line for line in lines if line.split()[0] == "digits")
    assert "adaptive sampler" in line and "linear schedule" in line


def test_help_shows_the_rows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("cifar10 --help")
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        out.splitlines()[0]
        == "usage: adaptive-ts train [ROW] [--dry_run] [--configs DIR] [--field.path VALUE ...]"
    )
    text = " ".join(out.replace("│", " ").split())
    assert "those of cifar10" in text
    assert "--train.batch_size INT" in text and "(default: 795600)" in text
    assert "--schedule.name: constant_beta, cosine, linear, quad, " in text
    assert "f_S: probe on every such optimizer step." in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ROWS = {", "does not load: SyntaxError"),
        ("x = 1", "needs a dict ROWS, from names to Configs"),
        ("ROWS = {'a': 3}", "needs a dict ROWS, from names to Configs"),
        (
            "from adaptive_ts.experiment.config.groups import Config\nROWS = {'../a': Config()}",
            "use letters",
        ),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, source, expected):
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(UserError) as error:
        command_line.parse([], configs_dir=tmp_path)
    assert "mine.py" in str(error.value) and expected in str(error.value)


def test_configs_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder of configs"):
        command_line.parse([], configs_dir=tmp_path / "none")
    with pytest.raises(UserError, match="no rows in"):
        command_line.parse([], configs_dir=tmp_path)
    source = "from adaptive_ts.experiment.config.groups import Config\nROWS = {'a': Config()}"
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=r"row 'a' is also in .*one\.py"):
        command_line.parse([], configs_dir=tmp_path)


def run(main, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    return stop.value.code


def test_run_cli(monkeypatch, capsys):
    def fail(error):
        def main(argv):
            raise error

        return main

    assert run(lambda argv: None, monkeypatch) == 0
    assert run(lambda argv: 3, monkeypatch) == 3
    assert run(fail(SystemExit(0)), monkeypatch) == 0
    assert capsys.readouterr() == ("", "")
    assert run(fail(UserError("two\n lines", exit_code=1)), monkeypatch) == 1
    assert capsys.readouterr() == ("", "train.py: two lines\n")
    assert run(fail(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "\ntrain.py: interrupted\n"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: 1 // 0)


SCRIPT = """
import sys
from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.config.command_line import parse
sys.argv[0] = "train.py"
def main(argv):
    for _ in range(int(argv.pop(0))):
        print("x" * 1000)
    parse(argv, configs_dir="configs")
run_cli(main)
"""


def test_as_a_process():
    command = [sys.executable, "-c", SCRIPT]
    wrong = subprocess.run(
        [*command, "0", "--seed", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "train.py: --seed: expected an integer; got 'x'\n"
    reader = subprocess.Popen(
        [*command, "1000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    reader.stdout.close()
    assert reader.stderr.read() == b""
    assert reader.wait() == 141
