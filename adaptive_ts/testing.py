"""`check_sampler`: the contract as a function, for our samplers and for other people's."""

import inspect
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_ts import collectives
from adaptive_ts.timesteps.grid import TimeGrid
from adaptive_ts.types import (
    Along,
    Batch,
    Key,
    PerExample,
    State,
    TimestepSample,
    TimestepSampler,
)

_BINS = 20  # coarse bins of the chi-square test, of equal expected mass


class SamplerReport(NamedTuple):
    """What `check_sampler` measured.

    Attributes:
      p_value: of the chi-square test of the draws against ``log_density``.
      total_mass: sum of the probabilities that ``log_density`` gives all timesteps.
      z_scores: of the importance-weighted means of the test functions t and cos(pi t).
    """

    p_value: float
    total_mass: float
    z_scores: tuple[float, ...]


def check_sampler(
    sampler: TimestepSampler,
    batch: Batch,
    *,
    extras: dict[str, Any] | None = None,
    grid: TimeGrid | None = None,
    key: Key | None = None,
    num_steps: int = 4,
    num_draws: int = 512,
    min_p_value: float = 1e-4,
    max_z_score: float = 4.5,
) -> SamplerReport:
    """Checks that a sampler keeps the contract of `TimestepSampler`.

    That its state has one pytree structure, shapes and dtypes, from real and from abstract
    batches, under jit, scan and vmap; that sample and update trace once and call no host; that
    update takes what it needs from the extras, ignores the rest and names what is missing; that
    its draws follow ``log_density`` (chi-square with a fixed key), which sums to one, and that
    importance-weighted means are unbiased. Where ``sample`` takes a ``shape``, that its times have
    it, equal or in order where asked for, and are taken by ``update``; or that it is refused.

    Args:
      sampler: the sampler.
      batch: a real batch it can draw for.
      extras: extras of ``update``, in place of those made here (a tiny model and its loss).
      grid: the sampler's grid; needed if ``sampler.sample`` does not name it.
      key: randomness of the whole check.
      num_steps: updates before the draws are tested.
      num_draws: batches drawn for the statistical tests.
      min_p_value: the chi-square test fails below it.
      max_z_score: the importance-weighted means fail above it.

    Returns:
      A `SamplerReport`.

    Raises:
      AssertionError: with what was expected and what was found.
      ValueError: the grid is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import adaptive_ts as ats
      >>> from adaptive_ts.testing import check_sampler
      >>> batch = {"image": jnp.zeros((4, 8, 8, 1))}
      >>> report = check_sampler(ats.uniform(ats.discrete(100)), batch)
      >>> print(round(report.total_mass, 3))
      1.0
    """
    grid = grid or getattr(sampler.sample, "grid", None)
    if grid is None:
        raise ValueError("this sampler does not name its time grid: pass grid=")
    key = collectives.seed_key(0) if key is None else key
    extras = _default_extras(batch) | (extras or {})
    state = _check_init(sampler, batch, key)
    _check_sample(sampler, state, batch, grid, key)
    state = _check_update(sampler, state, batch, extras, key, num_steps)
    _check_extras(sampler, state, batch, extras, key)
    if "shape" in inspect.signature(sampler.sample).parameters:
        _check_shapes(sampler, state, batch, grid, extras, key)
    return _check_draws(sampler, state, batch, grid, key, num_draws, min_p_value, max_z_score)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def _require_same(found: Any, expected: Any, what: str) -> None:
    found, expected = _shapes(found), _shapes(expected)
    _require(found == expected, f"{what}: expected {expected}, found {found}")


def _require_draw(found: TimestepSample, shape: tuple[int, ...], grid: TimeGrid, what: str) -> None:
    time = (shape, np.dtype(np.float32 if grid.num_timesteps is None else np.int32))
    real = (shape, np.dtype(np.float32))
    fields = {name: value for name, value in found._asdict().items() if value is not None}
    expected = {"t": time, "u": real, "weight": real, "r": time}
    expected = {name: expected[name] for name in {"t": 0, "u": 0, "weight": 0} | fields}
    _require(_shapes(fields) == expected, f"{what}: expected {expected}, found {_shapes(fields)}")


def _default_extras(batch: Batch) -> dict[str, Any]:
    """A model of one parameter whose loss depends on t, and a step that it has taken."""
    size = collectives.batch_size(batch)

    def loss_fn(params: jax.Array, batch: Batch, t: PerExample, key: Key) -> PerExample:
        noise = jax.random.normal(key, t.shape)
        time = t.astype(jnp.float32) / (1 + t.astype(jnp.float32))
        return (params - time + 0.1 * noise) ** 2

    params = jnp.float32(1.0)
    return {
        "batch": batch,
        "loss_fn": loss_fn,
        "params": params,
        "new_params": params - 0.1,
        "opt_state": (),
        "losses": jnp.linspace(0.5, 1.5, size, dtype=jnp.float32),
    }


