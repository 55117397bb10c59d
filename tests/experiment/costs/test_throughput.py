"""What throughput says of peaks and FLOPs, its mistakes in one line, and a run of all its parts."""

import doctest

import jax
import pytest
from small_run import ROOT
from small_throughput import CONFIGS, one_device, run

from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.costs import peaks, torch_trainer
from adaptive_ts.experiment.costs import race as throughput_race
from adaptive_ts.experiment.costs.entries import flops_per_image, image_of
from adaptive_ts.experiment.costs.peaks import arithmetic, known_peak, peaks_of, utilisation
from adaptive_ts.experiment.costs.throughput import make_plan
from adaptive_ts.experiment.costs.throughput_report import Entry, Yardstick, rows, text
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.main import throughput


@pytest.mark.parametrize(
    ("kind", "bfloat16", "tf32"),
    [
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.5, 378.0),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0),
        ("NVIDIA A100-PCIE-40GB", 312.0, 156.0),
        ("TPU v4", 275.0, None),
        ("TPU v5 lite", 197.0, None),
        ("TPU v5", 459.0, None),
        ("TPU v5p", 459.0, None),
    ],
)
def test_peaks(kind, bfloat16, tf32):
    assert known_peak(kind)[:2] == (bfloat16, tf32)


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "TPU v4 lite", "NVIDIA A1000", "TPU v5x"]
)
def test_devices_that_are_not_in_the_table(kind):
    assert known_peak(kind) is None


@pytest.mark.parametrize(
    ("dtype", "platform", "options", "expected"),
    [
        ("float32", "cpu", {"precision": "tensorfloat32"}, "float32"),
        ("bfloat16", "gpu", {"precision": "highest"}, "bfloat16"),
        ("float32", "gpu", {"capability": "9.0"}, "tf32"),
        ("float32", "gpu", {"capability": "8.0", "precision": "high"}, "tf32"),
        ("float32", "gpu", {"capability": "7.5"}, "float32"),
        ("float32", "gpu", {"capability": "gfx90a"}, "float32"),
        ("float32", "gpu", {"capability": "12.0", "precision": "highest"}, "float32"),
        ("float32", "gpu", {"precision": "BF16_BF16_F32_X3"}, "BF16_BF16_F32_X3"),
        ("float32", "tpu", {}, "bfloat16"),
        ("float32", "tpu", {"precision": "high"}, "high"),
    ],
)
def test_what_products_are_computed_in(monkeypatch, dtype, platform, options, expected):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert arithmetic(dtype, platform, **options) == expected


def test_tf32_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert arithmetic("float32", "gpu", capability="9.0") == "float32"


def test_peaks_by_what_is_computed():
    both = {"float32": "tf32", "bfloat16": "bfloat16"}
    assert peaks_of(both, "NVIDIA H200", None) == {"float32": 494.7, "bfloat16": 989.4}
    assert peaks_of({"float32": "bfloat16"}, "TPU v4", None) == {"float32": 275.0}
    assert peaks_of({"float32": "float32"}, "TPU v4", None) == {"float32": None}
    assert peaks_of({"float32": "high"}, "TPU v4", None) == {"float32": None}
    assert peaks_of(both, "cpu", None) == {"float32": None, "bfloat16": None}
    assert peaks_of(both, "NVIDIA H200", [3.0]) == {"float32": 3.0, "bfloat16": 3.0}
    assert peaks_of(both, "cpu", [3.0, 4.0]) == {"float32": 3.0, "bfloat16": 4.0}


def test_utilisation():
    # 35 GFLOP per image, 5,000 images/s: 175 TFLOP/s of two devices of 350.
    assert utilisation(5000, 35e9, 350.0, 2) == pytest.approx(0.25)
    assert utilisation(5000, 35e9, None, 1) is None
    assert doctest.testmod(peaks).failed == 0


