"""A model that is told classes: in training, in the held-out bound and when it makes images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditional_run import OPTIONS, STEPS, TRANSFORMER, conditional_config, conditional_run
from small_run import arguments, parse, summary, train

from adaptive_ts import diffusion
from adaptive_ts.experiment.assembly import build
from adaptive_ts.experiment.assembly.state import abstract, make_init
from adaptive_ts.experiment.assembly.step import make_step
from adaptive_ts.experiment.config.paths import replace
from adaptive_ts.experiment.data.decoding import Records
from adaptive_ts.experiment.data.loading import load_split
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.evaluate.likelihood import evaluate
from adaptive_ts.experiment.generate import making, request
from adaptive_ts.experiment.generate.trained import load_trained, read_config
from adaptive_ts.experiment.main import generate

NULL = 10


@pytest.fixture(scope="module")
def run(run_data, once):
    return conditional_run(run_data, once)


@pytest.fixture(scope="module")
def trained(run):
    return load_trained(run, read_config(run), sharding.make_mesh(), log=lambda line: None)


def loud(params):
    """Weights of which none are zero, so that the label matters much."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * draw.standard_normal(x.shape, np.float32), params)


def untrained(config):
    built = build.build(config, sharding.make_mesh(jax.devices()[:1]))
    init = jax.jit(lambda key: built.init_params(key, {"image": jnp.zeros((1, 8, 8, 1))}))
    return built, loud(jax.device_get(init(jax.random.key(0))))


def digits(count):
    draw = np.random.default_rng(0)
    image = draw.uniform(-1, 1, (count, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(count, dtype=np.int32) % 10}


def test_the_label_reaches_the_trained_model(trained):
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
    t, labels = jnp.full((11,), 30), jnp.arange(11)
    eps = jax.jit(trained.built.eps_fn)(trained.state.ema, jnp.repeat(x, 11, axis=0), t, labels)
    apart = np.abs(np.asarray(eps)[:, None] - np.asarray(eps)[None]).max((2, 3, 4))
    assert apart[~np.eye(11, dtype=bool)].min() > 1e-3, "each class, and none, has its own"


def test_the_held_out_bound_is_that_of_the_held_out_labels(run, run_data, trained):
    mesh = sharding.make_mesh()
    test = load_split(conditional_config(run_data).data, "test", lambda line: None)
    _, key = jax.random.split(jax.random.key(0))
    key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))[0]
    params, told = loud(jax.device_get(trained.state.ema)), []
    whole_params = jax.device_put(params, sharding.replicated(mesh))

    def measure(dataset, params=whole_params, **options):
        return evaluate(trained.built, params, dataset, 8, key, mesh, **options)

    whole = measure(test, trained.state.ema, tell=told.append)
    assert sum(told) == whole.num_images == 256
    assert whole.total_vlb == pytest.approx(summary(run)["vlb_bits_per_dim"], rel=1e-6)
    assert whole.total_loss == pytest.approx(summary(run)["held_out_loss"], rel=1e-6)

    few = measure(test, max_images=8)
    batch = {"image": test.images[:8].astype(np.float32) / 127.5 - 1, "label": test.labels[:8]}
    index = jnp.arange(8, dtype=jnp.int32)
    for loss, expected in ((trained.built.loss, few.loss), (trained.built.vlb, few.vlb)):
        at = jax.jit(lambda t: loss.at(params, batch, jnp.full(8, t), key, index).mean())
        for stratum in (0, 20):
            value = at(few.timesteps[stratum])
            np.testing.assert_allclose(value, expected[stratum], rtol=1e-4)

    wrong = measure(test._replace(labels=(test.labels + 1) % 10), max_images=8)
    assert np.abs(wrong.loss / few.loss - 1).max() > 0.01
    files = Records(test.images.shape, lambda i: (test.images[i], test.labels[i]))
    read = measure(test._replace(images=files, labels=np.zeros(0, np.int32)), max_images=8)
    np.testing.assert_array_equal(read.vlb, few.vlb)


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_training_hides_classes_and_nothing_else_does(run_data, name):
    """Where it hides them the loss is that of the null class, elsewhere that of the label."""
    depth = {"dit": 1, "uvit": 2}[name]
    changes = {"model__name": name, "model__transformer__depth": depth, "sampler__name": "impact"}
    config = conditional_config(run_data, model__transformer__class_dropout=0.5, **changes)
    never = conditional_config(run_data, model__transformer__class_dropout=0.0, **changes)
    (hiding, params), plain = untrained(config), build.build(never, sharding.make_mesh())
    assert hiding.parts.probe_loss_fn is hiding.loss and plain.parts.loss_fn is plain.loss
    adaptive = build.build(replace(config, {"sampler.name": "adaptive"}), sharding.make_mesh())
    assert adaptive.parts.probe_loss_fn is adaptive.vlb
    batch, key, index = digits(32), jax.random.key(1), jnp.arange(32)
    nothing = {**batch, "label": np.full(32, NULL, np.int32)}
    t = index + 5

    @jax.jit
    def measure(batch):
        losses = (hiding.loss, hiding.vlb, plain.loss, plain.vlb, hiding.eps_loss)
        return [loss.at(params, batch, t, key, index) for loss in (*losses, hiding.parts.loss_fn)]

    loss, vlb, *never, of_eps, training = map(np.asarray, measure(batch))
    np.testing.assert_array_equal([loss, vlb], never)
    np.testing.assert_array_equal(of_eps, loss, "eps is what the model predicts")
    of_null = np.asarray(measure(nothing)[0])
    assert np.abs(of_null / loss - 1).min() > 1e-4, "the label matters to every one of them"
    kept = np.isclose(training, loss, rtol=1e-5)
    np.testing.assert_allclose(training, np.where(kept, loss, of_null), rtol=1e-5)
    # Binomial(32, 1/2) is beyond these with p = 1e-3.
    assert 7 <= kept.sum() <= 25


