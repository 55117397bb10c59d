"""What a sampler costs on many devices: messages and FLOPs, from the compiled steps."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import ROOT

import adaptive_ts as ats
from adaptive_ts import collectives
from adaptive_ts.experiment.assembly.state import abstract, make_init
from adaptive_ts.experiment.assembly.step import StepParts, make_step
from adaptive_ts.experiment.config.command_line import parse
from adaptive_ts.experiment.costs import scaling
from adaptive_ts.experiment.costs.counts import Cost, added, cost_of, probe_share
from adaptive_ts.experiment.costs.messages import Tally, count_collectives
from adaptive_ts.experiment.devices import sharding
from adaptive_ts.experiment.devices.compiling import compiling
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.main import scaling as command
from adaptive_ts.learning import reinforce

CONFIGS = ["--configs", str(ROOT / "configs")]

HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "all-reduce(x).py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%async (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[1,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %v = f32[4]{0} get-tuple-element(%state), index=1
  %square = f32[4,4]{1,0} dot(%v, %v), lhs_contracting_dims={}, rhs_contracting_dims={}
  %sent = f32[4]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], f32[4]{0}) tuple(%v, %sent)
}

%body.1 (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %inner = (s32[], f32[4]{0}) while(%state), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %v = f32[4]{0} get-tuple-element(%inner), index=1
}

%condition (state: (s32[], f32[4])) -> pred[] {
  %state = (s32[], f32[4]{0}) parameter(0)
  %own = pred[] custom-call(%state), custom_call_target="x"
  ROOT %any = pred[] all-reduce(%own), to_apply=%add
}

ENTRY %main (a: f32[4], b: bf16[2,8]) -> f32[] {
  %a = f32[4]{0} parameter(0)
  %b = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(1)
  %grads = (f32[4]{0}, /*index=1*/bf16[2,8]{1,0}) all-reduce(%a, %b), \
replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add, metadata={op_name="all-to-all(%a)"}
  %ar = f32[4]{0} all-reduce-start(%a), to_apply=%add
  %ar.done = f32[4]{0} all-reduce-done(%ar)
  %ag = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%b), dimensions={0}
  %ag.done = bf16[16,8]{1,0} all-gather-done(%ag)
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={}
  %cp.done = f32[4]{0} collective-permute-done(%cp)
  %wide = f32[8,4]{1,0} broadcast(%a), dimensions={1}
  %as = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-start(%wide), calls=%async
  %as.done = f32[1,4]{1,0} async-done(%as), calls=%async
  %a2a = (s4[3]{0}, token[]) all-to-all(%wide), replica_groups={{0,1,2,3,4,5,6,7}}
  %first = (s32[], f32[4]{0}) tuple(%a)
  %known = (s32[], f32[4]{0}) while(%first), condition=%condition, body=%body, \
backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[4]{0}) while(%first), condition=%condition, body=%body.1
  ROOT %out = f32[] get-tuple-element(%unknown), index=0
}
"""


def test_collectives_of_all_kinds():
    found = count_collectives(HLO)
    once = {
        "all-reduce": (2, 16 + 32 + 16),
        "all-gather": (1, 256),
        "reduce-scatter": (1, 128),
        "collective-permute": (1, 16),
        "all-to-all": (1, 128),
    }
    # Three turns and four questions whether to go on; then who knows how many of two and three.
    in_loops = {"all-reduce": (4 + 1 + 3, 8), "collective-permute": (3 + 2, 5 * 16)}
    expected = {
        kind: Tally(count + in_loops.get(kind, (0, 0))[0], size + in_loops.get(kind, (0, 0))[1])
        for kind, (count, size) in once.items()
    }
    assert found.tallies == expected
    assert found.uncertain == 1 + 2 + 3
    assert sorted(map(str, found.loops)) == ["2", "3", "None"]
    assert not count_collectives(HLO.replace(", num_partitions=8", "")).tallies
    assert not count_collectives("").tallies


@pytest.mark.usefixtures("quick_compilation")
def test_a_loop_as_this_compiler_prints_it(mesh8):
    rows = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(None, "data"))

    def sums(x):
        return jax.lax.map(lambda y: (y @ y.T).sum(), x)

    x = jax.ShapeDtypeStruct((3, 16, 4), jnp.float32, sharding=rows)
    found = count_collectives(jax.jit(sums).lower(x).compile().as_text())
    assert found.loops == (3,) and found.uncertain == 0
    assert sum(tally.count for tally in found.tallies.values()) % 3 == 0
    assert found.tallies["all-reduce"] == Tally(3, 12)


