"""Every tensor of the published full-size weights has its place in our networks, and every place its tensor.

`published/` holds names and shapes of published files, from other code than ours: each file says from which.
"""

import inspect
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers import randomise, thinned

from tinyldm.folders.rename import apply, export_renamed, published_shapes, recognise
from tinyldm.folders.weights import Weights
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.vendor_loaders import clip, taesd, unet, vae

PUBLISHED = Path(__file__).parent / "published"
NETWORKS = {unet: UNet, vae: AutoencoderKL, clip: CLIPText}

# What a published file may hold beside the network that is read from it.
BESIDE = r"vision_model\..*|visual_projection\..*|visual\..*|logit_scale|(.*\.)?position_ids|text_projection"
IDS = ("bos_token_id", "eos_token_id")
SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}


def published(name):
    """The config.json (None where the layout has none) and {tensor name: shape} of a file in `published/`."""
    content = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return content.get("config"), flat(content["tensors"])


def flat(node, prefix=""):
    if isinstance(node, list):
        return {prefix: tuple(node)}
    return {name: shape for key, child in node.items()
            for name, shape in flat(child, f"{prefix}.{key}" if prefix else key).items()}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def id_of(value):
    """Of a test: a loader by its name, not its path; sets and counts say nothing."""
    return value.__name__.split(".")[-1] if value in NETWORKS else value if isinstance(value, str) else ""


def lazy(shapes):
    return Weights(shapes, lambda names: iter(()), {})


def tidied(layout, config, weights):
    """Published shapes under the names that the rules give. What is left out must be known to be beside the point."""
    rules = layout.tidy(config)
    left_out = [name for name in weights.shapes if not apply(rules, name)]
    assert [name for name in left_out if not re.fullmatch(BESIDE, name)] == []
    return weights.renamed(lambda name: apply(rules, name)).shapes


def places(loader, layout, config):
    with torch.device("meta"):
        network = NETWORKS[loader](config)
    return published_shapes(network.state_dict(), layout.rules(config))


def assert_same(ours, theirs):
    """Equal names and shapes; otherwise how many differ, and the first few of each sort."""
    some = lambda names: f"{len(names)} {sorted(names)[:4]}"
    wrong = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert ours == theirs, (f"ours alone: {some(ours.keys() - theirs.keys())}; published alone: "
                            f"{some(theirs.keys() - ours.keys())}; other shapes: {some(wrong.items())}")


@pytest.mark.parametrize("name, loader, layout, count", thinned(2, [
    ("sd15_unet", unet, "diffusers", 686),
    ("sd21_unet", unet, "diffusers", 686),
    ("sdxl_unet", unet, "diffusers", 1680),
    ("ft_mse_vae", vae, "diffusers", 248),
    ("sd3_vae", vae, "diffusers", 244),
    ("flux_vae", vae, "diffusers", 244),
    ("sd15_text_encoder", clip, "transformers", 196),
    ("sd21_text_encoder", clip, "transformers", 372),
    ("laion_clip_l", clip, "transformers", 197),
    ("laion_clip_l_open_clip", clip, "open_clip", 149),
]), ids=id_of)
def test_every_tensor_of_a_published_network_has_its_place_by_its_config(name, loader, layout, count):
    config, shapes = published(name)
    config = loader.from_config(config)
    found, weights = recognise(lazy(shapes), loader.LAYOUTS)
    assert found is loader.LAYOUTS[layout]
    theirs = tidied(found, config, weights)
    assert_same(places(loader, found, config), theirs)
    assert len(theirs) == count


