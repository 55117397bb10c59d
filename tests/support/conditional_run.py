"""A trained run whose model is told classes, a small DiT, made once for all who ask for it."""

from small_run import arguments, parse, train

from adaptive_ts.experiment.config.paths import replace

STEPS = 5  # the label reaches the images from the third on: DiT begins with zeros
TRANSFORMER = (
    "--model.name dit --model.transformer.patch_size 4 --model.transformer.hidden_size 8 "
    "--model.transformer.depth 1 --model.transformer.num_heads 1 "
)
OPTIONS = (
    f"{TRANSFORMER} --model.transformer.num_classes 10 --model.transformer.class_dropout 0.2 "
    f"--sampler.name uniform --generate.num_images 24 --train.steps {STEPS} "
    f"--train.save_every {STEPS - 1} "
    "--optimizer.warmup_steps 0 --optimizer.learning_rate 0.05"
)


def conditional_run(run_data, once):
    """The folder of the run. For those who only read: it is shared."""

    def make(folder):
        code, _ = train(folder / "run", run_data, OPTIONS)
        assert code == 0

    return once("conditional_run", make) / "run"


def conditional_config(run_data, **changes):
    """Its config, changed: ``model__transformer__class_dropout=0.5``."""
    _, config = parse(arguments("unused", run_data, OPTIONS))
    return replace(config, {name.replace("__", "."): v for name, v in changes.items()})
