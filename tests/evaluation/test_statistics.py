"""Statistics of features: exact in one pass, and the same in any order and in any batches."""

import numpy as np
import pytest

from tinyldm.evaluation import statistics
from tinyldm.evaluation.statistics import SPLITS, Classes, Gatherer, Gaussian, Moments, Sample


def draw(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3).astype(np.float32)


def keys(n: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 2**64, n, dtype=np.uint64)


def gather(rows, marks, batch: int, logits=None, kept: int = 100):
    gatherer = Gatherer("inception", "tensorflow1", kept)
    for i in range(0, len(rows), batch):
        gatherer.add(rows[i:i + batch], marks[i:i + batch], None if logits is None else logits[i:i + batch])
    return gatherer.finish(source="here")


@pytest.mark.parametrize("batch", [1, 7, 512, 513, 2000])
def test_mean_and_covariance_are_numpys_at_any_batch_size_also_far_from_0(batch):
    rows = draw(1400, 5).astype(np.float64) + 1e6
    moments = Moments(5)
    for i in range(0, 1400, batch):
        moments.add(rows[i:i + batch])
    mean, cov = moments.gaussian()
    centred = rows - rows.mean(0)
    assert np.allclose(mean, rows.mean(0), rtol=1e-14)
    assert np.allclose(cov, centred.T @ centred / 1399, rtol=1e-8)          # the plain sum of squares would lose all but 4 digits
    assert np.array_equal(cov, cov.T)


def test_moments_can_be_asked_for_in_between():
    rows, moments = draw(300, 3), Moments(3)
    moments.add(rows[:100])
    assert np.allclose(moments.gaussian().cov, np.cov(rows[:100].astype(float), rowvar=False))
    moments.add(rows[100:])
    assert np.allclose(moments.gaussian().cov, np.cov(rows.astype(float), rowvar=False)) and moments.count == 300


def test_a_sample_holds_all_rows_up_to_its_limit_and_then_those_of_the_smallest_keys():
    rows, marks = draw(500, 4), keys(500)
    for most in (500, 600, 60):
        for batch in (1, 13, 500):
            sample = Sample(4, most)
            for i in range(0, 500, batch):
                sample.add(rows[i:i + batch], marks[i:i + batch])
            assert np.array_equal(sample.sorted(), rows[np.argsort(marks)][:most])


def test_neither_order_nor_batches_change_what_is_gathered():
    rows, marks, logits = draw(700, 6), keys(700), 3 * draw(700, 12, 1)
    order = np.random.default_rng(5).permutation(700)
    one, two = gather(rows, marks, 50, logits), gather(rows[order], marks[order], 33, logits[order])
    assert np.array_equal(one.rows, two.rows) and one.count == two.count == 700 and len(one.rows) == 100
    assert np.allclose(one.gaussian.mean, two.gaussian.mean, rtol=1e-12) and np.allclose(one.gaussian.cov, two.gaussian.cov, rtol=1e-11)
    assert np.allclose(one.inception_score, two.inception_score, rtol=1e-12)


