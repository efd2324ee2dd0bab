"""Distances between two sets of features, in float64: Fréchet, kernel (KID, CMMD), precision and recall. It knows features only.

Intervals are 95 % intervals of the bootstrap: the same statistic of sets in which each picture counts as often as it was drawn from the
set with replacement. Its standard deviation is laid around the estimate. (The replicates' own mean is no estimate: repeated pictures
look like a narrower distribution, which makes every one of these distances larger.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tinyldm.evaluation.statistics import Gaussian

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]         # x [n, d], y [m, d] -> [n, m]
BLOCK = 1024                # rows of a matrix of pairs that are in memory at once
NORMAL = 1.959964           # 95 % of a normal distribution lie within so many standard deviations
SEED = 2020                 # as in torch-fidelity, for the subsets of KID


def check_dimensions(x: np.ndarray, y: np.ndarray) -> None:
    """ValueError where the features [n, d] and [m, d] cannot be of one network."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} numbers: they were made by different networks")


class Estimate(NamedTuple):
    value: float
    interval: tuple[float, float]       # 95 %


def estimate(value: float, replicates: np.ndarray, scale: float = 1.0) -> Estimate:
    """scale: multiplies the standard deviation of the replicates, where these come from fewer pictures than the value."""
    half_width = NORMAL * scale * float(np.std(replicates, ddof=1))
    return Estimate(float(value), (float(value) - half_width, float(value) + half_width))


def counts(n: int, replicates: int, seed: int = SEED) -> np.ndarray:
    """How often each of n pictures was drawn in each bootstrap replicate: float64 [n, replicates], n in every column."""
    rng = np.random.default_rng((seed, n))
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates).T.astype(np.float64)


def mean_estimate(values: np.ndarray, replicates: int) -> Estimate:
    """The mean of one number per picture [n]."""
    return estimate(values.mean(), values @ counts(len(values), replicates) / len(values))


# ---------------------------------------------------------------- Fréchet distance


