"""Distances between sets of features: against closed forms, and against plain float64 references."""

import numpy as np
import pytest
import scipy.linalg

from tinyldm.evaluation import distances
from tinyldm.evaluation.distances import Frechet, cmmd, counts, kid, mean_estimate, precision_recall
from tinyldm.evaluation.statistics import Gaussian


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def covariance(d: int, seed: int) -> np.ndarray:
    a = draw(d, 2 * d, seed)
    return a @ a.T / (2 * d)


def gaussian_of(x: np.ndarray) -> Gaussian:
    return Gaussian(x.mean(0), np.cov(x, rowvar=False))


# ---------------------------------------------------------------- Fréchet


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """With one set of eigenvectors: |m1 - m2|² + sum of (s1 - s2)²."""
    q, _ = np.linalg.qr(draw(40, 40, 0))
    s1, s2, m1, m2 = (np.abs(draw(1, 40, seed))[0] for seed in (1, 2, 3, 4))
    one, two = Gaussian(m1, q @ np.diag(s1**2) @ q.T), Gaussian(m2, q @ np.diag(s2**2) @ q.T)
    wanted = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert Frechet(one).to(two) == pytest.approx(wanted, rel=1e-10) == Frechet(two).to(one)


def test_the_root_agrees_with_scipys_sqrtm_and_with_the_eigenvalues_of_the_product():
    """As pytorch-fid and torch-fidelity 0.3 (sqrtm) and torch-fidelity 0.4 (eigenvalues) compute it."""
    one, two = Gaussian(draw(1, 30, 1)[0], covariance(30, 2)), Gaussian(draw(1, 30, 3)[0], covariance(30, 4))
    product = one.cov @ two.cov
    rest = ((one.mean - two.mean) ** 2).sum() + np.trace(one.cov) + np.trace(two.cov)
    by_sqrtm = rest - 2 * np.trace(scipy.linalg.sqrtm(product)).real
    by_eigenvalues = rest - 2 * np.sqrt(scipy.linalg.eigvals(product)).real.sum()
    assert Frechet(two).to(one) == pytest.approx(by_sqrtm, rel=1e-8) == pytest.approx(by_eigenvalues, rel=1e-8)


@pytest.mark.parametrize("n", [10, 25, 200])
def test_rows_have_the_distance_of_their_gaussian_also_where_they_are_fewer_than_dimensions(n):
    x, reference = draw(n, 25, 1, 0.3), Frechet(Gaussian(np.zeros(25), covariance(25, 2)))
    assert reference.to_rows(x) == pytest.approx(reference.to(gaussian_of(x)), rel=1e-6)


def test_weights_are_repetitions():
    x, reference = draw(30, 8, 1), Frechet(Gaussian(np.zeros(8), covariance(8, 2)))
    weights = counts(30, 1)[:, 0]
    assert weights.sum() == 30 and weights.max() > 1 and weights.min() == 0
    assert reference.to_rows(x, weights) == pytest.approx(reference.to_rows(np.repeat(x, weights.astype(int), 0)), rel=1e-9)


def test_a_set_is_at_distance_0_from_itself_also_a_constant_one():
    x, constant = draw(50, 80, 1), np.full((20, 6), 3.0)
    assert Frechet(gaussian_of(x)).to_rows(x) == pytest.approx(0, abs=1e-4)          # of a singular covariance, and traces of 80
    assert Frechet(gaussian_of(constant)).to_rows(constant) == 0
    assert Frechet(gaussian_of(constant)).to_rows(constant + 2) == pytest.approx(24)


def test_features_of_another_network_are_refused():
    with pytest.raises(ValueError, match="features of 5 and of 4 numbers: they were made by different networks"):
        Frechet(gaussian_of(draw(20, 4, 1))).to(gaussian_of(draw(20, 5, 1)))


def test_fid_of_few_pictures_is_too_high_and_fid_infinity_is_not():
    d, shift = 24, 0.2
    reference = Frechet(Gaussian(np.zeros(d), np.eye(d)))
    true, found, extrapolated = d * shift**2, [], []
    for seed in range(12):
        x = draw(600, d, seed, shift)
        found.append(reference.to_rows(x)), extrapolated.append(reference.at_infinity(x))
    assert np.mean(found) - true > 0.2 and abs(np.mean(extrapolated) - true) < 0.05


def test_the_bootstraps_interval_is_that_of_new_samples():
    d = 6
    reference = Frechet(Gaussian(np.zeros(d), np.eye(d)))
    values = [reference.to_rows(draw(400, d, seed, 0.3)) for seed in range(200)]
    x = draw(400, d, 999, 0.3)
    found = reference.bootstrap(reference.to_rows(x), x, 400, 200)
    assert (found.interval[1] - found.value) / distances.NORMAL == pytest.approx(np.std(values), rel=0.2)
    wide = reference.bootstrap(reference.to_rows(x), x, 1600, 200)          # of four times as many pictures, of which 400 were kept
    assert (wide.interval[1] - wide.value) == pytest.approx((found.interval[1] - found.value) / 2)


def test_the_interval_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).exponential(size=500)
    found = mean_estimate(values, 2000)
    assert found.value == values.mean()
    assert (found.interval[1] - found.value) / distances.NORMAL == pytest.approx(values.std() / 500**0.5, rel=0.05)


# ---------------------------------------------------------------- kernels