def test_the_inception_score_is_the_published_formula_within_every_part():
    logits, marks = 2 * draw(400, 10, 3).astype(np.float64), keys(400)
    classes = Classes(10)
    for i in range(0, 400, 21):
        classes.add(logits[i:i + 21], (marks[i:i + 21] % np.uint64(SPLITS)).astype(int))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in range(SPLITS):
        mine = p[marks % np.uint64(SPLITS) == part]
        scores.append(np.exp((mine * (np.log(mine) - np.log(mine.mean(0)))).sum(1).mean()))
    assert np.allclose(classes.score(), (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_the_inception_score_of_k_sure_classes_is_k_and_of_equal_pictures_is_1():
    sure, equal = Classes(20, 2), Classes(20, 2)
    sure.add(1e4 * np.eye(20, dtype=np.float32)[np.arange(140) % 7], np.arange(140) // 70)
    equal.add(np.tile(draw(1, 20), (30, 1)), np.arange(30) % 2)
    assert np.allclose(sure.score(), (7, 0)) and np.allclose(equal.score(), (1, 0))


# ---------------------------------------------------------------- files


def test_a_file_holds_what_pytorch_fid_reads_and_what_it_writes_is_read(tmp_path):
    found = gather(draw(50, 4), keys(50), 8)
    statistics.save(tmp_path / "ours.npz", found)
    with np.load(tmp_path / "ours.npz") as read:                            # pytorch-fid: fid_score.py, compute_statistics_of_path
        mu, sigma = read["mu"][:], read["sigma"][:]
    assert np.allclose(mu, found.gaussian.mean) and np.allclose(sigma, found.gaussian.cov)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)        # the same file: save_fid_stats
    assert all(map(statistics.is_statistics, (tmp_path / "ours.npz", tmp_path / "theirs.npz")))

    ours = statistics.load(tmp_path / "ours.npz", "inception", "tensorflow1")
    assert (ours.count, ours.facts["source"]) == (50, str(tmp_path / "ours.npz")) and np.array_equal(ours.rows, found.rows)
    theirs = statistics.load(tmp_path / "theirs.npz", "inception", "pytorch")
    assert theirs.count is None and np.array_equal(theirs.gaussian.cov, sigma)
    with pytest.raises(ValueError, match="holds only mean and covariance: KID needs the pictures themselves as --reference, or an .npz that --metric stats"):
        theirs.kept("KID")


def test_statistics_of_another_tower_or_resize_are_refused(tmp_path):
    statistics.save(tmp_path / "a.npz", gather(draw(50, 4), keys(50), 8))
    assert statistics.tower_of(tmp_path / "a.npz") == "inception"
    with pytest.raises(ValueError, match="made with tower inception, this metric has tower dinov2"):
        statistics.load(tmp_path / "a.npz", "dinov2", "bicubic")
    with pytest.raises(ValueError, match="made with resize tensorflow1, this metric has resize pytorch"):
        statistics.load(tmp_path / "a.npz", "inception", "pytorch")


def test_damaged_statistics_are_refused_and_arrays_of_pictures_are_none(tmp_path):
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.array([[1, np.nan], [np.nan, 1]]))
    np.savez(tmp_path / "pictures.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"mu \[3\] and sigma \[4, 4\] are not a mean \[d\] and a covariance \[d, d\]"):
        statistics.load(tmp_path / "wrong.npz", "inception", "tensorflow1")
    with pytest.raises(ValueError, match="not finite"):
        statistics.load(tmp_path / "nan.npz", "inception", "tensorflow1")
    assert not any(map(statistics.is_statistics, (tmp_path / "pictures.npz", tmp_path / "text.npz", tmp_path / "absent.npz")))


def test_features_that_are_no_numbers_and_sets_without_a_covariance_are_refused():
    rows = draw(20, 3)
    rows[7, 1], rows[9, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 20 rows of features are not finite numbers"):
        gather(rows, keys(20), 20)
    with pytest.raises(ValueError, match="1 pictures have no covariance"):
        gather(draw(1, 3), keys(1), 1)
    with pytest.raises(ValueError, match="no pictures"):
        Gatherer("inception", "tensorflow1").finish()


def test_memory_does_not_grow_with_the_number_of_pictures():
    gatherer, sizes = Gatherer("inception", "tensorflow1", 100), []
    for turn in range(40):
        gatherer.add(draw(50, 4, turn), keys(50), draw(50, 8, turn))
        sizes.append(sum(array.nbytes for part in (gatherer.moments, gatherer.sample, gatherer.classes)
                         for array in vars(part).values() if isinstance(array, np.ndarray)))
    assert len(set(sizes)) == 1 and isinstance(gatherer.moments.gaussian(), Gaussian)
