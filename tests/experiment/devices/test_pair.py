"""Two processes: what one of them cannot read, has other options for, or ends in the middle of."""

import os
import socket
import sys

import pytest
from small_run import ROOT, run_together


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """(exit codes, output lines, stderr) of `pair_worker`'s two processes."""
    script, folder = ROOT / "tests" / "support" / "pair_worker.py", tmp_path_factory.mktemp("pair")
    one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": one}
    ended = run_together(lambda rank, port: (sys.executable, script, rank, port, folder), 2, env)
    codes, texts, errors = zip(*ended, strict=True)
    out = [[x for x in text.splitlines() if not x.startswith("[Gloo]")] for text in texts]
    return list(codes), out, errors


def test_a_checkpoint_of_which_one_process_lost_its_part_is_damaged_for_both(said):
    _, out, error = said
    assert all(lines[0].startswith("checkpoint 2 is damaged (") for lines in out), (out, error)
    assert sum("another process cannot read it" in lines[0] for lines in out) <= 1
    assert all(lines[1] == "restored 1, True" for lines in out), (out, error)


def test_processes_with_other_options_or_other_data_are_refused(said):
    _, out, error = said
    same = "the processes differ (this one is as process 0): start the same command on all hosts"
    first, second = (lines[2:] for lines in out)
    assert len(first) == 2 and all(line.startswith(same) for line in first), (out, error)
    assert "the processes differ (train.save_every: 3 there, 4 here): start" in second[0]
    assert "(training images: 'images 0' there, 'images 1' here): start" in second[1]


def test_the_one_that_is_left_says_so_and_asks_to_be_started_again(said):
    codes, _, error = said
    assert codes == [75, 9], error
    assert f"process 0 of 2, on {socket.gethostname()}: lost another process (" in error[0]
    assert "by peer" in error[0], "what the network said, often with an address"
    assert "Traceback" not in error[0]
