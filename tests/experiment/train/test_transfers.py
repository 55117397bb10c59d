"""The loop copies batches in and metrics out, those a step late, and nothing else."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from small_run import train

from adaptive_ts.experiment.train import loop

STEPS, LOGGED = 6, (3, 6)


@pytest.fixture(scope="module")
def watched(run_data, tmp_path_factory):
    """(what a run of six steps did, in order, as (what, step); the stray copies it refused)."""
    events, owner, refused = [], {}, []
    number, here = [0], threading.get_ident()  # functions are compiled in threads of their own

    def own(tree, what):
        for name, leaf in tree.items():
            owner[id(leaf)] = f"{what} {name}", number[0], leaf  # the leaf lives: its id is its own

    @contextlib.contextmanager
    def compiling(jobs, **options):
        with real["compiling"](jobs, **options) as compiled:
            yield lambda name: compiled(name) if name == "init" else call(name, compiled(name))

    def call(name, function):
        def density(*args):
            value = function(*args)
            own({"": value}, "density")
            events.append(("density", number[0]))
            return value

        def step(state, batch, key):
            number[0] += 1
            refused.append(strays(lambda batch: function(state, batch, key), batch, state.step))
            state, metrics = function(state, batch, key)
            own(metrics, "metrics")
            events.append(("step", number[0]))
            return state, metrics

        return density if name == "density" else step

    def device_get(tree):
        asked = owner.get(id(jax.tree.leaves(tree)[0]), ("", None))
        events.append(("device_get", asked[1]))
        return real["device_get"](tree)

    def value(array):
        what, step, _ = owner.get(id(array), (f"stray {array.shape}", number[0], None))
        if threading.get_ident() == here:
            events.append((f"fetch {what}", step))
        return real["value"](array)

    def open_checkpoints(*args, **options):
        def save(step, state, meta):
            events.append(("save", step))
            return checkpoints.save(step, state, meta)

        checkpoints = real["open"](*args, **options)
        return checkpoints._replace(save=save)

    real = {
        "compiling": loop.compiling,
        "open": loop.open_checkpoints,
        "device_get": jax.device_get,
        "value": ArrayImpl._value.fget,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compiling", compiling)
        patch.setattr(loop, "open_checkpoints", open_checkpoints)
        patch.setattr(loop.ending, "finish", lambda *args: events.append(("finish", STEPS)) or "")
        patch.setattr(jax, "device_get", device_get)
        # Where np.asarray, float, bool, .item() and device_get of what lies on 8 devices end.
        patch.setattr(ArrayImpl, "_value", property(value))
        extra = f"--train.steps {STEPS} --train.save_every {STEPS} --train.log_every {LOGGED[0]}"
        assert train(tmp_path_factory.mktemp("watched") / "run", run_data, extra)[0] == 0
    first = events.index(("step", 1))
    return events[first : events.index(("save", STEPS))], refused


def strays(step, batch, scalar):
    """Tries each kind of copy to the devices that nobody asked for; how many were refused."""
    copies = (
        lambda: step(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)),
        lambda: jnp.sum(np.zeros(8, np.float32)),
        lambda: scalar + 1,
        lambda: jnp.zeros(3),
    )
    count = 0
    for copy in copies:
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            copy()
        count += 1
    return count


def test_a_stray_copy_to_the_devices_is_an_error_in_every_step(watched):
    assert watched[1] == [4] * STEPS


def test_metrics_are_fetched_once_the_next_step_is_on_its_way(watched):
    events = [event for event in watched[0] if not event[0].startswith("fetch")]
    expected = [("step", 1)]
    for number in range(2, STEPS + 1):
        expected.append(("step", number))
        expected += [("density", number)] if number in LOGGED else []
        expected.append(("device_get", number - 1))
    assert events == [*expected, ("device_get", STEPS)], "the last one before it is saved"


def test_a_step_fetches_its_metrics_and_nothing_else(watched):
    events = watched[0]
    fetched = {n: sorted(w for w, step in events if step == n and "fetch" in w) for n in range(8)}
    names = fetched[1]
    assert "fetch metrics loss" in names and len(set(names)) == len(names) > 5
    for number in range(1, STEPS + 1):
        density = ["fetch density "] if number in LOGGED else []
        assert fetched[number] == density + names, "p(t) only where it is logged"
    assert not fetched[0] and not fetched[7]
    # Step n's fetches come all between its device_get and the step after the next.
    for place, (what, step) in enumerate(events):
        if "fetch" in what:
            before = [event for event in events[:place] if event[0] in ("device_get", "step")]
            assert before[-1] == ("device_get", step)
