"""FLUX.1's transformer against diffusers' FluxTransformer2DModel, live: float32 rounding, 1e-5 relative. Both layouts, both ways."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from helpers import combinations, randomise, thinned
from originals import original_flux
from parity import assert_close, assert_same_gradients, assert_survives_json_and_diffusers, error, projected
from parity import transformer_inputs as inputs

from tinyldm.folders.build import load_network, load_weights
from tinyldm.folders.load import load_part
from tinyldm.folders.rename import export_renamed, published_shapes, recognise
from tinyldm.folders.weights import Weights
from tinyldm.model import NETWORKS
from tinyldm.models import flux as networks
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.vendor_loaders import flux
from tinyldm.vendor_loaders.flux import DIFFUSERS_RULES, ORIGINAL_RULES, from_config, to_config

# The published networks, narrow and with few blocks.
SCHNELL = FluxConfig(in_channels=4, out_channels=4, width=96, heads=3, double_layers=2, single_layers=3, context_dim=24, pooled_dim=20,
                     rope_axes=(4, 14, 14))
DEV = replace(SCHNELL, guidance=True)
ODD = replace(DEV, in_channels=3, out_channels=5, heads=6, double_layers=1, single_layers=1, rope_axes=(6, 4, 6))
CONFIGS = {"schnell": SCHNELL, "dev": DEV, "other channels and axes": ODD}

# config.json of the published folders, without the fields that every file of diffusers has.
COMMON = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
          "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
PUBLISHED = {
    "dev": (FluxConfig(guidance=True), COMMON | {"guidance_embeds": True}),
    "schnell": (FluxConfig(), COMMON | {"guidance_embeds": False}),
    "dev, as diffusers writes it today": (FluxConfig(guidance=True), COMMON | {"guidance_embeds": True, "out_channels": None,
                                                                               "axes_dims_rope": [16, 56, 56]}),
}


def pair(config):
    """Our network and diffusers', with the same weights."""
    ours = randomise(Flux(config))
    theirs = FluxTransformer2DModel.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), DIFFUSERS_RULES))
    return ours, theirs


def call(net, x, t, context, pooled, guidance=(3.5, 1.25)):
    """The output, from ours as from theirs, which FluxPipeline gives tokens, their positions, and times of 0 to 1."""
    guidance = torch.tensor(guidance)
    if isinstance(net, Flux):
        return net(x, t, Cond(context, pooled=pooled, extra={"guidance": guidance}))
    b, c, h, w = x.shape
    tokens = FluxPipeline._pack_latents(x, b, c, h, w)
    image_ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", x.dtype)
    text_ids = torch.zeros(context.shape[1], 3)
    out = net(tokens, context, pooled, t / 1000, image_ids, text_ids, guidance if net.config.guidance_embeds else None).sample
    return FluxPipeline._unpack_latents(out, h * 8, w * 8, 8)


def run(net, x, t, context, pooled):
    """The output and the gradients of a random projection of it."""
    return projected(call(net, x, t, context, pooled), x, context, pooled)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name, size", combinations(3, CONFIGS, [(8, 12), (26, 6), (32, 32), (2, 2)]), ids=str)
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
    found = export_renamed({name: p.grad for name, p in ours.named_parameters()}, DIFFUSERS_RULES)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert_same_gradients(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["packing", "pairs", "axes", "text positions", "time scale", "guidance scale"])
def test_a_network_with_a_typical_mistake_is_another_one(mistake, monkeypatch):
    """Each loads without an error. What the tests above see is far above their tolerance."""
    ours, theirs = pair(DEV)
    x, t, context, pooled = inputs(DEV)
    wanted = call(theirs, x, t, context, pooled)
    rotations, rotate = networks.rotations, networks.rotate_pairs
    if mistake == "packing":                    # the channel fastest, as in MMDiT's answer
        ours.patch_in.weight.copy_(ours.patch_in.weight.unflatten(1, (4, 4)).transpose(1, 2).flatten(1))
    elif mistake == "pairs":                    # i and i + d/2
        halves = lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        monkeypatch.setattr(networks, "rotate_pairs", lambda x, rope: rotate(halves(x), rope))
    elif mistake == "axes":                     # columns before rows
        monkeypatch.setattr(networks, "rotations", lambda *args: torch.cat(
            [(rope := rotations(*args))[..., :2, :], rope[..., 9:, :], rope[..., 2:9, :]], dim=-2))
    elif mistake == "text positions":           # numbered, as in a language model
        def numbered(text, rows, cols, axes, device):
            rope = rotations(0, rows, cols, axes, device)
            return torch.cat([rotations(0, text, 1, axes, device), rope])
        monkeypatch.setattr(networks, "rotations", numbered)
    if "scale" in mistake:
        embedding = ours.time_in if mistake == "time scale" else ours.guidance_in
        embedding.register_forward_pre_hook(lambda module, args: args[0] / 1000)
    assert error(call(ours, x, t, context, pooled), wanted) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_we_are_no_further_from_float32_than_diffusers(name):
    config = CONFIGS[name]
    """At times and scales that bfloat16 holds: diffusers rounds them to it. Here they stay float32."""
    exact, theirs = pair(config)
    x, _, context, pooled = inputs(config, (8, 12))
    given = x, torch.tensor([1000.0, 500.0]), context, pooled, (4.0, 1.0)
    wanted = call(exact, *given)
    ours, theirs = randomise(Flux(config)).bfloat16(), theirs.bfloat16()
    a, b = (error(call(net, *(y.bfloat16() if torch.is_tensor(y) and y.dim() > 1 else y for y in given)), wanted) for net in (ours, theirs))
    assert 1e-3 < a < 1.1 * b and b < 0.1


