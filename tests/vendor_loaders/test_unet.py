"""The U-Net against diffusers' UNet2DConditionModel, live: float32 rounding, 1e-5 relative."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import combinations, randomise, thinned
from originals import compvis_unet
from parity import assert_close, assert_survives_json_and_diffusers, error, projected
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyldm.folders.build import load_weights
from tinyldm.folders.rename import export_renamed, load_renamed, published_names, recognise
from tinyldm.folders.weights import Weights
from tinyldm.models.layers import Cond
from tinyldm.models.unet import TransformerBlock, UNet, UNetConfig
from tinyldm.vendor_loaders import unet
from tinyldm.vendor_loaders.unet import LAYOUTS, UNET_RULES, from_config, to_config

# The published U-Nets, narrow: levels, depth, where there is attention and how it is entered are theirs.
SD1 = UNetConfig(widths=(32, 64, 96, 96), context_dim=24, groups=8, sample_size=16)
SD2 = replace(SD1, heads=(1, 2, 3, 3), context_dim=40, linear_projection=True, upcast_attention=True)
ODD = replace(SD1, in_channels=5, out_channels=3, widths=(32, 64, 128), depth=1, attention=(False, False, True),
              heads=(4, 4, 4))
FINE = replace(ODD, depth=2, attention=(True, True, False), heads=(1, 2, 4), linear_projection=True)
XL = replace(SD2, widths=(32, 64, 128), attention=(False, True, True), heads=(1, 2, 4), upcast_attention=False,
             transformer_layers=(1, 2, 3), pooled_dim=20)
DEEP = replace(FINE, transformer_layers=(2, 2, 2), pooled_dim=7)
LCM = replace(SD1, told=("guidance",))           # a latent consistency model's (SimianLuo/LCM_Dreamshaper_v7)
CONFIGS = {"lcm": LCM, "sd 1": SD1, "sd 2": SD2, "other channels and one block": ODD, "attention where it is fine": FINE, "sdxl": XL,
           "as deep everywhere": DEEP}
FULL_SD1 = UNetConfig()
FULL_SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, upcast_attention=True)
FULL_XL = UNetConfig(widths=(320, 640, 1280), attention=(False, True, True), heads=(5, 10, 20), context_dim=2048, linear_projection=True,
                     transformer_layers=(1, 2, 10), pooled_dim=1280, sample_size=128)
FULL = {"full sd 1": (FULL_SD1, 686), "full sd 2": (FULL_SD2, 686), "full sdxl": (FULL_XL, 1680)}


def pair(config):
    """Our U-Net and diffusers', with the same weights."""
    ours = randomise(UNet(config))
    theirs = UNet2DConditionModel.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), UNET_RULES))
    return ours, theirs


def inputs(config, size=(8, 16)):
    torch.manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, requires_grad=True)
    context = torch.randn(2, 7, config.context_dim, requires_grad=True)
    return x, torch.tensor([999.0, 3.5]), context


SIZES = torch.tensor([[768.0, 1024.0, 17.0, 64.0, 512.0, 640.0], [333.0, 250.0, 0.0, 5.0, 256.0, 384.0]])


def told(config, net, theirs):
    """Both networks as functions of (x, t, context), with the same pooled text and sizes where the config has such conditions."""
    pooled = torch.randn(2, config.pooled_dim or 1, generator=torch.Generator().manual_seed(3))
    if config.told:
        from diffusers import LatentConsistencyModelPipeline            # here, because it loads much

        scale = torch.tensor([1.5, 8.5])
        return (lambda x, t, context: net(x, t, Cond(context, extra={"guidance": scale})), lambda x, t, context: theirs(
            x, t, context, timestep_cond=LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, 256)).sample)
    if config.pooled_dim is None:
        return lambda x, t, context: net(x, t, Cond(context)), lambda x, t, context: theirs(x, t, context).sample
    added = {"text_embeds": pooled, "time_ids": SIZES}
    return (lambda x, t, context: net(x, t, Cond(context, pooled=pooled, extra={"sizes": SIZES})),
            lambda x, t, context: theirs(x, t, context, added_cond_kwargs=added).sample)


