"""Weights in 8 bits: what is stored, how far it is from the weight, what it saves, and what goes on working beside it."""

from dataclasses import replace

import pytest
import torch
from helpers import combinations
from pretend_gpu import GPU, PretendGpu
from small_models import MODELS, drawn, unet_model
from test_text_memo import dit_model
from torch import nn

from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.model import repeated_blocks
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.offload import offload, weight_bytes
from tinyldm.quantized import FORMATS, WholeWeight, store_weights


def stored(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    whole = WholeWeight(weight.dtype, FORMATS[format])
    numbers, scale = whole.right_inverse(weight)
    return numbers, whole(numbers, scale)


def test_int8_rounds_to_a_grid_of_127_steps_up_to_the_largest_number_of_each_row():
    numbers, whole = stored(torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]]), "int8")
    assert numbers.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 2, 0]] and numbers.dtype == torch.int8       # 3 / 2 = 1.5 is even at 2
    torch.testing.assert_close(whole, torch.tensor([[1.27, -0.63, 0.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 0.0]]))


@pytest.mark.parametrize("shape", [(64, 300), (32, 16, 3, 3)])
@pytest.mark.parametrize("format, worst", [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_no_weight_is_off_by_more_than_half_a_step(shape, format, worst):
    """Of int8 half a 127th of the row's largest; of float8 with three bits behind the point, 2^-4 of the weight itself."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    _, whole = stored(weight, format)
    largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (len(shape) - 1))
    bound = largest * worst if format == "int8" else weight.abs() * worst + largest * 2**-10 / 448          # and its smallest numbers
    assert ((whole - weight).abs() <= bound * 1.001).all()
    assert (whole - weight).abs().max() > 0


@pytest.mark.parametrize("format, name", combinations(2, FORMATS, MODELS))
def test_a_network_with_stored_weights_computes_what_one_with_the_rounded_weights_does(name, format):
    model, rounded = MODELS[name](), MODELS[name]()
    store_weights(model, format)
    with torch.no_grad():
        for block in repeated_blocks(rounded.net):
            for layer in (layer for layer in block.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))):
                layer.weight.copy_(stored(layer.weight, format)[1])
    assert (drawn(model) == drawn(rounded)).all()
    assert 0 < abs(drawn(model).astype(int) - drawn(MODELS[name]()).astype(int)).mean() < 12


def test_the_blocks_take_half_the_memory_of_bfloat16_and_nothing_else_changes():
    model = replace(dit_model(), net=DiT(DiTConfig(width=256, layers=2, heads=2, mlp_width=1024, context_dim=32)).bfloat16())
    blocks = lambda: sum(map(weight_bytes, repeated_blocks(model.net)))
    before, around = blocks(), weight_bytes(model.net) - blocks()
    store_weights(model, "int8")
    assert 0.5 <= blocks() / before < 0.52 and weight_bytes(model.net) - blocks() == around
    assert next(model.net.parameters()).dtype == torch.bfloat16 == model.net.blocks[0].mlp[0].weight.dtype
    assert {type(layer).__mro__[1] for layer in (model.net.blocks[0].mlp[0],)} == {nn.Linear}


def test_an_adapter_beside_stored_weights_adds_what_it_adds_beside_whole_ones():
    model = unet_model()
    adapter = LoRA(model.net, LoRAConfig(2))
    for branch in adapter.branches.values():
        nn.init.constant_(branch.up, 0.1)
    store_weights(model, "int8")
    plain = drawn(model)
    adapter.attach()
    assert (drawn(model) != plain).any()


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_stored_weights_are_moved_to_the_device_as_others_are(how):
    model = unet_model()
    for module in model.modules.values():
        module.requires_grad_(False)
    store_weights(model, "int8")
    expected = drawn(model)
    with PretendGpu():
        assert (drawn(offload(model, GPU, how)) == expected).all()
