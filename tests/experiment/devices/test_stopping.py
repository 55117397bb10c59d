"""Signals: while a run trains, before and after that, and a second one."""

import os
import shutil
import signal

import jax
import pytest
from small_run import same_run, saved_steps, train

from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.stopping import Stopped, stop_requests, stopping_at_once
from adaptive_ts.experiment.train import loop

SIGNALS = (signal.SIGINT, signal.SIGTERM)
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def handlers():
    """What pytest's own handlers are is none of a test's business."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_told_and_a_second_one_acts(number):
    before = signal.getsignal(number)
    mesh = sharding.make_mesh(jax.devices()[:1])
    with stop_requests(mesh, lambda step: False) as poll:
        assert poll(1) is None
        send(number)
        assert poll(2) == number.name
        assert {n: signal.getsignal(n) for n in SIGNALS} == USUAL
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_saved_it_stops_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name), stopping_at_once():
        with stop_requests(sharding.make_mesh(jax.devices()[:1]), lambda step: False):
            pass  # whose end gives the handlers back
        send(number)
        pytest.fail("went on")
    assert signal.getsignal(number) == before


def test_a_signal_before_the_first_step_or_after_the_last(
    three, six, run_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)

    def signalled(number):
        def stopped(*_, **__):
            send(number)
            pytest.fail("went on")

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_jobs", signalled(signal.SIGTERM))
        code, said = train(folder, run_data, "--train.steps 6")
    assert code == 75 and said[-1].startswith("Stopped by SIGTERM; what is saved stays.")
    assert saved_steps(folder) == [2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(loop.ending, "finish", signalled(signal.SIGINT))
        code, said = train(folder, run_data, "--train.steps 6")
    assert code == 75 and said[-1].startswith("Stopped by SIGINT; what is saved stays.")
    assert saved_steps(folder) == [5, 6]
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and "resuming after step 6 of 6" in said[0]
    same_run(folder, six[0])