def make_parts(name, mesh):
    """A step of a network of three convolutions, that dwarfs a small policy."""
    schedule, grid, optimizer = ats.schedules.linear(1000), ats.discrete(1000), optax.adam(1e-3)

    def predict(params, x, t, batch, key):
        for kernel in params:
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                jnp.tanh(x), kernel, (1, 1), "SAME", dimension_numbers=dims
            )
        return x

    split = sharding.split(mesh) if mesh.size > 1 else None
    options = {"every": 4, "num_buckets": 16, "bucket_sharding": split}
    chosen = {**options, "num_selected": 2}
    policy = ats.learning.conv_beta_policy(channels=(2,), hidden=())
    samplers = {
        "uniform": lambda: ats.uniform(grid),
        "adaptive": lambda: ats.adaptive(grid, policy, optax.adam(1e-3), **chosen),
        "impact": lambda: ats.impact(grid, optimizer, **options),
    }
    loss = ats.denoising_loss(predict, schedule)
    parts = StepParts(samplers[name](), grid, loss, loss, optimizer, 0.99, False, mesh)
    sides = (1, 64), (64, 64), (64, 1)
    return parts, lambda key, batch: tuple(jnp.zeros((3, 3, *side)) for side in sides)


def small_jobs(name, count):
    """ "plain" and "probe" -> what `compiling` takes, on some of the devices."""
    mesh = sharding.make_mesh(jax.devices()[:count])
    parts, init_params = make_parts(name, mesh)
    image = jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.float32, sharding=sharding.split(mesh))
    init = make_init(init_params, parts.optimizer, parts.sampler, {"image": image})
    key = jax.eval_shape(jax.random.key, 0)
    state = abstract(init, key, mesh)
    variants = {"plain": False, "probe": True} if name != "uniform" else {"uniform": None}
    return {
        (name, count, variant): (
            make_step(parts, probe=probe, state=state),
            (state, {"image": image}, key),
        )
        for variant, probe in variants.items()
    }


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "most", "larger"), [("adaptive", 2, 0.02), ("impact", 1, 1.02)])
def test_what_a_sampler_adds_on_eight_devices(name, most, larger):
    """No message in a step, two at most in a step with a probe, whose share of the work stays."""
    jobs = small_jobs("uniform", 8) | small_jobs(name, 1) | small_jobs(name, 8)
    with compiling(jobs) as compiled:
        costs = {job: cost_of(compiled(job)) for job in jobs}
    uniform = costs["uniform", 8, "uniform"]
    assert uniform.collectives["all-reduce"].count == 1  # gradients, loss and statistics
    one, eight = (
        {"uniform": uniform, **{v: costs[name, n, v] for v in ("plain", "probe")}} for n in (1, 8)
    )
    assert not one["probe"].collectives and not eight["probe"].uncertain
    assert eight["plain"].collectives == uniform.collectives
    more, size = added(eight, "probe")
    # Impact's other gradient, of its objective, goes along with the loss's.
    assert more == most and size <= larger * uniform.messages.bytes
    shares = [probe_share(costs, 4) for costs in (one, eight)]
    assert shares[1] == pytest.approx(shares[0], rel=0.05) and shares[0] > 0.05


@pytest.mark.parametrize("entropy", ["bonus", "in_reward"])
def test_policy_gradient_in_parts_is_that_at_the_advantages(entropy):
    rng = np.random.default_rng(0)
    x, u = (jnp.asarray(rng.uniform(0.1, 0.9, 32), jnp.float32) for _ in range(2))
    reward = jnp.asarray(rng.normal(0.3, 0.1, 32), jnp.float32).at[3].set(jnp.nan)
    before, _, _ = reinforce.standardize(reinforce.init_moments(), x)
    _, standard, _ = reinforce.standardize(before, reward)

    def gradient(advantage, entropy_coef):
        def loss(p):
            a, b = jnp.exp(p[0] * x + p[1]), jnp.exp(p[2] * x)
            return reinforce.reinforce_loss(
                a, b, u, advantage, entropy_coef=entropy_coef, entropy=entropy
            )

        return jax.grad(loss)(jnp.asarray([0.5, 0.2, -0.3])), {}

    found, _ = reinforce.in_parts(gradient, reward, standard, 0.1)
    advantage = reinforce.advantages(reward, standard)
    np.testing.assert_allclose(found, gradient(advantage, 0.1)[0], rtol=1e-4)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_example_of_a_split_batch_is_that_of_a_whole_one(mesh8, bad):
    rows = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data"))
    x = jnp.arange(48.0).reshape(16, 3).at[4].set(bad)
    batch = {"x": x, "label": jnp.arange(16) - 5, "seen": jnp.arange(16) % 2 == 0, "all": x[:2]}
    for index in (0, 4, 15):
        whole = collectives.take_example(batch, jnp.int32(index), 16, None)
        shared = collectives.take_example(batch, jnp.int32(index), 16, None, rows)
        jax.tree.map(np.testing.assert_array_equal, shared, whole)