def entries():
    train = [("jax", "uniform"), ("jax", "adaptive"), ("torch", "compiled")]
    return [
        *(Entry("train", *name, "float32", 8) for name in train),
        Entry("train", "jax", "uniform", "float32", 16),
        Entry("generate", "jax", "ddim", "float32", 8),
    ]


def test_rows_and_text():
    uniform, adaptive, torch, larger, generated = entries()
    seconds = {
        uniform: [0.5, 1.0, 0.25], adaptive: [1.0, 4.0, 1.0], torch: [], larger: [0.25] * 3,
        generated: [2.0, 4.0, 8.0],
    }  # fmt: skip
    race = throughput_race.Race(seconds, {torch: "torch.compile does not work here (X: y)"})
    yardstick = Yardstick(10, 2e9, {"float32": 4.0}, 2)
    found = dict(zip(entries(), rows(entries(), race, yardstick), strict=True))
    assert found[uniform]["images_per_s"] == {"min": 80, "median": 160, "max": 320}
    assert found[uniform]["tflops_per_s"] == pytest.approx(0.32)
    assert found[uniform]["utilisation"] == pytest.approx(0.32 / 8)
    assert [found[e]["over_uniform"] for e in (uniform, adaptive, larger)] == [1.0, 0.25, 1.0]
    assert found[generated]["images_per_s"] == {"min": 1, "median": 2, "max": 4}
    assert "utilisation" not in found[generated] and found[torch]["images_per_s"] is None
    about = {
        "row": "digits", "model": "unet", "devices": "2 x cpu", "device_kind": "cpu", "every": 10,
        "cycles": 3, "settings": ["float32: products in float32"], "flops_per_image": 2e9,
        "peak_tflops": {"float32": None}, "generation": "ddim, 3 steps",
    }  # fmt: skip
    said = text({**about, "rows": list(found.values())})
    assert "no peak known of cpu: --peak_tflops X" in said
    assert "PyTorch compiled" in said and "torch.compile does not work here (X: y)" in said
    assert "best batch of uniform, float32: 16, 640 images/s" in said
    assert "generation, images/s: ddim, 3 steps" in said and "160 (80 to 320)" in said
    assert "peak of one device, TFLOP/s: float32 4" in text(
        {**about, "rows": [], "peak_tflops": {"float32": 4.0}}
    )


def test_against_torch():
    uniform, _, compiled, larger, _ = entries()
    eager = compiled._replace(name="eager")
    seconds = {
        uniform: [1.0, 2.0, 2.0], compiled: [1.0, 3.0, 2.5], larger: [1.0, 1.0, 1.0],
        eager: [3.0],  # it ran out of memory after a round
    }  # fmt: skip
    cpu = {
        uniform: [2.0, 2.0, 4.0], compiled: [2.0, 3.0, 5.0], larger: [1.0, 1.0, 1.0], eager: [8.0]
    }  # fmt: skip
    race = throughput_race.Race(seconds, {eager: "out of memory"}, cpu)
    found = rows([uniform, compiled, larger], race, Yardstick(10, 2e9, {"float32": None}, 1))
    ratio = {"min": 1.0, "median": 1.25, "max": 1.5, "cpu": 1.25}
    once = {"min": 3.0, "median": 3.0, "max": 3.0, "cpu": 4.0}
    assert [row["over_torch"] for row in found] == [{"eager": once, "compiled": ratio}, {}, {}]
    about = {
        "row": "digits", "model": "unet", "devices": "1 x cpu", "device_kind": "cpu", "every": 10,
        "cycles": 3, "settings": [], "flops_per_image": 2e9, "peak_tflops": {"float32": None},
        "rows": found,
    }  # fmt: skip
    assert (
        "uniform, batch 8, over PyTorch compiled: 1.250 x (1.000 to 1.500) the images/s; "
        "CPU seconds, PyTorch's over ours: 1.250"
    ) in text(about)


