"""What an adapter takes beside a model that stays as it is: counted by hand, and by the autograd of a real step."""

from dataclasses import replace

import pytest
import torch
from small_models import unet_model
from torch import nn

from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.config import change, make_config
from tinyldm.config.finetune import finetune_row
from tinyldm.models.layers import Cond
from tinyldm.planning import finetune
from tinyldm.planning.finetune import BATCHES, GPUS, PUBLISHED_MODELS, fitting, plan_tuned_phase, published_memory, render_published
from tinyldm.planning.flops import MetaNetworks, count_flops, size, useful_flops
from tinyldm.planning.memory import RESERVE, empty

CONFIG = make_config(**finetune_row({"finetune": "lora"}))


def meta(module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(module)(module.config).requires_grad_(False)


def test_the_published_networks_have_their_published_numbers_of_parameters():
    """Of the weights files on the hub."""
    with torch.device("meta"):
        counts = {name: size(row.net(row.config)) for name, row in PUBLISHED_MODELS.items()}
    assert counts == {"Stable Diffusion 1.5": 859_520_964, "Stable Diffusion 2.1": 865_910_724, "Stable Diffusion XL": 2_567_463_684,
                      "Stable Diffusion 3 medium": 2_028_328_000, "Stable Diffusion 3.5 medium": 2_243_171_520,
                      "Stable Diffusion 3.5 large": 8_056_627_520, "FLUX.1 dev": 11_901_408_320}


def test_beside_stable_diffusion_1_an_adapter_takes_what_its_numbers_say():
    """797,184 numbers at rank 4, as in the files of diffusers' example: in float32 weights, gradients, two moments and an average of each,
    beside the network in bfloat16."""
    row = PUBLISHED_MODELS["Stable Diffusion 1.5"]
    needed = published_memory(row, 64, change(CONFIG, rank=4))
    batch = 2 * 4 * (2 * 4 * 8 * 8 + 77 * 768)
    assert needed[False](0) * 1e9 == pytest.approx(2 * 859_520_964 + 5 * 4 * 797_184 + RESERVE)
    steps = [[needed[kept](micro) - needed[kept](micro - 1) for micro in (1, 2)] for kept in (False, True)]
    assert steps[0][0] == pytest.approx(steps[0][1]) and steps[1][0] < steps[0][0] and steps[1][0] * 1e9 > batch


def test_flops_and_memory_of_a_plan_are_those_of_frozen_weights():
    model = unet_model()
    networks = MetaNetworks(meta(model.net), nn.ModuleList(map(meta, model.text.modules.values())), meta(model.vae))
    cond, config = Cond(empty(1, 16, 32), None, empty(1, 32)), change(CONFIG, resolution=16, rank=2)
    adapter = LoRA(networks.net, LoRAConfig(2))
    adapter.attach()
    plan = plan_tuned_phase(config, networks, {"net": adapter}, cond)
    forward = count_flops(lambda: networks.net(empty(1, 4, 8, 8), empty(1), cond))
    assert plan.flops["net"] == 2 * forward and plan.flops["text"] == 0
    assert plan.useful == 2 * forward
    alone, whole = (useful_flops(each, replace(model, vae=networks.vae)) for each in (config, change(config, finetune="whole")))
    assert 3 * alone == 2 * whole > 0
    twice = plan_tuned_phase(change(config, grad_checkpointing=True), networks, {"net": adapter}, cond)
    assert twice.rate / plan.rate == pytest.approx(2 / 3)
    assert plan.frozen == 2 * size(networks.net) and plan.casts == 0
    with_text = plan_tuned_phase(change(config, train_text=True), networks, {"net": adapter}, cond)
    assert with_text.frozen == 2 * size(*networks) and with_text.flops["text"] > 0
    assert plan_tuned_phase(change(config, dtype="fp32"), networks, {"net": adapter}, cond).frozen == 4 * size(networks.net)


def test_the_largest_micro_batch_that_fits_is_found_first_without_checkpointing():
    needed = {False: lambda micro: 7.0 + 4 * micro, True: lambda micro: 6.0 + micro}
    assert GPUS == (8, 12, 16, 24, 32) and BATCHES == (8, 4, 2, 1)
    assert fitting(needed) == ["2 *", "1", "2", "4", "4"]
    assert fitting({False: lambda micro: 99, True: lambda micro: 30 + micro}) == ["-"] * 4 + ["2 *"]


def test_the_table_has_a_row_for_every_model_and_size(monkeypatch):
    asked = []
    monkeypatch.setattr(finetune, "published_memory", lambda row, side, config: asked.append(side) or {kept: lambda micro: 9.0
                                                                                                    for kept in (False, True)})
    lines = render_published(CONFIG).splitlines()
    assert len(lines) == 4 + len(asked) == 4 + 2 * len(PUBLISHED_MODELS) - 1 and "rank 16 (attention)" in lines[0]
    assert asked[:3] == [512, 768, 512] and lines[-1].split()[-5:] == ["-", "8", "8", "8", "8"]
