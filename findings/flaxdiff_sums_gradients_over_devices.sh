#!/usr/bin/env bash
# flaxdiff's trainer takes pmean of the gradients inside shard_map. Its parameters are replicated
# there, so jax has already summed their gradients over the devices: the mean of eight equal sums
# is the sum. With plain SGD, a step on 8 devices is 8 times the mean of what the same train step
# does with each device's examples and key by itself. Adam hides all of it but its epsilon, and
# clipping by norm sees gradients 8 times too large.
# Seen with flaxdiff 0.2.11 and jax 0.12.0.1 on Python 3.13, on 8 virtual CPU devices. Output seen:
#   flaxdiff 0.2.11, jax 0.12.0.1: the step on 8 devices is 8.000 times the mean of 8 steps on one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.13 -m venv env
env/bin/python -m pip install -q flaxdiff==0.2.11 jax==0.12.0.1 jaxlib==0.12.0.1
cat >look.py <<'P'
from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flaxdiff.inputs import DiffusionInputConfig
from flaxdiff.predictors import EpsilonPredictionTransform
from flaxdiff.schedulers import CosineNoiseScheduler
from flaxdiff.trainer import GeneralDiffusionTrainer


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, temb):
        return nn.Conv(1, (3, 3))(x)


def trainer(distributed):
    return GeneralDiffusionTrainer(
        model=Model(),
        optimizer=optax.sgd(1e-2),
        noise_schedule=CosineNoiseScheduler(1000),
        input_config=DiffusionInputConfig("image", (8, 8, 1), []),
        rngs=jax.random.PRNGKey(0),
        model_output_transform=EpsilonPredictionTransform(),
        distributed_training=distributed,
        checkpoint_base_path="checkpoints" + str(distributed),
    )


def moved(trainer, images, index):
    step = trainer._define_train_step(batch_size=len(images))
    state, _, _ = step(trainer.state, trainer.rngstate, {"image": images}, index)
    pair = (state.params, trainer.state.params)
    return np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, pair))])


images = np.random.default_rng(0).integers(0, 255, (32, 8, 8, 1)).astype(np.uint8)
together = moved(trainer(True), images, jnp.arange(8))
one = trainer(False)
parts = [moved(one, images[4 * i : 4 * i + 4], jnp.int32(i)) for i in range(8)]
ratio = together @ np.mean(parts, 0) / np.sum(np.mean(parts, 0) ** 2)
print(
    f"flaxdiff {version('flaxdiff')}, jax {version('jax')}: "
    f"the step on 8 devices is {ratio:.3f} times the mean of 8 steps on one"
)
P
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
env/bin/python look.py 2>error | tail -1 | tee found || { cat error >&2; exit 1; }
echo "flaxdiff 0.2.11, jax 0.12.0.1: the step on 8 devices is 8.000 times the mean of 8 steps on one" >wanted
diff wanted found
