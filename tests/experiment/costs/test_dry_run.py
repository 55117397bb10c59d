"""``train.py --dry_run``: what a run would be, and nothing left behind."""

import re

import pytest
from small_run import arguments, main, tree

from adaptive_ts.experiment.errors import UserError


def sizes(said):
    """Of the state, in MB: in all, and on each device."""
    found = re.search(r"state: ([\d.]+) MB in all, ([\d.]+) MB on each device", said)
    return float(found[1]), float(found[2])


def test_a_dry_run_tells_and_writes_nothing(run_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = tree(run_data)
    argv = arguments(tmp_path / "run", run_data, "--train.steps 1000 --dry_run")
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "digits: 2,801 parameters; 1,500 images of digits, 8x8x1" in said
    assert "mesh: data 8; 8 cpu device(s) of 1 process(es); batch 8, 1 on each" in said
    whole, own = sizes(said)
    assert whole == own, "no axis splits it"
    for name in ("step", "step with a probe"):
        line = rf"^{name}, on each device: ([\d.]+) GFLOPs, ([\d.,]+) MB read and written"
        flops, size = re.search(line, said, re.M).groups()
        assert float(flops) > 0 and float(size.replace(",", "")) > 0
    assert re.search(
        r"time: about \d+:\d\d.* for 1,000 steps \(.* ms a step, .* with a probe", said
    )
    assert str(tmp_path / "run") in said.splitlines()[-1]
    assert tree(run_data) == before and not list(tmp_path.iterdir())


def test_data_that_is_not_prepared_leaves_nothing_either(run_data, tmp_path, capsys):
    extra = "--sampler.name uniform --mesh.fsdp 2 --model.channels 32 --train.steps 3 --dry_run"
    assert main(arguments(tmp_path / "run", tmp_path / "data", extra)) == 0
    said = capsys.readouterr().out
    assert "mesh: data 4, fsdp 2" in said and re.search(r"axis \d split over fsdp", said)
    whole, own = sizes(said)
    assert 0.45 < own / whole < 0.6
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_run_would(six, run_data, tmp_path):
    argv = arguments(six[0], run_data, "--seed 1 --dry_run")
    with pytest.raises(UserError, match="holds a run of another config"):
        main(argv)
    with pytest.raises(UserError, match="is not divisible by the 8 devices"):
        main(arguments(tmp_path / "run", run_data, "--train.batch_size 9 --dry_run"))
