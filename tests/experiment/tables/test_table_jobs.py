"""The processes of a table: one that ends late leaves nothing hanging."""

import json
import time
from types import SimpleNamespace

from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.tables import jobs as table_jobs
from adaptive_ts.experiment.tables.jobs import Job, run_jobs

CHOICE = SimpleNamespace(about="nothing")  # of features


def late(job, results, folder, options):
    """Says that it is done, and is a while longer."""
    for seed in job.seeds:
        results.put(job.config.train.steps)
        results.put({"label": job.label, "dataset": "d", "schedule": "s", "seed": seed})
    time.sleep(1)
    (folder / f"{job.label}.ended").touch()


def test_a_process_that_ends_after_its_last_result_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(table_jobs, "_work", late)
    monkeypatch.setattr(table_jobs, "image_features", lambda data, features: CHOICE)
    jobs = [Job(label, label, Config(), (0,), "f") for label in ("a", "b")]
    run_jobs(jobs, tmp_path, workers=1, image_evaluations=1, features=CHOICE)
    runs = (tmp_path / "d-s.jsonl").read_text().splitlines()
    assert [json.loads(run)["label"] for run in runs] == ["a", "b"]
    assert (tmp_path / "a.ended").exists() and (tmp_path / "b.ended").exists()