def test_turns_are_taken_in_rounds_and_one_that_cannot_run_is_left_out():
    order, finished = [], []

    def turn(name, fails_in=None):
        def run():
            order.append(name)
            if order.count(name) - 1 == fails_in:
                raise throughput_race.CannotRunError(f"{name} is too large")

        return run

    turns = {"a": turn("a"), "b": turn("b", 0), "c": turn("c", 2)}
    race = throughput_race.in_turn(
        turns, 3, after_round=lambda r: finished.append({k: len(v) for k, v in r.seconds.items()})
    )
    assert "".join(order) == "abc" + "ac" + "ac" + "a"
    assert finished == [
        {"a": 1, "b": 0, "c": 1},
        {"a": 2, "b": 0, "c": 1},
        {"a": 3, "b": 0, "c": 1},
    ]
    assert race.failures == {"b": "b is too large", "c": "c is too large"}
    assert list(turns) == ["a"]


def test_only_a_lack_of_memory_is_taken_for_one():
    def fails(message):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(throughput_race.CannotRunError, match=r"^out of memory \(.*trying to alloc"):
        throughput_race.with_memory(lambda: fails("RESOURCE_EXHAUSTED: trying to allocate 9G\nof"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        throughput_race.with_memory(lambda: fails("INTERNAL: x"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cycles", "0"], "--cycles: 0 is out of range: must be at least 1"),
        (["--batch_sizes", "8", "0"], "--batch_sizes: 0 is out of range"),
        (["--batch_sizes", "8", "9"], "--batch_sizes: 9 is not divisible by the 8 devices: use 8"),
        (["--train.batch_size", "9"], "--train.batch_size: 9 is not divisible by the 8 devices"),
        (["--batch_sizes"], "argument --batch_sizes: expected at least one argument"),
        (["--dtypes", "float16"], "argument --dtypes: invalid choice: 'float16'"),
        (["--model.dtype=bfloat16"], "--model.dtype: there are several here: use --dtypes"),
        (["--samplers", "unifrom"], "--samplers: 'unifrom' is unknown: did you mean 'uniform'"),
        (["digits_stratified"], "--sampler.stratified: True means nothing to the adaptive"),
        (["--peak_tflops", "0"], "--peak_tflops: 0 is out of range"),
        (["--peak_tflops", "1", "2", "3"], "--peak_tflops: 3 numbers for 2 of --dtypes (float32 b"),
        (["--sampler.nmae", "beta"], "--sampler.nmae: unknown field"),
        (["overhaed"], "'overhaed' is not a row: did you mean 'overhead'"),
        (["--model.multipliers", *"1111111111", "--model.attention", *["False"] * 10], "--model: "),
        (["--out", str(ROOT)], f"--out: {ROOT} is a folder: give a file"),
        (["--out", f"{__file__}/x"], "--out: cannot use"),
        (["--trace", __file__], "--trace: cannot use"),
        (["--torch"], "--torch: PyTorch is not installed: python -m pip install"),
    ],
)
def test_mistakes_cost_one_line(monkeypatch, argv, message):
    monkeypatch.setattr(torch_trainer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # --torch sets it, for good
    named = bool(argv) and not argv[0].startswith("-")
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        throughput.main([*argv[:named], *CONFIGS, *argv[named:]])
    assert message in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model.name dit", "only the U-Net is there in PyTorch, got 'dit'"),
        ("--model.remat True", "--model.remat True is not there in PyTorch"),
        ("--weighting.name p2", "the loss weighting 'p2' is not there in PyTorch"),
        ("", "runs on one device, JAX has 8: hide the others"),
    ],
)
def test_what_pytorch_has_not(monkeypatch, argv, message):
    monkeypatch.setattr(torch_trainer.importlib.util, "find_spec", lambda name: name)
    _, config = parse(["digits", *argv.split()], configs_dir=ROOT / "configs")
    with pytest.raises(UserError) as caught:
        torch_trainer.check_torch(config, sharding.make_mesh())
    assert message in str(caught.value)


def test_the_plan():
    args, overrides = throughput.arguments(["digits_impact", *CONFIGS, "--seed", "3", "--torch"])
    assert (args.row, overrides) == ("digits_impact", ["--seed", "3"])
    args.torch = False
    _, config = parse([args.row], configs_dir=ROOT / "configs")
    plan = make_plan(config, args, one_device())._replace(torch=True)
    size, names = config.train.batch_size, [("jax", "uniform"), ("jax", "impact")]
    names += [("torch", "eager"), ("torch", "compiled")]
    expected = [Entry("train", *n, d, size) for d in ("float32", "bfloat16") for n in names]
    expected += [Entry("generate", "jax", "ddim", d, size) for d in ("float32", "bfloat16")]
    assert plan.entries() == expected
    chosen = plan.config_of("uniform", "bfloat16", 7)
    assert (chosen.model.dtype, chosen.train.batch_size) == ("bfloat16", 7)
    assert (chosen.sampler.name, chosen.sampler.every) == ("uniform", config.sampler.every)
    assert plan.config_of("impact", "float32", 7).sampler == config.sampler


def check_rows(report, names, dtype, peak):
    """Of one dtype and a batch of 8: all rows are there, and their numbers fit together."""
    assert [(row["kind"], row["framework"], row["name"]) for row in report["rows"]] == names
    for row in report["rows"]:
        speed = row["images_per_s"]
        assert (row["batch_size"], row["dtype"], row["note"]) == (8, dtype, None)
        assert len(row["seconds"]) == report["cycles"] == 2
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        images = 8 * (report["every"] if row["kind"] == "train" else 1)
        assert speed["max"] == pytest.approx(images / min(row["seconds"]))
        if row["kind"] == "train":
            share = speed["median"] * report["flops_per_image"] / peak
            assert row["utilisation"] == pytest.approx(share)
            assert (row["over_uniform"] == 1) == (row["name"] == "uniform")


@pytest.mark.slow
def test_a_run_of_all_its_parts(run_data, tmp_path, capsys):
    folder = tmp_path / "trace"
    extra = ["--dtypes", "float32", "--peak_tflops", "0.5", "--trace", str(folder)]
    report = run(tmp_path, run_data, *extra)
    names = [("train", "jax", "uniform"), ("train", "jax", "adaptive"), ("generate", "jax", "ddim")]
    check_rows(report, names, "float32", 8 * 0.5e12)
    said = capsys.readouterr().out
    assert said.count("adaptive") == 1 and "peak of one device, TFLOP/s: float32 0.5" in said
    assert {
        path.relative_to(folder).parts[0] for path in folder.rglob("perfetto_trace.json.gz")
    } == {
        f"train-jax-{name}"
        for name in ("uniform-float32-8", "adaptive-float32-8", "adaptive-float32-8-probe")
    }


def test_classes_guidance_other_images_and_bfloat16(run_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    extra = "--dtypes bfloat16 --samplers uniform --peak_tflops 1 --model.name dit"
    extra += " --generate.guidance 2 --data.downsample 2"
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "num_classes": 10}
    extra += "".join(f" --model.transformer.{name} {size}" for name, size in sizes.items())
    report = run(tmp_path, run_data, *extra.split())
    names = [("train", "jax", "uniform"), ("generate", "jax", "ddim")]
    check_rows(report, names, "bfloat16", 1e12)
    assert report["model"] == "dit on 4x4x1 images of digits"


def test_flops_are_of_the_whole_batch_however_many_devices_share_it(run_data):
    """Three times the forward pass, to a tenth: that of a convolution's two gradients."""
    argv = ["overhead", "--data.dir", str(run_data), "--train.batch_size", "64"]
    _, config = parse(argv, configs_dir=ROOT / "configs")
    args, _ = throughput.arguments(CONFIGS)
    mesh = sharding.make_mesh()
    plan = make_plan(config, args, mesh)
    found = flops_per_image(plan, mesh, image_of(config))
    assert mesh.size == 8 and found == pytest.approx(3 * 26.33e6, rel=0.1)
