"""The config: what it accepts, what it says about mistakes, what defines a run."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config import groups, paths, sampler_groups
from adaptive_ts.experiment.config.methods import SAMPLERS
from adaptive_ts.experiment.errors import UserError


def problems(**changes):
    values = {k.replace("__", "."): v for k, v in changes.items()}
    return c.validate(c.replace(c.Config(), values))


def test_every_field_is_frozen_and_has_a_docstring_for_the_help():
    files = [Path(m.__file__) for m in (groups, sampler_groups)]
    source = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    names = {path.rpartition(".")[2] for path in paths.leaf_types(c.Config)}
    for number, line in enumerate(source):
        is_field = line.startswith("    ") and line.strip().split(":")[0] in names and " = " in line
        if is_field and "default_factory" not in line:  # mesh.data is one, data a group
            assert source[number + 1].strip().startswith('"""'), line
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.Config().seed = 1
    assert c.Config() == c.Config() and hash(c.Config()) == hash(c.Config())


def test_the_default_is_valid():
    assert problems() == []


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("seed", -1, "-1 is out of range: must be in 0..4294967295"),
        ("schedule.num_timesteps", 1, "1 is out of range: must be in 2..100000"),
        ("schedule.num_timesteps", 100_001, "100001 is out of range: must be in 2..100000"),
        ("sampler.every", 0, "0 is out of range: must be at least 1"),
        ("sampler.history", 2, "2 is out of range: must be at least 3"),
        ("sampler.chunk", 0, "0 is out of range: must be at least 1"),
        ("sampler.uniform_prob", 1.0, "1.0 is out of range: must be in [0, 1)"),
        ("optimizer.learning_rate", math.nan, "nan is out of range: must be above 0 and finite"),
        ("optimizer.clip_norm", math.inf, "inf is out of range: must be above 0 and finite"),
        ("train.batch_size", 0, "0 is out of range: must be at least 1"),
        ("train.steps", 2.5, "expected an integer; got 2.5"),
        ("train.steps", True, "expected an integer; got True"),
        ("model.dtype", "int8", "expected one of float32, bfloat16; got 'int8'"),
        ("workdir", "", "'' is out of range: must be a folder's path"),
        ("model.name", "vit", "expected one of unet, dit, uvit; got 'vit'"),
        ("model.transformer.depth", 0, "0 is out of range: must be at least 1"),
        ("model.transformer.num_classes", 0, "0 is out of range: must be at least 1"),
        ("model.transformer.num_classes", 2.5, "expected an integer; got 2.5"),
        ("model.transformer.class_dropout", 1.0, "1.0 is out of range: must be in [0, 1)"),
        ("generate.guidance", -1.0, "-1.0 is out of range: must be at least 0 and finite"),
        ("generate.guidance", math.inf, "inf is out of range: must be at least 0 and finite"),
        (
            "sampler.name",
            "adaptve",
            "'adaptve' is unknown: did you mean 'adaptive'? known: " + ", ".join(SAMPLERS),
        ),
    ],
)
def test_one_problem(path, value, text):
    assert problems(**{path.replace(".", "__"): value}) == [f"--{path}: {text}"]


def test_all_problems_are_collected():
    found = problems(train__steps=0, optimizer__b1=1.0, sampler__name="x", schedule__name="y")
    assert [p.split(":")[0] for p in found] == [
        *("--sampler.name", "--schedule.name", "--train.steps", "--optimizer.b1")
    ]