@pytest.mark.parametrize("name, loader, layout, like, untold, count", thinned(2, [
    ("sd15_checkpoint", unet, "CompVis", "sd15_unet", ("sample_size",), 686),
    ("sd21_checkpoint", unet, "CompVis", "sd21_unet", ("sample_size",), 686),
    ("sdxl_checkpoint_unet", unet, "CompVis", "sdxl_unet", ("sample_size",), 1680),
    ("sd15_checkpoint", vae, "CompVis", "ft_mse_vae", ("sample_size",), 248),
    ("sd21_checkpoint", vae, "CompVis", "ft_mse_vae", ("sample_size",), 248),
    ("sd15_checkpoint", clip, "transformers", "sd15_text_encoder", IDS, 196),
    # Stable Diffusion 2 never runs the last of the 24 layers; the published model folder leaves it out.
    ("sd21_checkpoint", clip, "open_clip", "sd21_text_encoder", (*IDS, "layers"), 292),
    ("laion_clip_l_open_clip", clip, "open_clip", "laion_clip_l", (*IDS, "projection_dim"), 148),
]), ids=id_of)
def test_the_weights_alone_tell_the_config_that_places_every_tensor(name, loader, layout, like, untold, count):
    found, weights = recognise(lazy(published(name)[1]), loader.LAYOUTS)
    assert found is loader.LAYOUTS[layout]
    config, wanted = found.infer(weights.shapes), loader.from_config(published(like)[0])
    assert replace(config, **{field: getattr(wanted, field) for field in untold}) == wanted
    theirs = tidied(found, config, weights)
    assert_same(places(loader, found, config), theirs)
    assert len(theirs) == count


def test_the_text_encoder_of_sd_2_is_that_of_its_checkpoint_without_what_diffusers_leaves_out():
    config = clip.from_config(published("sd21_text_encoder")[0])
    layout, weights = recognise(lazy(published("sd21_checkpoint")[1]), clip.LAYOUTS)
    unused = {name.removeprefix("cond_stage_model.model.") for name in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE}
    unused.add("logit_scale")
    used = {name: shape for name, shape in weights.shapes.items() if name not in unused}
    assert len(used) == len(weights.shapes) - len(unused)
    assert_same(places(clip, layout, config), used)


@pytest.mark.parametrize("name, total", [("sd15_checkpoint", 1143), ("sd21_checkpoint", 1240)])
def test_a_checkpoint_holds_three_networks_and_a_noise_schedule_and_no_more(name, total):
    shapes = published(name)[1]
    claims = Counter()
    for loader in NETWORKS:
        layout, weights = recognise(lazy(shapes), loader.LAYOUTS)
        prefix = next(found[1] for key in shapes if (found := re.fullmatch(layout.mark, key)))
        claims.update(prefix + key for key in weights.shapes)
    assert set(claims.values()) == {1} and shapes.keys() - claims.keys() == SCHEDULE and len(shapes) == total


# ---- diffusers' own converters, on shapes and on values


CONVERTERS = {unet: lambda tensors, config: convert_ldm_unet_checkpoint(tensors, config),
              vae: lambda tensors, config: convert_ldm_vae_checkpoint(tensors, config),
              clip: lambda tensors, config: convert_open_clip_checkpoint(SimpleNamespace(config=None), tensors)}


@pytest.mark.parametrize("checkpoint, loader, folder", [
    ("sd15_checkpoint", unet, "sd15_unet"), ("sd15_checkpoint", vae, "ft_mse_vae"),
    ("sd21_checkpoint", unet, "sd21_unet"), ("sd21_checkpoint", vae, "ft_mse_vae"), ("sdxl_checkpoint_unet", unet, "sdxl_unet"),
    ("sd21_checkpoint", clip, "sd21_text_encoder"),
], ids=id_of)
def test_the_files_of_both_layouts_agree_by_diffusers_converters(checkpoint, loader, folder):
    config, wanted = published(folder)
    wanted = tidied(next(iter(loader.LAYOUTS.values())), loader.from_config(config), lazy(wanted))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in published(checkpoint)[1].items()}
    assert_same(wanted, shapes_of(CONVERTERS[loader](tensors, config)))


SMALL_UNET = UNetConfig(widths=(16, 32, 48), depth=1, attention=(False, True, True), heads=(2, 2, 2), context_dim=24,
                        groups=8, sample_size=16)
SMALL_VAE = VAEConfig(widths=(16, 32, 48), depth=1, groups=8)
SMALL_CLIP = CLIPTextConfig(vocab_size=50, width=24, layers=3, heads=2, mlp_width=40, context_length=9,
                            projection_dim=16)


