"""SD3's laws against diffusers' and the papers' own formulas; shifts and directions of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from static_laws import BATCH, GRIDS, probabilities, pull, relative_density

import adaptive_ts as ats
from adaptive_ts.samplers.logit import cosmap, logit_normal, mode
from adaptive_ts.testing import check_sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")
SAMPLERS = {
    "logit_normal": lambda grid: logit_normal(grid, 0.5, 1.5, shift=2.0),
    "mode": lambda grid: mode(grid, coupling="antithetic"),
    "cosmap": lambda grid: cosmap(grid, shift=3.0, coupling="low_discrepancy"),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_keeps_the_contract(name, grid):
    # The inverse of a logit-normal density has no finite variance: no z-scores for it.
    limit = np.inf if name == "logit_normal" else 4.5
    report = check_sampler(
        SAMPLERS[name](GRIDS[grid]), BATCH, num_steps=1, num_draws=256, max_z_score=limit
    )
    assert report.total_mass == pytest.approx(1, abs=1e-3)


def test_steepest_mode_has_finite_densities():
    # There p is infinite at u = 1/2, as |u - 1/2|^(-2/3).
    for scale in (-1.0, 2 / (np.pi - 2)):
        t = np.linspace(0.0, 1.0, 1001, dtype=np.float32)
        density = relative_density(mode(ats.continuous(20), scale), t)
        assert np.all(np.isfinite(density) & (density > 0))
        p = probabilities(mode(ats.discrete(100), scale))
        assert p.sum() == pytest.approx(1, abs=1e-6)


PAIRS = [(0, 1), (0.5, 1), (-0.5, 1), (0, 0.5), (0.5, 0.6), (-1.2, 1.2)]


@pytest.mark.parametrize(("mean", "std"), PAIRS)
def test_logit_normal_is_that_of_diffusers(mean, std, golden):
    arrays, grid = golden("logit_normal_sd3"), ats.discrete(1000)
    index, name = arrays["index"], f"m{mean}_s{std}__p"
    for sampler, key in (
        (logit_normal(grid, mean, std), f"{name}_index_floor_uT"),
        # The paper's mean favours high noise; in diffusers' descending list it favours low noise.
        (logit_normal(grid, mean, std, diffusers_time=True), f"{name}_by_sigma_ascending"),
    ):
        np.testing.assert_allclose(
            probabilities(sampler)[index], arrays[key], rtol=1e-6, atol=1e-14
        )


def test_the_direction_of_diffusers_is_the_other_one():
    grid = ats.discrete(1000)
    mine, theirs = (logit_normal(grid, 0.5, diffusers_time=d) for d in (False, True))
    mine, theirs = probabilities(mine), probabilities(theirs)
    np.testing.assert_allclose(mine, theirs[::-1], rtol=1e-5, atol=1e-14)
    assert mine[:500].sum() == pytest.approx(stats.norm.cdf(-0.5), abs=1e-6)


@pytest.mark.parametrize("scale", [1.29, 0.81, -0.5])
def test_mode_is_that_of_diffusers(scale, golden):
    arrays = golden("logit_normal_sd3")
    found = probabilities(mode(ats.discrete(1000), scale))[arrays["index"]]
    np.testing.assert_allclose(found, arrays[f"mode_s{scale}__p_index_floor_uT"], rtol=1e-6)


def test_cosmap_is_that_of_diffusers(golden):
    arrays = golden("logit_normal_sd3")
    found = probabilities(cosmap(ats.discrete(1000)))[arrays["index"]]
    np.testing.assert_allclose(found, arrays["cosmap__p_index_floor_uT"], rtol=1e-6)


def test_mode_never_leaves_the_timesteps():
    # The paper's formula gives u = 1, an index out of range, at v = 0.
    ends = jnp.asarray([2.0**-24, 1 - 2.0**-24])
    np.testing.assert_array_equal(pull(mode(ats.discrete(1000)), ends).t, [0, 999])
    assert np.all(pull(mode(ats.continuous(20)), ends).u < 1)


LAWS = {
    "logit_normal": lambda grid, shift: logit_normal(grid, -0.4, 1.3, shift=shift),
    "diffusers": lambda grid, shift: logit_normal(grid, 0.4, 1.3, shift=shift, diffusers_time=True),
    "mode": lambda grid, shift: mode(grid, shift=shift),
    "mode_ends": lambda grid, shift: mode(grid, -0.9, shift=shift),
    "cosmap": lambda grid, shift: cosmap(grid, shift=shift),
}


def oracle(name, v):
    """The laws' draws before the shift, in float64 and in the papers' own form."""
    if name in ("logit_normal", "diffusers"):
        return special.expit(-0.4 + 1.3 * special.ndtri(v))
    if name == "cosmap":
        return 1 - 1 / (np.tan(np.pi * v / 2) + 1)
    scale = 1.29 if name == "mode" else -0.9
    w = 1 - v
    return 1 - w - scale * (np.cos(np.pi * w / 2) ** 2 - 1 + w)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("name", LAWS)
def test_shifted_laws_in_continuous_and_discrete_time(name, shift):
    v = np.linspace(1e-4, 1 - 1e-4, 2001)
    s = oracle(name, v)
    exact = shift * s / (1 + (shift - 1) * s)
    sampler = LAWS[name](ats.continuous(20, t_min=1.0, t_max=3.0), shift)
    draw = pull(sampler, jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(draw.u, exact, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(draw.t, 1 + 2 * exact, rtol=2e-5)
    # The density is the slope of v in u, and its integral the mass of a timestep.
    slope = np.gradient(v, exact)[5:-5]
    found = relative_density(sampler, draw.t)[5:-5]
    np.testing.assert_allclose(found, slope, rtol=5e-3)
    p = probabilities(LAWS[name](ats.discrete(10), shift))
    cdf = np.interp(np.arange(1, 10) / 10, exact, v)
    np.testing.assert_allclose(np.cumsum(p)[:-1], cdf, atol=1e-5)


def test_shift_moves_to_more_noise():
    means = [probabilities(LAWS["cosmap"](ats.discrete(100), a)) @ np.arange(100) for a in (1, 3)]
    assert means[1] > means[0] + 15


@pytest.mark.parametrize(
    "call",
    [
        lambda g: logit_normal(g, np.inf),
        lambda g: logit_normal(g, 0.0, 0.0),
        lambda g: logit_normal(g, shift=-1.0),
        lambda g: mode(g, 1.8),
        lambda g: mode(g, -1.1),
        lambda g: mode(g, shift=0.0),
        lambda g: cosmap(g, shift=np.nan),
    ],
)
def test_errors_name_the_value_and_the_remedy(call):
    with pytest.raises(ValueError, match=r"got .*must be"):
        call(GRIDS["continuous"])


def test_strict_dtype_promotion(strict):
    with strict():
        for grid in (GRIDS["T1000"], GRIDS["continuous"]):
            for make in SAMPLERS.values():
                sampler = make(grid)
                draw = jax.eval_shape(sampler.sample, jax.random.key(1), (), BATCH)
                assert jax.eval_shape(sampler.log_density, (), draw, BATCH).dtype == jnp.float32
