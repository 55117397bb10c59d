"""What a run leaves to look at."""

import json
import math
import struct
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import Image

from adaptive_ts.experiment import files, logs, pictures
from adaptive_ts.experiment.errors import UserError


def lines(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_metrics_are_json_at_once(tmp_path):
    log = logs.open_metrics(tmp_path, tensorboard=False)
    log.write(10, {"loss": jnp.float32(0.5), "n": np.int64(3), "probed": True})
    assert lines(tmp_path) == [{"step": 10, "loss": 0.5, "n": 3, "probed": True}], "not flushed"
    log.write(20, {"loss": math.nan, "a": np.float32(np.inf), "b": jnp.bfloat16(2)})
    log.close()
    assert lines(tmp_path)[1] == {"step": 20, "loss": None, "a": None, "b": 2.0}
    assert not (tmp_path / "tensorboard").exists()


def test_metrics_resume_drops_what_is_repeated(tmp_path):
    log = logs.open_metrics(tmp_path, tensorboard=False)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed in the middle of a line
    log = logs.open_metrics(tmp_path, resume_step=2, tensorboard=False)
    assert [e["step"] for e in lines(tmp_path)] == [1, 2]
    log.write(3, {"loss": 9.0})
    log.close()
    assert [(e["step"], e["loss"]) for e in lines(tmp_path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    logs.open_metrics(tmp_path, tensorboard=False).close()
    assert lines(tmp_path) == [], "a new run starts a new log"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_of_lists_and_a_silent_one(tmp_path):
    path = tmp_path / "timesteps.jsonl"
    log = logs.open_jsonl(path)
    for step in (1, 2):
        log.write(step, {"density": np.array([0.5, 1.5])})
    log.close()
    logs.open_jsonl(path, resume_step=1).close()
    assert logs.read_metrics(path) == [{"step": 1, "density": [0.5, 1.5]}]
    for silent in (
        logs.open_jsonl(path, enabled=False),
        logs.open_metrics(tmp_path / "other", enabled=False),
    ):
        silent.write(3, {"loss": 1.0})
        silent.close()
    assert len(logs.read_metrics(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["timesteps.jsonl"]


def events(folder):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_metrics_reach_tensorboard(tmp_path):
    log = logs.open_metrics(tmp_path)
    log.write(10, {"loss": 0.5, "entropy": math.nan})
    log.close()
    log = logs.open_metrics(tmp_path, resume_step=10)
    log.write(20, {"loss": 0.25})
    log.close()
    found = events(tmp_path / "tensorboard")
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert sorted(scalars) == [(10, "loss", 0.5), (20, "loss", 0.25)]
    assert [e.step for e in found if e.session_log.status == 1] == [0, 11], (
        "later events are purged"
    )


def test_progress_without_a_terminal_is_lines(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    told = []
    bar = logs.progress(100, 20, log=told.append)
    for step in range(21, 101):
        now[0] += 0.5
        bar.update(step, loss=1 / step if step % 10 == 0 else None)
    bar.log("saved")
    bar.close()
    assert told == [
        "step 40/100, loss 0.0250, 2.00 step/s, 00:10 elapsed, 00:30 left",
        "step 60/100, loss 0.0167, 2.00 step/s, 00:20 elapsed, 00:20 left",
        "step 80/100, loss 0.0125, 2.00 step/s, 00:30 elapsed, 00:10 left",
        "step 100/100, loss 0.0100, 2.00 step/s, 00:40 elapsed, 00:00 left",
        "saved",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = logs.progress(50, 10)
    bar.update(30, loss=0.125)
    bar.update(50)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "50/50" in err and "loss=0.1250" in err and "step/s" in err
    silent = logs.progress(50, 10, enabled=False)
    silent.update(30, loss=0.1)
    silent.log("x")
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_image_grid_magnifies_pixels(tmp_path):
    images = np.full((5, 8, 8, 1), -1.0, np.float32)
    images[4, 0, 0] = 1.0
    images[3, 7, 7] = np.nan
    pictures.save_image_grid(tmp_path / "samples" / "a.png", images, side=100)
    grid = np.asarray(Image.open(tmp_path / "samples" / "a.png"))
    # 3 columns, 2 rows; (100 // 3 - 2) // 8 = 3 pixels per pixel; gaps of 2.
    assert grid.shape == (2 * (24 + 2) + 2, 3 * (24 + 2) + 2)
    top, left = 2 + 26, 2 + 26
    assert (grid[top : top + 3, left : left + 3] == 255).all()
    assert (grid[top + 3 : top + 24, left : left + 24] == 0).all()
    assert (grid[:2] == 255).all() and (grid[2:26, 2:26] == 0).all()


def test_image_grid_keeps_bytes_and_colours(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    pictures.save_image_grid(tmp_path / "b.png", images, side=6)
    grid = np.asarray(Image.open(tmp_path / "b.png"))
    np.testing.assert_array_equal(grid[2:-2, 2:-2], images[0])
    pictures.save_image_grid(tmp_path / "b.png", images, side=100, smooth=True)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "b.png"))[2:-2, 2:-2, 0])) > 16
    for wrong in (images[0], images[..., :2], images[:0]):
        with pytest.raises(ValueError, match="N, H, W, C"):
            pictures.save_image_grid(tmp_path / "b.png", wrong)


def test_pictures_are_whole_files_and_leave_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    steps, t = np.arange(1, 4) * 10, np.arange(250)
    density = np.linspace(0, 2, 250) * np.ones((3, 1))
    pictures.plot_timesteps(tmp_path / "a.png", steps, density, t, "p(t)")
    pictures.plot_timesteps(tmp_path / "b.png", [1], np.ones((1, 1)), [0.5], "one")
    pictures.plot_losses(tmp_path / "c.png", t, np.ones(250), np.ones(250), np.arange(250), "loss")
    pictures.plot_losses(tmp_path / "d.png", t, t * np.nan, t * np.nan, t * 0, "nothing yet")
    pictures.plot_curve(tmp_path / "e.png", np.arange(99), np.r_[np.nan, np.ones(98)], "curve")
    pictures.plot_curve(tmp_path / "f.png", [], [], "nothing yet")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{c}.png" for c in "abcdef"]
    for path in tmp_path.iterdir():
        image = Image.open(path)
        image.load()
        assert image.size[0] >= 900 and np.asarray(image).std() > 5
    assert dict(matplotlib.rcParams) == before


def test_losses_are_pooled_by_their_counts():
    from adaptive_ts.experiment.pictures import _pool

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 300, 4000)
    loss = rng.gamma(2.0, size=4000) + drawn / 100
    groups = [loss[drawn == t] for t in range(300)]
    columns = ([f(g) for g in groups] for f in (np.mean, np.std, len))
    t, mean, std, count = _pool(np.arange(300), *columns)
    np.testing.assert_allclose(t, np.arange(100) * 3 + 1)
    for i in (0, 57, 99):
        pooled = np.concatenate(groups[3 * i : 3 * i + 3])
        np.testing.assert_allclose([mean[i], std[i]], [pooled.mean(), pooled.std()])
        assert count[i] == len(pooled)


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": np.float32(1.5), "b": [math.nan, jnp.arange(2)], "c": tmp_path})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [None, [0, 1]], "c": str(tmp_path)}
    with pytest.raises((TypeError, ValueError)):
        files.write_json(path, {"a": object()})
    assert files.read_json(path)["a"] == 1.5
    assert files.read_json(tmp_path / "none.json") is None
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"broken\.json is damaged .*: move it away"):
        files.read_json(tmp_path / "broken.json")
    (tmp_path / "broken.json").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_summary_text():
    summary = {
        **{"row": "digits", "sampler": "adaptive", "schedule": "linear", "seed": 0, "steps": 2000},
        **{"wall_clock_s": 151.2, "steps_per_s": 13.23, "loss": 0.09123, "workdir": "runs/d"},
    }
    assert logs.summary_text(summary, [("timesteps.png", "the learned p(t)")]) == (
        "Trained digits (adaptive sampler, linear schedule, seed 0) to step 2,000 in 02:31 "
        "(13.2 steps/s): training loss 0.0912. Everything is in runs/d: timesteps.png (the learned "
        "p(t))."
    )
    likelihood = {"steps": 6, "vlb_bits_per_dim": 4.6712, "vlb_error": 0.0519}
    assert logs.summary_text(likelihood).endswith("step 6: VLB 4.671 ± 0.052 bits/dim.")
    assert logs.summary_text({"steps": 6, "loss": math.nan}) == "Trained the model to step 6."
