"""Random numbers as pure functions of (stream, seed, position): there is no state to save, so a run resumes at any step.

Every use of random numbers in training has a stream of its own in the table below. Two uses with the same number would get
the same bits. A number must never change: the same seed would then give other noise.
(data/order.py and data/loader.py pass their stream as a spawn key of numpy's SeedSequence: other bits again.)
Only the initial weights are drawn from torch's global generator: seed for the autoencoder, seed + 1 for the network.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    SAMPLE_ORDER = 0        # data/order.py: the order of the samples in an epoch
    BATCH_ORDER = 1         # data/order.py: the order of batches where pictures have several sizes
    NOISE = 2               # noise, times and dropped captions of a training step
    POSTERIOR = 3           # noise with which the autoencoder samples latents in a training step
    VALIDATION_NOISE = 4
    LOADER = 5              # data/loader.py: the view and the caption of a sample, and the noise of its sampled latents
    CROPS = 6               # the pictures that the autoencoder is trained on in a step, and the position of their crops
    VALIDATION_TIMES = 7
    PAIRS = 8               # the pictures and captions that a CLIP is trained on in a step
    VALIDATION_FURTHER = 9  # objectives/teacher.py: what else an objective draws for held-out samples


def seed_sequence(stream: Stream, seed: int, *position: int) -> np.random.SeedSequence:
    """The seed of a numpy generator. position: numbers that distinguish the draws of one stream, such as the step."""
    return np.random.SeedSequence((seed, int(stream), *position))


def generator(stream: Stream, seed: int, *position: int) -> torch.Generator:
    """A torch generator, always on the CPU, so that every device trains on the same numbers."""
    state = seed_sequence(stream, seed, *position).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
