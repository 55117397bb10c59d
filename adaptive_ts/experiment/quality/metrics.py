"""How close generated images are to real ones, in the features of a network.

Four numbers: Frechet distance, kernel distance (KID), Inception Score, precision and recall.
Features are (N, d) of any network; a number is one of its network, its preprocessing and its N.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import special
from scipy.linalg import lapack

_ROWS = 1024  # of distances at once: with 50,000 columns they take 200 MB


class Gaussian(NamedTuple):
    """The mean (d,) and the covariance (d, d) of a set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments(NamedTuple):
    """What a `Gaussian` needs of features that come in parts, float64.

    Attributes:
      count: features seen, N.
      mean: (d,).
      scatter: (d, d), the sum of (x - mean) (x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def gaussian(features: np.ndarray) -> Gaussian:
    """The moments of features (N, d); the covariance is divided by N - 1.

    Raises:
      ValueError: fewer than two features, or not (N, d). Features that are not finite pass, and
        make every distance NaN.
    """
    x = _checked(features, finite=False).astype(np.float64)
    return Gaussian(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))


def add_features(moments: Moments | None, features: np.ndarray) -> Moments:
    """The moments with more features (n, d) in them; None is the moments of nothing.

    Deviations are from the means of the parts, so that large means cost no digits.

    Raises:
      ValueError: features that are not finite, not (n, d), or of another d.

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.quality.metrics import add_features, to_gaussian
      >>> x = np.random.default_rng(0).normal(size=(10, 3))
      >>> moments = add_features(add_features(None, x[:4]), x[4:])
      >>> bool(np.allclose(to_gaussian(moments).covariance, np.cov(x.T)))
      True

    Source: Chan, Golub and LeVeque 1983, The American Statistician 37(3): the pairwise update.
    """
    x = _checked(features, least=1).astype(np.float64)
    mean = x.mean(0)
    deviations = x - mean
    part = Moments(len(x), mean, deviations.T @ deviations)
    if moments is None:
        return part
    if mean.shape != moments.mean.shape:
        raise ValueError(
            f"{len(mean)} features per image after {len(moments.mean)}: mixed networks?"
        )
    count = moments.count + part.count
    delta = part.mean - moments.mean
    between = np.outer(delta, delta) * (moments.count * part.count / count)
    return Moments(
        count,
        moments.mean + delta * (part.count / count),
        moments.scatter + part.scatter + between,
    )


def to_gaussian(moments: Moments) -> Gaussian:
    """The Gaussian of accumulated moments; the covariance is divided by N - 1.

    Raises:
      ValueError: of fewer than two images.
    """
    if moments.count < 2:
        raise ValueError(f"a covariance needs two images or more, got {moments.count}")
    return Gaussian(moments.mean, moments.scatter / (moments.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64; FID in Inception's features.

    The root's trace is the sum of the singular values of R_a^T R_b, for any R R^T = covariance:
    here Cholesky's, with pivots. It is exact to rounding where a covariance is singular, as of
    fewer images than features; roots of eigenvalues of A B keep only half of the digits there.
    NaN where a moment is not finite, as of a model that has diverged.

    Raises:
      ValueError: the two are of different networks: their numbers of features differ.

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.quality.metrics import Gaussian, frechet_distance
      >>> a, b = Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.ones(2), 4 * np.eye(2))
      >>> round(frechet_distance(a, b), 6)
      4.0

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} features per image against {len(b.mean)}: other networks?")
    if not all(np.isfinite(x).all() for x in (*a, *b)):
        return float("nan")
    product = _root(a.covariance).T @ _root(b.covariance)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(((a.mean - b.mean) ** 2).sum() + trace), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """(d, r) of rank r, R with R R^T = covariance."""
    # f2py makes lapack's functions, so that no type checker sees them.
    lower, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)  # pyrefly: ignore[missing-attribute]
    root = np.zeros((len(covariance), rank))
    root[pivots - 1] = np.tril(lower)[:, :rank]
    return root


def kid(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subset_size: int = 1000,
    subsets: int = 100,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel Inception distance: (mean, standard deviation) of MMD^2 over random subsets.

    The unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3; it may be below zero.

    Args:
      a: (N, d) features.
      b: (M, d) features.
      subset_size: images drawn from each side, without replacement.
      subsets: how many times.
      seed: of the draws; the default draws torch-fidelity's subsets.

    Raises:
      ValueError: fewer images than ``subset_size``, another d on the two sides, features that
        are not finite, or a size below 2.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), Sec. 4.
    """
    a, b = _checked_pair(a, b)
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"KID needs subset_size >= 2 and subsets >= 1: {subset_size}, {subsets}")
    if min(len(a), len(b)) < subset_size:
        raise ValueError(
            f"KID draws subsets of {subset_size} images, got {len(a)} and {len(b)}: make more "
            f"images, or pass subset_size={min(len(a), len(b))} or less"
        )
    rng = np.random.RandomState(seed)  # a stream that NumPy has promised never to change
    values = []
    for _ in range(subsets):
        x, y = (f[rng.choice(len(f), subset_size, replace=False)] for f in (a, b))
        values.append(_squared_mmd(x.astype(np.float64), y.astype(np.float64)))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    count, dim = x.shape

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / dim + 1) ** 3

    within = [k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))]
    return sum(within) / (count * (count - 1)) - 2 * kernel(x, y).mean()


