"""The lines of docs/howto/flaxdiff.md, put into flaxdiff itself where it is installed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import changed, fences, read
from flax import linen as nn

pytest.importorskip("flaxdiff", reason="it is no extra: uv run --with flaxdiff==0.2.11 pytest ...")

from flaxdiff.inputs import DiffusionInputConfig
from flaxdiff.predictors import EpsilonPredictionTransform
from flaxdiff.schedulers import CosineNoiseScheduler
from flaxdiff.trainer import general_diffusion_trainer as trainer_module

FIXED, LEARNED = (
    fence.code for fence in fences(read("docs/howto/flaxdiff.md")) if fence.language == "diff"
)
BATCH = {"image": np.random.default_rng(0).integers(0, 255, (8, 8, 8, 1)).astype(np.uint8)}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, temb):
        level = jnp.broadcast_to((temb / 1000)[:, None, None, None], x.shape)
        h = nn.silu(nn.Conv(8, (3, 3))(jnp.concatenate([x, level], axis=-1)))
        return nn.Conv(x.shape[-1], (3, 3))(h)


@pytest.fixture(autouse=True)
def as_their_code_has_it(quick_compilation):
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        yield


def trainer_of(module, folder, schedule):
    config = DiffusionInputConfig(
        sample_data_key="image", sample_data_shape=(8, 8, 1), conditions=[]
    )
    return module["GeneralDiffusionTrainer"](
        model=Model(),
        optimizer=optax.adam(1e-3),
        noise_schedule=schedule,
        input_config=config,
        rngs=jax.random.PRNGKey(0),
        model_output_transform=EpsilonPredictionTransform(),
        distributed_training=False,
        checkpoint_base_path=str(folder),
    )


def with_the_page_s_lines():
    """The namespace of their trainer's module, changed as the page says."""
    lines = Path(trainer_module.__file__).read_text().split("\n")
    places = [
        next(i for i, line in enumerate(lines) if line.strip().startswith(start))
        for start in ("folded_key = ", "# Loss function")
    ]
    first, last = places
    lines[first:last] = [f"    {line}" for line in lines[first:last]]
    module = {"__name__": "flaxdiff.trainer.changed", "__package__": "flaxdiff.trainer"}
    source = changed("\n".join(lines), LEARNED)
    exec(compile(source, "general_diffusion_trainer.py", "exec"), module)
    return module


def test_a_learned_sampler(tmp_path):
    module = with_the_page_s_lines()
    trainer = trainer_of(module, tmp_path, CosineNoiseScheduler(1000))
    sampler = module["sampler"]
    trainer.rngstate = (trainer.rngstate, sampler.init(jax.random.key(0), BATCH))
    step = trainer._define_train_step(batch_size=8)
    state, carried, losses = trainer.state, trainer.rngstate, []
    for _ in range(3):
        state, loss, carried = step(state, carried, BATCH, jnp.int32(0))
        losses.append(float(loss))
    assert np.all(np.isfinite(losses)) and len(set(losses)) == 3
    assert int(carried[1].count.sum()) == 3 * 8
    recorded = carried[1].losses
    assert np.all(recorded >= 0) and float(recorded.sum()) > 0
    pairs = zip(*map(jax.tree.leaves, (trainer.state.params, state.params)), strict=True)
    assert all(np.any(a != b) for a, b in pairs)


def test_a_fixed_law():
    page = {"jnp": jnp, "CosineNoiseScheduler": CosineNoiseScheduler}
    source = changed("schedule = CosineNoiseScheduler(1000)\n", FIXED)
    exec(source, page)
    state = trainer_module.RandomMarkovState(jax.random.key(1))
    times, after = page["schedule"].generate_timesteps(4000, state)
    assert times.dtype == jnp.int32 and times.shape == (4000,)
    # Beta(1, 2) has mean 1/3 and standard deviation 1/sqrt(18).
    assert abs(float(times.mean()) / 1000 - 1 / 3) < 4 / (18 * 4000) ** 0.5
    assert after is not state
