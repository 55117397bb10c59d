"""The lines that the how-to pages add: at most ten to a codebase, and they run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_dit
import pytest
import stub_maxdiffusion
from documents import added_lines, changed, fences, read

import adaptive_ts as ats

PAGES = {
    "maxdiffusion": [10],
    "flaxdiff": [7, 9],
    "own_dit": [10],
    "hackable_diffusion": [4, 4, 9],
}  # flaxdiff's tenth is in the script, as the page says


def diffs(page):
    return [f.code for f in fences(read(f"docs/howto/{page}.md")) if f.language == "diff"]


@pytest.fixture(autouse=True)
def as_their_code_has_it(quick_compilation):
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        yield


@pytest.mark.parametrize("page", PAGES)
def test_at_most_ten_lines_are_added(page):
    found = [len(added_lines(diff)) for diff in diffs(page)]
    assert found == PAGES[page] and max(found) <= 10


def test_the_readers_of_diffs():
    source = "a\nb\nc\nd\n"
    assert changed(source, "@@ one\n-b\n+B\n@@\n c\n+e\n") == "a\nB\nc\ne\nd\n"
    assert changed(source, "-a\n...\n-d\n+all") == "all\n"
    assert added_lines("+x\n+\n-y\n z") == ["x"]
    with pytest.raises(AssertionError, match="found 0 times"):
        changed(source, "-a\n-c\n+B")


# A DiT of one's own ------------------------------------------------------------------------------

IMAGES = {
    "image": jax.random.normal(jax.random.key(0), (8, 8, 8, 1)),
    "labels": jnp.arange(8),
}


@pytest.mark.parametrize("line", [None, "ats.loss_second_moment(ats.discrete(1000), history=1)"])
def test_a_dit_of_one_s_own(line):
    """The page's own sampler, and another in its line: the loss falls on one batch."""
    source = changed(Path(own_dit.__file__).read_text(), diffs("own_dit")[0])
    if line:
        source = re.sub(r"^sampler = .*$", f"sampler = {line}", source, flags=re.MULTILINE)
    page = {"__name__": "page"}
    exec(compile(source, "own_dit.md", "exec"), page)
    params = page["model"].init(jax.random.key(1), IMAGES["image"], jnp.arange(8), jnp.arange(8))
    state = {
        "params": params,
        "ema": params,
        "opt_state": page["tx"].init(params),
        "sampler": page["sampler"].init(jax.random.key(2), IMAGES),
    }
    first, losses = jax.device_get(state["sampler"]), []
    for step in range(60):
        state, loss = page["train_step"](state, IMAGES, jax.random.key(step))
        losses.append(float(loss))
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])
    pairs = zip(*map(jax.tree.leaves, (first, jax.device_get(state["sampler"]))), strict=True)
    assert any(np.any(a != b) for a, b in pairs)


# maxdiffusion ------------------------------------------------------------------------------------


def test_the_stub_of_maxdiffusion_has_the_page_s_lines():
    has = {line.split("  #")[0].strip() for line in read_stub().split("\n")}
    missing = [line for line in added_lines(diffs("maxdiffusion")[0]) if line.strip() not in has]
    assert not missing


def read_stub():
    return Path(stub_maxdiffusion.__file__).read_text()


def latents(steps):
    keys = jax.random.split(jax.random.key(3), steps)
    return [
        {
            "pixel_values": jax.random.normal(key, (8, 4, 8, 8)),  # NCHW
            "input_ids": jax.random.normal(key, (8, 3, 6)),
        }
        for key in keys
    ]


def adaptive():
    policy = ats.learning.conv_beta_policy(image_key="pixel_values", channel_axis=1)
    return ats.adaptive(ats.discrete(1000), policy, optax.adam(1e-3), every=1)


@pytest.mark.parametrize(
    "make", [lambda: ats.loss_second_moment(ats.discrete(1000)), adaptive], ids=["page", "adaptive"]
)
def test_maxdiffusion_s_step(make, monkeypatch):
    sampler = make()
    monkeypatch.setattr(stub_maxdiffusion, "sampler", sampler)
    trainer = stub_maxdiffusion.Trainer(0, latents(4))
    before = jax.device_get(trainer.state.params)
    step = trainer.compile_train_step(stub_maxdiffusion.PIPELINE, stub_maxdiffusion.PARAMS)
    _, state = trainer.training_loop(step, stub_maxdiffusion.PIPELINE)
    wanted = jax.eval_shape(sampler.init, jax.random.key(0), latents(1)[0])
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, trainer.losses)))
    pairs = zip(*map(jax.tree.leaves, (before, trainer.state.params)), strict=True)
    assert all(np.any(a != b) for a, b in pairs)
    if make is not adaptive:  # every step recorded the losses of its eight examples
        assert int(state.count.sum()) == 4 * 8