def inception_score(
    logits: np.ndarray, *, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
    """exp(mean of KL(p(class | x) || p(class))): (mean, standard deviation) over the splits.

    p(class) is the mean of p(class | x) within a split.

    Args:
      logits: (N, classes).
      splits: parts of about equal size.
      seed: of the order they are split in; the default's is torch-fidelity's. None is the given
        order, as in the paper's code, for images whose order means nothing.

    Raises:
      ValueError: fewer than two images in a split, logits that are not finite, or not (N, classes).

    Example:
      >>> import numpy as np
      >>> from adaptive_ts.experiment.quality.metrics import inception_score
      >>> certain = 100 * np.eye(5)[np.arange(100) % 5]  # 5 classes, each image sure of one
      >>> round(inception_score(certain, splits=1)[0], 6)
      5.0

    Source: Salimans et al. 2016 (arXiv 1606.03498), Sec. 4.
    """
    logits = _checked(logits, "logits").astype(np.float64)
    if splits < 1 or len(logits) < 2 * splits:
        raise ValueError(
            f"{splits} splits of two images or more need {2 * splits} images, got {len(logits)}: "
            "make more images, or pass fewer splits"
        )
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    log_p = special.log_softmax(logits, 1)
    edges = [i * len(log_p) // splits for i in range(splits + 1)]
    scores = []
    for start, end in itertools.pairwise(edges):
        part = log_p[start:end]
        marginal = special.logsumexp(part, 0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, both in [0, 1].

    Precision is the part of the generated images that lie in a ball about some real one, whose
    radius is that one's distance to its k-th nearest real neighbour; recall is the same with the
    two exchanged. Distances are computed on JAX's device in blocks, in float32 about the mean:
    ties are decided to six digits.

    Args:
      real: (N, d) features.
      generated: (M, d) features; as many as real ones, where numbers are to be compared.
      k: the neighbour.

    Raises:
      ValueError: ``k`` below 1, no more than k images on a side, another d on the two sides, or
        features that are not finite.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), Eqs. 1 and 2, Algorithm 1.
    """
    real, generated = _checked_pair(real, generated)
    if k < 1 or min(len(real), len(generated)) <= k:
        raise ValueError(
            f"neighbour k={k} needs k >= 1 and more than k images, got {len(real)} real and "
            f"{len(generated)} generated"
        )
    centre = real.mean(0, dtype=np.float64)
    x, y = (jnp.asarray((f - centre).astype(np.float32)) for f in (real, generated))
    inside = _covered(y, x, _radii(x, k)), _covered(x, y, _radii(y, k))
    precision, recall = (float(np.asarray(i).mean()) for i in inside)
    return precision, recall


def _radii(x: jax.Array, k: int) -> jax.Array:
    """(N,) the squared distance of each point to its k-th nearest other one."""
    return _by_rows(lambda rows, index: _kth_nearest(rows, x, index, k), x)


def _covered(points: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    """(N,) whether each point lies in a ball about one of the centres."""
    return _by_rows(lambda rows, _: _in_a_ball(rows, centres, radii), points)


def _by_rows(function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """function(rows, their indices), by blocks of one size: the last one overlaps its neighbour."""
    parts = []
    for start in range(0, len(x), _ROWS):
        first = min(start, max(len(x) - _ROWS, 0))
        index = jnp.arange(first, min(first + _ROWS, len(x)))
        parts.append(function(x[index], index)[start - first :])
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames="k")
def _kth_nearest(rows: jax.Array, x: jax.Array, index: jax.Array, k: int) -> jax.Array:
    distances = _squared_distances(rows, x).at[jnp.arange(len(rows)), index].set(jnp.inf)
    return -lax.top_k(-distances, k)[0][:, -1]


@jax.jit
def _in_a_ball(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return (_squared_distances(rows, centres) <= radii[None]).any(1)


def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    return (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * product


def _checked_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} features per image against {b.shape[1]}: other networks?")
    return a, b


def _checked(
    features: np.ndarray, name: str = "features", *, least: int = 2, finite: bool = True
) -> np.ndarray:
    x = np.asarray(features)
    if x.ndim != 2 or x.dtype.kind != "f" or not x.shape[1]:
        raise ValueError(f"{name} must be floats (images, numbers), got {x.dtype} {x.shape}")
    if len(x) < least:
        raise ValueError(f"{name} of {least} images or more are needed, got {len(x)}")
    if finite and not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(1).sum())
        raise ValueError(f"{name} of {bad} of {len(x)} images are not finite")
    return x
