"""Sets of features as statistics, gathered in one pass and in memory that does not grow with the number of pictures.

This file and distances.py know features, not pictures: rows [n, d] of any network. A set keeps three things:

    moments     mean and covariance of all rows, in float64
    sample      at most `KEPT` of the rows, for statistics of pairs of pictures, for intervals and for FID-infinity. Up to that number
                they are all rows; above it they are those whose keys are smallest. A key is a hash of a picture's pixels
    classes     for the Inception score: sums of class probabilities in each of ten parts, to which rows are assigned by their keys

Nothing depends on the order of the pictures or on the batches in which they came, beyond rounding in float64: what is random
follows from the keys. A set is stored as .npz with the names that pytorch-fid reads and writes (mu, sigma), so either reads the other's.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import dsyrk

from tinyldm.files import write_file

KEPT = 10_000               # rows of a sample: the number that precision and recall are usually taken of
AT_ONCE = 512               # rows that are gathered before the covariance is updated
SPLITS = 10                 # parts of the Inception score (arXiv:1606.03498; the code that was published with it)


class Gaussian(NamedTuple):
    """What a Fréchet distance needs of a set."""

    mean: np.ndarray            # float64 [d]
    cov: np.ndarray             # float64 [d, d], divided by n - 1


class Moments:
    """Mean and covariance of rows in one pass: batches are centred at their own means, and joined by a rank-one term, so that a mean
    that is large beside the spread costs no digits. (Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm".)"""

    def __init__(self, dimensions: int):
        self.count, self.mean = 0, np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions), order="F")        # upper triangle of the sum of (x - mean)(x - mean)^T
        self.waiting = np.empty((AT_ONCE + 1, dimensions))                  # the last row is for the rank-one term
        self.held = 0

    def add(self, rows: np.ndarray) -> None:
        """rows [b, d]. ValueError where a number is not finite."""
        if not np.isfinite(rows).all():
            raise ValueError(f"{int((~np.isfinite(rows).all(1)).sum())} of {len(rows)} rows of features are not finite numbers: the "
                             "weights of the network that makes them are damaged")
        while len(rows):
            part, rows = rows[:AT_ONCE - self.held], rows[AT_ONCE - self.held:]
            self.waiting[self.held:self.held + len(part)] = part
            self.held += len(part)
            if self.held == AT_ONCE:
                self.join()

    def join(self) -> None:
        """Take the rows that wait into mean and scatter."""
        if not (n := self.held):
            return
        x, total = self.waiting[:n + 1], self.count + n
        mean = x[:n].mean(0)
        x[:n] -= mean
        x[n] = (mean - self.mean) * (self.count * n / total) ** 0.5
        self.scatter = dsyrk(1.0, x.T, beta=1.0, c=self.scatter, overwrite_c=1)
        self.mean, self.count, self.held = self.mean + (mean - self.mean) * (n / total), total, 0

    def gaussian(self) -> Gaussian:
        """ValueError for fewer than two rows."""
        self.join()
        if self.count < 2:
            raise ValueError(f"{self.count} pictures have no covariance: give two or more")
        upper = np.triu(self.scatter)
        return Gaussian(self.mean, (upper + np.triu(upper, 1).T) / (self.count - 1))


class Sample:
    """At most `most` rows, those with the smallest keys: a random sample that does not depend on the order in which rows come."""

    def __init__(self, dimensions: int, most: int = KEPT):
        self.most, self.count = most, 0
        self.rows = np.empty((most, dimensions), np.float32)
        self.keys = np.empty(most, np.uint64)

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """rows [b, d], keys uint64 [b]."""
        every = np.concatenate([self.keys[:self.count], keys])
        chosen = np.argpartition(every, self.most - 1)[:self.most] if len(every) > self.most else np.arange(len(every))
        new = chosen[chosen >= self.count] - self.count
        dropped = np.setdiff1d(np.arange(self.count), chosen)
        places = np.concatenate([dropped, np.arange(self.count, self.most)])[:len(new)]
        self.rows[places], self.keys[places] = rows[new], keys[new]
        self.count = min(len(every), self.most)

    def sorted(self) -> np.ndarray:
        """The rows [n, d] in the order of their keys, float32."""
        return self.rows[np.argsort(self.keys[:self.count], kind="stable")]


