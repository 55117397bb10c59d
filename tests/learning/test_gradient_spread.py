"""How noisy one probe's policy gradient is, by what a probe costs (docs/concepts/probes.md).

A model in training is held still; from it many single steps are taken, each on a fresh batch with
fresh draws, and each is judged by `adaptive` itself: with plain gradient descent for the policy's
optimizer, what its policy moves by is the gradient. The policy is then put back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import adaptive_ts as ats
from adaptive_ts.experiment.assembly.build import build
from adaptive_ts.experiment.config.row_files import load_rows
from adaptive_ts.experiment.devices.sharding import make_mesh

IMAGES = (load_digits().images[..., None] / 8 - 1).astype(np.float32)
BATCH, HISTORY = 128, 20
BEFORE, AFTER = (3, 100), (2, 25)  # |S|, strata of a profile


def forwards(kind):
    """Images of a probe."""
    selected, strata = kind
    return 2 * (strata + selected * BATCH)


@functools.cache
def run():
    """(the digits run's parts, its step on given timesteps, its first parameters and state)."""
    built = build(load_rows()["digits"].config, make_mesh(jax.devices()[:1]))
    parts = built.parts

    @jax.jit
    def step(params, opt_state, batch, t, key):
        def loss(params):
            return jnp.mean(parts.loss_fn(params, batch, t, key))

        updates, opt_state = parts.optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = built.init_params(jax.random.key(0), {"image": jnp.zeros((BATCH, 8, 8, 1))})
    return parts, step, params, parts.optimizer.init(params)


def noise_to_signal(kinds, *, steps, probes):
    """Per kind: tr Cov(g) / |E g|^2 of the gradient g of one probe."""
    parts, step, params, opt_state = run()
    rng, key = np.random.default_rng(0), jax.random.key(1)
    policy = ats.learning.conv_beta_policy()

    def batch_of():
        return {"image": jnp.asarray(IMAGES[rng.integers(len(IMAGES), size=BATCH)])}

    for i in range(steps):
        k = jax.random.fold_in(key, i)
        t = jax.random.randint(k, (BATCH,), 0, 1000)
        params, opt_state = step(params, opt_state, batch_of(), t, k)

    def judged(sampler, state, draw, batch, new, key):
        extras = {"params": params, "new_params": new, "loss_fn": parts.probe_loss_fn}
        losses = jnp.zeros((BATCH,))
        after, _ = sampler.update(state, draw, losses, key=key, batch=batch, probe=True, **extras)
        moved = jax.tree.map(jnp.subtract, state.policy, after.policy)
        leaves = [x.ravel() for x in jax.tree.leaves(moved)]
        return after._replace(policy=state.policy), jnp.concatenate(leaves)

    samplers = {
        kind: ats.adaptive(
            parts.grid, policy, optax.sgd(1.0), entropy_coef=0.0, history=HISTORY,
            num_selected=kind[0], num_buckets=kind[1],
        )
        for kind in kinds
    }  # fmt: skip
    judge = {kind: jax.jit(functools.partial(judged, s)) for kind, s in samplers.items()}
    states = {kind: s.init(jax.random.key(5), batch_of()) for kind, s in samplers.items()}
    draw_of, found = jax.jit(samplers[kinds[0]].sample), {kind: [] for kind in kinds}
    for i in range(HISTORY + probes):
        batch, k = batch_of(), jax.random.fold_in(key, steps + i)
        draw = draw_of(k, states[kinds[0]], batch)
        new, _ = step(params, opt_state, batch, draw.t, k)
        for kind in kinds:
            states[kind], g = judge[kind](states[kind], draw, batch, new, k)
            if i >= HISTORY:
                found[kind].append(np.asarray(g, np.float64))
    return {kind: _ratio(np.stack(g)) for kind, g in found.items()}


def _ratio(g):
    variance = g.var(0, ddof=1).sum()
    return float(variance / max((g.mean(0) ** 2).sum() - variance / len(g), 1e-30))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, 300, 800])
def test_the_default_probe_is_less_noisy_at_equal_cost(steps):
    found = noise_to_signal((BEFORE, AFTER), steps=steps, probes=100)
    cost = forwards(AFTER) / forwards(BEFORE)
    print(f"after {steps} steps: {found}; at equal cost {cost * found[AFTER] / found[BEFORE]:.2f}")
    assert cost < 0.6
    assert cost * found[AFTER] < 0.8 * found[BEFORE]
