"""selection.py against scikit-learn and the official feature selector."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.feature_selection import SelectKBest, f_regression

from adaptive_ts.learning import selection

PRECISIONS = ("float64", "float32")
K = 3
f_statistic = jax.jit(selection.f_statistic, static_argnames="precision")
select = jax.jit(selection.select_timesteps, static_argnames=("k", "min_rows", "precision"))


def everything(n):
    return jnp.ones(n, bool)


def sklearn_f(rows, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f_regression(np.asarray(rows, np.float64), np.asarray(target, np.float64))[0]


def assert_selects(got, oracle_f, k=K):
    """Same indices, except among columns whose F lies within 1e-4 relative of the k-th."""
    order = np.argsort(oracle_f, kind="mergesort")
    if sorted(order[-k:]) == sorted(got):
        return
    kth = oracle_f[order[-k]]
    for index in set(got) ^ set(order[-k:]):
        assert abs(oracle_f[index] - kth) <= 1e-4 * abs(kth), (got, order[-k:], oracle_f[index])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden(golden, strict, precision):
    g = golden("f_regression")
    # float32 sees the rounded matrix, so its F may differ from that of the float64 one.
    rtol = 1e-6 if precision == "float64" else 2e-4

    def check(rows, target, f, selected):
        with jax.enable_x64(True), strict():  # so that the float64 inputs are not rounded
            rows, target = jnp.asarray(rows), jnp.asarray(target)
            got = f_statistic(rows, target, everything(rows.shape[0]), precision=precision)
        assert got.dtype == jnp.float32
        perfect = f > 1e10
        np.testing.assert_allclose(got[~perfect], f[~perfect], rtol=rtol, atol=1e-6)
        assert np.all(np.isfinite(got)) and np.all(np.asarray(got)[perfect] > 1e10)
        assert selection.top_timesteps(got, K).tolist() == selected.tolist()
        return np.asarray(got)

    check(g["X"], g["y"], g["F"], g["selected"])
    check(g["X"], g["y_random"], g["F_random"], g["selected_random"])
    edge = check(g["X_edge"], g["y"], g["F_edge"], g["selected_edge"])
    if precision == "float64":
        np.testing.assert_allclose(edge, g["F_edge"], rtol=1e-6)
    ties = check(np.tile(g["X"][:, :1], (1, 50)), g["y"], g["F_ties"], g["selected_ties"])
    assert len(set(ties.tolist())) == 1
    for rows in (2, 3, 4, 5):
        target = g["X"][:rows].sum(1)
        check(g["X"][:rows], target, g[f"F_{rows}rows"], g[f"sel_{rows}rows"])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [12, 20, 47])
def test_official_buffer(golden, precision, count):
    g = golden("f_regression")
    queue = selection.ProfileQueue(jnp.asarray(g["buffer_X"]), jnp.int32(count))
    assert selection.filled(queue).tolist() == [True] * 12 + [False] * 8
    got = select(queue, K, jnp.arange(K, dtype=jnp.int32), precision=precision)
    assert got.tolist() == g["selected_official"].tolist() and got.dtype == jnp.int32


def random_problem(rng, capacity, n):
    """Profiles with a common trend, unequal scales, offsets, and some degenerate columns."""
    trend = rng.standard_normal((capacity, 1))
    rows = rng.standard_normal((capacity, n)) + trend * rng.standard_normal(n)
    rows = rows * 10.0 ** rng.uniform(-9, 3) * 10.0 ** rng.uniform(-2, 2, n)
    rows = rows + rng.choice([0, 1, 30]) * rows.std(0)
    rows[:, rng.integers(n)] = 0
    rows[:, rng.integers(n)] = rng.choice([1.0, 0.5, -2.0])
    rows[:, rng.integers(n)] = rows[:, rng.integers(n)]
    mask = rng.random(capacity) < rng.uniform(0.1, 1)
    mask[rng.permutation(capacity)[:3]] = True
    return rows.astype(np.float32), mask


@pytest.mark.parametrize("target_is", ["totals", "random"])
def test_random_matrices_against_sklearn(target_is):
    rng = np.random.default_rng(0)
    problems = [random_problem(rng, 20, 50) for _ in range(250)]
    rows, masks = (np.stack(x) for x in zip(*problems, strict=True))
    targets = rows.astype(np.float64).sum(2)
    if target_is == "random":
        targets = rng.standard_normal((250, 20)).astype(np.float32)
    garbage = np.where(masks[:, :, None], rows, np.float32(np.nan))  # must not be looked at
    for precision in PRECISIONS:
        given = None if target_is == "totals" else jnp.asarray(targets)
        axes = (0, None if given is None else 0, 0)
        statistic = functools.partial(selection.f_statistic, precision=precision)
        f = jax.jit(jax.vmap(statistic, axes))(garbage, given, masks)
        top = jax.vmap(functools.partial(selection.top_timesteps, k=K))(f)
        assert f.dtype == jnp.float32 and np.all(np.isfinite(f))
        for i in range(250):
            oracle = sklearn_f(rows[i][masks[i]], targets[i][masks[i]])
            assert_selects(top[i].tolist(), oracle)
            ordinary = oracle < 1e6
            rtol = 1e-5 if precision == "float64" else 1e-3
            np.testing.assert_allclose(f[i][ordinary], oracle[ordinary], rtol=rtol, atol=1e-4)


def test_select_equals_selectkbest():
    rng = np.random.default_rng(1)
    for capacity in (3, 5, 20):
        rows = rng.standard_normal((capacity, 30)).astype(np.float32)
        queue = selection.ProfileQueue(jnp.asarray(rows), jnp.int32(capacity))
        oracle = SelectKBest(f_regression, k=K).fit(rows, rows.astype(np.float64).sum(1))
        for precision in PRECISIONS:
            got = select(queue, K, jnp.zeros(K, jnp.int32), precision=precision)
            assert got.tolist() == oracle.get_support(indices=True).tolist()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [5, 50, 100, 1000])
def test_equal_columns_tie_exactly(precision, n):
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.standard_normal((20, 1)).astype(np.float32), n, axis=1)
    target = jnp.asarray(rng.standard_normal(20), jnp.float32)
    f = f_statistic(rows, target, everything(20), precision=precision)
    assert len(set(f.tolist())) == 1
    assert selection.top_timesteps(f, K).tolist() == [n - 3, n - 2, n - 1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_degenerate(precision):
    rng = np.random.default_rng(3)
    rows = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32).at[:, 1].set(0.1)
    call = functools.partial(f_statistic, precision=precision)
    assert call(rows, rows[:, 0], everything(6))[1] == 0
    assert call(rows, jnp.full(6, 0.1), everything(6)).tolist() == [0] * 4
    for few in range(3):
        assert call(rows, rows[:, 0], jnp.arange(6) < few).tolist() == [0] * 4
    perfect = call(jnp.stack([rows[:, 0] * s for s in (1, 2, -8)], 1), rows[:, 0], everything(6))
    assert len(set(perfect.tolist())) == 1 and perfect[0] > 1e10
    for scale in (1e-30, 1e30):  # squares of these leave float32
        small = call(rows * scale, rows[:, 2] + rows[:, 0], everything(6))
        np.testing.assert_allclose(
            small, call(rows, rows[:, 2] + rows[:, 0], everything(6)), rtol=1e-5
        )


def test_top_timesteps_ties_and_nan():
    top = selection.top_timesteps
    assert top(jnp.zeros(9), 3).tolist() == [6, 7, 8]
    assert top(jnp.array([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [2, 3]
    assert top(jnp.array([jnp.nan, 1.0, jnp.inf, 0.0]), 2).tolist() == [1, 2]
    rng = np.random.default_rng(4)
    for _ in range(50):
        scores = rng.integers(0, 4, 12).astype(np.float32)
        want = np.sort(np.argsort(scores, kind="mergesort")[-4:])
        assert top(jnp.asarray(scores), 4).tolist() == want.tolist()


def test_queue_is_a_ring_and_drops_nonfinite(strict):
    queue, push = selection.init_queue(3, 2), jax.jit(selection.push_profile)
    with strict():
        for value in (1.0, 2.0, jnp.nan, 3.0, jnp.inf, 4.0, 0.0):
            queue = push(queue, jnp.array([0.0, value]))
    assert queue.rows[:, 1].tolist() == [4.0, 0.0, 3.0] and int(queue.count) == 5
    assert selection.filled(queue).tolist() == [True, False, True]


def test_select_keeps_current_below_min_rows():
    rng = np.random.default_rng(5)
    queue, current = selection.init_queue(5, 8), jnp.array([0, 3, 6], jnp.int32)
    for pushed in range(1, 6):
        queue = selection.push_profile(queue, jnp.asarray(rng.standard_normal(8), jnp.float32))
        for zero in (
            (queue, selection.push_profile(queue, jnp.zeros(8))) if pushed < 5 else (queue,)
        ):
            kept = select(zero, k=3, current=current, min_rows=4).tolist() == [0, 3, 6]
            assert kept == (pushed < 4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_transforms_agree_and_no_float64_leaves(mesh8, strict, precision):
    rng = np.random.default_rng(6)
    rows = jnp.asarray(rng.standard_normal((8, 20, 40)), jnp.float32)
    counts = jnp.asarray([3, 5, 8, 11, 14, 17, 20, 40], jnp.int32)
    current = jnp.zeros(K, jnp.int32)

    def one(rows, count):
        queue = selection.ProfileQueue(rows, count)
        return selection.select_timesteps(queue, K, current, precision=precision)

    with strict():
        jitted = jnp.stack([jax.jit(one)(r, c) for r, c in zip(rows, counts, strict=True)])
        eager = one(rows[4], counts[4])
        mapped = jax.jit(jax.vmap(one))(rows, counts)
        scanned = jax.jit(lambda: jax.lax.map(lambda x: one(*x), (rows, counts)))()
        sharded = jax.jit(
            jax.shard_map(
                jax.vmap(one), mesh=mesh8, in_specs=(P("data"), P("data")), out_specs=P("data")
            )
        )(rows, counts)
        replicated = jax.jit(
            jax.shard_map(
                lambda r, c: jax.lax.cond(c > 3, one, lambda *_: current, r, c),
                mesh=mesh8,
                in_specs=(P(), P()),
                out_specs=P(),
            )
        )(rows[4], counts[4])
    for got in (mapped, scanned, sharded):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, jitted)
    for got in (eager, replicated):
        np.testing.assert_array_equal(got, jitted[4])
    queue = selection.push_profile(selection.init_queue(4, 5), jnp.ones(5))
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in queue)


def test_messages():
    queue = selection.init_queue(4, 5)
    with pytest.raises(ValueError, match="capacity is 0"):
        selection.init_queue(0, 5)
    with pytest.raises(ValueError, match=r"row has shape \(4,\)"):
        jax.eval_shape(selection.push_profile, queue, jnp.zeros(4))
    with pytest.raises(ValueError, match="k is 6"):
        selection.select_timesteps(queue, 6, jnp.zeros(6, jnp.int32))
    with pytest.raises(ValueError, match="current has shape"):
        selection.select_timesteps(queue, 3, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="min_rows is 0"):
        selection.select_timesteps(queue, 3, jnp.zeros(3, jnp.int32), min_rows=0)
    with pytest.raises(ValueError, match="precision is 'f8'"):
        selection.f_statistic(queue.rows, None, everything(4), precision="f8")
    with pytest.raises(ValueError, match="target has shape"):
        selection.f_statistic(queue.rows, jnp.zeros(3), everything(4))
    with pytest.raises(ValueError, match=r"\(capacity, n\)"):
        selection.f_statistic(queue.rows, None, everything(5))