@pytest.mark.parametrize("config", [
    SMALL_UNET, replace(SMALL_UNET, depth=2, attention=(True, True, False), linear_projection=True),
    replace(SMALL_UNET, widths=(16, 32), attention=(False, False), heads=(2, 2)),
    replace(SMALL_UNET, depth=2, transformer_layers=(1, 2, 3), pooled_dim=20, linear_projection=True),
], ids=["depth 1", "depth 2, linear", "attention in the middle alone", "sdxl"])
def test_diffusers_converts_our_compvis_unet_to_our_diffusers_unet(config):
    tensors = randomise(UNet(config)).state_dict()
    exported = export_renamed(tensors, unet.LAYOUTS["CompVis"].rules(config))
    single = {f"model.diffusion_model.{name}": tensor for name, tensor in exported.items()}
    assert_equal(convert_ldm_unet_checkpoint(single, unet.to_config(config)),
                 export_renamed(tensors, unet.LAYOUTS["diffusers"].rules(config)))


@pytest.mark.parametrize("config", [SMALL_VAE, replace(SMALL_VAE, depth=2, latent_channels=16, quant_convs=False)],
                         ids=["sd", "flux"])
def test_diffusers_converts_our_compvis_vae_to_our_diffusers_vae(config):
    tensors = randomise(AutoencoderKL(config)).state_dict()
    exported = export_renamed(tensors, vae.LAYOUTS["CompVis"].rules(config))
    single = {f"first_stage_model.{name}": tensor for name, tensor in exported.items()}
    assert_equal(convert_ldm_vae_checkpoint(single, vae.to_config(config)),
                 export_renamed(tensors, vae.LAYOUTS["diffusers"].rules(config)))


@pytest.mark.parametrize("config", [SMALL_CLIP, replace(SMALL_CLIP, projection_dim=None)],
                         ids=["projected", "not projected"])
def test_diffusers_converts_our_open_clip_text_tower_to_our_transformers_one(config):
    tensors = randomise(CLIPText(config)).state_dict()
    exported = export_renamed(tensors, clip.LAYOUTS["open_clip"].rules(config))
    prefix = "conditioner.embedders.1.model."       # Stable Diffusion XL's; for 2's, diffusers drops the projection
    theirs = convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace(hidden_size=config.width)),
                                          {prefix + name: tensor for name, tensor in exported.items()}, prefix)
    assert_equal(theirs, export_renamed(tensors, clip.LAYOUTS["transformers"].rules(config)))


def assert_equal(theirs, ours):
    assert_same(shapes_of(ours), shapes_of(theirs))
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


# ---- what a config does not say


@pytest.mark.parametrize("loader, kind", [(unet, diffusers.UNet2DConditionModel), (vae, diffusers.AutoencoderKL),
                                          (taesd, diffusers.AutoencoderTiny)], ids=["unet", "vae", "taesd"])
def test_an_absent_field_means_the_default_of_its_class_and_no_field_of_the_class_is_unknown(loader, kind):
    defaults = {name: field.default for name, field in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    assert loader.FIXED.items() <= defaults.items() and defaults.keys() <= loader.KNOWN | loader.FIXED.keys()
    named = {"_class_name": kind.__name__}
    assert loader.from_config(named) == loader.from_config(named | json.loads(json.dumps(defaults)))


def test_an_absent_field_of_a_text_encoder_means_the_default_of_transformers():
    stated = transformers.CLIPTextConfig().to_dict() | {"architectures": ["CLIPTextModel"]}
    assert clip.from_config({}) == clip.from_config(json.loads(json.dumps(stated)))


@pytest.mark.parametrize("loader", [unet, vae, taesd], ids=["unet", "vae", "taesd"])
@pytest.mark.parametrize("size, read", [(48, 48), ([48], 48), ([48, 48], 48), ([24, 32], (24, 32))])
def test_a_sample_size_is_one_number_or_height_and_width_and_survives_being_written(loader, size, read):
    config = loader.from_config({"sample_size": size})
    assert config.sample_size == read and loader.from_config(json.loads(json.dumps(loader.to_config(config)))) == config
    for wrong in (0, -8, "48", [24, 32, 8], [24, None], 48.0):
        with pytest.raises(ValueError, match="sample_size=.*one number, or"):
            loader.from_config({"sample_size": wrong})