@pytest.mark.parametrize("name, size", combinations(2, CONFIGS, [(8, 16), (24, 8)]))
def test_exported_weights_give_diffusers_the_same_output_and_gradients(name, size):
    config = CONFIGS[name]
    net, theirs = told(config, *pair(config))
    x, t, context = inputs(config, size)
    assert_close(projected(net(x, t, context), x, context), projected(theirs(x, t, context), x, context))


@pytest.mark.parametrize("config", thinned(3, [SD1, SD2, XL]), ids=["sd 1", "sd 2", "sdxl"])
def test_every_weight_gets_the_gradient_that_diffusers_gives_it(config):
    net, theirs = pair(config)
    x, t, context = inputs(config, (8, 8))
    for network in told(config, net, theirs):
        out = network(x, t, context)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    names = published_names(net.state_dict(), UNET_RULES)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {names[name]: p.grad for name, p in net.named_parameters()}
    assert found.keys() == expected.keys()
    assert_close(found.values(), (expected[name] for name in found))


@torch.no_grad()
@pytest.mark.parametrize("t", thinned(2, [torch.tensor([999, 3]), torch.tensor(40), torch.tensor([0, 0]), torch.tensor([0.25, 998.75])]),
                         ids=["integers", "one for all", "zero", "floats"])
def test_times_of_any_type_mean_what_diffusers_means_by_them(t):
    net, theirs = pair(SD1)
    x, _, context = inputs(SD1, (8, 8))
    ours = net(x, t.expand(2), Cond(context))
    assert_close([ours], [theirs(x, t, context).sample])
    assert torch.equal(ours, net(x, t.expand(2).double(), Cond(context)))


@torch.no_grad()
@pytest.mark.parametrize("config", thinned(3, [SD1, SD2, XL]), ids=["sd 1", "sd 2", "sdxl"])
def test_in_bf16_we_are_no_further_from_float32_than_diffusers(config):
    exact, theirs = pair(config)
    ours, theirs = told(config, randomise(UNet(config)).bfloat16(), theirs.bfloat16())
    x, t, context = inputs(config, (16, 24))
    want = told(config, exact, None)[0](x, t, context)
    x, context = x.bfloat16(), context.bfloat16()
    a, b = error(ours(x, t, context), want), error(theirs(x, t, context), want)
    assert 1e-4 < a < 1.1 * b and b < 0.05