def test_kid_is_the_published_loop_over_subsets():
    """torch-fidelity's metric_kid.py, in float64: its draws, and its estimator of every subset."""
    x, y = draw(130, 7, 1), 0.9 * draw(150, 7, 2, 0.1)
    kernel = lambda a, b: (a @ b.T / 7 + 1) ** 3
    rng, values = np.random.RandomState(2020), []
    for _ in range(30):
        a, b = x[rng.choice(130, 50, replace=False)], y[rng.choice(150, 50, replace=False)]
        within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (50 * 49) for z in (a, b)]
        values.append(sum(within) - 2 * kernel(a, b).mean())
    found = kid(x, y, size=50, number=30)
    assert found.of_subsets == pytest.approx(np.mean(values), rel=1e-9) and found.std == pytest.approx(np.std(values), rel=1e-9)
    everything = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert found.all_pairs.value == pytest.approx(sum(everything) - 2 * kernel(x, y).mean(), rel=1e-9)


def test_kid_of_two_samples_of_one_distribution_is_0_within_its_error():
    values = [kid(draw(80, 5, seed), draw(90, 5, 1000 + seed), number=1, replicates=2).all_pairs.value for seed in range(100)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10


def test_an_interval_of_kid_is_that_of_new_samples():
    found = [kid(draw(150, 5, seed), draw(150, 5, 500 + seed, 0.4), number=1, replicates=100).all_pairs for seed in range(60)]
    spread = np.std([each.value for each in found])
    widths = [(each.interval[1] - each.value) / distances.NORMAL for each in found]
    assert np.mean(widths) == pytest.approx(spread, rel=0.3)


def test_cmmd_is_the_biased_estimate_of_directions():
    x, y = draw(40, 9, 1), draw(30, 9, 2, 0.5)
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    mean = lambda p, q: np.mean([[np.exp(-((i - j) ** 2).sum() / 200) for j in q] for i in p])
    assert cmmd(x, y).value == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert cmmd(3 * x, y / 2).value == pytest.approx(cmmd(x, y).value, rel=1e-9)
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-9)


def test_blocks_change_nothing(monkeypatch):
    x, y = draw(60, 4, 1), draw(70, 4, 2, 0.2)
    whole = kid(x, y), cmmd(x, y), precision_recall(x, y)
    monkeypatch.setattr(distances, "BLOCK", 17)
    parts = kid(x, y), cmmd(x, y), precision_recall(x, y)
    assert parts[0].of_subsets == pytest.approx(whole[0].of_subsets, rel=1e-9) and parts[1].value == pytest.approx(whole[1].value, rel=1e-9)
    assert all(np.array_equal(*pair) for pair in zip(parts[2], whole[2]))


def test_kid_of_one_picture_is_refused():
    with pytest.raises(ValueError, match="two pictures or more"):
        kid(draw(1, 3, 0), draw(5, 3, 0))


# ---------------------------------------------------------------- precision and recall


def plain(real: np.ndarray, generated: np.ndarray, k: int, k_density: int) -> tuple[float, ...]:
    """The definitions, with loops."""
    apart = lambda a, b: float(np.linalg.norm(a - b))
    def reach(z, i, n):
        return sorted(apart(z[i], z[j]) for j in range(len(z)) if j != i)[n - 1]
    m, n = len(generated), len(real)
    precision = np.mean([any(apart(g, real[i]) <= reach(real, i, k) for i in range(n)) for g in generated])
    recall = np.mean([any(apart(r, generated[j]) <= reach(generated, j, k) for j in range(m)) for r in real])
    density = sum(apart(g, real[i]) <= reach(real, i, k_density) for g in generated for i in range(n)) / (k_density * m)
    coverage = np.mean([any(apart(g, real[i]) <= reach(real, i, k_density) for g in generated) for i in range(n)])
    return precision, recall, density, coverage


def test_precision_recall_density_and_coverage_are_their_definitions():
    real, generated = draw(30, 3, 1), 0.7 * draw(25, 3, 2, 0.5)
    found = [values.mean() for values in precision_recall(real, generated)]
    assert np.allclose(found, plain(real, generated, 3, 5)) and len({*np.round(found, 6)}) == 4
    assert np.allclose([values.mean() for values in precision_recall(real, generated, 2, 2)], plain(real, generated, 2, 2))


def test_equal_sets_are_precise_and_complete_and_distant_ones_neither():
    x = draw(40, 5, 1)
    assert [values.mean() for values in precision_recall(x, x)] == pytest.approx([1, 1, 1.2, 1])       # each in its own ball, and 5 more
    assert [values.mean() for values in precision_recall(x, x + 100)] == [0, 0, 0, 0]
    constant = np.full((9, 4), 7.0)
    assert precision_recall(constant, constant).precision.mean() == 1


def test_features_far_from_0_have_the_same_neighbours():
    """|x|² + |y|² - 2 x y would lose the digits of their distances."""
    real, generated = draw(60, 5, 1), draw(50, 5, 2, 0.5)
    near, far = precision_recall(real, generated), precision_recall(real + 1e8, generated + 1e8)
    assert all(np.array_equal(*pair) for pair in zip(near, far)) and 0 < near.precision.mean() < 1


def test_too_few_pictures_for_neighbours_are_refused():
    with pytest.raises(ValueError, match="5 pictures: precision and recall need 6 or more of each set"):
        precision_recall(draw(5, 3, 0), draw(30, 3, 1))
