"""Random numbers as pure functions of (stream, seed, position): nothing is remembered, so a run resumes at any step.

Every use of random numbers in training has a stream of its own in the table below. Two uses that shared a number would see
the same bits. The numbers are part of the meaning of a run: another number means other noise, so they never change.
Only the initial weights are drawn from torch's global generator: seed for the autoencoder, seed + 1 for the network.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    SAMPLE_ORDER = 0        # data/order.py: which sample stands at which place of an epoch
    BATCH_ORDER = 1         # data/order.py: the order of batches where pictures have several sizes
    NOISE = 2               # noise, times and dropped captions of a training step
    POSTERIOR = 3           # the autoencoder's sampled latents in a training step
    VALIDATION_NOISE = 4
    LOADER = 5              # data/loader.py: which view and which caption of a sample, and its sampled latents
    CROPS = 6               # which pictures, and which part of each, the autoencoder sees in a training step
    VALIDATION_TIMES = 7


def seed_sequence(stream: Stream, seed: int, *position: int) -> np.random.SeedSequence:
    """What numpy's generators are made from. position: whatever tells the draws of one stream apart, such as the step."""
    return np.random.SeedSequence((seed, int(stream), *position))


def generator(stream: Stream, seed: int, *position: int) -> torch.Generator:
    """torch's generator, on the CPU, so that every device trains on the same numbers."""
    state = seed_sequence(stream, seed, *position).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