def _check_init(sampler: TimestepSampler, batch: Batch, key: Key) -> State:
    state = jax.jit(sampler.init)(key, batch)
    abstract_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    abstract = jax.eval_shape(lambda key: sampler.init(key, abstract_batch), key)
    _require_same(abstract, state, "init from abstract shapes")
    return state


def _check_sample(
    sampler: TimestepSampler, state: State, batch: Batch, grid: TimeGrid, key: Key
) -> None:
    size = collectives.batch_size(batch)
    traces = []

    def counted(key: Key, state: State, batch: Batch) -> TimestepSample:
        traces.append(1)
        return sampler.sample(key, state, batch)

    jitted = jax.jit(counted)
    one = jitted(key, state, batch)
    _require_draw(one, (size,), grid, "sample")
    again = jitted(key, state, batch)
    _require(bool(jnp.all(one.u == again.u)), "sample: the same key gave other draws")
    other = jitted(jax.random.fold_in(key, 1), state, batch)
    _require(bool(jnp.any(one.u != other.u)), "sample: another key gave the same draws")
    _require(len(traces) == 1, f"sample: traced {len(traces)} times for one shape")
    _require(bool(jnp.all((one.u > 0) & (one.u < 1))), f"sample: u outside (0, 1): {one.u}")
    _require(bool(jnp.all(jnp.isfinite(one.weight) & (one.weight >= 0))), f"weight: {one.weight}")
    log_density = jax.eval_shape(sampler.log_density, state, one, batch)
    _require(log_density.shape == (size,), f"log_density: shape {log_density.shape}")
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    keys = jnp.stack([key, jax.random.fold_in(key, 1)])
    both = jax.eval_shape(jax.vmap(sampler.sample, (0, 0, None)), keys, states, batch)
    _require(both.t.shape == (2, size), f"sample under vmap over states: {both.t.shape}")


