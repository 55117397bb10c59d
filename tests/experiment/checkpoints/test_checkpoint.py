"""Checkpoints: bit-exact round trips, and every kind of damage found and stepped back from."""

import contextlib
import errno
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved import abstract, make_state, restore, save, small_disk

from adaptive_ts.experiment.checkpoints.checksums import state_digest
from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
from adaptive_ts.experiment.errors import UserError


def data_file(folder, step):
    files = [p for p in pathlib.Path(folder, str(step), "state").rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints 1 and 2, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, (1, 2))
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_round_trip_is_bit_exact(tmp_path):
    state, meta = make_state(3), {"config": {"a": [1, 2.5, None]}, 7: "seven"}
    checkpoints = open_checkpoints(tmp_path / "a")
    assert checkpoints.restore_latest(abstract(state)) is None
    assert checkpoints.latest_step() is None
    assert checkpoints.save(3, state, meta)
    assert not checkpoints.save(3, state, meta)
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    step, restored, restored_meta = checkpoints.restore_latest(abstract(state))
    checkpoints.close()
    assert (step, restored_meta) == (3, {"config": {"a": [1, 2.5, None]}, "7": "seven"})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    assert state_digest(restored) == state_digest(state)


def test_restore_on_other_devices(tmp_path, mesh8):
    rows, everywhere = NamedSharding(mesh8, P("data")), NamedSharding(mesh8, P())
    state = make_state(1)
    where = jax.tree.map(lambda x: rows if x.shape and x.shape[0] % 8 == 0 else everywhere, state)
    sharded = jax.device_put(state, where)
    checkpoints = open_checkpoints(tmp_path / "a")
    checkpoints.save(1, sharded, {})
    checkpoints.wait()
    shapes = abstract(state)
    for target in (
        shapes,
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
        ),
    ):
        _, restored, _ = checkpoints.restore_latest(target)
        assert state_digest(restored) == state_digest(state)
    assert restored["params"]["w"].sharding == rows
    checkpoints.close()


def test_donated_state_is_saved_as_it_was(tmp_path):
    state = {"w": jnp.full((512, 512), 3.0)}
    overwrite = jax.jit(lambda s: {"w": s["w"] * 0 - 1}, donate_argnums=0)
    checkpoints = open_checkpoints(tmp_path / "a")
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = overwrite(state)
    checkpoints.wait()
    _, restored, _ = checkpoints.restore_latest(abstract(state))
    assert (np.asarray(restored["w"]) == 3).all()
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path / "a", (1, 2, 3, 4, 5))
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.is_dir()) == ["3", "4", "5"]


@pytest.mark.parametrize("trial", range(6))
def test_a_flipped_bit_is_found(folder, trial):
    rng = random.Random(trial)
    file = data_file(folder, 2)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    log = []
    step, state, meta = restore(folder, log.append)
    assert (step, meta) == (1, {"seed": 1})
    assert state_digest(state) == state_digest(make_state(1))
    assert len(log) == 1 and "checkpoint 2 is damaged" in log[0] and "\n" not in log[0], log


def truncate(step_folder):
    file = data_file(step_folder.parent, 2)
    os.truncate(file, file.stat().st_size // 2)


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def edit_meta(step_folder):
    file = next(p for p in (step_folder / "meta").iterdir() if '"seed"' in p.read_text())
    file.write_text(file.read_text().replace('"seed": 2', '"seed": 3'))


DAMAGE = {
    "truncated": truncate,
    "data file removed": lambda d: data_file(d.parent, 2).unlink(),
    "no state": lambda d: shutil.rmtree(d / "state"),
    "no meta": lambda d: shutil.rmtree(d / "meta"),
    "empty step": empty,
    "meta edited": edit_meta,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_stepped_back_from(folder, damage, capfd):
    DAMAGE[damage](folder / "2")
    log = []
    assert restore(folder, log.append)[0] == 1
    assert len(log) == 1 and "checkpoint 2" in log[0] and len(log[0]) < 250, log
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "Stale file handle"),
        (ValueError("DATA_LOSS: Error reading [os_error_code='5']"), "Input/output error"),
        (MemoryError("RESOURCE_EXHAUSTED: Out of memory"), "Out of memory"),
    ],
)
def test_what_cannot_be_read_for_now_is_not_taken_for_damaged(folder, monkeypatch, error, words):
    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", refuse)
        with pytest.raises(UserError, match=rf"cannot read checkpoint 2 in .*{words}") as caught:
            restore(folder, lambda _: None)
    assert caught.value.exit_code == 1 and f"move {folder / '2'} away" in str(caught.value)
    assert restore(folder, lambda _: None)[0] == 2


def test_all_damaged(folder):
    empty(folder / "2")
    empty(folder / "1")
    with pytest.raises(UserError, match=r"no usable checkpoint in .*checkpoint 2.*and 1 more.*"):
        restore(folder, lambda _: None)
    assert (folder / "1").is_dir() and (folder / "2").is_dir()