@pytest.fixture
def half_logits():
    """Attention as plain products in the dtype of q and k; unasked, this PyTorch's kernels add float16 up in float32."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@torch.no_grad()
def lift_logits(net):
    """Add 700² / sqrt(32) to every attention logit, given a context whose first feature is 1. float16 ends at 65504."""
    for block in (module for module in net.modules() if isinstance(module, TransformerBlock)):
        for norm, attention in (block.norm1, block.self_attention), (block.norm2, block.cross_attention):
            norm.weight[0], norm.bias[0] = 0, 1
            for linear in (attention.to_q, attention.to_k):
                first = linear.weight.view(attention.heads, -1, linear.in_features)[:, 0]     # of each head
                first[:], first[:, 0] = 0, 700
    return net


@torch.no_grad()
def test_upcast_attention_keeps_float16_finite_and_close_to_float32_where_logits_overflow(half_logits):
    x, t, context = (y.detach() for y in inputs(SD2, (8, 8)))
    context[..., 0] = 1
    draw = lambda net, dtype: lift_logits(net).to(dtype)(x.to(dtype), t, Cond(context.to(dtype)))
    want = draw(randomise(UNet(SD2)), torch.float32)
    ours = draw(randomise(UNet(SD2)), torch.float16)
    assert ours.dtype == torch.float16 and error(ours, want) < 0.01
    assert draw(randomise(UNet(replace(SD2, upcast_attention=False))), torch.float16).isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", thinned(2, [torch.float32, torch.bfloat16]))
def test_upcast_attention_changes_nothing_outside_float16(dtype):
    x, t, context = (y.detach().to(dtype) for y in inputs(SD2, (8, 8)))
    plain = randomise(UNet(replace(SD2, upcast_attention=False))).to(dtype)
    assert torch.equal(randomise(UNet(SD2)).to(dtype)(x, t, Cond(context)), plain(x, t, Cond(context)))


@torch.no_grad()
@pytest.mark.parametrize("config", thinned(2, [SD2, XL]), ids=["sd 2", "sdxl"])
def test_a_folder_that_diffusers_saved_loads_as_the_same_network(config, tmp_path):
    theirs = randomise(UNet2DConditionModel.from_config(to_config(config)))
    theirs.save_pretrained(tmp_path)
    assert from_config(json.loads((tmp_path / "config.json").read_text())) == config
    net = UNet(config)
    load_weights(net, tmp_path / "diffusion_pytorch_model.safetensors")
    ours, theirs = told(config, net, theirs)
    x, t, context = inputs(config, (8, 8))
    assert_close([ours(x, t, context)], [theirs(x, t, context)])


def test_the_context_mask_means_what_diffusers_means_by_it():
    net, theirs = pair(SD1)
    x, t, context = inputs(SD1, (8, 8))
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    ours = projected(net(x, t, Cond(context, mask)), x, context)
    assert_close(ours, projected(theirs(x, t, context, encoder_attention_mask=mask).sample, x, context))
    assert not torch.allclose(ours[0], net(x, t, Cond(context)))


@pytest.mark.parametrize("config, count", thinned(3, [*FULL.values(), *((config, None) for config in CONFIGS.values())]),
                         ids=[*FULL, *CONFIGS])
def test_names_and_shapes_are_exactly_those_of_diffusers(config, count):
    with torch.device("meta"):
        ours = UNet(config)
        theirs = UNet2DConditionModel.from_config(to_config(config))
    shapes = lambda tensors: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = published_names(ours.state_dict(), UNET_RULES)
    assert {names[key]: shape for key, shape in shapes(ours.state_dict()).items()} == shapes(theirs.state_dict())
    assert count in (None, len(names))


@pytest.mark.parametrize("config", [SD1, XL], ids=["sd 1", "sdxl"])
def test_every_normalisation_has_the_eps_that_diffusers_gives_it(config):
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(to_config(config))
    eps = lambda net: {f"{name}.weight": m.eps for name, m in net.named_modules() if hasattr(m, "eps")}
    names = published_names(ours.state_dict(), UNET_RULES)
    assert {names[key]: value for key, value in eps(ours).items()} == eps(theirs)


@pytest.mark.parametrize("config", thinned(3, [FULL_SD1, FULL_SD2, FULL_XL, *CONFIGS.values(), replace(ODD, attention=(False,) * 3)]))
def test_a_config_survives_json_and_diffusers(config):
    assert_survives_json_and_diffusers(config, unet, UNet2DConditionModel)


def test_configs_in_the_short_form_of_old_releases_are_read():
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    old = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
           "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
           "cross_attention_dim": 768, "down_block_types": [down, down, down, "DownBlock2D"], "downsample_padding": 1,
           "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
           "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
           "sample_size": 64, "up_block_types": ["UpBlock2D", up, up, up]}
    assert from_config(old) == FULL_SD1
    sd2 = old | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
                 "upcast_attention": True, "dual_cross_attention": False, "num_class_embeds": None}
    assert from_config(sd2) == FULL_SD2
    flax = sd2 | {"_class_name": "FlaxUNet2DConditionModel", "dropout": 0.0}         # as in the Flax branch of SD 2.1
    assert from_config(flax) == FULL_SD2


@pytest.mark.parametrize("field, value", [
    ("transformer_layers_per_block", [1, 2]), ("transformer_layers_per_block", [1, 2, [4, 10]]),
    ("transformer_layers_per_block", None), ("transformer_layers_per_block", "2"), ("transformer_layers_per_block", [1, 2, None]),
    ("addition_embed_type", "text_time"), ("addition_embed_type", "image"), ("time_embedding_dim", 99),
    ("act_fn", "gelu"), ("mid_block_type", None), ("layers_per_block", [1, 2, 2]), ("only_cross_attention", True),
    ("cross_attention_dim", [24, 24, 32]), ("num_attention_heads", 8), ("flip_sin_to_cos", False),
    ("attention_head_dim", 3), ("a_field_of_the_future", "yes"), ("_class_name", "UNet2DModel"),
    ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]), ("sample_size", [16, 24, 32]), ("sample_size", 0),
    ("sample_size", [16, "24"]), ("sample_size", []),
    ("_class_name", "FlaxUNet2DModel"),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        from_config(to_config(ODD) | {field: value})
    known_as = {"_class_name": "UNet2DModel", "down_block_types": "AttnDownBlock2D", "up_block_types": "UpBlock2D",
                "attention_head_dim": "heads=3"}
    assert known_as.get(field, field) in str(error.value) and "\n" not in str(error.value)


# ---- Stable Diffusion XL


@torch.no_grad()
def test_pooled_text_comes_before_the_sizes_and_these_in_the_order_that_the_network_was_trained_with():
    """Checked against the formula, with a first layer that lets a single input through."""
    net = randomise(UNet(XL))
    pooled = torch.randn(2, XL.pooled_dim, generator=torch.Generator().manual_seed(4))
    first, second = net.add_embedding.linear_1, net.add_embedding.linear_2
    for p in (first.weight, first.bias, second.weight, second.bias):
        p.zero_()
    second.weight[0, 0] = 1.0

    def through(column):
        first.weight.zero_()
        first.weight[0, column] = 1.0
        return net.add_embedding(pooled, SIZES)[:, 0]

    silu = torch.nn.functional.silu
    assert torch.equal(through(XL.pooled_dim - 1), silu(pooled[:, -1]))
    for i, size in enumerate(SIZES.unbind(1)):          # original height and width, crop top and left, target height and width
        for k in (0, 5, 127):
            angle, start = size * 10_000 ** (-k / 128), XL.pooled_dim + 256 * i
            torch.testing.assert_close(through(start + k), silu(angle.cos()), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(through(start + 128 + k), silu(angle.sin()), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_every_size_and_the_pooled_text_change_the_picture():
    net = randomise(UNet(XL))
    x, t, context = inputs(XL, (8, 8))
    pooled = torch.randn(2, XL.pooled_dim, generator=torch.Generator().manual_seed(4))
    draw = lambda pooled, sizes: net(x, t, Cond(context, pooled=pooled, extra={"sizes": sizes}))
    plain = draw(pooled, SIZES)
    changed = [draw(pooled + 1, SIZES)] + [draw(pooled, SIZES + 100 * torch.eye(6)[i]) for i in range(6)]
    assert all(error(out, plain) > 1e-3 for out in changed)


@torch.no_grad()
@pytest.mark.parametrize("config", thinned(2, [
    replace(XL, depth=1, widths=(64, 64), attention=(True, False), heads=(1, 1), transformer_layers=(3, 2)), XL]),
    ids=["attention where it is fine", "sdxl"])
def test_a_single_file_of_sdxl_s_shape_is_recognised_by_its_shapes_and_draws_what_diffusers_draws(config):
    config = replace(config, widths=tuple(64 * heads for heads in config.heads))        # one head per 64 channels, as published
    theirs = randomise(UNet2DConditionModel.from_config(to_config(config)))
    file = Weights.of({f"model.diffusion_model.{name}": tensor for name, tensor in compvis_unet(theirs.state_dict(), config).items()})
    layout, weights = recognise(file, LAYOUTS)
    assert layout is LAYOUTS["CompVis"]
    found = layout.config_of(weights.shapes)
    assert found == replace(config, groups=32, sample_size=64)
    net = UNet(config)
    load_renamed(net, weights, layout.rules(config))
    ours, theirs = told(config, net.eval(), theirs)
    x, t, context = inputs(config, (8, 12) if config.depth == 2 else (6, 4))
    assert_close([ours(x, t, context)], [theirs(x, t, context)])


def shapes_of(config, changes=()):
    """Names and shapes of a U-Net in the original layout, some of them changed; those of shape None left out."""
    with torch.device("meta"):
        tensors = export_shapes(UNet(config))
    return {name: shape for name, shape in (tensors | dict(changes)).items() if shape is not None}


def export_shapes(net):
    names = published_names(net.state_dict(), LAYOUTS["CompVis"].rules(net.config))
    return {names[key]: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


REFINER = replace(FULL_XL, widths=(384, 768, 1536, 1536), attention=(False, True, True, False), heads=(6, 12, 24, 24), context_dim=1280,
                  transformer_layers=(4, 4, 4, 4), pooled_dim=1024)


@pytest.mark.parametrize("shapes, message", [
    (partial(shapes_of, REFINER), "Stable Diffusion XL's refiner.*base model alone"),
    (partial(shapes_of, replace(FULL_SD2, pooled_dim=512)), "unCLIP"),
    (partial(shapes_of, FULL_SD2, {"label_emb.weight": (1000, 1280)}), "upscaler"),
], ids=["refiner", "unclip", "upscaler"])
def test_a_single_file_of_another_u_net_is_refused_by_its_name(shapes, message):
    with pytest.raises(ValueError, match=message) as error:
        LAYOUTS["CompVis"].config_of(shapes())
    assert "\n" not in str(error.value)


def test_a_single_file_of_a_pruned_u_net_is_refused():
    whole = shapes_of(FULL_XL)
    without = lambda text: {name: shape for name, shape in whole.items() if text not in name}
    fewer = without("output_blocks.1.1.transformer_blocks.9.")
    no_middle = {name: shape for name, shape in whole.items() if not name.startswith(("middle_block.1.", "middle_block.2."))}
    for shapes, place in ((fewer, "output_blocks.1 has 9 blocks, not 10"), (no_middle, "middle_block has 0 blocks, not 10")):
        with pytest.raises(ValueError, match=f"{place}.*SSD-1B"):
            LAYOUTS["CompVis"].config_of(shapes)


@pytest.mark.parametrize("config, changes, message", [
    (REFINER, {}, "Stable Diffusion XL's refiner"),
    (XL, {"time_cond_proj_dim": 128}, "time_cond_proj_dim=128: only 256, as in latent consistency models"),
    (XL, {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}, "addition_time_embed_dim=8"),
    (XL, {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "Kolors"),
    (XL, {"mid_block_type": "UNetMidBlock2D"}, "SSD-1B"),
    (XL, {"transformer_layers_per_block": [1, [2, 2], [4, 4]],
          "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, "SSD-1B"),
])
def test_a_folder_of_another_u_net_than_sdxl_s_is_refused_by_its_name(config, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        from_config(to_config(config) | changes)
    assert "\n" not in str(error.value)


def test_depths_in_every_spelling_of_diffusers_are_one_number_per_level():
    nested = {"transformer_layers_per_block": [[1, 1], [2, 2], [3, 3]], "reverse_transformer_layers_per_block": [[3] * 3, [2] * 3, [1] * 3]}
    assert from_config(to_config(XL) | nested) == XL
    assert from_config(to_config(XL) | {"transformer_layers_per_block": [0, 2, 3]}) == XL       # level 0 has no transformer
    with torch.device("meta"):
        shapes = [{name: tuple(tensor.shape) for name, tensor in UNet2DConditionModel.from_config(config).state_dict().items()}
                  for config in (to_config(XL) | nested, to_config(XL))]
    assert shapes[0] == shapes[1]
