"""SpeeD: the published laws, m and halves; and the law that the paper names, in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from static_laws import probabilities, pull, relative_density

import adaptive_ts as ats
from adaptive_ts.samplers.speed import mirror_timestep, speed
from adaptive_ts.schedules.continuous import rectified_flow
from adaptive_ts.schedules.discrete import constant_beta, cosine, linear, quad
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
GRID = ats.discrete(1000)
SCHEDULES = {
    "linear": linear(1000),
    "squaredcos_cap_v2": cosine(1000),
    "quad": quad(1000),
    "const": constant_beta(1000),
}
NAMES = list(SCHEDULES)


def batch(size):
    return {"image": jnp.zeros((size, 8, 8, 1))}


@pytest.mark.parametrize(
    ("grid", "schedule"),
    [
        (GRID, SCHEDULES["linear"]),
        (ats.discrete(50, rounding="nearest"), linear(50)),
        (ats.continuous(20, t_min=1e-3, t_max=1.0), rectified_flow()),
    ],
    ids=["T1000", "T50_nearest", "continuous"],
)
@pytest.mark.parametrize("dual", [True, False])
def test_sampler_keeps_the_contract(grid, schedule, dual):
    sampler = speed(grid, schedule, dual=dual)
    report = check_sampler(sampler, batch(8), num_steps=1, num_draws=256)
    assert report.total_mass == pytest.approx(1, abs=1e-3)


def test_published_sampler_keeps_the_contract():
    sampler = speed(GRID, SCHEDULES["linear"], as_published=True)
    report = check_sampler(sampler, batch(8), num_steps=1)
    assert report.total_mass == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 5, 10, 25])
def test_the_law_is_the_published_p(name, k, golden):
    expected = golden("speed")[f"{name}__k{k}__p"]
    for options in ({}, {"dual": False}, {"dual": False, "as_published": True}):
        found = probabilities(speed(GRID, SCHEDULES[name], k=k, **options))
        np.testing.assert_allclose(found, expected, rtol=3e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_published_law_of_a_batch(name, size, k, golden):
    sampler = speed(GRID, SCHEDULES[name], k=k, as_published=True)
    expected = golden("speed")[f"{name}__k{k}__marginal_batch{size}"]
    np.testing.assert_allclose(probabilities(sampler, batch(size)), expected, rtol=5e-7)


@pytest.mark.parametrize(
    ("name", "m"), [("linear", 642), ("squaredcos_cap_v2", 959), ("quad", 829), ("const", 229)]
)
def test_the_mirror_stands_where_the_noise_is_flat(name, m):
    assert mirror_timestep(SCHEDULES[name]) == m


def test_published_ratio_is_ten_and_not_k():
    p = 1000 * probabilities(speed(GRID, SCHEDULES["linear"], as_published=True), batch(128))
    for t, value in {
        0: 1.3158,
        1: 1.9634,
        57: 1.9634,
        58: 1.4453,
        357: 1.4453,
        358: 1.3158,
    }.items():
        assert p[t] == pytest.approx(value, abs=1e-4)
    for t, value in {642: 1.3158, 643: 0.6682, 699: 0.6682, 700: 0.1336, 999: 0.1336}.items():
        assert p[t] == pytest.approx(value, abs=1e-4)
    paper = 1000 * probabilities(speed(GRID, SCHEDULES["linear"]), batch(128))
    assert paper[:700] == pytest.approx(paper[0]) and paper[700:] == pytest.approx(paper[0] / 5)


def test_default_law_does_not_depend_on_the_batch():
    mine, theirs = (speed(GRID, SCHEDULES["linear"], as_published=p) for p in (False, True))
    np.testing.assert_array_equal(probabilities(mine, batch(2)), probabilities(mine, batch(128)))
    assert np.abs(probabilities(theirs, batch(2)) - probabilities(theirs, batch(128))).max() > 5e-4


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_published_halves(size):
    sampler = speed(GRID, SCHEDULES["const"], as_published=True)
    draw = jax.jit(sampler.sample)(jax.random.key(1), (), batch(size))
    t, first = np.asarray(draw.t), min(size // 2 + 1, size)
    rest = t[: size - first]
    np.testing.assert_array_equal(t[first:], np.where(rest < 229, 229 - rest, rest - 229))
    np.testing.assert_array_equal(GRID.to_t(draw.u), t)


def test_default_pairs_mirror_the_inverse_cdf():
    sampler = speed(ats.continuous(20), rectified_flow(), tau=0.5, k=3.0)
    u = np.asarray(sampler.sample(jax.random.key(2), (), batch(64)).u, np.float64)
    v = np.interp(u, [0, 0.5, 1], [0, 0.75, 1])
    np.testing.assert_allclose(v[:32] + v[32:], 1, atol=1e-6)
    assert len(np.unique(v[:32])) == 32


def test_a_fine_row_of_draws_has_the_law():
    sampler = speed(ats.continuous(20, t_min=0.0, t_max=2.0), rectified_flow(), tau=0.6, k=4.0)
    draw = pull(sampler, (np.arange(4000) + 0.5) / 4000)
    inside = np.count_nonzero(np.asarray(draw.t) < 1.2)
    assert inside == pytest.approx(4000 * 2.4 / 2.8, abs=1)
    density = relative_density(sampler, draw.t)
    np.testing.assert_allclose(np.unique(density.round(5)), [1 / 2.8, 4 / 2.8], rtol=1e-4)


@pytest.mark.parametrize("as_published", [False, True])
def test_eight_devices_draw_as_one(as_published, mesh8):
    def make(axis_name):
        return speed(GRID, SCHEDULES["linear"], as_published=as_published, axis_name=axis_name)

    def local(images, axis_name="data"):
        sampler = make(axis_name)
        draw = sampler.sample(jax.random.key(3), (), {"image": images})
        return draw, sampler.log_density((), draw, {"image": images})

    spec = PartitionSpec("data")
    images = batch(32)["image"]
    split = jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=spec, out_specs=spec))(images)
    whole = jax.jit(lambda images: local(images, None))(images)
    np.testing.assert_array_equal(split[0].t, whole[0].t)
    np.testing.assert_allclose(split[0].u, whole[0].u, atol=1e-7)
    np.testing.assert_allclose(split[1], whole[1], rtol=1e-6)  # the global batch's law


def test_a_short_schedule_is_never_flat():
    schedule = linear(50)
    assert mirror_timestep(schedule) == 1  # as in the published code: argmax of nothing
    sampler = speed(ats.discrete(50), schedule, as_published=True)
    t = np.asarray(sampler.sample(jax.random.key(4), (), batch(32)).t)
    np.testing.assert_array_equal(t[17:], np.abs(1 - t[:15]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau=0.0"),
        ({"tau": 700}, "tau=700"),
        ({"k": 0.0}, "k=0.0"),
        ({"k": np.inf}, "k=inf"),
    ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=f"{message}.*tau must be"):
        speed(GRID, SCHEDULES["linear"], **options)


def test_errors_of_time():
    with pytest.raises(ValueError, match="as_published=False"):
        speed(ats.continuous(20), rectified_flow(), as_published=True)
    with pytest.raises(ValueError, match="give both the same"):
        speed(GRID, linear(500))


def test_strict_dtype_promotion(strict):
    with strict():
        for published in (False, True):
            sampler = speed(GRID, SCHEDULES["linear"], as_published=published)
            draw = jax.eval_shape(sampler.sample, jax.random.key(1), (), batch(8))
            density = jax.eval_shape(sampler.log_density, (), draw, batch(8))
            assert density.dtype == jnp.float32
