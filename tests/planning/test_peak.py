"""The peak memory of forward passes without gradients, counted on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyldm.models.layers import Attention
from tinyldm.planning.memory import empty
from tinyldm.planning.peak import peak_bytes


def linear(*shape):
    with torch.device("meta"):
        return nn.Linear(*shape)


def test_the_peak_of_a_chain_is_that_of_its_widest_place():
    first, second, third = linear(30, 500), linear(500, 20), linear(20, 10)
    # x in float32 and bfloat16 and the first weight's and bias's casts beside the output; x stays alive through its caller
    forward = lambda x: third(second(first(x)))
    widest = 4 * 7 * 30 + 2 * 7 * 30 + 2 * (30 * 500 + 500) + 2 * 7 * 500
    assert peak_bytes(lambda: forward(empty(7, 30))) == widest
    assert peak_bytes(lambda: forward(empty(7, 30)), torch.float32) == 4 * 7 * (30 + 500 + 20)


def test_what_is_kept_for_later_counts_and_what_is_dropped_does_not():
    x, layer = empty(7, 30), linear(30, 30)

    def residual():
        y = F.silu(x)
        for _ in range(5):                                      # each layer's output replaces the one before
            y = x + layer(y)
        return y

    one = 4 * 7 * 30
    assert peak_bytes(residual, torch.float32) == 3 * one       # y, the layer's output, their sum
    assert peak_bytes(lambda: [F.silu(x) for _ in range(5)], torch.float32) == 5 * one


def test_views_and_operations_in_place_take_no_memory():
    x = empty(8, 4, 6)
    assert peak_bytes(lambda: x.view(8, 24).t()[:3].expand(2, 3, 8)) == 0
    assert peak_bytes(lambda: F.silu(x).mul_(2).flatten().add_(1)) == 4 * 8 * 4 * 6


def test_attention_takes_no_matrix_of_weights():
    with torch.device("meta"):
        attention = Attention(64, 1)
    small, large = (peak_bytes(lambda: attention(empty(1, n, 64))) for n in (1000, 10_000))
    assert large == pytest.approx(10 * small, rel=0.01)

