"""--train.max_skipped: steps whose loss is not finite change nothing, and too many of them stop."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import arguments, lines, parse, saved_steps, terminated_at, train

from adaptive_ts.experiment.checkpoints.checksums import state_digest
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.generate.trained import load_trained
from adaptive_ts.experiment.train import loop

EXTRA = "--train.steps 6 --train.max_skipped 2 --train.max_to_keep 6"


@pytest.fixture
def bad(monkeypatch):
    """The set, empty yet, of the steps, from 1, whose loss and gradient are NaN.

    Their batches are black, which no batch of digits is, and the loss of black images is NaN.
    """
    numbers, make_plan, batches = set(), loop.make_plan, loop.batches

    def with_nan(loss_fn):
        def loss(params, batch, t, key):
            black = jnp.all(batch["image"] == -1.0)
            return loss_fn(params, batch, t, key) * jnp.where(black, jnp.nan, 1.0)

        return loss

    def planned(*args, **options):
        plan = make_plan(*args, **options)
        parts = plan.built.parts._replace(loss_fn=with_nan(plan.built.parts.loss_fn))
        return plan._replace(built=plan.built._replace(parts=parts))

    def blackened(dataset, *, start_step, **options):
        for number, batch in enumerate(batches(dataset, start_step=start_step, **options)):
            black = number + start_step + 1 in numbers
            yield {**batch, "image": np.zeros_like(batch["image"])} if black else batch

    monkeypatch.setattr(loop, "make_plan", planned)
    monkeypatch.setattr(loop, "batches", blackened)
    return numbers


def state_at(folder, run_data, step):
    _, config = parse(arguments(folder, run_data, EXTRA))
    found = load_trained(folder, config, sharding.make_mesh(), step=step, log=print)
    return jax.device_get(found.state)


def same_bits(a, b):
    return state_digest(a) == state_digest(b)


def test_bad_steps_change_nothing_and_too_many_in_a_row_stop(bad, run_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    bad |= {2, 4, 5, 6}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_checkpoints", terminated_at(4))
        code, said = train(folder, run_data, EXTRA)
    assert code == loop.EXIT_RESUME and "after step 5" in said[-1]
    told = [line for line in said if "update skipped" in line]
    assert [line.split(" of at most")[0] for line in told] == [
        "step 2: the loss is nan, the gradient's norm nan: update skipped, 1 in a row",
        "step 4: the loss is nan, the gradient's norm nan: update skipped, 1 in a row",
        "step 5: the loss is nan, the gradient's norm nan: update skipped, 2 in a row",
    ]
    states = {step: state_at(folder, run_data, step) for step in range(1, 6)}
    assert all(state.step == step for step, state in states.items())
    for step in (2, 4, 5):  # 2 and 4 would have probed
        assert same_bits(states[step]._replace(step=0), states[step - 1]._replace(step=0)), step
    for name in ("params", "ema", "opt_state", "sampler", "statistics"):
        assert not same_bits(getattr(states[3], name), getattr(states[2], name)), name
    metrics = lines(folder)
    assert [line["step"] for line in metrics if line["loss"] is None] == [2, 4, 5]

    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as error:  # the count went into the file
        train(folder, run_data, EXTRA)
    assert error.value.exit_code == 1 and str(error.value).startswith(
        "the loss is nan and the gradient's norm nan at step 6, 3 steps in a row, "
        "--train.max_skipped 2: stopped; the last good checkpoint is of step 5, in "
        f"{folder / 'checkpoints'}. A lower --optimizer.learning_rate or --optimizer.clip_norm may"
    )
    assert "or --train.max_skipped" not in str(error.value)
    assert saved_steps(folder)[-1] == 5

    bad.clear()
    code, said = train(folder, run_data, EXTRA)
    assert code == 0 and "resuming after step 5 of 6" in said[0]
    assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(state_at(folder, run_data, 6)))
    assert lines(folder)[-1]["loss"] is not None


@pytest.mark.slow
def test_without_bad_steps_skipping_changes_nothing(three, six, run_data, tmp_path):
    """And a run may be given the option later."""
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    code, said = train(folder, run_data, "--train.steps 6 --train.max_skipped 2")
    assert code == 0 and "resuming after step 3 of 6" in said[0]
    # Another program, in which the compiler may round otherwise.
    for mine, its in zip(lines(folder), lines(six[0]), strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-6, nan_ok=True)
