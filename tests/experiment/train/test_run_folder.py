"""A run's folder is one run's at a time."""

import shutil
import subprocess
import sys

import pytest
from small_run import arguments, parse, train, tree

from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import locked
from adaptive_ts.experiment.train import loop

HOLDER = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def held_by_another_process(path):
    command = [sys.executable, "-c", HOLDER, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def refusal(folder, run_data):
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as error:
        train(folder, run_data, "--train.steps 6")
    assert str(folder) in str(error.value)
    assert "is being trained in by another process: wait for it, or" in str(error.value)
    return error.value


def test_a_second_run_in_the_same_folder_is_refused(six, run_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(six[0], folder)
    before = tree(folder)
    with held_by_another_process(folder / ".lock") as holder:
        assert holder.stdout.readline() == "held\n"
        assert refusal(folder, run_data).exit_code == 2
        assert tree(folder) == before
        holder.kill()  # what becomes of it does not matter: the system frees the lock
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "This run is complete" in said[-1]
    after = tree(folder)
    assert after.pop("config.json") != before.pop("config.json"), "it names the new folder"
    assert after == before


def test_a_checkpoint_of_another_config_is_refused_whatever_config_json_says(
    three, run_data, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint 3 in .* is of a run of another config \(seed"):
        train(folder, run_data, "--train.steps 6 --seed 1")
    (folder / "config.json").unlink()  # that of the run that was refused
    code, said = train(folder, run_data, "--train.steps 3")
    assert code == 0 and "This run is complete" in said[-1]


def test_a_run_that_is_refused_writes_nothing_into_a_new_folder(run_data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / ".lock", wait=False) as got:
        assert got
        refusal(folder, run_data)
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_the_folder_is_held_until_the_run_ends(six, run_data, tmp_path):
    """Also by the run that finds nothing to do, and by one that fails."""
    folder, found = tmp_path / "run", []
    shutil.copytree(six[0], folder)

    def is_free():
        with locked(folder / ".lock", wait=False) as got:
            return got

    row, config = parse(arguments(folder, run_data, "--train.steps 6"))
    assert loop.run(row, config, log=lambda line: found.append(is_free())) == 0
    assert found == [False] and is_free()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot use"):
        train(folder, run_data, "--train.steps 6")
    assert is_free()
