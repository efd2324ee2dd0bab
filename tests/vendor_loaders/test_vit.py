"""CLIP's, DINOv2's and SigLIP's picture towers against transformers', live, through the files in which they are published."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from helpers import later, randomise
from originals import meta_dinov2, open_clip_picture_tower, timm_siglip
from photos import photos
from PIL import Image
from safetensors.torch import load_file, save_file

from tinyldm.evaluation.towers import TOWERS, features, load_vit, open_tower
from tinyldm.folders.rename import apply, published_shapes
from tinyldm.vendor_loaders.layout import Layout
from tinyldm.vendor_loaders.vit import LAYOUTS

SIZES = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
CLIP = SIZES | dict(intermediate_size=192, projection_dim=48)
IMAGES = photos(3, 80, 64)              # uint8 [3, 64, 80, 3]
MODELS = {
    "clip": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP)),
    "clip of LAION": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP, hidden_act="gelu")),
    "clip with wide heads": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**CLIP | {"num_attention_heads": 1}, layer_norm_eps=1e-3)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, intermediate_size=192)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "dinov2, giant": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES)),
}


@torch.no_grad()
def published(name: str, folder=None):
    """A random model with embeddings of the size that the layers' outputs have, written to the folder."""
    model = randomise(MODELS[name](), 1)
    for key, p in model.named_parameters():
        if ("embedding" in key or "token" in key or "probe" in key) and "patch" not in key:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        if "lambda" in key:
            p += 1
    if folder is not None:
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def answer(model, pixels) -> torch.Tensor:
    out = model(pixels)
    return out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape and (found - expected).abs().max() < tolerance * expected.abs().max()