def test_fields_that_contradict_each_other():
    assert problems(sampler__num_selected=5, sampler__num_buckets=4) == [
        "--sampler.num_selected: 5 is out of range: must be in 1..4 (--sampler.num_buckets)"
    ]
    assert problems(model__multipliers=(1, 2, 2)) == [
        "--model.attention: False True has 2 entries for 3 levels: give one True or False for each "
        "of --model.multipliers 1 2 2"
    ]
    assert problems(generate__steps=11, schedule__num_timesteps=10) == [
        "--generate.steps: 11 is out of range: must be in 1..10 (--schedule.num_timesteps)"
    ]
    (stratified,) = problems(sampler__stratified=True)
    assert "--sampler.name uniform" in stratified
    assert problems(sampler__stratified=True, sampler__name="uniform") == []
    (coupling,) = problems(sampler__coupling="antithetic", sampler__name="speed")
    assert "means nothing to the speed sampler" in coupling
    assert problems(sampler__coupling="antithetic", sampler__name="beta") == []
    law = {"sampler__log_snr__placement": "nearest"}
    (unused,) = problems(**law, sampler__name="log_snr_laplace")
    assert unused.startswith("--sampler.log_snr.placement: 'nearest' means nothing to the log_snr_")
    assert problems(**law, sampler__name="log_normal_sigma") == []
    (unused,) = problems(sampler__beta__b=2.0)
    assert unused.startswith("--sampler.beta: ") and "add --sampler.name beta" in unused
    assert problems(sampler__beta__b=2.0, sampler__name="beta") == []
    assert problems(sampler__log_snr__loc=1.0, sampler__name="log_snr_cauchy") == []
    (unused,) = problems(weighting__gamma=3.0)
    assert unused == (
        "--weighting.gamma: 3.0 means nothing without a weighting: leave it out, or add "
        "--weighting.name max_snr or min_snr or p2 or soft_min_snr"
    )
    (unused,) = problems(weighting__k=2.0, weighting__name="min_snr")
    assert "means nothing to min_snr" in unused and "--weighting.name p2" in unused
    assert problems(weighting__k=2.0, weighting__name="p2") == []
    older = c.replace(c.Config(), {"weighting.name": "min_snr", "weighting.k": 2.0})
    assert c.validate(older, unused=False) == [], "a run that was started with it can be read"
    (unknown,) = problems(sampler__on_top_of="adaptive")
    assert unknown.startswith("--sampler.on_top_of: 'adaptive' is unknown: ")
    assert problems(weighting__gamma=3.0, weighting__name="min_snr") == []


def model_problems(name, **options):
    options = {f"model__transformer__{k}": v for k, v in options.items()}
    return problems(model__name=name, **options)


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_transformers(name):
    assert model_problems(name) == []
    assert model_problems(name, num_classes=10) == []
    assert model_problems(name, num_classes=10, class_dropout=0.0) == []
    assert model_problems(name, hidden_size=48, num_heads=5) == [
        "--model.transformer.hidden_size: 48 is not divisible by the 5 heads "
        "(--model.transformer.num_heads)"
    ]
    assert model_problems(name, class_dropout=0.5) == [
        "--model.transformer.class_dropout: 0.5 means nothing without classes: leave it out, or "
        "add --model.transformer.num_classes NUMBER"
    ]
    assert problems(model__name=name, model__dropout=0.1) == [
        f"--model.dropout: 0.1 means nothing to {name}: add --model.dropout 0"
    ]
    odd, narrow = model_problems(name, depth=3), model_problems(name, hidden_size=6)
    if name == "uvit":
        assert odd == ["--model.transformer.depth: 3 is odd: uvit needs an even number"]
        assert narrow == []
    else:
        assert odd == []
        assert narrow == [
            "--model.transformer.hidden_size: 6 is not divisible by 4, as dit's position embedding "
            "needs"
        ]


@pytest.mark.parametrize("options", [{"depth": 4}, {"num_classes": 10}, {"class_dropout": 0.0}])
def test_the_unet_has_no_options_of_transformers(options):
    assert model_problems("unet", **options) == [
        "--model.transformer: its options mean nothing to the unet: leave them out, or add "
        "--model.name dit"
    ]


def test_guidance_is_for_models_that_know_classes_and_none():
    (unet,) = problems(generate__guidance=2.0)
    (dit,) = problems(model__name="dit", generate__guidance=0.0)
    assert unet.startswith("--generate.guidance: 2.0 means nothing to a model without classes: ")
    assert dit.endswith("leave it out, or train with --model.transformer.num_classes NUMBER")
    told = {"model__name": "dit", "model__transformer__num_classes": 10, "generate__guidance": 2.0}
    assert problems(**told) == []
    assert problems(**told, model__transformer__class_dropout=0.0) == [
        "--generate.guidance: 2.0 needs a model that was trained without classes too: leave it "
        "out, or train with --model.transformer.class_dropout above 0"
    ]


