"""LoRA as branches beside the layers of a network: what is added, where, and that nothing else changes."""

import math

import pytest
import torch
from small_models import MODELS, unet_model
from torch import nn

from tinyldm.adapters.lora import Branch, LoRA, LoRAConfig
from tinyldm.adapters.targets import GROUPS, adapted_parts, target_layers
from tinyldm.model import NETWORKS, TEXT_ENCODERS, Architecture
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.t5 import T5, T5Config


@pytest.fixture(scope="module")
def model():
    return unet_model()


def inputs(net):
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([30.0, 700.0]),
            Cond(torch.randn(2, 5, net.config.context_dim, generator=generator)))


def trained(network, config=None, seed=0):
    """An adapter as after training: B is no longer zero."""
    torch.manual_seed(seed)
    lora = LoRA(network, config or LoRAConfig(4, targets=("attention", "mlp", "conv")))
    with torch.no_grad():
        for branch in lora.branches.values():
            branch.up.normal_(std=0.1)
    return lora


@torch.no_grad()
def test_a_new_adapter_changes_no_bit_and_no_name_of_the_network(model):
    net = model.net
    names, modules, before = [*net.state_dict()], [*net.named_modules()], net(*inputs(net))
    lora = LoRA(net, LoRAConfig(4, targets=("attention", "mlp", "conv")))
    lora.attach()
    assert torch.equal(net(*inputs(net)), before)
    assert [*net.state_dict()] == names and [*net.named_modules()] == modules
    lora.detach()


@torch.no_grad()
def test_an_attached_adapter_adds_its_deltas_to_the_weights_at_its_strength(model):
    net, lora = model.net, trained(model.net, LoRAConfig(4, alpha=2.0, targets=("attention", "mlp", "conv"), conv_rank=3))
    before, weights = net(*inputs(net)), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lora.attach(), lora.attach()                                       # twice is once
    for strength in (1.0, -0.5):
        lora.strength = strength
        beside = net(*inputs(net))
        lora.detach()
        net.load_state_dict(weights | {name: weights[name] + delta for name, delta in lora.deltas().items()})
        assert (net(*inputs(net)) - beside).abs().max() < 1e-5 * before.abs().max()
        net.load_state_dict(weights)
        assert (beside - before).abs().max() > 0.1
        lora.attach()
    lora.detach()
    assert torch.equal(net(*inputs(net)), before)


@pytest.mark.parametrize("config, scale", [
    (LoRAConfig(4), 1.0), (LoRAConfig(4, alpha=2.0), 0.5), (LoRAConfig(4, alpha=6.0, rank_stabilised=True), 3.0)])
def test_the_delta_is_b_a_times_alpha_over_the_rank_or_its_root(model, config, scale):
    lora = trained(model.net, config)
    name = "down.0.attentions.0.blocks.0.self_attention.to_q"
    branch = lora.branches[name.replace(".", "/")]
    assert branch.down.shape == (4, 16) and branch.up.shape == (16, 4)
    assert branch.down.abs().max() <= 16 ** -0.5 + 1e-6                # kaiming_uniform(a = sqrt 5): within 1 / sqrt(in)
    assert torch.allclose(lora.deltas()[f"{name}.weight"], scale * branch.up @ branch.down)


def test_a_branch_of_a_convolution_has_its_kernel_stride_and_padding():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(2, 6, 9, 9)
    branch = Branch(layer, 3, 0.5, 0.0)
    nn.init.normal_(branch.up)
    assert branch.down.shape == (3, 6, 3, 3) and branch.up.shape == (8, 3, 1, 1)
    dense = torch.einsum("or,rikl->oikl", branch.up.flatten(1), branch.down)
    assert torch.allclose(branch(x), nn.functional.conv2d(x, dense, None, 2, 1), atol=1e-5)


def test_ranks_of_blocks_are_those_of_the_longest_name_and_zero_leaves_a_block_out(model):
    config = LoRAConfig(4, targets=("attention", "conv"), conv_rank=2,
                        ranks={"down": 3, "down.1.attentions": 1, "up": 0, "middle.resnets.1": 5})
    ranks = {name.replace("/", "."): branch.down.shape[0] for name, branch in LoRA(model.net, config).branches.items()}
    assert {rank for name, rank in ranks.items() if name.startswith("down.0.")} == {3}
    assert {rank for name, rank in ranks.items() if name.startswith("down.1.attentions.")} == {1}
    assert ranks["middle.resnets.0.conv1"] == 2 and ranks["middle.resnets.1.conv1"] == 5
    assert ranks["middle.attentions.0.blocks.0.self_attention.to_q"] == 4
    assert not any(name.startswith("up.") for name in ranks)
    plain = LoRA(model.net, LoRAConfig(4, targets=("conv",), conv_rank=2)).branches
    assert plain["down/1/resnets/0/conv_shortcut"].down.shape[0] == 4   # 1x1, no convolution to which conv_rank applies


def test_dropout_drops_inputs_of_the_branch_in_training_only(model):
    lora = trained(model.net, LoRAConfig(4, dropout=0.5))
    branch = next(iter(lora.branches.values()))
    x = torch.ones(1, 1000, branch.down.shape[1])
    lora.train()
    torch.manual_seed(0)
    dropped = branch(x)
    assert dropped.std(dim=1).max() > 1e-3 and (dropped.mean(1) - branch.eval()(x).mean(1)).abs().max() < 0.05
    assert torch.equal(branch(x), branch(x))


