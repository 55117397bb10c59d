"""The one command: its help without JAX, its subcommands, and where its rows come from."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from small_run import ROOT

import adaptive_ts
import train as script
from adaptive_ts.experiment.commands import run_cli
from adaptive_ts.experiment.config.row_files import built_in_folder, load_rows
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.main import command, train
from adaptive_ts.experiment.main.command import COMMANDS

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow", "torch", "matplotlib", "sklearn")
HELP = rf"""
import sys
from adaptive_ts.experiment.main.command import main
for name in sys.argv[1:]:
    print("\n=====", name)
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert not stop.code
print("\n=====", [name for name in {HEAVY} if name in sys.modules])
"""
ROW = "from adaptive_ts.experiment.config import Config\nROWS = {'NAME': Config(seed=7)}\n"


def test_help_of_every_command_is_there_without_jax(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    *helps, imported = done.stdout.split("\n=====")[1:]
    assert imported.strip() == "[]"
    assert len(helps) == len(COMMANDS)
    for name, text in zip(COMMANDS, helps, strict=True):
        assert text.split()[0] == name and "usage: " in text
        assert f"adaptive-ts {name} " in " ".join(text.split())


def test_every_command_is_a_module_and_every_module_a_command():
    files = {path.stem for path in (ROOT / "adaptive_ts/experiment/main").glob("[!_]*.py")}
    assert files - {"command"} == set(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tarin"], "'tarin' is not a command: did you mean 'train'?"),
        (["--seed", "1"], "'--seed' is not a command: known: decode, encode"),
        (["train", "dgits"], "'dgits' is not a row: did you mean 'digits'?"),
        (["tables", "dgits"], "'dgits' is not a file of rows: did you mean 'digits'?"),
        (["overhead", "--sede", "1"], "--sede: unknown field: did you mean --seed?"),
        (["scaling", "--devices", "0"], "--devices: 0 is out of range"),
        (["generate"], "required: RUN"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaptive-ts"])
    with pytest.raises(UserError) as error:
        command.main(argv)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_help_and_version(capsys, monkeypatch):
    for argv in ([], ["--help"]):
        assert command.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"adaptive-ts {adaptive_ts.__version__}\n"


def test_train_py_is_the_same_command():
    assert script.main is train.main


@pytest.mark.parametrize("argv", [["train"], ["train.py"]])
def test_what_is_not_installed_is_named_with_its_extra(argv, monkeypatch, capsys):
    def needs(name):
        def main(argv):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return main

    monkeypatch.setattr(sys, "argv", ["adaptive-ts", *argv])
    for module, extra in (("tyro", "train"), ("grain.python", "train"), ("torch", "latents")):
        monkeypatch.setattr(train, "main", needs(module))
        with pytest.raises(SystemExit) as stop:
            run_cli(command.main if argv == ["train"] else train.main)
        name = module.partition(".")[0]
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.endswith(f": {name} is not installed: pip install 'adaptive-ts[{extra}]'\n")
    for module in ("adaptive_ts.nothing", "somebody_s"):  # a fault of ours, or the row file's
        monkeypatch.setattr(train, "main", needs(module))
        with pytest.raises(ModuleNotFoundError):
            run_cli(train.main)


def test_rows_of_the_working_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built_in = load_rows()
    assert {"digits", "cifar10"} <= set(built_in) and built_in["digits"].config.seed == 0
    assert built_in == load_rows(built_in_folder())
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.py").write_text(ROW.replace("NAME", "digits"))
    (folder / "theirs.py").write_text("raise RuntimeError('somebody else, who has no ROWS')")
    (folder / "theirs_too.py").write_text("import ml_collections\nROWS = 3")
    (folder / "noted.py").write_text("from adaptive_ts import types\nROWS: int")
    rows = load_rows()
    assert rows["digits"].config.seed == 7 and set(rows) == set(built_in)
    (folder / "more.py").write_text(ROW.replace("NAME", "mine"))
    assert set(load_rows()) == {*built_in, "mine"}
    (folder / "again.py").write_text(ROW.replace("NAME", "mine"))
    with pytest.raises(UserError, match="row 'mine' is also in"):
        load_rows()
    (folder / "again.py").write_text(ROW.replace("NAME", "other").replace(")}", "}"))
    with pytest.raises(UserError, match=r"configs/again\.py does not load: SyntaxError"):
        load_rows()


def test_a_row_in_the_place_of_a_built_in_one_stays_in_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(ROW.replace("NAME", "digits_uniform"))
    rows = load_rows()
    assert rows["digits_uniform"].table == "digits" and rows["digits_uniform"].config.seed == 7
    (tmp_path / "configs" / "digits.py").write_text(ROW.replace("NAME", "digits_other"))
    (tmp_path / "configs" / "mine.py").unlink()
    assert [name for name, row in load_rows().items() if row.table == "digits"] == ["digits_other"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("{3: Config()}", "row 3: use letters"),
        ("{'a': Config(sampler=3)}", "row 'a': sampler is 3: give a SamplerConfig"),
        ("{'a': Config(train=None)}", "row 'a': train is None: give a TrainConfig"),
        ("exit(3)", "does not load: SystemExit: 3"),
    ],
)
def test_a_row_that_is_none_is_named_in_one_line(rows, words, tmp_path):
    source = f"from adaptive_ts.experiment.config import Config\nROWS = {rows}\n"
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=r"mine\.py") as error:
        command.main(["train", "a", "--configs", str(tmp_path)])
    assert words in str(error.value) and "\n" not in str(error.value)


NAMES_IN_THREADS = """
import threading
import adaptive_ts as ats
barrier, found = threading.Barrier(8), []
def use(name):
    barrier.wait()
    found.append(getattr(ats, name))
names = "adaptive beta schedules learning vlb_loss check_sampler discrete weightings".split()
threads = [threading.Thread(target=use, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8
"""


def test_names_may_be_used_first_by_several_threads():
    subprocess.run(
        [sys.executable, "-c", NAMES_IN_THREADS], env={"PYTHONPATH": str(ROOT)}, check=True
    )


def test_this_repository_s_rows_are_the_built_in_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    here, there = load_rows(), load_rows(built_in_folder())
    assert {n: row.config for n, row in here.items()} == {n: r.config for n, r in there.items()}
    assert all(not row.path.is_absolute() for row in here.values())


def test_the_console_script_is_declared():
    (found,) = entry_points(group="console_scripts", name="adaptive-ts")
    assert found.load() is command.run
