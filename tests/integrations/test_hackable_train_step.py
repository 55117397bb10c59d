"""Learned samplers in kauldron's train step, around hackable_diffusion's own model and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_ts as ats

pytest.importorskip("hackable_diffusion", reason="the extra [hackable-diffusion], Python 3.12")

from hackable_diffusion import hd
from hackable_diffusion.kdiff import core
from hackable_parts import BATCH, LOSS, TIME, diffusion
from kauldron import kd

from adaptive_ts.integrations.hackable_diffusion import SampledTrainStep

ADAM = optax.adam(1e-2)
SPEC = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
LEARNED = {
    "second_moment": lambda: ats.loss_second_moment(TIME, history=1),
    "adaptive": lambda: ats.adaptive(TIME, ats.learning.conv_beta_policy(), ADAM, every=1),
    "impact": lambda: ats.impact(TIME, ADAM, every=1, num_buckets=5),
}


@pytest.fixture(autouse=True)
def as_their_code_has_it(quick_compilation):
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        yield


def train_step(sampler, mask=None):
    wrapper = core.KauldronLossWrapper(loss=LOSS, mask=mask)
    streams = [kd.train.RngStream("default", train=True, eval=True)]
    return SampledTrainStep(
        sampler=sampler,
        model=diffusion(hd.training.time_sampling.UniformTimeSampler()),
        optimizer=ADAM,
        rng_streams=kd.train.RngStreams(streams, seed=0),
        sharding=kd.sharding.ShardingStrategy(),
        init_transform=kd.ckpts.NoopTransform(),
        aux=kd.train.Auxiliaries(losses={"diffusion_loss": wrapper}, metrics={}, summaries={}),
    )


def differ(a, b):
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


@pytest.mark.parametrize("name", LEARNED)
def test_the_state_is_carried_and_learns(name):
    sampler = LEARNED[name]()
    step = train_step(sampler)
    state = step.init(SPEC)
    first, params = jax.device_get((state.collections["timesteps"]["state"], state.params))
    wanted = jax.eval_shape(sampler.init, jax.random.key(0), BATCH)
    assert jax.tree.structure(first) == jax.tree.structure(wanted)
    state, aux = step.step(state, BATCH, return_losses=True)
    state, _ = step.step(state, BATCH)
    second = jax.device_get(state.collections["timesteps"]["state"])
    assert differ(first, second) and differ(params, state.params) and state.step == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(second))
    assert np.isfinite(aux.compute().loss_values["losses/total"])


def test_the_objective_is_the_mean_of_weight_times_loss():
    seen = {}

    def spy(state, sample, losses, **extra):
        jax.debug.callback(lambda *found: seen.update(found=found), sample.weight, losses)
        return state, {}

    sampler = ats.importance_weighted(ats.beta(TIME, 1.0, 2.0))._replace(update=spy)
    step = train_step(sampler)
    _, aux = step.step(step.init(SPEC), BATCH, return_losses=True)
    jax.effects_barrier()
    weight, losses = seen["found"]
    found = aux.compute().loss_values["losses/total"]
    np.testing.assert_allclose(found, np.mean(weight * losses), rtol=1e-5)
    # Neither the plain mean, nor kauldron's mean over a mask.
    assert abs(found - np.mean(losses)) > 1e-2
    assert abs(found - np.sum(weight * losses) / np.sum(weight)) > 1e-2
    assert jnp.std(weight) > 0.1


def test_a_mask_of_the_user_s_is_refused():
    step = train_step(ats.uniform(TIME), mask="batch.label")
    state = step.init(SPEC)
    wrong = r"'diffusion_loss' has mask='batch\.label', where the timesteps' weights belong"
    with pytest.raises(ValueError, match=wrong):
        step.step(state, BATCH)