# ---------------------------------------------------------------- diffusers' layout


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_diffusers_saved_loads_as_the_same_network(name, tmp_path):
    _, theirs = pair(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_part(tmp_path, [row for row in NETWORKS.values() if row.folder == "transformer"], "cpu", torch.float32)
    assert isinstance(ours, Flux) and ours.config == CONFIGS[name]
    given = inputs(CONFIGS[name], (4, 6))
    assert_close([call(ours, *given)], [call(theirs, *given)])


def test_the_last_modulation_is_written_with_its_halves_swapped_and_the_others_as_they_are():
    net = randomise(Flux(DEV))
    written, half = export_renamed(net.state_dict(), DIFFUSERS_RULES), torch.arange(192).roll(96)
    assert torch.equal(written["norm_out.linear.weight"], net.final_modulation.weight[half])
    assert torch.equal(written["norm_out.linear.bias"], net.final_modulation.bias[half])
    for ours, theirs in ((net.double_blocks[1].text, "transformer_blocks.1.norm1_context"),
                         (net.double_blocks[1].image, "transformer_blocks.1.norm1"),
                         (net.single_blocks[2], "single_transformer_blocks.2.norm")):
        assert torch.equal(written[f"{theirs}.linear.weight"], ours.modulation.weight)
    original = export_renamed(net.state_dict(), ORIGINAL_RULES)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], net.final_modulation.weight)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_tensor_of_a_published_folder_has_its_place_and_each_place_its_tensor(name):
    config, published = PUBLISHED[name]
    assert from_config(published) == config
    with torch.device("meta"):
        ours, theirs = Flux(config), FluxTransformer2DModel.from_config(published)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert published_shapes(ours.state_dict(), DIFFUSERS_RULES) == expected
    # 16 outside the blocks, 4 more for guidance, 32 in each double block and 14 in each single one
    assert len(expected) == 16 + 4 * config.guidance + 19 * 32 + 38 * 14


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(config for config, _ in PUBLISHED.values())],
                         ids=[*CONFIGS, *("full " + name for name in PUBLISHED)])
def test_a_config_survives_json_and_diffusers(config):
    assert_survives_json_and_diffusers(config, flux, FluxTransformer2DModel)


def test_an_absent_field_means_the_default_of_the_class_and_no_field_of_the_class_is_unknown():
    parameters = inspect.signature(FluxTransformer2DModel.__init__).parameters
    defaults = {name: field.default for name, field in parameters.items() if name != "self"}
    assert defaults.keys() == flux.KNOWN | flux.FIXED.keys() and flux.FIXED.items() <= defaults.items()
    assert from_config({"in_channels": 128}).in_channels == 32          # as many as Canny's, but all of them of the latents
    assert from_config({}) == from_config(json.loads(json.dumps(defaults))) == FluxConfig()


