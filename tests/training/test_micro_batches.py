"""Micro-batches that are halved where memory does not suffice, in all processes alike."""

import pytest
import torch

from tinyldm.training.micro_batches import MicroBatches


class Steps:
    """Micro-batches whose steps run out of memory while there are fewer than `fits` of them. elsewhere: what happens in another
    process, attempt by attempt."""

    def __init__(self, count: int, most: int, fits: int, elsewhere=(), **options):
        self.fits, self.elsewhere, self.asked, self.restarts = fits, list(elsewhere), [], []
        self.parts = MicroBatches(count, most, "a picture of 16 px", self.restarts.append, **options)

    def agree(self, failed: bool) -> bool:
        self.asked.append(failed)
        return failed or bool(self.elsewhere and self.elsewhere.pop(0))

    def step(self, error=torch.OutOfMemoryError) -> list[int]:
        """-> the count of each attempt."""
        counts = []
        for attempt in self.parts.attempts():
            with attempt:
                counts.append(attempt.count)
                if attempt.count < self.fits:
                    raise error("out of memory")
            attempt.failed = self.agree(attempt.failed)
        return counts


def test_a_step_that_fits_is_attempted_once():
    steps = Steps(3, 8, fits=1)
    assert steps.step() == [3] and steps.asked == [False] and steps.restarts == []


def test_micro_batches_are_doubled_up_to_single_samples_and_stay_so():
    steps = Steps(1, 6, fits=6)
    assert steps.step() == [1, 2, 4, 6] and steps.restarts == [2, 4, 6] and steps.asked == [True, True, True, False]
    assert steps.step() == [6] and steps.restarts == [2, 4, 6]


def test_a_process_that_has_memory_starts_over_with_the_others():
    steps = Steps(2, 8, fits=1, elsewhere=[True, True, False])
    assert steps.step() == [2, 4, 8] and steps.asked == [False] * 3 and steps.restarts == [4, 8]


@pytest.mark.parametrize("elsewhere", [[], [True] * 9])
def test_where_single_samples_do_not_fit_the_error_says_what_to_do(elsewhere):
    steps = Steps(2, 4, fits=1 if elsewhere else 99, elsewhere=elsewhere)
    with pytest.raises(ValueError, match="out of memory with a picture of 16 px alone: use a smaller network"):
        steps.step()
    assert steps.restarts == [4]                                 # nothing is dropped for an attempt that will not be made


@pytest.mark.parametrize("error, options", [(KeyError, {}), (torch.OutOfMemoryError, dict(retry=False))])
def test_other_errors_and_those_of_sharded_networks_end_the_step(error, options):
    steps = Steps(1, 8, fits=2, **options)
    with pytest.raises(error, match="out of memory"):
        steps.step(error)
    assert steps.asked == [] and steps.restarts == []
