"""The U-Net and the training step in PyTorch are ours: ``pip install -e '.[train,parity]'``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_run import parse
from small_throughput import one_device, run

from adaptive_ts.experiment.assembly.build import build, first_state
from adaptive_ts.experiment.assembly.step import make_step
from adaptive_ts.experiment.config.groups import ModelConfig
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.costs import torch_trainer
from adaptive_ts.experiment.costs.race import CannotRunError, put_images
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.models.convert import from_torch
from adaptive_ts.experiment.models.unet import UNet

torch = pytest.importorskip("torch")

CONFIGS = {
    "golden": ModelConfig(channels=32, multipliers=(1, 2), attention=(False, True)),
    "uneven": ModelConfig(
        channels=6, multipliers=(2, 1, 3), res_blocks=2, attention=(True, False, False), groups=4
    ),
}
SIDE = 16


def filled(config, channels=3):
    """The U-Net with random weights everywhere, also where it begins with zeros."""
    from adaptive_ts.experiment.costs.torch_unet import UNet as TorchUNet

    model, rng = TorchUNet(config, channels).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.1, parameter.shape)))
    return model


def as_params(tensors, like=None):
    return from_torch("unet", {k: v.detach().numpy() for k, v in tensors.items()}, like=like)


def flat(tree):
    return {k: np.asarray(v) for k, v in flatten_dict(tree, sep="/").items()}


def ours(config):
    return UNet(
        config.channels, config.multipliers, config.res_blocks, config.attention,
        groups=config.groups, dtype=jnp.dtype(config.dtype),
    )  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name):
    config, rng = CONFIGS[name], np.random.default_rng(1)
    x = rng.standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
    t = np.array([3, 800], np.int32)
    model, unet = filled(config), ours(config)
    like = jax.eval_shape(unet.init, jax.random.key(0), x, t)["params"]
    params = as_params(model.state_dict(), like)

    def loss(params):
        out = unet.apply({"params": params}, x, t)
        return jnp.mean(out**2), out

    (_, expected), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    out = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t))
    torch.mean(out**2).backward()
    found = out.detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(found).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(found).max()))
    theirs = flat(as_params({k: p.grad for k, p in model.named_parameters()}, like))
    for path, value in flat(gradient).items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(theirs[path], value, atol=1e-3 * scale, err_msg=path)


def test_bfloat16_is_the_same_network():
    config = replace(CONFIGS["golden"], {"dtype": "bfloat16"})
    x = np.random.default_rng(1).standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
    t, model = np.array([3, 800], np.int32), filled(config)
    params = as_params(model.state_dict())
    expected = np.asarray(jax.jit(ours(config).apply)({"params": params}, x, t))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t))
    assert out.dtype == torch.float32
    error = np.abs(out.permute(0, 2, 3, 1).numpy() - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < 0.05


@pytest.fixture
def small(run_data, tmp_path):
    argv = f"digits --workdir {tmp_path} --data.dir {run_data} --schedule.num_timesteps 50"
    argv += " --model.channels 8 --train.batch_size 8 --sampler.name uniform --sampler.every 3"
    argv += " --optimizer.warmup_steps 2 --optimizer.learning_rate 1e-2 --optimizer.clip_norm 0.05"
    return parse(argv.split())[1]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_coefficients(small, prediction):
    """Noise and target of a timestep, as the loss in JAX has them."""
    config = replace(small, {"model.prediction": prediction})
    schedule = build(config, one_device()).schedule
    t = jnp.arange(config.schedule.num_timesteps)
    alpha, sigma, by_x0, by_noise = torch_trainer.coefficients(config)
    np.testing.assert_allclose(alpha, schedule.alpha(t), rtol=1e-6)
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-6)
    expected = {"eps": (0 * alpha, 1 + 0 * alpha), "v": (-sigma, alpha), "flow": (-1, 1)}
    for found, value in zip((by_x0, by_noise), expected[prediction], strict=True):
        np.testing.assert_allclose(found, value + 0 * alpha, rtol=1e-6)


def test_clipping_adam_and_average_are_those_of_the_step(small):
    """A cycle of three steps on given noise and timesteps, from the same weights."""
    mesh, rng = one_device(), np.random.default_rng(2)
    images = rng.integers(0, 256, (8, 8, 8, 1), np.uint8)
    x = rng.standard_normal((8, 8, 8, 1)).astype(np.float32)
    target, t = rng.standard_normal(x.shape).astype(np.float32), np.arange(8, dtype=np.int32)
    trainer = torch_trainer.TorchTrainer(small, images, "float32", compiled=False, mesh=mesh)
    names = [name for name, _ in trainer.model.named_parameters()]
    with torch.no_grad():
        begin = filled(small.model, 1).parameters()
        for own, average, value in zip(trainer.parameters, trainer.average, begin, strict=True):
            own.copy_(value)
            average.copy_(value)
    built, key = build(small, mesh), jax.random.key(0)
    init, _ = first_state(built, images.shape, key, mesh)
    state = init(key)
    params = as_params(trainer.model.state_dict(), state.params)
    params = jax.tree.map(np.array, params)  # PyTorch goes on to write into its own
    before = flat(params)

    def torch_loss(_images):
        given, wanted = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, target))
        return torch.mean((trainer.model(given, torch.from_numpy(t)) - wanted) ** 2)

    def loss(params, _batch, _t, _key):
        out = ours(small.model).apply({"params": params}, x, t)
        return jnp.mean((out - target) ** 2, axis=(1, 2, 3))

    trainer.loss = torch_loss
    trainer()
    step = make_step(built.parts._replace(loss_fn=loss), probe=None)
    state = state._replace(
        params=jax.tree.map(jnp.array, params), ema=jax.tree.map(jnp.array, params)
    )
    for _ in range(3):
        state, metrics = step(state, put_images(images, mesh), key)
        assert metrics["grad_norm"] > small.optimizer.clip_norm
    for tree, tensors in ((state.params, trainer.parameters), (state.ema, trainer.average)):
        theirs = flat(as_params(dict(zip(names, tensors, strict=True)), tree))
        moved = sum(((value - before[path]) ** 2).sum() for path, value in flat(tree).items())
        wrong = sum(((value - theirs[path]) ** 2).sum() for path, value in flat(tree).items())
        assert moved > 0.01 and wrong < 1e-4 * moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss(small, dtype):
    mesh = one_device()
    images = np.tile(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1), (64, 1, 1, 1))
    config = replace(small, {"optimizer.clip_norm": 1.0, "data.flip": True})
    trainer = torch_trainer.TorchTrainer(config, images, dtype, compiled=False, mesh=mesh)
    losses = [float(trainer._step()[0]) for _ in range(60)]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


def test_the_command(run_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    extra = "--dtypes float32 --samplers uniform --torch --trace"
    report = run(tmp_path, run_data, *extra.split(), str(tmp_path / "trace"))
    kinds = [(row["kind"], row["framework"], row["name"]) for row in report["rows"]]
    both = [("train", "torch", name) for name in torch_trainer.FLAVOURS]
    assert kinds == [("train", "jax", "uniform"), *both, ("generate", "jax", "ddim")]
    eager, compiled = report["rows"][1:3]
    assert eager["images_per_s"]["min"] > 0 and eager["over_uniform"] > 0
    assert (compiled["images_per_s"] is None) == (compiled["note"] is not None)
    assert (tmp_path / "trace" / "train-torch-eager-float32-8" / "trace.json").exists()
    said = capsys.readouterr().out
    assert "PyTorch eager" in said and f"PyTorch {torch.__version__}: channels_last" in said


def test_what_does_not_compile_is_said_in_one_line(small, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no compiler\nin sight")

    images = np.zeros((2, 8, 8, 1), np.uint8)
    options = {"dtype": "float32", "mesh": one_device()}
    trainer = torch_trainer.TorchTrainer(small, images, compiled=True, **options)
    trainer.loss = fail
    message = r"^torch.compile does not work here \(RuntimeError: no compiler\)$"
    with pytest.raises(CannotRunError, match=message):
        trainer()
    trainer = torch_trainer.TorchTrainer(small, images, compiled=False, **options)
    trainer.loss = fail
    with pytest.raises(RuntimeError, match="no compiler"):
        trainer()
