"""The order of training: a pure function of (seed, step), every sample once an epoch, sources mixed by weight in any interval."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tinyldm.data.order import Order, interleave, permute

SIZE, WIDE, TALL = (32, 32), (24, 40), (40, 24)
NARROW = (16, 64)


def drawn(order, steps, first=0):
    return np.concatenate([order.batch(step) for step in range(first, first + steps)])


def sources(*counts):
    """Ranges of flat numbers of sources with these counts of samples, all of one size."""
    ends = np.cumsum(counts).tolist()
    return [{SIZE: range(end - count, end)} for count, end in zip(counts, ends)]


def chi_square(observed, expected):
    return ((np.asarray(observed) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 100, 1023, 1024, 99_991])
def test_a_permutation_takes_every_value_once(n):
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(np.arange(n), n, 5, 0, epoch)), np.arange(n))


@pytest.mark.slow
def test_ten_million_values_are_permuted_and_any_of_them_can_be_computed_alone():
    n = 10_000_000
    assert np.bincount(permute(np.arange(n), n, 0, 1), minlength=n).max() == 1
    some = np.array([n - 1, 0, 1234567])
    assert np.array_equal(permute(some, n, 0, 1), [permute(np.array([i]), n, 0, 1)[0] for i in some])


@pytest.mark.parametrize("n", [2, 3, 5, 7, 12, 30])
def test_small_permutations_send_every_value_everywhere_equally_often(n):
    keys, table = 1500, np.zeros((n, n))
    for seed in range(keys):
        table[np.arange(n), permute(np.arange(n), n, seed, 0)] += 1
    freedom = (n - 1) ** 2
    assert chi_square(table, keys / n) < freedom + 4 * (2 * freedom) ** 0.5


def test_neighbours_end_up_at_every_distance_equally_often():
    """The distance between the images of two neighbours is uniform."""
    n, keys = 11, 3000
    distances = np.zeros(n)
    for seed in range(keys):
        a, b = permute(np.array([4, 5]), n, seed, 0)
        distances[(b - a) % n] += 1
    assert distances[0] == 0
    assert chi_square(distances[1:], keys / (n - 1)) < 9 + 4 * 18 ** 0.5
    steps = np.diff(permute(np.arange(100_000), 100_000, 3, 0)) % 100_000
    assert chi_square(np.bincount(steps * 50 // 100_000, minlength=50), 99_999 / 50) < 49 + 4 * 98 ** 0.5


def test_epochs_seeds_and_sources_have_unrelated_orders():
    n = 5000
    orders = [permute(np.arange(n), n, seed, 0, pool, size, epoch)
              for seed, pool, size, epoch in product((0, 1), (0, 1), (0, 1), (0, 1))]
    for i, one in enumerate(orders):
        for two in orders[:i]:
            assert (one == two).sum() < 12                              # 1 expected
            assert abs(np.corrcoef(one, two)[0, 1]) < 5 / n ** 0.5


def test_every_sample_comes_once_an_epoch_and_epochs_differ():
    order = Order(sources(60, 40), 8, seed=3)
    epochs = drawn(order, 25).reshape(2, 100)
    assert np.array_equal(np.sort(epochs, axis=1), [range(100)] * 2)
    assert not np.array_equal(*epochs)
    assert order.steps_per_epoch == 13 and order.sizes == [SIZE] and order.never_drawn == []


def test_a_batch_depends_on_nothing_but_seed_and_step():
    one, two = Order(sources(500), 16, seed=3), Order(sources(500), 16, seed=3)
    ahead = [one.batch(step) for step in range(50)]
    for step in (49, 0, 31, 31):
        assert np.array_equal(two.batch(step), ahead[step])
    assert not np.array_equal(Order(sources(500), 16, seed=4).batch(0), ahead[0])
    assert np.array_equal(one.batch(10 ** 12), two.batch(10 ** 12))


def test_the_batch_size_only_cuts_the_order():
    assert np.array_equal(drawn(Order(sources(70), 8, 0), 15), drawn(Order(sources(70), 24, 0), 5))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sets_smaller_than_a_batch_repeat_epoch_after_epoch(n):
    batch = Order(sources(n), 12, 0).batch(1)
    assert np.array_equal(np.sort(batch.reshape(-1, n), axis=1), [range(n)] * (12 // n))


def test_a_source_cut_off_from_its_range_is_drawn_by_its_own_numbers():
    order = Order([{SIZE: range(100, 103)}, {SIZE: range(200, 204)}, {SIZE: range(0)}], 7, 0)
    assert sorted(order.batch(0)) == [100, 101, 102, 200, 201, 202, 203]


def deviations(table, proportions):
    """The largest deviation of a source's count from its exact proportion: in any interval, and in any prefix."""
    steps = np.zeros((2 * len(table) + 1, len(proportions)))
    for i, source in enumerate(np.tile(table, 2)):
        steps[i + 1] = -np.array(proportions) / sum(proportions)
        steps[i + 1, source] += 1
    surplus = np.cumsum(steps, axis=0)
    return np.ptp(surplus, axis=0).max(), np.abs(surplus).max()


