"""Learned samplers in kauldron's train step, around hackable_diffusion's own model and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import changed, fences, read

import adaptive_ts as ats

pytest.importorskip("hackable_diffusion", reason="the extra [hackable-diffusion], Python 3.12")

from hackable_diffusion import hd
from hackable_diffusion.kdiff import core
from hackable_parts import BATCH, LOSS, PROCESS, TIME, Network, applied, diffusion
from kauldron import kd

from adaptive_ts.integrations.hackable_diffusion import LawTimeSampler, SampledTrainStep

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


CONFIG, TRAINER, OWN = (
    fence.code
    for fence in fences(read("docs/howto/hackable_diffusion.md"))
    if fence.language == "diff"
)


def parts(mask=None):
    wrapper = core.KauldronLossWrapper(loss=LOSS, mask=mask)
    streams = [kd.train.RngStream("default", train=True, eval=True)]
    return dict(
        model=diffusion(hd.training.time_sampling.UniformTimeSampler()),
        optimizer=ADAM,
        rng_streams=kd.train.RngStreams(streams, seed=0),
        sharding=kd.sharding.ShardingStrategy(),
        init_transform=kd.ckpts.NoopTransform(),
        aux=kd.train.Auxiliaries(losses={"diffusion_loss": wrapper}, metrics={}, summaries={}),
    )


def train_step(sampler, mask=None):
    return SampledTrainStep(sampler=sampler, **parts(mask))


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


def test_the_page_s_config():
    source = """
cfg.model = core.Diffusion(
    time_sampler=hd.training.time_sampling.UniformTimeSampler(
        span=hd.jax_helpers.SafeSpan(safety_epsilon=1e-4)
    ),
    network=network, corruption_process=process, x0="batch.image", cond={"label": "batch.label"},
)
"""
    page = {"core": core, "hd": hd, "network": Network(), "process": PROCESS}
    page["cfg"] = type("Config", (), {})
    exec(changed(source, CONFIG), page)
    model = page["cfg"].model
    assert isinstance(model.time_sampler, LawTimeSampler)
    time = applied(model, applied(model, None))["noise_info"]["time"]
    assert time.shape == (8, 1, 1, 1) and len(np.unique(time)) == 8


def test_the_page_s_trainer():
    page = {"kd": kd, "parts": parts()}
    exec(changed("trainstep = kd.train.TrainStep(**parts)\n", TRAINER), page)
    state = page["trainstep"].init(SPEC)
    state, _ = page["trainstep"].step(state, BATCH)
    assert int(state.collections["timesteps"]["state"].count.sum()) == 8


def test_the_page_s_own_train_step():
    source = """
import optax
@jax.jit
def train_step(params, opt_state, batch, key):
    value, grads = jax.value_and_grad(mean_loss)(params, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates)
    return new, opt_state, value
"""
    model = diffusion(hd.training.time_sampling.UniformTimeSampler())
    source = changed(source, OWN)
    page = {"jax": jax, "tx": ADAM, "diffusion": model, "loss": LOSS}
    exec(source, page)
    params = applied(model, None)
    carried = (params, ADAM.init(params), page["sampler"].init(jax.random.key(0), BATCH))
    for step in range(3):
        *carried, value = page["train_step"](*carried, BATCH, jax.random.key(step))
        assert np.isfinite(value)
    assert int(carried[2].count.sum()) == 3 * 8 and differ(params, carried[0])
