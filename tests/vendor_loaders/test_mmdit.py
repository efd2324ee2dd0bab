"""MMDiT against diffusers' SD3Transformer2DModel, live: float32 rounding, 1e-5 relative. Both published layouts, both ways."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from helpers import randomise, thinned
from originals import original_mmdit
from parity import assert_close, assert_same_gradients, assert_survives_json_and_diffusers, error, projected
from parity import transformer_inputs as inputs

from tinyldm.folders.build import load_network
from tinyldm.folders.load import load_part
from tinyldm.folders.rename import export_renamed, published_shapes, recognise
from tinyldm.folders.weights import Weights
from tinyldm.model import NETWORKS
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.vendor_loaders import mmdit
from tinyldm.vendor_loaders.mmdit import from_config, to_config

# The published networks, narrow and with few blocks.
SD3 = MMDiTConfig(in_channels=4, out_channels=4, width=64, layers=3, heads=4, context_dim=24, pooled_dim=20, max_positions=16,
                  sample_size=16)
MEDIUM = replace(SD3, qk_norm=True, dual_layers=(0, 1), max_positions=24)
LARGE = replace(SD3, width=96, heads=6, layers=4, qk_norm=True)
ODD = replace(SD3, in_channels=3, out_channels=5, patch=1, dual_layers=(2,), max_positions=17, sample_size=13)
CONFIGS = {"3 medium": SD3, "3.5 medium": MEDIUM, "3.5 large": LARGE, "other channels and patches": ODD}

# config.json of the published folders, without the fields that every file of diffusers has.
COMMON = {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
          "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
PUBLISHED = {
    "3 medium": (MMDiTConfig(), COMMON | {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}),
    "3.5 medium": (MMDiTConfig(qk_norm=True, dual_layers=tuple(range(13)), max_positions=384), COMMON | {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}),
    "3.5 large": (MMDiTConfig(width=2432, layers=38, heads=38, qk_norm=True), COMMON | {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "dual_attention_layers": [], "qk_norm": "rms_norm"}),
}


def random_net(config):
    """Ours, with a table of positions that no formula makes: whoever computes it anew has another one."""
    net = randomise(MMDiT(config))
    net.positions.copy_(torch.randn(net.positions.shape, generator=torch.Generator().manual_seed(5)))
    return net


def pair(config):
    """Our network and diffusers', with the same weights."""
    ours = random_net(config)
    theirs = SD3Transformer2DModel.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), mmdit.diffusers_rules(config)))
    return ours, theirs


def call(net, x, t, context, pooled, **options):
    """The output, from ours as from theirs."""
    if isinstance(net, MMDiT):
        return net(x, t, Cond(context, pooled=pooled), **options)
    return net(x, context, pooled, t, **options).sample


def run(net, x, t, context, pooled, **options):
    """The output and the gradients of a random projection of it."""
    return projected(call(net, x, t, context, pooled, **options), x, context, pooled)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name, size", thinned(2, [
    *((name, size) for name in ("3 medium", "3.5 medium", "3.5 large") for size in ((8, 12), (26, 6), (32, 32))),
    ("other channels and patches", (5, 11))]))
def test_exported_weights_give_diffusers_the_same_output_and_gradients(name, size):
    config = CONFIGS[name]
    ours, theirs = pair(config)
    given = inputs(config, size)
    assert_close(run(ours, *given), run(theirs, *given))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_gets_the_gradient_that_diffusers_gives_it(name):
    config = CONFIGS[name]
    ours, theirs = pair(config)
    given = inputs(config, (8, 6))
    for net in (ours, theirs):
        out = call(net, *given)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()} | {"positions": torch.zeros_like(ours.positions)}
    found = export_renamed(gradients, mmdit.diffusers_rules(config))
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    del found["pos_embed.pos_embed"]
    assert_same_gradients(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [[1], [0, 2], [2], [0, 1, 2]], ids=str)
def test_skipped_blocks_are_those_of_diffusers(skipped):
    ours, theirs = pair(MEDIUM)
    given = inputs(MEDIUM)
    found = call(ours, *given, skip_layers=skipped)
    assert_close([found], [call(theirs, *given, skip_layers=skipped)])
    assert error(found, call(ours, *given)) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("t", [torch.tensor([999, 3]), torch.tensor([0, 0]), torch.tensor([0.25, 998.75])],
                         ids=["integers", "zero", "floats"])
