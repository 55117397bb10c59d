"""Tables: what is measured and reported, and that a table goes on where it was."""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classified import classified_digits
from scipy import stats
from small_run import ROOT, SMALL, compiler_environment

from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.data.loading import from_arrays, load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.evaluate.likelihood import geometric_strata
from adaptive_ts.experiment.main import tables
from adaptive_ts.experiment.quality import features
from adaptive_ts.experiment.quality.inception import Activations
from adaptive_ts.experiment.quality.metrics import gaussian
from adaptive_ts.experiment.quality.reference import FeatureNetwork, Reference
from adaptive_ts.experiment.tables import jobs as table_jobs
from adaptive_ts.experiment.tables import pictures, plan, program_cache, programs, records, report
from adaptive_ts.experiment.tables import runs as contest
from adaptive_ts.experiment.tables import times as table_times
from adaptive_ts.experiment.tables.programs import functions_of, held_out_batch

OPTIONS = [*SMALL.split(), "--train.steps", "4", "--generate.steps", "2"]
OPTIONS += ["--optimizer.warmup_steps", "0", "--optimizer.learning_rate", "0.01"]


def config_of(row="digits_uniform", *overrides):
    argv = [row, *OPTIONS, *overrides]
    return parse(argv, configs_dir=ROOT / "configs")[1]


def test_the_table_s_bits_are_the_vlb_s(run_data):
    config = config_of("digits_uniform", "--data.dir", str(run_data))
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build(config, mesh)
    train, test = (load_split(config.data, split, lambda line: None) for split in ("train", "test"))
    jobs, _ = functions_of(config, built, train, mesh)
    strata = geometric_strata(50)
    params = built.init_params(jax.random.key(0), {"image": jnp.zeros((1, 8, 8, 1))})
    params = jax.tree.map(lambda x: x + 0.05, params)
    batch, index = held_out_batch(test, 0)
    mse = jobs["errors"][0](params, batch, index)
    bits = jobs["bits"][0](mse)
    images = {"image": jnp.asarray(test.images[:64]).astype(jnp.float32) / 127.5 - 1}
    key, index = jax.random.key(2**31 - 1), jnp.arange(64)
    for at in (0, 3, len(mse) - 1):
        t = jnp.full((64,), int(strata.timesteps[at]))
        direct = built.vlb.at(params, images, t, key, index).mean()
        assert bits[at] == pytest.approx(float(direct), rel=1e-4)
        direct = built.eps_loss.at(params, images, t, key, index).mean()
        assert mse[at] == pytest.approx(float(direct), rel=1e-4)