def test_only_the_adapter_gets_gradients_and_every_tensor_of_it_does(model):
    net = model.net.requires_grad_(False)
    lora = trained(net)
    lora.attach()
    net(*inputs(net)).square().mean().backward()
    lora.detach()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_gradient_checkpointing_gives_the_same_gradients_dropout_included(model):
    net, found = unet_model().net.requires_grad_(False).train(), []
    lora = trained(net, LoRAConfig(4, targets=("attention",), dropout=0.3)).train()
    lora.attach()
    for net.grad_checkpointing in (False, True):
        torch.manual_seed(7)
        net(*inputs(net)).square().mean().backward()
        found.append([p.grad.clone() for p in lora.parameters()])
        lora.zero_grad()
    lora.detach()
    assert all(torch.allclose(one, two, atol=1e-7) for one, two in zip(*found)) and max(one.abs().max() for one in found[0]) > 1e-4


def test_the_adapter_is_float32_beside_a_network_in_16_bits_and_under_autocast(model):
    net, lora = model.net, trained(model.net)
    lora.attach()
    whole = net(*inputs(net))
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(*inputs(net)) - whole).abs().max() < 0.1 * whole.abs().max()
    lora.detach()
    half = unet_model().net.to(torch.bfloat16)
    beside = trained(half)
    beside.attach()
    x, t, cond = inputs(half)
    drawn = half(x.bfloat16(), t, Cond(cond.context.bfloat16()))
    assert drawn.dtype == torch.bfloat16 and {p.dtype for p in beside.parameters()} == {torch.float32}
    assert (drawn.float() - whole).abs().max() < 0.1 * whole.abs().max()


@torch.no_grad()
def test_a_compiled_network_computes_with_its_adapter():
    text, ids = small("clip"), torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    lora, before = trained(text, LoRAConfig(2, targets=("attention",))), text(ids).hidden
    lora.attach()
    compiled, expected = torch.compile(text.layers[0], backend="eager"), text.layers[0](text.token_embedding(ids))
    try:
        drawn = compiled(text.token_embedding(ids))
        lora.strength = 0.0                                             # seen by the compiled network too
        assert torch.allclose(drawn, expected, atol=1e-5) and torch.allclose(text(ids).hidden, before)
        assert torch.allclose(compiled(text.token_embedding(ids)), text.layers[0](text.token_embedding(ids)), atol=1e-5)
        assert (compiled(text.token_embedding(ids)) - expected).abs().max() > 0.01
    finally:
        torch._dynamo.reset()


# ---------------------------------------------------------------- targets


def small(name):
    if name in MODELS:
        return MODELS[name]().net
    if name == "clip":
        return unet_model().text.modules["text"]
    return {"dit": lambda: DiT(DiTConfig(width=32, layers=2, heads=2, context_dim=16, mlp_width=64)),
            "flux": lambda: Flux(FluxConfig(width=32, heads=2, double_layers=1, single_layers=1, context_dim=16, pooled_dim=16,
                                            rope_axes=(4, 6, 6))),
            "t5": lambda: T5(T5Config(vocab_size=20, width=16, layers=1, heads=2, head_dim=8, mlp_width=32))}[name]()


# Network -> group -> how many layers it has, counted by hand: per block of attention 4, and so on.
COUNTS = {
    "unet": {"attention": 7 * 8, "mlp": 7 * 4, "conv": 8 * 2 + 5 + 2},
    "dit": {"attention": 2 * 8, "mlp": 2 * 2},
    "mmdit": {"attention": 4 * 8 - 1, "mlp": 4 * 4 - 2, "modulation": 8},       # the last block's text is only read
    "flux": {"attention": 8 + 3, "mlp": 4 + 2, "modulation": 3},
    "clip": {"attention": 2 * 4, "mlp": 2 * 2},
    "t5": {"attention": 4, "mlp": 3},
}


@pytest.mark.parametrize("name", [*NETWORKS, *TEXT_ENCODERS])
def test_the_groups_of_every_network_find_their_layers_and_no_layer_is_in_two(name):
    network = small(name)
    found = {group: target_layers(network, (group,)).keys() for group in COUNTS[name]}
    assert {group: len(layers) for group, layers in found.items()} == COUNTS[name]
    assert len(set().union(*found.values())) == sum(COUNTS[name].values())
    row: Architecture = {**NETWORKS, **TEXT_ENCODERS}[name]
    assert row.targets.keys() == COUNTS[name].keys() <= GROUPS.keys()


def test_text_encoders_are_adapted_where_the_targets_have_text(model):
    assert [*adapted_parts(model, ("attention",))] == ["net"] and [*adapted_parts(model, ("attention", "text"))] == ["net", "text"]
    with pytest.raises(ValueError, match="no layers in modulation, a target of an adapter: it has attention, conv, mlp, text"):
        adapted_parts(model, ("attention", "modulation"))


@pytest.mark.parametrize("options, message", [
    ({"rank": 0}, "rank 0 of an adapter must be 1 or more"),
    ({"rank": 17}, "rank 17 is above the width of the layer down.0.attentions.0.blocks.0.self_attention.to_q, 16"),
    ({"alpha": 0.0}, "alpha 0.0 of an adapter must be above 0"),
    ({"alpha": math.nan}, "alpha nan of an adapter must be above 0"),
    ({"dropout": 1.0}, "dropout 1.0 of an adapter must be at least 0 and below 1"),
    ({"targets": ()}, "an adapter needs targets: some of attention, mlp"),
    ({"targets": ("atention",)}, "unknown target of an adapter 'atention': did you mean 'attention'"),
    ({"targets": ("modulation",)}, "UNet has no layers in modulation: its groups are attention, mlp, conv"),
    ({"ranks": {"down": -1}}, "must be 0 or more"),
    ({"ranks": {"down": 0, "middle": 0, "up": 0}}, "leave no layer of UNet to adapt"),
])
def test_settings_that_cannot_work_are_refused_with_the_fix(model, options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(model.net, LoRAConfig(**{"rank": 4} | options))
