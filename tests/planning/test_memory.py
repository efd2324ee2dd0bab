"""What is kept for the backward pass, counted on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyldm.config import preset_config
from tinyldm.model import repeated_blocks
from tinyldm.models import layers
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.planning.flops import forwards, meta_networks
from tinyldm.planning.memory import SavedActivations, count_saved, empty


def linear(*shape):
    with torch.device("meta"):
        return nn.Linear(*shape)


def test_kept_bytes_of_two_layers_match_the_closed_form():
    first, second = linear(30, 50), linear(50, 20)
    kept, casts = count_saved(lambda: second(F.gelu(first(empty(7, 30)))))
    assert kept == 2 * 7 * (30 + 50 + 50)                     # both layers' inputs, and what gelu got; in bf16
    assert casts == 2 * (30 * 50 + 50 + 50 * 20 + 20)
    assert count_saved(lambda: second(F.gelu(first(empty(7, 30)))), torch.float32) == (4 * 7 * (30 + 50 + 50), 0)


def test_attention_keeps_no_matrix_of_weights():
    layer = linear(64, 64)

    def attend(n):
        q = layer(empty(1, 1, n, 64))
        return F.scaled_dot_product_attention(q, q, q)

    small, large = (count_saved(lambda: attend(n))[0] for n in (100, 1000))
    assert large == 10 * small


@pytest.mark.parametrize("part", ["net", "encode"])
def test_activations_grow_with_the_batch(part):
    networks = meta_networks(preset_config("5090_week", dit=dict(layers=2)))
    one, four = (count_saved(forwards(networks, 128, batch)[part])[0] for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.01)


SMALL = {
    "dit": lambda: DiT(DiTConfig(width=64, layers=3, heads=2, mlp_width=256)),
    "unet": lambda: UNet(UNetConfig(widths=(32, 64), depth=1, attention=(False, True), heads=(2, 2), groups=8))}


@pytest.mark.parametrize("kind", SMALL)
def test_the_inputs_that_checkpointing_keeps_are_counted_to_the_byte(kind, monkeypatch):
    with torch.device("meta"):
        net, inputs = SMALL[kind](), (torch.empty(1, 4, 16, 16), torch.empty(1), layers.Cond(torch.empty(1, 77, 768)))
    given, blocks = {}, []

    def checkpoint(block, *inputs, **options):
        blocks.append(block)
        flat = [x for item in inputs for x in (item if isinstance(item, tuple) else (getattr(item, "context", item),))]
        given.update((x.untyped_storage()._cdata, x) for x in flat if x is not None)
        return block(*inputs)

    mine = repeated_blocks(net)
    whole, counted = (count_saved(lambda: net(*inputs), torch.float32, some)[0] for some in ([], mine))
    with monkeypatch.context() as patch:
        patch.setattr(SavedActivations, "pack", lambda self, x: x)
        alone, _ = count_saved(lambda: net(*inputs), torch.float32, mine)
    monkeypatch.setattr(layers, "checkpoint", checkpoint)
    net.grad_checkpointing = True
    net(*inputs)
    assert [*map(id, blocks)] and set(map(id, blocks)) == set(map(id, mine))
    assert alone == sum(x.untyped_storage().nbytes() for x in given.values())
    assert alone < counted < whole


def test_checkpointing_keeps_the_inputs_of_all_blocks_and_the_inside_of_the_largest():
    first, second = nn.Sequential(linear(30, 50), nn.GELU(), linear(50, 30)), nn.Sequential(linear(30, 20), nn.GELU(), linear(20, 30))
    call = lambda: second(first(empty(7, 30)))
    assert count_saved(call, torch.float32)[0] == 4 * 7 * (30 + 50 + 50 + 30 + 20 + 20)
    assert count_saved(call, torch.float32, [first, second])[0] == 4 * 7 * (30 + 30 + 50 + 50)
    assert count_saved(call, torch.float32, [second])[0] == 4 * 7 * (30 + 50 + 50 + 30 + 20 + 20)
    large = nn.Sequential(linear(30, 200), nn.GELU(), linear(200, 30))
    between = count_saved(lambda: large(second(first(empty(7, 30)))), torch.float32, [first, large])[0]
    assert between == 4 * 7 * (30 + 30 + 20 + 20 + 30 + 200 + 200)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (first, second, large))
