"""What a run leaves to look at: metrics, progress, pictures, one paragraph. For process 0 only."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_ts.experiment.errors import Log
from adaptive_ts.experiment.files import atomic, to_plain

_FLUSH_SECONDS = 10  # of TensorBoard's file, which waits for the disk


class Metrics(NamedTuple):
    """An open log: ``write(step, {"loss": ...})`` and ``close()``."""

    write: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


_SILENT = Metrics(lambda step, values: None, lambda: None)


def open_jsonl(
    path: str | os.PathLike[str], *, resume_step: int | None = None, enabled: bool = True
) -> Metrics:
    """Opens a log of one JSON object per step, flushed line by line.

    Args:
      path: the file.
      resume_step: the step that training goes on from: later lines, and a half-written last one,
        are dropped. None: a new run, all are dropped.
      enabled: False: nothing is touched (processes other than 0).

    Returns:
      A `Metrics`. Arrays become numbers and lists, NaN and infinities null.
    """
    if not enabled:
        return _SILENT
    entries = [] if resume_step is None else read_metrics(path)
    with atomic(path) as file:
        for entry in entries:
            if entry["step"] <= resume_step:
                file.write(f"{json.dumps(entry)}\n".encode())
    log = Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def write(step: int, values: Mapping[str, Any]) -> None:
        log.write(json.dumps({"step": int(step), **to_plain(values)}) + "\n")
        log.flush()

    return Metrics(write, log.close)


def open_metrics(
    workdir: str | os.PathLike[str],
    resume_step: int | None = None,
    tensorboard: bool = True,
    enabled: bool = True,
) -> Metrics:
    """Opens ``metrics.jsonl`` (see `open_jsonl`) and its mirror for TensorBoard.

    Args:
      workdir: the run's folder; TensorBoard's files go to ``workdir/tensorboard``.
      resume_step: the step that training goes on from; None: a new run.
      tensorboard: write the mirror too; it leaves out what is not finite.
      enabled: False: nothing is touched (processes other than 0).
    """
    log = open_jsonl(Path(workdir) / "metrics.jsonl", resume_step=resume_step, enabled=enabled)
    if not (tensorboard and enabled):
        return log
    # Not its SummaryWriter, whose thread ends at a full disk: the next writes would wait for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    purge = 0 if resume_step is None else resume_step + 1
    folder = Path(workdir) / "tensorboard"
    folder.mkdir(exist_ok=True)
    # The name's own clock counts whole seconds.
    board = EventsWriter(str(folder / "events"), filename_suffix=f".{purge}")

    flushed = -math.inf

    def add(step: int, **content: Any) -> None:
        nonlocal flushed
        board.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            board.flush()
            flushed = time.monotonic()

    add(purge, session_log=SessionLog(status=SessionLog.START))

    def write(step: int, values: Mapping[str, Any]) -> None:
        log.write(step, values)
        numbers = {k: v for k, v in to_plain(values).items() if isinstance(v, int | float)}
        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        add(int(step), summary=Summary(value=scalars))

    def close() -> None:
        with contextlib.ExitStack() as stack:  # both, whatever the first says
            stack.callback(board.close)
            stack.callback(log.close)

    return Metrics(write, close)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``; broken lines are left out, and so is a missing file."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
    return entries


class Progress(NamedTuple):
    """Where a run stands: ``update(step, loss)``, ``log(text)`` for a line between, ``close()``."""

    update: Callable[..., None]
    log: Log
    close: Callable[[], None]


def progress(
    total: int,
    initial: int = 0,
    enabled: bool = True,
    *,
    interval: float = 10.0,
    log: Log | None = None,
) -> Progress:
    """A bar with step, loss, speed and ETA on a terminal; a line now and then elsewhere.

    Args:
      total: the last step.
      initial: the step that training goes on from.
      enabled: False: nothing is shown (processes other than 0).
      interval: seconds between lines where stderr is no terminal.
      log: takes those lines; None: stderr.

    Returns:
      A `Progress`; ``update(step, loss=None)`` takes the number of steps done so far.
    """
    from tqdm import tqdm

    def to_stderr(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if not enabled:
        return Progress(lambda step, loss=None: None, lambda text: None, lambda: None)
    if sys.stderr.isatty():
        # tqdm itself draws nothing on a terminal that reports no size, as some containers' do.
        columns, lines = shutil.get_terminal_size()
        bar = tqdm(total=total, initial=initial, unit=" step", ncols=columns, nrows=lines)

        def update(step: int, loss: float | None = None) -> None:
            if loss is not None:
                bar.set_postfix_str(f"loss={float(loss):.4f}", refresh=False)
            bar.update(step - bar.n)

        return Progress(update, lambda text: bar.write(text, file=sys.stderr), bar.close)
    return _lines(total, initial, interval, log or to_stderr, tqdm.format_meter)


def _lines(total, initial, interval, log, format_meter) -> Progress:
    shape = "step {n}/{total}{postfix}, {rate_fmt}, {elapsed} elapsed, {remaining} left"
    began = time.monotonic()
    last: dict[str, Any] = {"step": initial, "time": began, "loss": None}

    def update(step: int, loss: float | None = None) -> None:
        now = time.monotonic()
        last["loss"] = last["loss"] if loss is None else float(loss)
        if step < total and now - last["time"] < interval:
            return
        rate = (step - last["step"]) / max(now - last["time"], 1e-9)
        extra = None if last["loss"] is None else f"loss {last['loss']:.4f}"
        line = format_meter(
            step, total, now - began, rate=rate, unit=" step", postfix=extra, bar_format=shape
        )
        log(" ".join(line.split()))  # tqdm pads the rate
        last.update(step=step, time=now)

    return Progress(update, log, lambda: None)


def summary_text(summary: Mapping[str, Any], files: Sequence[tuple[str, str]] = ()) -> str:
    """The paragraph at the end of a run: what was reached, and where the files are.

    Args:
      summary: what ``summary.json`` holds. Of its keys these are told, where present: ``row``,
        ``sampler``, ``schedule``, ``seed``, ``steps``, ``wall_clock_s``, ``steps_per_s``,
        ``loss``, ``vlb_bits_per_dim``, ``vlb_error``, ``workdir``.
      files: (name, what it shows), of files in the workdir.
    """
    from tqdm import tqdm

    s = {k: v for k, v in to_plain(summary).items() if v is not None}
    text = f"Trained {s.get('row', 'the model')}"
    details = [f"{s[k]} {k}" for k in ("sampler", "schedule") if k in s]
    details += [f"seed {s['seed']}"] if "seed" in s else []
    text += f" ({', '.join(details)})" if details else ""
    text += f" to step {s['steps']:,}" if "steps" in s else ""
    text += f" in {tqdm.format_interval(s['wall_clock_s'])}" if "wall_clock_s" in s else ""
    text += f" ({s['steps_per_s']:.1f} steps/s)" if "steps_per_s" in s else ""
    reached = [f"training loss {s['loss']:.4f}"] if "loss" in s else []
    if "vlb_bits_per_dim" in s:
        error = f" ± {s['vlb_error']:.3f}" if "vlb_error" in s else ""
        reached.append(f"VLB {s['vlb_bits_per_dim']:.3f}{error} bits/dim")
    text += f": {', '.join(reached)}" if reached else ""
    if "workdir" in s:
        listed = ", ".join(f"{name} ({what})" for name, what in files)
        text += f". Everything is in {s['workdir']}{f': {listed}' if listed else ''}"
    return text + "."