class Frechet:
    """Fréchet distances (arXiv:1706.08500, Eq. 6) to a reference: |m1 - m2|² + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

    tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of the symmetric matrix R S1 R, where R² = S2. Unlike scipy.linalg.sqrtm of
    the product, this needs no small multiple of the identity where S1 or S2 is singular, and never becomes complex."""

    def __init__(self, reference: Gaussian):
        self.reference = reference

    @cached_property
    def root(self) -> np.ndarray:
        values, vectors = (each.numpy() for each in torch.linalg.eigh(torch.from_numpy(self.reference.cov)))
        return (vectors * values.clip(0) ** 0.5) @ vectors.T

    def to(self, other: Gaussian) -> float:
        """ValueError for sets of other dimensions."""
        check_dimensions(other.mean[None], self.reference.mean[None])
        return self._sum(other.mean, np.trace(other.cov), self.root @ other.cov @ self.root)

    def to_rows(self, rows: np.ndarray, weights: np.ndarray | None = None) -> float:
        """The distance to the Gaussian of rows [n, d], float64. weights [n]: how often each counts (once), whole numbers. Fewer rows than
        dimensions are cheap: the eigenvalues then are those of an n x n matrix."""
        weights = np.ones(len(rows)) if weights is None else weights
        used = weights > 0
        rows, weights, n = rows[used], weights[used], weights.sum()
        mean = weights @ rows / n
        x = (rows - mean) * (weights / (n - 1))[:, None] ** 0.5                 # x^T x is the covariance
        small = len(x) <= x.shape[1]
        product = x @ self.reference.cov @ x.T if small else self.root @ (x.T @ x) @ self.root
        return self._sum(mean, (x * x).sum(), product)

    def _sum(self, mean: np.ndarray, trace: float, product: np.ndarray) -> float:
        roots = torch.linalg.eigvalsh(torch.from_numpy(product + product.T) / 2).numpy().clip(0) ** 0.5
        apart = mean - self.reference.mean
        return float(apart @ apart + trace + np.trace(self.reference.cov) - 2 * roots.sum())

    def bootstrap(self, value: float, rows: np.ndarray, count: int, replicates: int) -> Estimate:
        """`value` with its interval. rows: those that were kept of `count` pictures."""
        found = [self.to_rows(rows, weights) for weights in counts(len(rows), replicates).T]
        return estimate(value, np.array(found), (len(rows) / count) ** 0.5)

    def at_infinity(self, rows: np.ndarray, points: int = 15) -> float:
        """FID-infinity: distances of random subsets fall about linearly in 1 / n; this is where the line meets 0 (arXiv:1911.07023).
        The reference is taken as it is. Subsets have from half of the rows to all of them."""
        rng = np.random.default_rng(SEED)
        sizes = np.unique(np.linspace(max(2, len(rows) // 2), len(rows), points).astype(int))
        values = [self.to_rows(rows[rng.permutation(len(rows))[:n]]) for n in sizes]
        if len(sizes) < 2:
            raise ValueError(f"{len(rows)} pictures are too few to extrapolate from: give four or more")
        return float(np.polyfit(1 / sizes, values, 1)[1])


# ---------------------------------------------------------------- kernel distances


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel (arXiv:1801.01401, Sec. 3)."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base                                   # numpy's power of 3 is several times slower


def gaussian(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> np.ndarray:
    """CMMD's kernel (arXiv:2401.09603, Sec. 4)."""
    return np.exp(-squared_distances(x, y) / (2 * sigma**2))


def mmd(kernel: Kernel, x: np.ndarray, y: np.ndarray, wx: np.ndarray, wy: np.ndarray, unbiased: bool) -> np.ndarray:
    """Squared maximum mean discrepancies of weighted sets: x [n, d] and y [m, d] with whole weights wx [n, k] and wy [m, k] -> [k].

    unbiased: without pairs of a picture and itself (both estimates: arXiv:0805.2368). The matrices of pairs are computed once for all k
    columns, a block of rows at a time."""
    def within(z: np.ndarray, w: np.ndarray) -> np.ndarray:
        total, n, own = pairs(z, z, w, w), w.sum(0), (w * w).sum(0)
        if not unbiased:
            return total / n**2
        diagonal = np.array([kernel(row[None], row[None])[0, 0] for row in z])
        if (n**2 <= own).any():
            raise ValueError("one picture has no pairs: give two or more")
        return (total - diagonal @ (w * w)) / (n**2 - own)

    def pairs(a: np.ndarray, b: np.ndarray, wa: np.ndarray, wb: np.ndarray) -> np.ndarray:
        return sum((wa[i:i + BLOCK] * (kernel(a[i:i + BLOCK], b) @ wb)).sum(0) for i in range(0, len(a), BLOCK))

    return within(x, wx) + within(y, wy) - 2 * pairs(x, y, wx, wy) / (wx.sum(0) * wy.sum(0))


def subsets(n: int, m: int, size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Random subsets of two sets as weights [n, number], [m, number]: the draws of torch-fidelity."""
    rng, found = np.random.RandomState(SEED), (np.zeros((n, number)), np.zeros((m, number)))
    for k in range(number):
        for weights in found:
            weights[rng.choice(len(weights), size, replace=False), k] = 1
    return found


class KernelDistance(NamedTuple):
    of_subsets: float           # mean over the subsets, the published number
    std: float                  # over the subsets
    size: int                   # pictures of a subset
    all_pairs: Estimate         # of all pictures at once


def kid(x: np.ndarray, y: np.ndarray, size: int = 1000, number: int = 100, replicates: int = 100) -> KernelDistance:
    """KID (arXiv:1801.01401): the unbiased squared MMD, over random subsets and of all. x [n, d], y [m, d]."""
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError("KID needs two pictures or more of each set")
    sx, sy = subsets(len(x), len(y), size, number)
    wx, wy = np.ones((len(x), 1)), np.ones((len(y), 1))
    bx, by = counts(len(x), replicates), counts(len(y), replicates, SEED + 1)
    values = mmd(cubic, x, y, np.hstack([wx, sx, bx]), np.hstack([wy, sy, by]), unbiased=True)
    in_subsets = values[1:number + 1]
    return KernelDistance(float(in_subsets.mean()), float(in_subsets.std()), size, estimate(values[0], values[number + 1:]))


def cmmd(x: np.ndarray, y: np.ndarray, replicates: int = 100) -> Estimate:
    """CMMD (arXiv:2401.09603): the biased squared MMD of embeddings of length 1, times 1000. Rows are divided by their lengths."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12) for z in (x, y))
    wx, wy = np.ones((len(x), 1)), np.ones((len(y), 1))
    bx, by = counts(len(x), replicates), counts(len(y), replicates, SEED + 1)
    values = 1000 * mmd(gaussian, x, y, np.hstack([wx, bx]), np.hstack([wy, by]), unbiased=False)
    return estimate(values[0], values[1:])


# ---------------------------------------------------------------- precision and recall


class Manifolds(NamedTuple):
    """One number per picture; the means are the metrics. Intervals of a mean take the other set as it is."""

    precision: np.ndarray       # of each generated picture
    recall: np.ndarray          # of each real picture
    density: np.ndarray         # of each generated picture
    coverage: np.ndarray        # of each real picture


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3, k_density: int = 5) -> Manifolds:
    """Improved precision and recall (arXiv:1904.06991, Eq. 1 and 2) and density and coverage (arXiv:2002.09797, Eq. 5 and 6). A
    picture's ball reaches to its k-th nearest neighbour in its own set, itself not counted. real [n, d], generated [m, d].

    ValueError for sets with no k-th neighbour."""
    if min(len(real), len(generated)) <= max(k, k_density):
        raise ValueError(f"{min(len(real), len(generated))} pictures: precision and recall need {max(k, k_density) + 1} or more of each "
                         "set")
    middle = real.mean(0)                       # differences of large numbers would lose digits
    real, generated = real - middle, generated - middle
    reach, reach_density = radii(real, (k, k_density))
    (reach_generated,) = radii(generated, (k,))
    precision, density = np.zeros(len(generated)), np.zeros(len(generated))
    recall, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for i in range(0, len(generated), BLOCK):
        apart = squared_distances(generated[i:i + BLOCK], real)                 # [block, n]
        precision[i:i + BLOCK] = (apart <= reach).any(1)
        density[i:i + BLOCK] = (apart <= reach_density).sum(1) / k_density
        recall |= (apart <= reach_generated[i:i + BLOCK, None]).any(0)
        nearest = np.minimum(nearest, apart.min(0))
    return Manifolds(precision, recall.astype(float), density, (nearest <= reach_density).astype(float))


def radii(x: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Squared distances of each row to its k-th nearest others: x [n, d] -> [len(ks), n]."""
    found = []
    for i in range(0, len(x), BLOCK):
        apart = squared_distances(x[i:i + BLOCK], x)
        rows = np.arange(len(apart))
        apart[rows, i + rows] = np.inf
        places = [k - 1 for k in ks]
        found.append(np.partition(apart, places, axis=1)[:, places])
    return np.concatenate(found).T


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n, d], [m, d] -> [n, m], never below 0."""
    return ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)).clip(0)
