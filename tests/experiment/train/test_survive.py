"""What goes wrong outside while a run trains: one line says it, and nothing that was saved is lost.

A full or read-only disk under the checkpoints alone is in test_checkpoint.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import shutil
import subprocess

import pytest
import tensorboardX.record_writer
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from saved import small_disk
from small_run import lines, same_run, saved_steps, train, tree

from adaptive_ts.experiment import files, logs
from adaptive_ts.experiment.data import loading
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.train import ending, loop

IN_SHARD = 30


@pytest.fixture(scope="module")
def in_shards(run_data, once):
    """A data_dir with the training digits in 50 files instead of one, and nothing decoded."""

    def make(folder):
        theirs, ours = run_data / "digits" / "1.0.0", folder / "digits" / "1.0.0"
        shutil.copytree(
            theirs, ours, ignore=shutil.ignore_patterns("*.npz", "*train.array_record*")
        )
        (whole,) = theirs.glob("*train.array_record*")
        records = ArrayRecordReader(str(whole)).read_all()
        info = json.loads((ours / "dataset_info.json").read_text())
        count = len(records) // IN_SHARD
        for number in range(count):
            name = f"digits-train.array_record-{number:05d}-of-{count:05d}"
            writer = ArrayRecordWriter(str(ours / name), "group_size:1")
            for record in records[number * IN_SHARD : (number + 1) * IN_SHARD]:
                writer.write(record)
            writer.close()
        for split in info["splits"]:
            if split["name"] == "train":
                split["shardLengths"] = [str(IN_SHARD)] * count
        (ours / "dataset_info.json").write_text(json.dumps(info))

    return once("in_shards", make)


def records_of(step):
    """The positions in the training split of the records of a step."""
    return loading._indices(1500, 0, (step - 1) * 8, 8)


def file_first_read_at(step, folder):
    """A file of records that this step is the first to open, and the first one it reads of it."""
    before = {int(i) // IN_SHARD for s in range(1, step) for i in records_of(s)}
    position = next(int(i) for i in records_of(step) if int(i) // IN_SHARD not in before)
    (path,) = folder.rglob(f"*train.array_record-{position // IN_SHARD:05d}-of-*")
    return path, position


def readable(path, position):
    try:
        return bool(ArrayRecordReader(str(path)).read([position % IN_SHARD]))
    except (RuntimeError, ValueError):
        return False


def damage(path, position):
    """Zeros where they do away with one record."""
    content = path.read_bytes()
    for start in range(0, len(content), 32):
        path.write_bytes(content[:start] + bytes(32) + content[start + 32 :])
        if readable(path, position + 1) and not readable(path, position):
            return
    raise AssertionError("no place to damage it")


@contextlib.contextmanager
def before_the_first_batch(harm):
    """Where a run has opened its data, and read nothing of it but one record."""
    batches = loop.batches

    def harmed(*args, **options):
        harm()
        return batches(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "batches", harmed)
        yield


def failure(folder, data_dir, exit_code=1):
    with pytest.raises(UserError) as error:
        train(folder, data_dir, "--train.steps 6")
    assert error.value.exit_code == exit_code and "\n" not in str(error.value)
    return str(error.value)


def test_records_that_vanish_or_are_damaged_in_the_middle(
    six, in_shards, tmp_path, monkeypatch, capfd
):
    """Of a set too large for memory, at step 4 and at step 5; once they are back it goes on."""
    monkeypatch.setattr(loading, "load", functools.partial(loading.load, ram_limit=0))
    data_dir, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(in_shards, data_dir)
    gone, first = file_first_read_at(4, data_dir)
    with before_the_first_batch(lambda: gone.rename(tmp_path / "elsewhere")):
        said = failure(folder, data_dir)
    assert said.startswith(f"digits: damaged records in {gone}, record {first} of the split (")
    assert "there is no such file any more): put the file back as it was, or remove" in said
    assert saved_steps(folder)[-1] == 3 and [m["step"] for m in lines(folder)] == [1, 2, 3]
    (tmp_path / "elsewhere").rename(gone)

    bad, first = file_first_read_at(5, data_dir)
    content = bad.read_bytes()
    with before_the_first_batch(lambda: damage(bad, first)):
        said = failure(folder, data_dir)
    assert said.startswith(f"digits: damaged records in {bad}, record {first} of the split (")
    assert "put the file back" in said and saved_steps(folder)[-1] == 4
    bad.write_bytes(content)

    code, lines_said = train(folder, data_dir, "--train.steps 6")
    assert code == 0 and "resuming after step 4 of 6" in lines_said[0]
    same_run(folder, six[0])
    assert "Traceback" not in capfd.readouterr().err


def full(step, place):
    """An `open_checkpoints` that fills the disk before it saves this step."""
    open_checkpoints = loop.open_checkpoints

    def opened(*args, **options):
        checkpoints = open_checkpoints(*args, **options)

        def save(number, state, meta):
            if number == step:
                checkpoints.wait()
                with contextlib.suppress(OSError), (place / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(2**12))
                        file.flush()
            return checkpoints.save(number, state, meta)

        return checkpoints._replace(save=save)

    return opened


@pytest.mark.slow
def test_a_disk_that_is_read_only_or_full_at_a_save(
    three, six, run_data, tmp_path, monkeypatch, capfd
):
    with small_disk(tmp_path / "disk", "24m") as disk:
        folder = disk / "run"
        shutil.copytree(three, folder)
        before = tree(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        said = failure(folder, run_data, exit_code=2)
        assert said == f"--workdir: cannot write to {folder}: Read-only file system"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert tree(folder) == before

        with monkeypatch.context() as patch:
            patch.setattr(loop, "open_checkpoints", full(5, disk))
            said = failure(folder, run_data)
        assert "cannot write" in said and "No space left on device" in said
        assert "step 4" in said and saved_steps(folder)[-1] == 4
        said = failure(folder, run_data)  # still full
        assert "No space left on device" in said and saved_steps(folder)[-1] == 4

        (disk / "filler").unlink()
        code, lines_said = train(folder, run_data, "--train.steps 6")
        assert code == 0 and "resuming after step 4 of 6" in lines_said[0]
        same_run(folder, six[0])
    assert "Traceback" not in capfd.readouterr().err


def full_device(path):
    return pathlib.Path("/dev/full").open("wb")


@pytest.mark.slow
def test_logs_that_cannot_be_written(three, six, run_data, tmp_path, monkeypatch, capfd):
    """Each in turn: TensorBoard's, the metrics, p(t), and what is written at the end."""
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    no_space = f"cannot write to {folder}: OSError: [Errno 28] No space left on device; "

    with monkeypatch.context() as patch:
        patch.setattr(tensorboardX.record_writer, "open_file", full_device)
        assert failure(folder, run_data).startswith(f"{no_space}the last good checkpoint is of st")

    for name in ("metrics.jsonl", "timesteps.jsonl"):
        path = folder / name
        content = path.read_bytes()

        @contextlib.contextmanager
        def atomic(target, path=path):
            with files.atomic(target) as file:
                yield file
            if target == path:  # what opens it from here on meets a full disk
                path.unlink()
                path.symlink_to("/dev/full")

        with monkeypatch.context() as patch:
            patch.setattr(logs, "atomic", atomic)
            said = failure(folder, run_data)
        assert said == (
            f"{no_space}the last good checkpoint is of step 3, in {folder / 'checkpoints'}"
        )
        path.unlink()
        path.write_bytes(content)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ending, "write_json", refuse)
        said = failure(folder, run_data)
    assert said == f"{no_space}step 6 is saved: the same command then finishes the run"
    code, lines_said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "resuming after step 6 of 6" in lines_said[0]
    same_run(folder, six[0])
    assert "Traceback" not in capfd.readouterr().err