def pillow_processor(name):
    """The processor with Pillow's arithmetic, which is the only one of transformers 4."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_transformers_from_the_folder_that_it_wrote(tmp_path, name):
    theirs = published(name, tmp_path)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = answer(theirs, pixels)
    assert expected.std(0).mean() > 0.1 * expected.std()        # features that hardly depend on the picture would prove nothing
    with torch.no_grad():
        assert_close(load_vit(tmp_path)(pixels), expected)


def test_the_road_of_a_picture_equals_that_of_transformers_with_its_own_preparation(tmp_path):
    theirs = published("clip", tmp_path)
    processor = pillow_processor("CLIPImageProcessor")(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels = torch.from_numpy(np.stack(processor(list(IMAGES))["pixel_values"]))
    assert_close(features(open_tower("clip", tmp_path), IMAGES), answer(theirs, pixels))


def test_the_road_of_a_picture_to_siglip_equals_transformers(tmp_path):
    theirs = published("siglip", tmp_path)
    processor = pillow_processor("SiglipImageProcessor")(size={"height": 56, "width": 56})
    pixels = torch.from_numpy(np.stack(processor(list(IMAGES))["pixel_values"]))
    assert_close(features(open_tower("siglip", tmp_path), IMAGES), answer(theirs, pixels))


def test_the_road_of_a_picture_to_dinov2_resamples_positions_as_meta_s_code_does(tmp_path):
    """Weights for 56 px and pictures of 224. transformers leaves out the offset of 0.1, by which Meta's code without registers differs;
    so does the tower when it is set to 0. With registers both do the same."""
    mean, std = (np.array(values)[:, None, None] for values in (TOWERS["dinov2"].mean, TOWERS["dinov2"].std))
    resized = np.stack([np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in IMAGES])
    pixels = torch.from_numpy((resized.transpose(0, 3, 1, 2) / 255 - mean) / std).float()
    for name, offset in (("dinov2", 0.1), ("dinov2 with registers", 0.0)):
        theirs, tower = published(name, tmp_path / name), open_tower("dinov2", tmp_path / name)
        expected = answer(theirs, pixels)
        assert tower.module.config.position_offset == offset and tower.module.config.antialias == (offset == 0)
        if offset:
            assert (features(tower, IMAGES) - expected).abs().max() > 1e-3 * expected.abs().max()
            tower.module.config = replace(tower.module.config, position_offset=0.0)
        assert_close(features(tower, IMAGES), expected)


def test_dinov2_s_positions_are_sampled_at_the_scale_with_the_offset(tmp_path):
    """By torch's own bicubic of the scale that dinov2's interpolate_pos_encoding passes: (h + 0.1) / 4."""
    published("dinov2", tmp_path)
    net = load_vit(tmp_path)
    grid = net.positions[1:].T.reshape(1, -1, 4, 4)
    expected = torch.nn.functional.interpolate(grid, scale_factor=(3.1 / 4, 2.1 / 4), mode="bicubic")
    assert expected.shape[2:] == (3, 2)
    torch.testing.assert_close(net.position(3, 2)[1:], expected.flatten(2)[0].T, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- other layouts


ORIGINALS = [("clip of LAION", open_clip_picture_tower, None),
             ("clip", open_clip_picture_tower, {"model_cfg": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": {"width": 128}}}),
             ("clip with wide heads", open_clip_picture_tower, {"model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 128}}}),
             ("siglip", timm_siglip, {"model_cfg": {"embed_dim": 128, "vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}}),
             ("dinov2", meta_dinov2, None), ("dinov2, giant", meta_dinov2, None), ("dinov2 with registers", meta_dinov2, None)]


@pytest.mark.parametrize("name, original, config, pickled", [
    pytest.param(*case, pickled, marks=later(2, i, pickled), id=f"{case[0]}, {case[1].__name__}-{pickled}")
    for i, case in enumerate(ORIGINALS) for pickled in (False, True)])
def test_the_original_layouts_give_the_same_features(tmp_path, name, original, config, pickled):
    published(name, tmp_path / "transformers")
    ours = load_vit(tmp_path / "transformers")
    tensors = {key: tensor.contiguous().clone() for key, tensor in original(load_file(tmp_path / "transformers/model.safetensors")).items()}
    folder = tmp_path / "original"
    folder.mkdir()
    if pickled:
        torch.save({"state_dict": tensors, "epoch": 3} if config else tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    if config:
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    found = load_vit(folder)
    expected = ours.config if "wide" not in name else replace(ours.config, norm_eps=1e-5)       # which open_clip's config does not tell
    assert found.config == expected and not found.training and not any(p.requires_grad for p in found.parameters())
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in found.state_dict().items())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_picture_tower_is_found_in_the_file_of_a_whole_model(tmp_path, name):
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    kind, vision = {"clip": ("CLIP", {key: value for key, value in CLIP.items() if key != "projection_dim"}),
                    "siglip": ("Siglip", SIZES | {"intermediate_size": 192})}[name]
    more = {"projection_dim": 48} if name == "clip" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    model = randomise(getattr(transformers, f"{kind}Model")(config), 3)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_image_features(pixels)
        assert_close(load_vit(tmp_path)(pixels), getattr(expected, "pooler_output", expected))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_has_a_name_of_its_own_in_every_layout(tmp_path, name):
    """The names of each layout lead back to it and to the same config."""
    model = {"transformers": "clip", "open_clip": "clip of LAION", "timm": "siglip"}.get(name, "dinov2 with registers")
    published(model, tmp_path)
    net, layout = load_vit(tmp_path), LAYOUTS[name]
    assert isinstance(layout, Layout)
    shapes = published_shapes(net.state_dict(), layout.rules(net.config))
    assert layout.config_of(shapes) == net.config
    assert {apply(layout.tidy(net.config), key) for key in shapes} == set(shapes)


# ---------------------------------------------------------------- mistakes


def test_published_activations_and_pooling_are_checked(tmp_path):
    published("clip", tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())

    def refused(message, **changes):
        file.write_text(json.dumps(written | changes))
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path)

    refused("unknown hidden_act of a picture tower 'relu'", hidden_act="relu")
    refused("laion/CLIP-ViT-H-14-laion2B-s32B-b79K was trained with 'gelu'", _name_or_path="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    refused("only CLIPs that pool at the class token", model_cfg={"vision_cfg": {"pool_type": "avg"}})
    refused("attentional_pool", model_cfg={"vision_cfg": {"attentional_pool": True}})
    refused("128 is not divisible by 3 heads", num_attention_heads=3)


def test_a_file_of_another_network_or_a_part_of_one_is_refused_by_name(tmp_path):
    published("clip", tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "position_embedding" not in key}, tmp_path / "cut.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1.mlp" not in key}, tmp_path / "part.safetensors")
    for name, message in (("other", "none of the layouts transformers, transformers-dinov2, open_clip, dinov2, timm fits"),
                          ("cut", "position_embedding.weight, is missing|position_embedding.weight is missing"),
                          ("part", "missing 4 .*encoder.layers.1.mlp")):
        with pytest.raises(ValueError, match=f"{name}.safetensors: .*{message}"):
            load_vit(tmp_path / f"{name}.safetensors")