@pytest.mark.parametrize("sampler", ["adaptive", "impact"])
def test_a_probe_takes_the_label_of_each_image_along(run_data, sampler):
    mesh, shapes = sharding.make_mesh(), []
    built = build.build(conditional_config(run_data, sampler__name=sampler), mesh)

    def recording(params, batch, t, key, index):
        shapes.append((batch["image"].shape[:1], batch["label"].shape))
        return built.loss.at(params, batch, t, key, index)

    parts = built.parts._replace(probe_loss_fn=diffusion.ExampleLoss(recording))
    example = {"image": jnp.zeros((8, 8, 8, 1))}
    init = make_init(built.init_params, parts.optimizer, parts.sampler, example)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    state, key = abstract(init, jax.random.key(0), mesh), jax.random.key(0)
    after, _ = jax.eval_shape(make_step(parts, probe=True), state, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert shapes and all(image == label for image, label in shapes)


def test_guidance_is_two_evaluations_and_1_is_one(run_data):
    built, params = untrained(conditional_config(run_data))
    sizes = []

    def recording(params, x, t, label):
        sizes.append(len(x))
        return built.eps_fn(params, x, t, label)

    def by_hand(params, x, t, label):
        none = built.eps_fn(params, x, t, jnp.full_like(label, NULL))
        return none + 3.0 * (built.eps_fn(params, x, t, label) - none)

    def make(eps_fn, weight):
        config = conditional_config(run_data, generate__guidance=weight, generate__num_images=6)
        mesh = sharding.make_mesh(jax.devices()[:1])
        own = built._replace(eps_fn=eps_fn)
        batches = making.image_batches(config, own, (8, 8, 1), mesh, labels=(7, 1))
        (made,) = batches(params, jax.random.key(2))
        return made

    plain, guided = make(recording, 1.0), make(recording, 3.0)
    assert set(sizes) == {6, 12} and sizes[0] == 6
    np.testing.assert_allclose(guided, make(by_hand, 1.0), atol=2e-4)
    assert np.abs(guided - plain).max() > 0.01


def test_the_command_makes_images_of_the_classes_wanted(run, run_data, tmp_path):
    def make(name, *argv):
        out = tmp_path / name
        assert generate.main([str(run), "--out", str(out), "--no_png", *argv]) == 0
        with np.load(out / "images.npz") as file:
            arrays = dict(file)
        return arrays, json.loads((out / "info.json").read_text())

    own, info = make("own")
    assert (info["guidance"], info["labels"]) == (1.0, list(range(10)))
    assert own["labels"].dtype == np.int32
    np.testing.assert_array_equal(own["labels"], np.arange(24) % 10)
    picture = (tmp_path / "own" / "grid.png").read_bytes()
    assert picture == (run / "samples" / f"step_{STEPS:08d}.png").read_bytes()

    wanted = ("--labels", "3", "7", "3", "--guidance", "2.5")
    guided, info = make("guided", *wanted)
    assert (info["guidance"], info["labels"]) == (2.5, [3, 7, 3])
    np.testing.assert_array_equal(guided["labels"], [3, 7, 3] * 8)
    small, _ = make("small", *wanted, "--batch_size", "8")
    apart = np.abs(small["images"].astype(int) - guided["images"])
    assert apart.max() <= 1 and np.mean(apart > 0) < 0.002

    plain, _ = make("plain", *wanted[:4], "--guidance", "1")
    assert (plain["images"] != guided["images"]).any()
    same = own["labels"] == plain["labels"]
    changed = (plain["images"] != own["images"]).any((1, 2, 3))
    assert not changed[same].any() and changed[~same].mean() > 0.5


def test_labels_and_guidance_of_a_model_without_classes(run, run_data):
    _, config = parse(arguments("unused", run_data, TRANSFORMER))
    parser = generate.make_parser()

    def message(config, *argv):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            request.options(config, parser.parse_args([str(run), *argv]))
        return str(error.value)

    assert message(config, "--labels", "3", "1") == (
        "--labels: 3 1 means nothing to a model without classes: leave it out"
    )
    assert message(config, "--guidance", "2").startswith(
        "--guidance: 2.0 means nothing to a model without classes: leave it out"
    )
    never = replace(read_config(run), {"model.transformer.class_dropout": 0.0})
    assert message(never, "--guidance", "2").startswith("--guidance: 2.0 needs a model that was")
    assert request.options(config, parser.parse_args([str(run), "--guidance", "1"])) == config
    with pytest.raises(ValueError, match="means nothing to a model without classes"):
        built = build.build(config, sharding.make_mesh())
        changed = replace(config, {"generate.guidance": 2.0})
        making.image_batches(changed, built, (8, 8, 1), sharding.make_mesh())


def test_the_number_of_classes_is_the_data_set_s(run, run_data, tmp_path):
    with pytest.raises(UserError, match="num_classes: 7 is not the number of classes of digits"):
        train(tmp_path / "new", run_data, f"{OPTIONS} --model.transformer.num_classes 7")
    assert not (tmp_path / "new").exists()
    config = replace(read_config(run), {"model.transformer.num_classes": 7})
    with pytest.raises(UserError) as error:
        load_trained(run, config, sharding.make_mesh())
    assert str(error.value) == (
        "--model.transformer.num_classes: 7 is not the number of classes of digits: give 10, or "
        "None for a model without classes"
    )
    digits = load_split(config.data, "test", lambda line: None)
    for number in (10, None):
        build.check_classes(replace(config, {"model.transformer.num_classes": number}), digits)