def test_the_version_of_the_code_is_that_of_what_is_computed(run_data, monkeypatch, tmp_path):
    config = config_of("digits_uniform", "--data.dir", str(run_data))
    first = programs.program(config)
    assert len(first) == 12 and programs.program(replace(config, {"seed": 3})) == first
    other = replace(config, {"optimizer.learning_rate": 0.02})
    assert programs.program(other) != first
    monkeypatch.setattr(program_cache, "CACHE", tmp_path)
    assert program_cache.program_of(config) == first
    plain = programs.vlb_terms
    monkeypatch.setattr(programs, "vlb_terms", lambda *a, **k: 2 * plain(*a, **k))
    assert programs.program(config) != first
    assert program_cache.program_of(config) == first, "no file has changed"
    (tmp_path / "programs.json").write_text("{")
    assert program_cache.program_of(config) != first


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run_data, monkeypatch, tmp_path):
    config = config_of("digits_uniform", "--data.dir", str(run_data), *OPTIONS[-4:])
    config = replace(config, {"train.save_every": 3})
    whole = next(contest.contest(config, [5], image_evaluations=2))
    measure, calls = contest._measure, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(contest, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        next(contest.contest(config, [5], image_evaluations=2, folder=tmp_path))
    assert (tmp_path / "seed5" / "3").is_dir()
    again = next(contest.contest(config, [5], image_evaluations=2, folder=tmp_path))
    assert len(calls) == 4 + 2, "from step 3 on: one evaluation on the way, and the end"
    assert not (tmp_path / "seed5").exists()
    assert len(again["frechet_curve"]) == 2 and again["frechet_curve"][-1][2] == again["frechet"]
    for run in (whole, again):
        for row in [*run["curve"], *run["frechet_curve"]]:
            row[1] = run["seconds"] = 0.0
    assert again == whole


def record(seed, label="uniform", vlb=3.0, frechet=2.0, curve=None, **changes):
    curve = curve or [[10, 1.0, 5.0, 0.2], [20, 2.0, 4.0, 0.1], [30, 3.0, vlb, 0.1]]
    return {
        "label": label, "dataset": "digits", "schedule": "linear", "seed": seed,
        "fingerprint": "f", "setting": "s", "program": "p", "cores": 1, "features": "classifier",
        "data": "d", "steps": 30, "seconds": 3.0, "frechet_curve": [[30, 3.0, frechet]],
        "vlb": vlb, "frechet": frechet, "mse": 0.1, "curve": curve,
        "timesteps": [0, 10, 40], "mse_by_timestep": [0.9, 0.3, 0.1],
        "density": [1.5, 1.0, 0.5], "density_timesteps": [5, 25, 45], **changes,
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    base = [record(s, vlb=3 + s, frechet=2.0 * s) for s in range(4)]
    other = [record(s, "beta", vlb=2.5 + s + 0.1 * s**2, frechet=1.9 * s) for s in (1, 2, 3, 9)]
    rows = report.by_row(base + other)
    found = report.differences(rows, "beta")
    a = [run["vlb"] for run in other[:3]]
    b = [run["vlb"] for run in base[1:]]
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["vlb"].mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (found["vlb"].low, found["vlb"].high) == pytest.approx(tuple(interval))
    assert report.differences(rows, "uniform") == {}
    assert report.paired([0.25]) == (0.25, None, None)


def test_steps_and_seconds_to_uniform_s_final_value():
    base = [record(0), record(1)]
    fast = [[10, 2.0, 4.0, 0.2], [20, 4.0, 2.0, 0.1], [30, 6.0, 1.0, 0.1]]  # 3.0 at step 15
    late = [[10, 2.0, 5.0, 0.2], [20, 4.0, 4.0, 0.1], [30, 9.0, 3.0, 0.1]]  # and once disturbed
    rows = report.by_row(
        [*base, record(0, "fast", curve=fast), record(1, "fast", curve=late),
         record(0, "slow", vlb=3.5), record(1, "slow", vlb=3.5)]
    )  # fmt: skip
    reached = report.reach(rows, "fast")
    assert reached.seeds == (2, 2)
    assert reached.steps == pytest.approx(np.mean([15 / 30, 1.0]))
    assert pictures.step_seconds(rows["fast"]) == pytest.approx(0.2)  # uniform: 0.1
    assert report.reach(rows, "slow").seeds == (0, 2)
    seconds = {"uniform": 0.1, "fast": 0.2, "slow": 0.1}
    lines = report.table(rows, seconds).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| uniform | 2 | 3.000 ± 0.000 |  |")
    assert "| 0.75 | 1.50 | 2.00 |" in lines[3] and "not reached" in lines[4]


def test_a_report_has_a_table_and_a_picture_per_schedule(tmp_path):
    runs = [
        record(s, label, schedule=schedule, vlb=3 + 0.1 * s + 0.01 * s * (label == "beta"))
        for s in range(3)
        for label in ("beta", "uniform")
        for schedule in ("linear", "quad")
    ]
    text = report.write_report(runs, tmp_path)
    assert text.count("| uniform | 3 |") == 2
    for name in ("digits-linear", "digits-quad"):
        assert (tmp_path / f"{name}.md").read_text() in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_kept_apart(tmp_path):
    """Other steps: other tables. Other options of one row: the last ones count."""
    long = [[10 * i, 1.0 * i, 5.0 - 0.1 * i, 0.1] for i in range(1, 7)]
    runs = [record(s) for s in range(2)]
    runs += [record(s, curve=long, setting="longer", steps=60) for s in range(2)]
    runs += [record(s, "impact", vlb=2.0, fingerprint="old") for s in range(3)]
    runs += [record(s, "impact", vlb=2.2, fingerprint="new") for s in range(3)]
    runs += [record(s, "impact", vlb=2.5, fingerprint="new", program="q") for s in range(2)]
    groups = records.comparable(runs)
    assert len(groups) == 2 and all(name.startswith("digits-linear-") for name in groups)
    same = max(groups.values(), key=len)
    assert [r["vlb"] for r in same if r["label"] == "impact"] == [2.5, 2.5]
    for change in ({"data": "other"}, {"features": "inception"}, {"cores": 2}):
        assert len(records.comparable([record(0), record(1, **change)])) == 2
    text = report.write_report(runs, tmp_path)
    assert "60 steps" in text and "30 steps" in text
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.slow
def test_the_times_of_the_rows_are_measured_and_used(tmp_path, run_data, capsys):
    argv = ["--rows", "uniform", "stratified", "--times", "--out", str(tmp_path), *OPTIONS]
    argv += ["--configs", str(ROOT / "configs"), "--data.dir", str(run_data)]
    assert tables.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said if "ms per step" in line] == [
        *("uniform", "stratified"),
    ]
    (path,) = tmp_path.glob("times-*.json")
    mark = path.stem.removeprefix("times-")
    assert mark == records.setting(config_of("digits_uniform"))
    times = table_times.read_times(tmp_path, mark)
    assert all(0 < seconds < 10 for seconds in times.values())
    runs = [record(s, label, setting=mark) for s in range(2) for label in ("uniform", "stratified")]
    text = report.write_report(runs, tmp_path)
    assert f"| {times['stratified'] / times['uniform']:.2f} |\n" in text
    assert table_times.read_times(tmp_path, "other") == {}


def test_a_table_without_uniform_claims_nothing_about_it(tmp_path):
    text = report.write_report([record(0, "beta"), record(1, "beta")], tmp_path)
    assert "| beta | 2 | 3.000 ± 0.000 |  | 2.0 ± 0.0 |  | 0.1000 ± 0.0000 |  |  |  |" in text


def test_a_line_that_was_cut_off_costs_one_run(tmp_path):
    records.append_run(tmp_path, record(0))
    path = tmp_path / "digits-linear.jsonl"
    with path.open("ab") as file:
        file.write(b'{"label": "uniform", "se')
    records.append_run(tmp_path, record(2))
    with path.open("ab") as file:
        file.write(b'5\n"text"\n\xff\n{"label": "uniform"}\n')
    assert [run["seed"] for run in records.read_runs(tmp_path)] == [0, 2]
    records.append_run(tmp_path, record(0, dataset="my/set"))
    assert len(records.read_runs(tmp_path)) == 3


def test_a_report_is_of_what_was_asked_for(tmp_path, capsys):
    for label in ("uniform", "beta_1_2"):
        for seed in (0, 1, 10):
            records.append_run(tmp_path, record(seed, label))
    out = ["--report", "--out", str(tmp_path)]
    tables.main([*out, "--seeds", "0", "1"])
    assert "| beta_1_2 | 2 |" in capsys.readouterr().out
    tables.main([*out, "--rows", "digits_uniform"])
    said = capsys.readouterr().out
    assert "| uniform | 3 |" in said and "beta" not in said


def arguments(folder, *extra):
    shared = ["--configs", str(ROOT / "configs"), "--out", str(folder), "--schedules", "linear"]
    return tables.arguments(["digits", *shared, *extra])


def test_what_is_done_is_not_planned_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "program_of", lambda config: "p")
    known = features.ImageFeatures("classifier", None, None)
    monkeypatch.setattr(plan, "image_features", lambda data, choice: known)
    rows = ("--rows", "uniform", "digits_stratified", "--seeds", "0", "1", "2")
    first = plan.missing(*arguments(tmp_path, *rows))
    assert [(job.label, job.seeds) for job in first] == [
        ("uniform", (0, 1, 2)),
        ("stratified", (0, 1, 2)),
    ]
    done = [first[0].about(first[0].config) for s in (0, 2)]
    done = [{**record(s), **about, "seed": s} for s, about in zip((0, 2), done, strict=True)]
    text = "".join(json.dumps(run) + "\n" for run in done)
    (tmp_path / "digits-linear.jsonl").write_text(
        text + '{"label": "uniform", "se'
    )  # killed while writing
    second = plan.missing(*arguments(tmp_path, *rows))
    assert [job.seeds for job in second] == [(1,), (0, 1, 2)]
    changed = plan.missing(*arguments(tmp_path, *rows, "--optimizer.learning_rate", "1e-4"))
    assert [job.seeds for job in changed] == [(0, 1, 2), (0, 1, 2)]
    other = plan.missing(*arguments(tmp_path, *rows, "--schedules", "quad", "cosine"))
    assert [job.config.schedule.name for job in other] == ["quad", "quad", "cosine", "cosine"]
    monkeypatch.setattr(plan, "program_of", lambda config: "another")
    new = plan.missing(*arguments(tmp_path, *rows))
    assert [job.seeds for job in new] == [(0, 1, 2), (0, 1, 2)]
    monkeypatch.setattr(plan, "program_of", lambda config: "p")
    other = known._replace(about="Inception")
    monkeypatch.setattr(plan, "image_features", lambda data, choice: other)
    new = plan.missing(*arguments(tmp_path, *rows))
    assert [job.seeds for job in new] == [(0, 1, 2), (0, 1, 2)]