def test_times_of_any_type_mean_what_diffusers_means_by_them(t):
    ours, theirs = pair(SD3)
    x, _, context, pooled = inputs(SD3, (4, 4))
    found = call(ours, x, t, context, pooled)
    assert_close([found], [call(theirs, x, t, context, pooled)])
    assert torch.equal(found, call(ours, x, t.double(), context, pooled))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_we_are_no_further_from_float32_than_diffusers(name):
    config = CONFIGS[name]
    exact, theirs = pair(config)
    given = inputs(config, (8, 12))
    wanted = call(exact, *given)
    ours, theirs = random_net(config).bfloat16(), theirs.bfloat16()
    x, t, context, pooled = (y if y.dim() == 1 else y.bfloat16() for y in given)
    a, b = (error(call(net, x, t, context, pooled), wanted) for net in (ours, theirs))
    assert 1e-3 < a < 1.1 * b and b < 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_network_s_table_of_positions_is_that_of_diffusers(name):
    config = CONFIGS[name]
    theirs = SD3Transformer2DModel.from_config(to_config(config))
    assert torch.equal(MMDiT(config).positions, theirs.pos_embed.pos_embed)


# ---------------------------------------------------------------- diffusers' layout


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_diffusers_saved_loads_as_the_same_network(name, tmp_path):
    _, theirs = pair(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_part(tmp_path, [row for row in NETWORKS.values() if row.folder == "transformer"], "cpu", torch.float32)
    assert isinstance(ours, MMDiT) and ours.config == CONFIGS[name]
    given = inputs(CONFIGS[name], (4, 6))
    assert_close([call(ours, *given)], [call(theirs, *given)])


def test_the_last_modulations_are_written_with_their_halves_swapped_and_the_others_as_they_are():
    net = random_net(SD3)
    written = export_renamed(net.state_dict(), mmdit.diffusers_rules(SD3))
    half = torch.arange(128).roll(64)
    for ours, theirs in ((net.final_modulation, "norm_out.linear"),
                         (net.blocks[2].text.modulation, "transformer_blocks.2.norm1_context.linear")):
        assert torch.equal(written[f"{theirs}.weight"], ours.weight[half]) and torch.equal(written[f"{theirs}.bias"], ours.bias[half])
    for ours, theirs in ((net.blocks[1].text.modulation, "1.norm1_context"), (net.blocks[2].image.modulation, "2.norm1")):
        assert torch.equal(written[f"transformer_blocks.{theirs}.linear.weight"], ours.weight)


@pytest.mark.parametrize("name", thinned(3, sorted(PUBLISHED, reverse=True)))
def test_each_tensor_of_a_published_folder_has_its_place_and_each_place_its_tensor(name):
    config, published = PUBLISHED[name]
    assert from_config(published) == config
    with torch.device("meta"):
        ours, theirs = MMDiT(config), SD3Transformer2DModel.from_config(published)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert published_shapes(ours.state_dict(), mmdit.diffusers_rules(config)) == expected
    # 17 outside the blocks, 28 in each, 6 fewer in the last; 4 for qk-norm; 10 for a second attention with qk-norm.
    assert len(expected) == {"3 medium": 17 + 24 * 28 - 6, "3.5 medium": 17 + 24 * 32 - 6 + 13 * 10, "3.5 large": 17 + 38 * 32 - 6}[name]


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(config for config, _ in PUBLISHED.values())],
                         ids=[*CONFIGS, *("full " + name for name in PUBLISHED)])
def test_a_config_survives_json_and_diffusers(config):
    assert_survives_json_and_diffusers(config, mmdit, SD3Transformer2DModel)


def test_an_absent_field_means_the_default_of_the_class_and_no_field_of_the_class_is_unknown():
    fields = inspect.signature(SD3Transformer2DModel.__init__).parameters
    defaults = {name: field.default for name, field in fields.items() if name != "self"}
    assert defaults.keys() == mmdit.KNOWN | mmdit.FIXED.keys()
    assert from_config({}) == from_config(json.loads(json.dumps(defaults)))
    assert from_config({"in_channels": 8, "out_channels": None}).out_channels == 8