@pytest.mark.parametrize("fields, said", [
    (dict(in_channels=384, out_channels=64), "384 channels per token and makes 64: it is FLUX.1 Fill, which also needs a mask"),
    (dict(in_channels=128, out_channels=64), "128 channels per token and makes 64: it is FLUX.1 Canny or Depth, which also needs"),
    (dict(in_channels=66), "takes 66 channels per token and makes 66, which are no multiples of 4"), (dict(patch_size=2), "patch_size=2"),
    (dict(_class_name="Flux2Transformer2DModel"), "FLUX.2, which has another network"),
    (dict(_class_name="ChromaTransformer2DModel"), "Chroma, "),
    (dict(_class_name="FluxControlNetModel"), "a ControlNet, "),
    (dict(_class_name="SD3Transformer2DModel"), "describes a SD3Transformer2DModel"),
    (dict(axes_dims_rope=[16, 56, 58]), r"rope_axes=\(16, 56, 58\) must be three even numbers"),
    (dict(mlp_ratio=3), "unknown field mlp_ratio=3"),
])
def test_what_the_network_cannot_be_is_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_config(to_config(FluxConfig()) | fields)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- Black Forest Labs' layout


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_the_original_layout_alone_gives_diffusers_output(name, prefix):
    config = CONFIGS[name]
    _, theirs = pair(config)
    weights = Weights.of({prefix + key: tensor for key, tensor in original_flux(theirs.state_dict(), config).items()})
    layout, own = recognise(weights, flux.LAYOUTS)
    assert layout is flux.LAYOUTS["original"]
    found = layout.config_of(own.shapes)
    assert replace(found, rope_axes=config.rope_axes) == config        # the weights do not tell it; these are unusual in one of three
    assert found == config or config is ODD
    ours = load_network(Flux, config, weights, "cpu", torch.float32)
    given = inputs(config, (4, 6))
    assert_close([call(ours, *given)], [call(theirs, *given)])


@torch.no_grad()
def test_a_file_of_either_layout_replaces_the_weights_of_a_network(tmp_path):
    from safetensors.torch import save_file
    net, other = randomise(Flux(DEV)), randomise(Flux(DEV), seed=1)
    for name, rules in (("diffusers", DIFFUSERS_RULES), ("original", ORIGINAL_RULES)):
        save_file(export_renamed(net.state_dict(), rules), tmp_path / f"{name}.safetensors")
        load_weights(other, tmp_path / f"{name}.safetensors")
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in net.state_dict().items())
        randomise(other, seed=1)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_diffusers_converts_our_file_of_the_original_layout_to_our_file_of_its_own(name):
    """Names and shapes: its converter knows the published width only."""
    state = {key: torch.empty(shape, device="meta") for key, shape in full_shapes(PUBLISHED[name][0], ORIGINAL_RULES).items()}
    theirs = convert_flux_transformer_checkpoint_to_diffusers({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()})
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == full_shapes(PUBLISHED[name][0], DIFFUSERS_RULES)


def full_shapes(config, rules):
    with torch.device("meta"):
        return published_shapes(Flux(config).state_dict(), rules)


@pytest.mark.parametrize("name", thinned(2, ["dev", "schnell"]))
def test_each_tensor_of_a_published_single_file_has_its_place_and_its_shapes_tell_the_config(name):
    config, published = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = Flux(config), FluxTransformer2DModel.from_config(published)
        expected = {key: tuple(tensor.shape) for key, tensor in original_flux(theirs.state_dict(), config).items()}
    assert published_shapes(ours.state_dict(), ORIGINAL_RULES) == expected
    weights = Weights({f"model.diffusion_model.{key}": shape for key, shape in expected.items()}, lambda names: iter(()), {})
    layout, own = recognise(weights, flux.LAYOUTS)
    assert layout.config_of(own.shapes) == config
    # The numbers of tensors in flux1-dev.safetensors and flux1-schnell.safetensors, and the shapes of their fused layers.
    assert len(expected) == {"dev": 780, "schnell": 776}[name]
    assert expected["single_blocks.37.linear1.weight"] == (21504, 3072) and expected["single_blocks.37.linear2.weight"] == (3072, 15360)
    assert expected["double_blocks.18.txt_attn.qkv.bias"] == (9216,) and expected["double_blocks.0.img_mod.lin.weight"] == (18432, 3072)


@pytest.mark.parametrize("changes, said", [
    ({"single_stream_modulation.lin.weight": (18432, 6144)}, "FLUX.2, which has another network .*single_stream_modulation.lin.weight"),
    ({"distilled_guidance_layer.in_proj.weight": (5120, 64)}, "Chroma, whose modulations"),
    ({"img_in.weight": (96, 384)}, "FLUX.1 Fill, "), ({"img_in.weight": (96, 128)}, "FLUX.1 Canny or Depth, "),
    ({"controlnet_x_embedder.weight": (96, 64)}, "a ControlNet, "), ({"img_in.weight": None}, "img_in.weight is missing"),
])
def test_relatives_and_cut_files_are_told_by_their_tensors(changes, said):
    shapes = {**published_shapes(randomise(Flux(DEV)).state_dict(), ORIGINAL_RULES), **changes}
    with pytest.raises(ValueError, match=said) as caught:
        flux.LAYOUTS["original"].config_of({name: shape for name, shape in shapes.items() if shape})
    assert "\n" not in str(caught.value)