@pytest.mark.parametrize("step", [2, 3])
def test_saving_over_a_damaged_step(folder, step):
    shutil.copytree(folder / "2", folder / "5")
    empty(folder / "5")
    shutil.rmtree(folder / "2" / "state")
    checkpoints = open_checkpoints(folder)
    assert checkpoints.restore_latest(abstract(make_state()), lambda _: None)[0] == 1
    assert checkpoints.latest_step() == 1
    assert (folder / "2").is_dir(), "deleted before anything replaces it"
    assert checkpoints.save(step, make_state(step), {"seed": step})
    checkpoints.close()
    log = []
    found = restore(folder, log.append)
    assert found[0] == step and not log
    assert state_digest(found[1]) == state_digest(make_state(step))


def test_another_model_is_no_damage(folder):
    for change, words in (
        ({"step": jax.ShapeDtypeStruct((), jnp.float32)}, r"\['step'\] is \['int32', \[\]\] in it"),
        ({"bytes": jax.ShapeDtypeStruct((8,), jnp.uint8)}, r"\['bytes'\].*\[8\]\] here"),
        ({"more": jax.ShapeDtypeStruct((8,), jnp.uint8)}, r"\['more'\] is absent in it"),
    ):
        checkpoints = open_checkpoints(folder)
        with pytest.raises(UserError, match=words):
            checkpoints.restore_latest({**abstract(make_state()), **change})
        checkpoints.close()
    assert restore(folder, lambda _: None)[0] == 2


def test_unread_checkpoints_are_not_written_over(folder):
    checkpoints = open_checkpoints(folder)
    for step in (1, 2):
        with pytest.raises(UserError, match="already holds step 2"):
            checkpoints.save(step, make_state(9), {})
    checkpoints.close()


@pytest.mark.parametrize(
    ("leaf", "words"),
    [(jnp.zeros((0, 3)), "empty"), ("text", "meta"), (np.int64(4), "int64, which JAX would make")],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, words):
    checkpoints = open_checkpoints(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"\['x'\].*{words}"):
        checkpoints.save(1, {"x": leaf}, {})
    checkpoints.close()


WRITER = """
import sys, jax, jax.numpy as jnp
from adaptive_ts.experiment.checkpoints.folder import open_checkpoints
def state(step):
    return {f"w{i}": jax.random.normal(jax.random.key(i + step), (1024, 1024)) for i in range(24)}
checkpoints = open_checkpoints(sys.argv[1])
checkpoints.save(1, state(1), {})
checkpoints.wait()
second = jax.block_until_ready(state(2))
checkpoints.save(2, second, {})
print("saving", flush=True)
checkpoints.close()
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    folder = tmp_path / "a"
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as writer:
        assert writer.stdout.readline() == "saving\n"
        writer.send_signal(signal.SIGKILL)
    names = {p.name for p in folder.iterdir()}
    assert "1" in names and "2" not in names, f"killed too late: {names}"
    (half,) = names - {"1"}
    shutil.copytree(folder / half, folder / half.replace("2", "5", 1))
    shapes = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(24)}
    checkpoints, log = open_checkpoints(folder), []
    step, state, _ = checkpoints.restore_latest(shapes, log.append)
    assert step == 1 and not log
    np.testing.assert_array_equal(state["w5"], jax.random.normal(jax.random.key(6), (1024, 1024)))
    assert checkpoints.save(2, state, {})
    checkpoints.close()
    assert {p.name for p in folder.iterdir()} == {"1", "2"}, "what was half written is gone"


def test_full_disk(tmp_path, capfd):
    with small_disk(tmp_path / "disk") as disk:
        small = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        large = {"w": jax.random.normal(jax.random.key(0), (2048, 2048))}
        checkpoints = open_checkpoints(disk / "a")
        checkpoints.save(1, small, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"No space left.*the last one is step 1") as caught:
            checkpoints.save(2, large, {})
            checkpoints.wait()
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        with contextlib.suppress(UserError):
            checkpoints.close()
        checkpoints = open_checkpoints(disk / "a")
        step, state, _ = checkpoints.restore_latest(abstract(small))
        assert step == 1 and state_digest(state) == state_digest(small)
        assert checkpoints.save(2, small, {})
        checkpoints.close()
    assert capfd.readouterr() == ("", "")


def test_read_only_disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        save(disk / "a", (1,))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        checkpoints = open_checkpoints(disk / "a")
        assert checkpoints.restore_latest(abstract(make_state()))[0] == 1
        with pytest.raises(UserError, match=r"Read-only file system.*the last one is step 1"):
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
        with contextlib.suppress(UserError):
            checkpoints.close()
        with pytest.raises(UserError, match=r"cannot use .*Read-only"):
            open_checkpoints(disk / "b")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(UserError, match="cannot use") as caught:
            open_checkpoints(path)
        assert caught.value.exit_code == 1


def test_max_to_keep(tmp_path):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        open_checkpoints(tmp_path, max_to_keep=0)
