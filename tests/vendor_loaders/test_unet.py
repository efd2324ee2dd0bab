import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from helpers import randomise
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.vendor_loaders.rename import export_renamed, load_renamed, published_names
from tinyldm.vendor_loaders.unet import UNET_RULES, from_config, to_config

SD1 = UNetConfig(widths=(32, 64, 128), depth=1, attention=(False, False, True), heads=(4, 4, 4), context_dim=24,
                 groups=8, sample_size=16)
SD2 = replace(SD1, in_channels=5, out_channels=3, depth=2, attention=(True, True, False), heads=(1, 2, 4),
              linear_projection=True)
FULL_SD1 = UNetConfig()
FULL_SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)


def inputs(config, size=(8, 16)):
    torch.manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, requires_grad=True)
    context = torch.randn(2, 7, config.context_dim, requires_grad=True)
    return x, torch.tensor([999.0, 3.5]), context


def run(out, x, context):
    """The output and the gradients of a random projection of it."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (x, context))]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_exported_weights_give_diffusers_the_same_output_and_gradients(config):
    net = randomise(UNet(config))
    theirs = UNet2DConditionModel.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(net.state_dict(), UNET_RULES))
    x, t, context = inputs(config)
    assert_close(run(net(x, t, Cond(context)), x, context), run(theirs(x, t, context).sample, x, context))


def test_loaded_weights_give_the_output_that_diffusers_gives():
    theirs = randomise(UNet2DConditionModel.from_config(to_config(SD1)))
    net = UNet(SD1)
    load_renamed(net, theirs.state_dict(), UNET_RULES)
    x, t, context = inputs(SD1)
    assert_close(run(net(x, t, Cond(context)), x, context), run(theirs(x, t, context).sample, x, context))


def test_the_context_mask_means_what_diffusers_means_by_it():
    net = randomise(UNet(SD1))
    theirs = UNet2DConditionModel.from_config(to_config(SD1)).eval()
    theirs.load_state_dict(export_renamed(net.state_dict(), UNET_RULES))
    x, t, context = inputs(SD1)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    ours = run(net(x, t, Cond(context, mask)), x, context)
    assert_close(ours, run(theirs(x, t, context, encoder_attention_mask=mask).sample, x, context))
    assert not torch.allclose(ours[0], net(x, t, Cond(context)))


@pytest.mark.parametrize("config", [FULL_SD1, FULL_SD2, SD1, SD2], ids=["full sd1", "full sd2", "sd1", "sd2"])
def test_names_and_shapes_are_exactly_those_of_diffusers(config):
    with torch.device("meta"):
        ours = UNet(config)
        theirs = UNet2DConditionModel.from_config(to_config(config))
    shapes = lambda tensors: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = published_names(ours.state_dict(), UNET_RULES)
    assert {names[key]: shape for key, shape in shapes(ours.state_dict()).items()} == shapes(theirs.state_dict())
    if config in (FULL_SD1, FULL_SD2):
        assert len(names) == 686


def test_every_normalisation_has_the_eps_that_diffusers_gives_it():
    with torch.device("meta"):
        ours, theirs = UNet(SD1), UNet2DConditionModel.from_config(to_config(SD1))
    eps = lambda net: {f"{name}.weight": m.eps for name, m in net.named_modules() if hasattr(m, "eps")}
    names = published_names(ours.state_dict(), UNET_RULES)
    assert {names[key]: value for key, value in eps(ours).items()} == eps(theirs)


@pytest.mark.parametrize("config", [FULL_SD1, FULL_SD2, SD1, SD2, replace(SD1, attention=(False,) * 3)])
def test_a_config_survives_json_and_diffusers(config):
    written = json.loads(json.dumps(to_config(config)))
    assert from_config(written) == config
    with torch.device("meta"):
        completed = UNet2DConditionModel.from_config(written).config
    assert from_config(json.loads(json.dumps(dict(completed)))) == config
    assert {name for name in written if completed[name] != written[name] and name != "_class_name"
            and list(completed[name]) != written[name]} == set()


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


@pytest.mark.parametrize("field, value", [
    ("transformer_layers_per_block", [1, 2, 10]), ("addition_embed_type", "text_time"), ("time_embedding_dim", 99),
    ("act_fn", "gelu"), ("mid_block_type", None), ("layers_per_block", [1, 2, 2]), ("only_cross_attention", True),
    ("cross_attention_dim", [24, 24, 32]), ("num_attention_heads", 8), ("flip_sin_to_cos", False),
    ("attention_head_dim", 3), ("a_field_of_the_future", "yes"), ("_class_name", "UNet2DModel"),
    ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]), ("sample_size", [16, 24]),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        from_config(to_config(SD1) | {field: value})
    known_as = {"_class_name": "UNet2DModel", "down_block_types": "AttnDownBlock2D", "up_block_types": "UpBlock2D",
                "attention_head_dim": "heads=3"}
    assert known_as.get(field, field) in str(error.value) and "\n" not in str(error.value)