COST = Cost(2e9, 1e8, 3_000_000, {"all-reduce": Tally(1, 4_000_000)}, 0, ())
PROBE = Cost(6e9, 3e8, 9_000_000, {"all-reduce": Tally(2, 4_500_000)}, 1, (3,))


def test_report(tmp_path, monkeypatch, capsys):
    def measure(config, counts):
        return {n: {"uniform": COST, "plain": COST, "probe": PROBE} for n in counts}

    monkeypatch.setattr(scaling, "measure", measure)
    out = tmp_path / "new" / "scaling.json"
    assert (
        command.main([*CONFIGS, "--devices", "2", "8", "8", "--out", str(out)], virtual=False) == 0
    )
    said = capsys.readouterr().out
    assert "the global batch of 128 is shared" in said and "adds 5.00% FLOPs" in said
    assert "+1 collectives (0.50 MB) in a step with a probe" in said
    assert "loops of 3 turns" in said and "1 all-reduce (4.00 MB)" in said
    report = json.loads(out.read_text())
    assert [row["devices"] for row in report["rows"]] == [2, 8]
    row = report["rows"][1]
    assert row["probe_share_of_flops"] == pytest.approx(0.05)
    assert row["added_collectives"]["probe"] == {"count": 1, "bytes": 500_000}
    assert row["steps"]["probe"]["collectives"]["all-reduce"]["count"] == 2
    command.main([*CONFIGS, "--mesh.fsdp", "4"], virtual=False)
    assert "\non 4, over" in (said := capsys.readouterr().out) and "\non 2, over" not in said
    assert probe_share({"uniform": COST}, 40) is None


def test_uniform_s_own_row_has_one_step():
    _, config = parse(["digits_uniform", "--train.batch_size", "8"], configs_dir=ROOT / "configs")
    image = jax.ShapeDtypeStruct((8, 8, 1), jnp.uint8)
    assert set(scaling.step_jobs(config, 2, image)) == {"uniform"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["overhaed"], "'overhaed' is not a row: did you mean 'overhead'"),
        (["--devices", "0"], "--devices: 0 is out of range: must be at least 1"),
        (["--devices", "two"], "--devices: invalid int value: 'two'"),
        (["--devices", "1024"], "--devices: 1024 are not there, but "),
        (["--devices", "3"], "--train.batch_size: 128 is not divisible by the 3 devices"),
        (["--devices", "4", "--mesh.fsdp", "3"], "--mesh.fsdp: 3 does not divide the 4 devices"),
        (["--devices", "2", "--out", "."], "--out: . is a folder: give a file"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    named = not argv[0].startswith("-")
    with pytest.raises(UserError) as error:
        command.main([*argv[:named], *CONFIGS, *argv[named:]], virtual=False)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.usefixtures("quick_compilation")
def test_virtual_devices_keep_the_user_s_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    command._make_virtual(64)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_dump_to=x",
        "--xla_force_host_platform_device_count=64",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("sampler", ["adaptive", "impact"])
def test_overhead_row_on_one_and_eight_devices(sampler):
    """The command's own count, with the network, policy and buckets of the ``overhead`` row."""
    argv = ["overhead", "--sampler.name", sampler]
    _, config = parse(argv, configs_dir=ROOT / "configs")
    found = scaling.measure(config, (1, 8))
    shares = [probe_share(costs, config.sampler.every) for costs in found.values()]
    assert shares[1] == pytest.approx(shares[0], rel=0.05)
    assert added(found[8], "plain") == Tally(0, 0)
    assert added(found[8], "probe").count <= 2
