"""When a sampler probes: after so many steps, at the first that moved the parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import adaptive_ts as ats
from adaptive_ts.learning.due import moved

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH = {"image": jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)), jnp.float32)}


def loss_fn(params, batch, t, key):
    return (params["w"] - jnp.mean(batch["image"], axis=(1, 2, 3)) * (1 + t / 10)) ** 2


def sampler_of(name, tx, **options):
    grid = ats.discrete(10)
    if name == "impact":
        return ats.impact(grid, tx, num_buckets=5, num_examples=1, **options)
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=(2,))
    return ats.adaptive(grid, policy, optax.adam(1e-2), num_buckets=5, **options)


def run(name, tx, steps, *, probe=lambda i: None, **options):
    """Which of the steps probed, and the sampler's states."""
    sampler = sampler_of(name, tx, **options)

    @functools.partial(jax.jit, static_argnames="probe")
    def step(carry, key, probe):
        params, opt_state, state = carry
        keys = jax.random.split(key, 3)
        draw = sampler.sample(keys[0], state, BATCH)
        grads = jax.grad(lambda p: jnp.mean(loss_fn(p, BATCH, draw.t, keys[1])))(params)
        updates, new_opt = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        state, metrics = sampler.update(
            state,
            draw,
            loss_fn(params, BATCH, draw.t, keys[1]),
            key=keys[2],
            batch=BATCH,
            loss_fn=loss_fn,
            params=params,
            new_params=new,
            opt_state=opt_state,
            probe=probe,
        )
        return (new, new_opt, state), metrics

    params = {"w": jnp.float32(1.0)}
    carry = params, tx.init(params), sampler.init(jax.random.key(0), BATCH)
    probed, states = [], [carry[2]]
    for i in range(1, steps + 1):
        carry, metrics = step(carry, jax.random.fold_in(jax.random.key(1), i), probe(i))
        states.append(carry[2])
        if metrics["probed"]:
            probed.append(i)
    return probed, states


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def multi(k):
    return optax.MultiSteps(optax.sgd(1e-2), k).gradient_transformation()


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_each_every_th_step_where_all_move(name):
    assert run(name, optax.sgd(1e-2), 13, every=4)[0] == [4, 8, 12]


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_the_first_that_moved_after_every_steps(name):
    """Every third step moves: due after 4, a probe waits for the 6th; 4 later, for the 12th."""
    probed, states = run(name, multi(3), 20, every=4)
    assert probed == [6, 12, 18]
    for i in range(1, 21):
        learned = [s._replace(step=0, report={}) for s in states[i - 1 : i + 1]]
        assert same(*learned) == (i not in probed)


@pytest.mark.parametrize("name", ["adaptive", "impact"])
def test_where_the_host_chooses_an_idle_step_is_no_probe_and_the_next_is_due(name):
    chosen = {4: True}  # nothing moves in the 4th step of 3, ...
    probed, states = run(name, multi(3), 6, every=5, probe=lambda i: chosen.get(i, False))
    assert probed == []
    assert same(states[3]._replace(step=0), states[4]._replace(step=0))
    assert (states[4].step + 1) % 5 == 0  # ... so the counter has the next one due
    chosen = {6: True}
    assert run(name, multi(3), 6, every=5, probe=lambda i: chosen.get(i, False))[0] == [6]


def test_steps_of_rate_zero_and_skipped_ones_teach_nothing():
    warm_up = optax.sgd(lambda count: jnp.where(count < 5, 0.0, 1e-2))
    assert run("adaptive", warm_up, 9, every=2)[0] == [6, 8]
    frozen = optax.masked(optax.set_to_zero(), {"w": True})
    probed, states = run("adaptive", optax.chain(optax.sgd(1e-2), frozen), 6, every=2)
    assert probed == [] and same(states[0]._replace(step=0), states[-1]._replace(step=0))


def test_one_device_that_moved_is_enough(mesh8):
    old = jnp.zeros((8, 3))
    for new, expected in (
        (old, False),
        (old.at[5, 1].set(1), True),
        (old.at[0].set(jnp.nan), True),
    ):

        def local(old, new):
            return moved({"w": old}, {"w": new}, "data")

        found = jax.shard_map(local, mesh=mesh8, in_specs=P("data"), out_specs=P())(old, new)
        assert bool(found) is expected
    assert not moved({}, {}, None)