def _split(extras: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays to trace, and functions to close over."""
    static = {name: value for name, value in extras.items() if callable(value)}
    return {k: v for k, v in extras.items() if k not in static}, static


def _check_update(
    sampler: TimestepSampler,
    state: State,
    batch: Batch,
    extras: dict[str, Any],
    key: Key,
    num_steps: int,
) -> State:
    arrays, static = _split(extras)
    traces = []

    def step(state: State, key: Key, arrays: dict[str, Any]) -> tuple[State, Any]:
        traces.append(1)
        rest = {k: v for k, v in arrays.items() if k != "losses"}
        k_sample, k_update = jax.random.split(key)
        draw = sampler.sample(k_sample, state, batch)
        return sampler.update(state, draw, arrays["losses"], key=k_update, **rest, **static)

    jitted = jax.jit(step)
    keys = jax.random.split(key, num_steps)
    new, seen = state, []
    for one_key in keys:
        new, metrics = jitted(new, one_key, arrays)
        _require_same(new, state, "update: the state's structure, shapes or dtypes")
        seen.append(metrics)
    _require(len(traces) == 1, f"update: traced {len(traces)} times for one shape")
    jaxpr = str(jax.make_jaxpr(step)(state, key, arrays))
    _require("callback" not in jaxpr, "update: a host callback in the jaxpr")
    for metrics in seen:
        flat = all(jnp.shape(value) == () for value in metrics.values())
        _require(flat and metrics.keys() == seen[0].keys(), f"update: metrics {metrics}")

    def scan(state: State, arrays: dict[str, Any]) -> State:
        return jax.lax.scan(lambda s, k: step(s, k, arrays), state, keys)[0]

    _require_same(jax.eval_shape(scan, state, arrays), state, "update under scan")
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    both, _ = jax.eval_shape(jax.vmap(step, (0, 0, None)), states, keys[:2], arrays)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), both)
    _require_same(one, state, "update under vmap")
    return new


def _check_extras(
    sampler: TimestepSampler, state: State, batch: Batch, extras: dict[str, Any], key: Key
) -> None:
    arrays, static = _split({"key": key, **extras})

    def update(names: set[str]) -> None:
        def call(state: State, arrays: dict[str, Any]) -> Any:
            given = {k: v for k, v in {**arrays, **static}.items() if k in names}
            draw = sampler.sample(key, state, batch)
            return sampler.update(state, draw, arrays["losses"], **given, not_an_extra=1)

        jax.eval_shape(call, state, arrays)

    names = {*arrays, *static} - {"losses"}
    update(names)
    parameters = inspect.signature(sampler.update).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    for name in needed:
        try:
            update(names - {name})
        except (TypeError, ValueError) as error:
            _require(name in str(error), f"update without {name!r} does not name it: {error}")
        else:
            raise AssertionError(f"update declares {name!r} but runs without it")


def _check_shapes(
    sampler: TimestepSampler,
    state: State,
    batch: Batch,
    grid: TimeGrid,
    extras: dict[str, Any],
    key: Key,
) -> None:
    shape = (collectives.batch_size(batch), 3)
    arrays, static = _split(extras)

    def all_ways(key: Key, state: State, arrays: dict[str, Any]) -> dict[str, TimestepSample]:
        ways: tuple[Along, ...] = get_args(Along)
        return {way: sampler.sample(key, state, batch, shape=shape[1:], along=way) for way in ways}

    def updated(key: Key, state: State, arrays: dict[str, Any]) -> State:
        rest = {**arrays, **static, "key": key}
        draw = all_ways(key, state, arrays)["independent"]
        losses = jnp.broadcast_to(rest.pop("losses")[:, None], shape)
        log_density = sampler.log_density(state, draw, batch)
        _require(log_density.shape == shape, f"log_density with a shape: {log_density.shape}")
        return sampler.update(state, draw, losses, **rest)[0]

    try:
        draws = jax.jit(all_ways)(key, state, arrays)
    except ValueError as error:
        _require("shape" in str(error), f"a refusal of shape= that does not name it: {error}")
        return
    for along, draw in draws.items():
        _require_draw(draw, shape, grid, f"sample with shape={shape[1:]}, along={along!r}")
    varied = jnp.any(jnp.diff(draws["independent"].u))
    _require(bool(varied), "sample with a shape: the draws of an example are all the same")
    equal, rising = draws["equal"].t, draws["increasing"].t
    _require(bool(jnp.all(equal == equal[:, :1])), "along='equal': times that differ")
    _require(bool(jnp.all(rising[:, 1:] >= rising[:, :-1])), "along='increasing': times that fall")
    _require_same(jax.eval_shape(updated, key, state, arrays), state, "update with a shape")


def _probabilities(
    sampler: TimestepSampler, state: State, batch: Batch, grid: TimeGrid
) -> tuple[np.ndarray, np.ndarray]:
    """Fine cells' centres in u, and the mean over the batch of each cell's probability."""
    size = collectives.batch_size(batch)
    if grid.num_timesteps is None:
        u = (np.arange(4096, dtype=np.float32) + 0.5) / 4096
        t = grid.to_t(jnp.asarray(u))
    else:
        t = jnp.arange(grid.num_timesteps, dtype=jnp.int32)
        u = np.asarray(grid.to_u(t))

    def relative(t: jax.Array, u: jax.Array) -> jax.Array:
        sample = TimestepSample(*(jnp.full((size,), x) for x in (t, u, jnp.float32(1))))
        return jnp.mean(jnp.exp(sampler.log_density(state, sample, batch)))

    density = jax.jit(jax.vmap(relative))(t, jnp.asarray(u))
    return u, np.asarray(density, np.float64) / len(u)


def _check_draws(
    sampler: TimestepSampler,
    state: State,
    batch: Batch,
    grid: TimeGrid,
    key: Key,
    num_draws: int,
    min_p_value: float,
    max_z_score: float,
) -> SamplerReport:
    centre, p = _probabilities(sampler, state, batch, grid)
    mass = float(p.sum())
    _require(abs(mass - 1) < 0.02, f"log_density: the probabilities sum to {mass}, not 1")

    def many(key: Key) -> tuple[jax.Array, jax.Array]:
        draw = sampler.sample(key, state, batch)
        return draw.t, sampler.log_density(state, draw, batch)

    t, log_density = jax.jit(jax.vmap(many))(jax.random.split(key, num_draws))
    if grid.num_timesteps is None:
        cell = np.minimum((np.asarray(grid.to_u(t)) * len(p)).astype(int), len(p) - 1)
    else:
        cell = np.asarray(t)
    edges = np.minimum((np.cumsum(p) / mass * _BINS - 1e-9).astype(int), _BINS - 1)
    expected = np.bincount(edges, p / mass, minlength=_BINS) * cell.size
    observed = np.bincount(edges[cell.ravel()], minlength=_BINS)
    used = expected > 5
    statistic = float(np.sum((observed - expected)[used] ** 2 / expected[used]))
    degrees = max(int(used.sum()) - 1, 1)
    p_value = float(jax.scipy.stats.chi2.sf(statistic, degrees))
    _require(p_value >= min_p_value, f"draws against log_density: chi-square p-value {p_value}")
    scores = []
    for f in (lambda x: x, lambda x: np.cos(np.pi * x)):
        value = np.asarray(jnp.exp(-log_density), np.float64) * f(centre[cell])
        means, truth = value.mean(1), f(centre).mean()
        error = max(means.std(ddof=1) / np.sqrt(num_draws), 1e-5)
        scores.append(float(abs(means.mean() - truth) / error))
    _require(max(scores) <= max_z_score, f"importance-weighted means are biased: z = {scores}")
    return SamplerReport(p_value, mass, tuple(scores))