def test_hosts():
    assert problems(hosts__coordinator="a:1", hosts__num_processes=2, hosts__process_id=1) == []
    assert problems(hosts__auto=True) == []
    (alone,) = problems(hosts__num_processes=2)
    assert "--hosts.coordinator" in alone and "--hosts.auto True" in alone
    (both,) = problems(hosts__auto=True, hosts__process_id=0)
    assert both.startswith("--hosts.auto: True")
    found = problems(hosts__coordinator="a", hosts__num_processes=2, hosts__process_id=2)
    assert found == [
        "--hosts.coordinator: 'a' is not HOST:PORT",
        "--hosts.process_id: 2 is out of range: must be in 0..1 (--hosts.num_processes)",
    ]


def test_dict_and_json_round_trip():
    config = c.replace(
        c.Config(),
        {"model.multipliers": (1, 2, 4), "workdir": "x", "sampler.chunk": 7, "data.flip": True},
    )
    saved = c.to_dict(config)
    assert json.loads(json.dumps(saved)) == saved
    assert c.from_dict(saved) == config
    assert c.from_dict({}) == c.Config()
    assert c.from_dict({"optimizer": {"clip_norm": 1}}).optimizer.clip_norm == 1.0


def test_from_dict_names_what_it_does_not_know():
    with pytest.raises(UserError) as error:
        c.from_dict({"trian": {"steps": 3}, "train": {"step": 3, "batch_size": "x"}})
    text = str(error.value)
    assert "trian: unknown field: did you mean" in text
    assert "train.step: unknown field: did you mean train.steps?" in text
    assert "train.batch_size: expected an integer; got 'x'" in text


def test_what_defines_a_run():
    ignored = {
        "workdir": "elsewhere",
        "data.dir": "d",
        "data.source_dir": "s",
        "train.steps": 7,
        "train.log_every": 7,
        "train.save_every": 7,
        "train.max_to_keep": 7,
        "train.tensorboard": False,
        "train.accumulate": 7,
        "train.max_skipped": 7,
        "mesh.data": 7,
        "mesh.fsdp": 7,
        "hosts.auto": True,
        "hosts.timeout": 7,
        "hosts.coordinator": "a:1",
        "hosts.num_processes": 2,
        "hosts.process_id": 1,
    }
    base = c.Config()
    moved = c.replace(base, ignored)
    assert c.fingerprint_fields(moved) == c.fingerprint_fields(base)
    assert c.differences(c.to_dict(moved), base) == []
    assert set(c.fingerprint_fields(base)) == set(paths.leaf_types(c.Config)) - set(ignored)


def test_differences():
    saved = c.to_dict(
        c.replace(c.Config(), {"sampler.name": "uniform", "model.multipliers": (1, 3)})
    )
    assert c.differences(saved, c.Config()) == [
        "model.multipliers: (1, 3) there, (1, 2) here",
        "sampler.name: 'uniform' there, 'adaptive' here",
    ]
    # A field from before it existed is its default; one that is gone is told.
    del saved["sampler"]["name"], saved["model"]["multipliers"]
    assert c.differences(saved, c.Config()) == []
    saved["sampler"]["old"] = 3
    assert c.differences(saved, c.Config()) == ["sampler.old: 3 there, unknown here"]


def test_default_workdir():
    base = c.Config()
    assert c.default_workdir("digits", base, base) == "runs/digits/adaptive-linear-seed0"
    named = c.replace(
        base, {"seed": 3, "sampler.name": "uniform", "schedule.name": "quad", "train.steps": 9}
    )
    assert c.default_workdir("digits", named, base) == "runs/digits/uniform-quad-seed3"
    folders = {
        c.default_workdir("digits", c.replace(base, {"train.batch_size": n}), base)
        for n in (16, 32, 128)
    }
    assert len(folders) == 3 and "runs/digits/adaptive-linear-seed0" in folders
    assert all(f.startswith("runs/digits/adaptive-linear-seed0") for f in folders)
    # Fields that are added later must not send this command to another folder.
    small = c.replace(base, {"train.batch_size": 16, "seed": 3})
    folder = "runs/digits/adaptive-linear-seed3-407675c4"
    assert c.default_workdir("digits", small, base) == folder
    one = c.replace(base, {"optimizer.clip_norm": 2})
    same = c.replace(base, {"optimizer.clip_norm": 2.0, "train.steps": 5})
    assert c.default_workdir("d", one, base) == c.default_workdir("d", same, base)