def test_colour_is_compared_by_inception_grey_by_a_classifier(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    data = from_arrays(pixels, np.arange(40) % 2, name="colour")
    monkeypatch.setattr(features, "load_split", lambda *args: data)
    monkeypatch.delenv("ADAPTIVE_TS_INCEPTION_WEIGHTS", raising=False)
    choice = features.FeatureChoice()
    with pytest.raises(UserError, match=r"^FID needs the weights of Inception: download [^\n]*$"):
        features.image_features(DataConfig(name="colour"), choice)
    with pytest.raises(UserError, match="--inception_weights: means nothing to a classifier"):
        features.image_features(DataConfig(), choice._replace(network="classifier", weights="x"))

    def first_two(images):
        assert images.dtype == np.uint8
        return Activations(images.reshape(len(images), -1)[:, :2].astype(np.float32), None)

    network = FeatureNetwork("inception", "Inception, ref", "m", 2, first_two)
    moments = gaussian(first_two(pixels).features)
    reference = Reference(moments, "0123", "colour/train", None)
    monkeypatch.setattr(features, "inception_network", lambda *a, **k: network)
    monkeypatch.setattr(features, "reference_features", lambda *a, **k: reference)
    found = features.image_features(DataConfig(name="colour"), choice)
    assert found.about == "Inception, ref, statistics 0123" and found.reference is moments
    made = found.extract(pixels.astype(np.float32) / 127.5 - 1)
    np.testing.assert_array_equal(made, first_two(pixels).features)


def test_a_dry_run_prints_a_command_for_each_run(tmp_path, capsys):
    out = tmp_path / "of mine"
    argv = ["digits", "--rows", "speed", "adaptive_clts", "--schedules", "linear", "quad"]
    argv += ["--seeds", "3", "4", "--out", str(out), "--jobs", "2", "--dry_run"]
    argv += ["--configs", str(ROOT / "configs"), "--train.steps", "7"]
    assert tables.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and len(set(lines)) == 8 and not out.exists()
    found = set()
    for line in lines:
        script, name, *rest = shlex.split(line)
        assert (script, name) == ("adaptive-ts", "tables")
        (job,) = plan.missing(*tables.arguments(rest))
        assert job.config.train.steps == 7 and job.config.workdir == str(out)
        found.add((job.label, job.config.schedule.name, *job.seeds))
    assert found == {
        (label, schedule, seed)
        for label in ("speed", "adaptive_clts")
        for schedule in ("linear", "quad")
        for seed in (3, 4)
    }


def test_the_rows_to_be_compared_are_all_planned(tmp_path):
    jobs = plan.missing(*arguments(tmp_path, "--seeds", "0"))
    labels = [job.label for job in jobs]
    paper = ["p2", "min_snr", "log_normal", "clts", "speed"]
    assert labels[:7] == ["uniform", *paper, "adaptive"]
    assert labels[7:12] == [f"adaptive_{label}" for label in paper]
    assert len(labels) == len(set(labels)) == 20
    assert len({job.fingerprint for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--jobs", "0"], "--jobs: 0 is out of range"),
        (["--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
        (["--rows", "digits_unifrom"], "'unifrom' is not a row of digits: did you mean 'uniform'"),
        (["--label", "x"], "--label: names one row"),
        (["dgits"], "'dgits' is not a file of"),
        (["overhead"], "has no rows called overhead_..."),
        (["--image_evaluations", "0"], "--image_evaluations: 0 is out of range"),
        (["--report", "--dry_run"], "--report: --dry_run means nothing to it"),
        (["--report"], "no such runs in"),
        (["--report", "--sampler.name", "beta"], "--report: --sampler.name means nothing to it"),
        (["--schedule.name", "quad"], "--schedule.name: a table has several: use --schedules"),
        (["--seeds", "-1"], "--seeds: -1 is out of range"),
        (["--schedules", "linaer"], "'linaer' is unknown: did you mean 'linear'"),
        (["--rows", "digits_impact", "--sampler.impact.temperature", "0"], "temperature must be"),
        (
            ["--rows", "digits_uniform", "--train.batch_size", "20"],
            "not divisible by the 8 devices",
        ),
        (["--out", __file__], "--out: cannot use"),
        (["--sampler.nmae", "beta"], "--sampler.nmae: unknown field"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, argv, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        named = bool(argv) and not argv[0].startswith("-")
        shared = ["--configs", str(ROOT / "configs"), "--out", str(tmp_path / "out")]
        tables.main([*argv[:named], *shared, *argv[named:]])
    assert message in str(caught.value)


def test_a_sweep_runs_reports_and_goes_on(tmp_path, run_data, once, monkeypatch, capsys):
    """In processes of their own; a second time nothing is run."""
    for name, value in compiler_environment().items():
        monkeypatch.setenv(name, value)  # the processes that train
    monkeypatch.setattr(program_cache, "CACHE", tmp_path / "cache")
    data_dir = classified_digits(run_data, once)

    def sweep(out, *seeds):
        argv = ["--rows", "uniform", "--out", str(out), "--configs", str(ROOT / "configs")]
        argv += ["--data.dir", str(data_dir), *OPTIONS, "--seeds", *map(str, seeds)]
        assert tables.main(argv) == 0
        return capsys.readouterr().out, records.read_runs(out)

    said, runs = sweep(tmp_path, 0, 1)
    assert "| uniform | 2 |" in said and "by classifier of digits, accuracy 0.9" in said
    assert (tmp_path / "digits-linear.png").exists()
    assert [run["seed"] for run in runs] == [0, 1]
    assert all(np.isfinite(run["vlb"]) and len(run["density"]) == 25 for run in runs)
    assert runs[0]["vlb"] != runs[1]["vlb"] and runs[0]["program"] == runs[1]["program"]
    assert not (tmp_path / "checkpoints").exists()
    monkeypatch.setattr(table_jobs, "run_jobs", None)  # nothing is left to run
    again, same = sweep(tmp_path, 1, 0)
    assert same == runs and again.strip() in said
