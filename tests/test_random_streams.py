"""Random numbers as functions of (stream, seed, position): every use in training has a stream of its own."""

import re

import numpy as np
import torch
from helpers import ROOT

from tinyldm.random_streams import Stream, generator, seed_sequence


def bits(stream: Stream, seed: int, *position: int) -> set[int]:
    """Numbers of 62 bits from torch's and numpy's generators."""
    random = np.random.default_rng(seed_sequence(stream, seed, *position))
    return {*torch.randint(2**62, (8,), generator=generator(stream, seed, *position)).tolist(), *random.integers(2**62, size=8).tolist()}


def test_no_two_streams_have_the_same_number():
    numbers = [int(stream) for stream in Stream.__members__.values()]          # with aliases, which iteration leaves out
    assert len(set(numbers)) == len(numbers)


def test_the_numbers_of_streams_never_change():
    """Resumed runs and published seeds depend on them; new streams come at the end."""
    known = dict(SAMPLE_ORDER=0, BATCH_ORDER=1, NOISE=2, POSTERIOR=3, VALIDATION_NOISE=4, LOADER=5, CROPS=6, VALIDATION_TIMES=7)
    assert known.items() <= {name: int(stream) for name, stream in Stream.__members__.items()}.items()
    first = torch.rand(1, generator=generator(Stream.NOISE, 0, 5), dtype=torch.float64)
    assert first.item() == 0.04839067996980784


def test_no_stream_gives_another_s_bits():
    places = [(seed, *position) for seed in (0, 1, 2, 3, 12345) for position in ((), (1,), (2,), (3,), (1, 2), (2, 1), (4, 4))]
    found = {(stream, place): bits(stream, *place) for stream in Stream for place in places}
    assert len(set().union(*found.values())) == sum(map(len, found.values())) == 16 * len(Stream) * len(places)


def test_a_stream_is_a_function_of_seed_and_position_and_nothing_is_remembered():
    before = torch.get_rng_state()
    assert bits(Stream.NOISE, 3, 7) == bits(Stream.NOISE, 3, 7) and torch.equal(before, torch.get_rng_state())


def test_every_stream_is_used_in_one_place_only():
    text = "".join(file.read_text() for file in [ROOT / "train.py", *(ROOT / "tinyldm").rglob("*.py")])
    uses = re.findall(r"\bStream\.([A-Z_]+)", text)
    assert sorted(uses) == sorted(Stream.__members__)