def test_two_sources_stay_within_one_sample_of_their_proportion_in_any_interval():
    for a, b in product(range(1, 25), repeat=2):
        interval, prefix = deviations(interleave([a, b]), [a, b])
        assert interval < 1 + 1e-9 and prefix < 0.5 + 1e-9


def test_more_sources_stay_within_one_sample_in_any_prefix_and_two_in_any_interval():
    for k, most in ((3, 9), (4, 5), (5, 3)):
        for proportions in product(range(1, most + 1), repeat=k):
            table = interleave(list(proportions))
            assert np.bincount(table, minlength=k).tolist() == list(proportions)
            interval, prefix = deviations(table, proportions)
            assert prefix < 1 - 1 / (2 * k - 2) + 1e-9
            assert interval < 2 - 1 / (k - 1) + 1e-9


def test_a_long_period_of_very_unequal_sources_keeps_the_proportions():
    proportions = [70_000, 1, 19_999, 10_000]
    table = interleave(proportions)
    surplus = np.cumsum(table[:, None] == np.arange(4), axis=0) - np.outer(np.arange(1, 100_001), proportions) / 100_000
    assert np.abs(surplus).max() < 1 - 1 / 6 + 1e-9


def test_weights_are_honoured_in_batches_and_each_source_runs_its_own_epochs():
    counts, weights = (30, 50, 11), [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]
    order = Order(sources(*counts), 16, 5, weights)
    numbers = drawn(order, 40)
    owner = np.searchsorted([30, 80, 91], numbers, side="right")
    ahead = np.cumsum(owner[:, None] == np.arange(3), axis=0) - np.outer(np.arange(1, 641), [0.7, 0.2, 0.1])
    assert np.abs(ahead).max() < 0.75 + 1e-9
    for source, count in enumerate(counts):
        mine = numbers[owner == source]
        epochs = mine[:len(mine) // count * count].reshape(-1, count)
        assert len(epochs) >= 2
        assert (np.sort(epochs, axis=1) == np.sort(epochs[0])).all() and len(np.unique(epochs[0])) == count
        assert not np.array_equal(epochs[0], epochs[1])
    assert order.steps_per_epoch is None


def test_sources_of_equal_length_have_different_orders():
    order = Order(sources(1000, 1000), 100, 5, [Fraction(1), Fraction(1)])
    numbers = drawn(order, 20)
    assert (numbers[numbers < 1000] == numbers[numbers >= 1000] - 1000).sum() < 12      # 1 expected


def test_only_the_proportions_of_weights_count():
    Order(sources(20, 30), 8, 0, [Fraction(10 ** 7), Fraction(10 ** 7)])
    one = Order(sources(20, 30), 8, 0, [Fraction(1, 3), Fraction(1, 6)])
    assert np.array_equal(drawn(one, 9), drawn(Order(sources(20, 30), 8, 0, [Fraction(40), Fraction(20)]), 9))


@pytest.mark.parametrize("weights, message", [
    ([Fraction(1), Fraction(1_000_000)], "rounder"), ([Fraction(1)], "1 weights for 2 sources"),
    ([Fraction(0), Fraction(1)], "above 0"), ([Fraction(-1), Fraction(3)], "above 0")])
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Order(sources(10, 10), 4, 0, weights)
    Order(sources(10, 10), 4, 0, [Fraction(1), Fraction(999)])


def buckets():
    return [{WIDE: range(0, 40), SIZE: range(40, 140), NARROW: range(140, 145)},
            {SIZE: range(145, 175), TALL: range(175, 201)}]


def size_of(number, ranges):
    return next(size for source in ranges for size, numbers in source.items() if number in numbers)


def test_a_batch_is_of_one_size_and_an_epoch_has_every_full_batch_once():
    order = Order(buckets(), 8, 1)
    assert order.sizes == [NARROW, WIDE, SIZE, TALL]
    assert order.steps_per_epoch == 40 // 8 + 130 // 8 + 26 // 8 and order.never_drawn == [(NARROW, 5)]
    epochs = [[order.batch(step + epoch * 24) for step in range(24)] for epoch in range(4)]
    sizes, left_over = [], set()
    for batches in epochs:
        kinds = [{size_of(number, buckets()) for number in batch} for batch in batches]
        assert all(len(kind) == 1 for kind in kinds)
        sizes.append([kind.pop() for kind in kinds])
        numbers = np.concatenate(batches)
        assert len(np.unique(numbers)) == len(numbers) == 24 * 8
        assert set(range(40)) <= set(numbers.tolist())                                  # they fill 5 batches exactly
        left_over.add(frozenset(set(range(175, 201)) - set(numbers.tolist())))
    assert len(left_over) > 1 and len(set(map(tuple, sizes))) == 4                     # the leftovers and the order differ
    assert np.bincount([epoch.index(TALL) for epoch in sizes]).max() < 4


def test_sizes_come_in_no_fixed_order():
    """The positions of one size's batches within an epoch are uniform."""
    order = Order([{WIDE: range(0, 16), SIZE: range(16, 64)}], 8, 1)
    table = np.zeros(8)
    for epoch in range(400):
        table += [order.batch(epoch * 8 + step)[0] < 16 for step in range(8)]
    assert chi_square(table, 100) < 8 + 4 * 4


def test_with_weights_and_several_sizes_sources_are_mixed_batch_by_batch():
    order = Order(buckets(), 8, 1, [Fraction(3), Fraction(1)])
    owners = [0 if order.batch(step).max() < 145 else 1 for step in range(400)]
    ahead = np.cumsum(np.array(owners) == 1) - np.arange(1, 401) / 4
    assert np.abs(ahead).max() <= 0.5
    first = np.concatenate([order.batch(step) for step in range(400) if owners[step] == 0][:17])
    assert len(np.unique(first)) == 17 * 8                                              # an epoch of source one: 5 + 12
    assert order.never_drawn == [(NARROW, 5)]


def test_sources_without_a_full_batch_are_refused():
    with pytest.raises(ValueError, match="--batch-size 10 "):
        Order([{SIZE: range(10), WIDE: range(10, 15)}], 11, 0)
    Order([{SIZE: range(10), WIDE: range(10, 15)}], 10, 0)
    with pytest.raises(ValueError, match="source 2 of 2 has"):
        Order([{SIZE: range(20)}, {WIDE: range(20, 25)}], 11, 0, [Fraction(1), Fraction(1)])
    with pytest.raises(ValueError, match="no samples"):
        Order([{}, {SIZE: range(0)}], 4, 0)
    with pytest.raises(ValueError, match="source 1 of 2 holds no samples"):
        Order([{}, {SIZE: range(9)}], 4, 0, [Fraction(1), Fraction(1)])
    with pytest.raises(ValueError, match="batch size 0"):
        Order(sources(4), 0, 0)
    with pytest.raises(ValueError, match="negative"):
        Order(sources(4), 1, -1)