@pytest.mark.parametrize("field, value, said", [
    ("_class_name", "SD3ControlNetModel", "describes a SD3ControlNetModel"),
    ("_class_name", "FluxTransformer2DModel", "describes a FluxTransformer2DModel"),
    ("caption_projection_dim", 48, "caption_projection_dim=48: only the width of the blocks, 64"),
    ("qk_norm", "layer_norm", "qk_norm='layer_norm'"), ("pos_embed_max_size", None, "pos_embed_max_size=None: only one number"),
    ("sample_size", [16, 24], "sample_size=.16, 24.: only one number"), ("sample_size", 0, "sample_size=0"),
    ("dual_attention_layers", [7], "the blocks 7"), ("extra_conditioning_channels", 1, "extra_conditioning_channels"),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_config(to_config(SD3) | {field: value})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- Stability's layout


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_stability_s_layout_alone_gives_diffusers_output(name, prefix):
    config = replace(CONFIGS[name], sample_size=CONFIGS[name].max_positions * CONFIGS[name].patch)     # the weights do not tell it
    _, theirs = pair(config)
    single = original_mmdit(theirs.state_dict(), config.layers, config.dual_layers)
    weights = Weights.of({prefix + key: tensor for key, tensor in single.items()})
    layout, own = recognise(weights, mmdit.LAYOUTS)
    assert layout is mmdit.LAYOUTS["original"]
    found = layout.config_of(own.shapes)
    if config.qk_norm:
        assert found == config
    ours = load_network(MMDiT, replace(found, heads=config.heads), weights, "cpu", torch.float32)       # 1 of 64 channels without qk_norm
    given = inputs(config, (4, 6))
    assert_close([call(ours, *given)], [call(theirs, *given)])


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_converts_our_file_of_stability_s_layout_to_our_file_of_its_own(name):
    config = CONFIGS[name]
    state = random_net(config).state_dict()
    single = {f"model.diffusion_model.{key}": tensor for key, tensor in export_renamed(state, mmdit.ORIGINAL_RULES).items()}
    theirs, ours = convert_sd3_transformer_checkpoint_to_diffusers(single), export_renamed(state, mmdit.diffusers_rules(config))
    assert theirs.keys() == ours.keys() and [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", thinned(3, sorted(PUBLISHED, reverse=True)))
def test_each_tensor_of_a_published_single_file_has_its_place_and_its_shapes_tell_the_config(name):
    config, published = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = MMDiT(config), SD3Transformer2DModel.from_config(published)
        single = original_mmdit(theirs.state_dict(), config.layers, config.dual_layers)
    expected = {key: tuple(tensor.shape) for key, tensor in single.items()}
    assert published_shapes(ours.state_dict(), mmdit.ORIGINAL_RULES) == expected
    weights = Weights({f"model.diffusion_model.{key}": shape for key, shape in expected.items()}, lambda names: iter(()), {})
    layout, own = recognise(weights, mmdit.LAYOUTS)
    assert layout.config_of(own.shapes) == config
    # The sizes by which published files are told apart.
    assert expected["pos_embed"] == {"3 medium": (1, 36864, 1536), "3.5 medium": (1, 147456, 1536), "3.5 large": (1, 36864, 2432)}[name]
    assert expected["joint_blocks.0.context_block.adaLN_modulation.1.bias"] == (6 * config.width,)
    assert expected["joint_blocks.0.x_block.adaLN_modulation.1.bias"] == ((9 if name == "3.5 medium" else 6) * config.width,)
    assert expected[f"joint_blocks.{config.layers - 1}.context_block.adaLN_modulation.1.bias"] == (2 * config.width,)


def test_a_controlnet_in_stability_s_layout_is_refused_as_one_and_a_cut_file_as_incomplete():
    shapes = published_shapes(random_net(SD3).state_dict(), mmdit.ORIGINAL_RULES)
    layout = mmdit.LAYOUTS["original"]
    with pytest.raises(ValueError, match="those of a ControlNet .controlnet_blocks.0.weight."):
        layout.config_of(shapes | {"controlnet_blocks.0.weight": (64, 64)})
    del shapes["pos_embed"]
    with pytest.raises(ValueError, match="pos_embed is missing"):
        layout.config_of(shapes)