class Classes:
    """Sums for the Inception score: exp of the mean of KL(p(y|x) || p(y)) (arXiv:1606.03498, Sec. 4), in SPLITS parts.

    Published code shuffles the pictures and cuts them into equal parts. Here a picture's key says which part it belongs to, so that the
    score does not depend on the order; parts then differ in size by about the square root of it."""

    def __init__(self, classes: int, splits: int = SPLITS):
        self.sums, self.entropies, self.counts = np.zeros((splits, classes)), np.zeros(splits), np.zeros(splits, np.int64)

    def add(self, logits: np.ndarray, parts: np.ndarray) -> None:
        """logits [b, classes]; parts: int [b], the part of each."""
        logits = logits.astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        p = np.exp(log_p)
        np.add.at(self.sums, parts, p)
        np.add.at(self.entropies, parts, (p * log_p).sum(1))
        np.add.at(self.counts, parts, 1)

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts that have pictures."""
        used = self.counts > 0
        if not used.any():
            raise ValueError("no pictures: the Inception score needs some")
        q = self.sums[used] / self.counts[used, None]
        q_log_q = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(1)
        scores = np.exp(self.entropies[used] / self.counts[used] - q_log_q)
        return float(scores.mean()), float(scores.std())


@dataclass
class FeatureSet:
    """What is kept of the features of a set of pictures. tower, resize: what made them, as named in the table of towers."""

    tower: str
    resize: str
    count: int | None = None            # pictures; None: not known, as of pytorch-fid's files
    gaussian: Gaussian | None = None
    rows: np.ndarray | None = None      # float32 [min(count, KEPT), d] in the order of their keys; None: not known
    inception_score: tuple[float, float] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)      # further words about the pictures, stored with them

    def kept(self, metric: str) -> np.ndarray:
        """The rows in float64. ValueError where only mean and covariance are known."""
        if self.rows is None:
            raise ValueError(f"{self.facts.get('source', 'the reference')} holds only mean and covariance: {metric} needs the pictures "
                             "themselves as --reference, or an .npz that --metric stats has written")
        return self.rows.astype(np.float64)


class Gatherer:
    """Makes a FeatureSet of features that come in batches."""

    def __init__(self, tower: str, resize: str, kept: int = KEPT):
        self.tower, self.resize, self.most = tower, resize, kept
        self.moments: Moments | None = None
        self.classes: Classes | None = None

    def add(self, rows: np.ndarray, keys: np.ndarray, logits: np.ndarray | None = None) -> None:
        """rows [b, d] of b pictures, their keys uint64 [b], and their logits [b, classes] where the network is a classifier."""
        if self.moments is None:
            self.moments, self.sample = Moments(rows.shape[1]), Sample(rows.shape[1], self.most)
        self.moments.add(rows)
        self.sample.add(rows, keys)
        if logits is not None:
            self.classes = self.classes or Classes(logits.shape[1])
            self.classes.add(logits, (keys % np.uint64(SPLITS)).astype(np.int64))

    def finish(self, **facts: str) -> FeatureSet:
        """ValueError where there were fewer than two pictures."""
        if self.moments is None:
            raise ValueError("no pictures: give two or more")
        gaussian = self.moments.gaussian()
        return FeatureSet(self.tower, self.resize, self.moments.count, gaussian, self.sample.sorted(),
                          self.classes.score() if self.classes else None, facts)


# ---------------------------------------------------------------- files


def save(file: Path, features: FeatureSet) -> None:
    """Write .npz with `mu` and `sigma`, which pytorch-fid reads, and what else is known."""
    arrays = {"mu": features.gaussian.mean, "sigma": features.gaussian.cov, "tower": features.tower, "resize": features.resize}
    arrays |= {} if features.count is None else {"count": features.count}
    arrays |= {} if features.rows is None else {"rows": features.rows}
    arrays |= {f"fact_{name}": value for name, value in features.facts.items()}
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(value) for name, value in arrays.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, content.getvalue())


def is_statistics(file: str | Path) -> bool:
    """Whether a file is an .npz of `mu` and `sigma`, rather than one of pictures."""
    path = Path(file)
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def load(file: str | Path, tower: str, resize: str) -> FeatureSet:
    """Read what `save` or pytorch-fid has written; of files that do not say which network made them, this is taken to be the one.

    ValueError for arrays of wrong shapes, for numbers that are not finite, and for another network or another resize than is wanted."""
    with np.load(file, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files if name in ("mu", "sigma", "tower", "resize", "count", "rows")
                  or name.startswith("fact_")}
    mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{file}: mu {list(mean.shape)} and sigma {list(cov.shape)} are not a mean [d] and a covariance [d, d]")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{file}: mu and sigma have numbers that are not finite: make it again")
    for name, wanted in (("tower", tower), ("resize", resize)):
        if name in arrays and str(arrays[name]) != wanted:
            raise ValueError(f"{file} was made with {name} {arrays[name]}, this metric has {name} {wanted}: numbers of two are not "
                             "comparable; name the reference pictures, or another file")
    facts = {name.removeprefix("fact_"): str(value) for name, value in arrays.items() if name.startswith("fact_")}
    return FeatureSet(tower, resize, int(arrays["count"]) if "count" in arrays else None, Gaussian(mean, cov), arrays.get("rows"),
                      facts=facts | {"source": str(file)})


def tower_of(file: str | Path) -> str:
    """The tower that a file of statistics names; "inception" where it names none, as pytorch-fid's files."""
    with np.load(file, allow_pickle=False) as found:
        return str(found["tower"]) if "tower" in found.files else "inception"
