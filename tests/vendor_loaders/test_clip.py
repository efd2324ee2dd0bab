"""CLIP's text tower against transformers', live (float32 rounding: 1e-5 relative), through the files it is published in."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from helpers import randomise
from originals import open_clip
from safetensors.torch import load_file, save_file

from tinyldm.folders.build import load_weights
from tinyldm.folders.load import load_text
from tinyldm.folders.rename import apply, published_shapes, recognise
from tinyldm.folders.weights import Weights
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.vendor_loaders.clip import LAYOUTS, from_config, to_config

PLAIN = CLIPTextConfig(vocab_size=104, width=64, layers=3, heads=4, mlp_width=160, context_length=16,
                       bos_token_id=98, eos_token_id=99, norm_eps=1e-3)     # 1e-5 hardly shows
PROJECTED = replace(PLAIN, projection_dim=24)
CONFIGS = [replace(config, activation=activation, eos_token_id=eos)
           for config, activation, eos in product((PLAIN, PROJECTED), ("quick_gelu", "gelu"), (99, 2))]

WORDS = [98, *torch.randint(1, 98, (15,), generator=torch.Generator().manual_seed(1)).tolist()]
ROWS = {                                                # what stands where a caption of words is padded or marked
    "ends early, padded with EOS": {i: 99 for i in range(4, 16)},
    "ends early, padded with 0": {4: 99} | {i: 0 for i in range(5, 16)},
    "empty": {i: 99 for i in range(1, 16)},
    "fills the context": {15: 99},
    "EOS twice, padded with 0": {3: 99, 8: 99} | {i: 0 for i in range(9, 16)},
    "EOS twice, and words behind": {6: 99, 12: 99},
    "an added token behind EOS": {5: 99, 9: 103},
    "an added token before EOS": {5: 101, 9: 99},
    "no EOS": {},
}
IDS = torch.tensor([[row.get(i, word) for i, word in enumerate(WORDS)] for row in ROWS.values()])


def id_of(config):
    return f"{config.activation}, EOS {config.eos_token_id}{', projected' if config.projection_dim else ''}"


@torch.no_grad()
def published(config):
    """transformers' model of this config, with embeddings of the size that the layers' outputs have."""
    written = to_config(config)
    model = getattr(transformers, written["architectures"][0])(transformers.CLIPTextConfig(**written))
    for name, p in randomise(model).named_parameters():
        if "_embedding" in name:
            p *= config.width**0.5
    return model


def pair(folder, config):
    """transformers' model, and ours from the folder that transformers wrote."""
    theirs = published(config)
    theirs.save_pretrained(folder)
    ours = load_text(folder)
    assert ours.config == config
    return ours, theirs


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_every_layer_with_and_without_the_final_norm_equals_transformers(tmp_path, config):
    ours, theirs = pair(tmp_path, config)
    out = theirs(IDS, output_hidden_states=True)
    final_norm = next(module for name, module in theirs.named_modules() if name.endswith("final_layer_norm"))
    assert len(out.hidden_states) == config.layers + 1
    for skip_last, state in enumerate(reversed(out.hidden_states)):
        assert_close(ours(IDS, skip_last, norm=False).hidden, state)
        assert_close(ours(IDS, skip_last).hidden, final_norm(state))
    assert_close(ours(IDS).hidden, out.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_pooled_features_equal_transformers_wherever_eos_and_padding_stand(tmp_path, config):
    ours, theirs = pair(tmp_path, config)
    out = theirs(IDS)
    expected = out.text_embeds if config.projection_dim else out.pooler_output
    for i in range(len(IDS)):
        assert_close(ours(IDS[i: i + 1]).pooled[0], expected[i])
    for skip_last in range(config.layers + 1):
        assert_close(ours(IDS, skip_last, norm=False).pooled, expected)


@torch.no_grad()
def test_the_two_rules_for_eos_differ_only_where_an_id_beyond_it_occurs():
    pooled = [randomise(CLIPText(replace(PLAIN, eos_token_id=eos)))(IDS).pooled for eos in (99, 2)]
    differs = (pooled[0] != pooled[1]).any(1)
    assert [row for row, differ in zip(ROWS, differs) if differ] == ["an added token behind EOS", "an added token before EOS"]


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "text_model.", "cond_stage_model.transformer.",
                                    "cond_stage_model.transformer.text_model."])
@pytest.mark.parametrize("config", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_the_transformers_layout_loads_with_any_prefix_and_what_old_files_add(tmp_path, prefix, config):
    theirs = published(config)
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()}
    inner = prefix.removesuffix("text_model.")          # the projection lies beside text_model, not in it
    tensors = {f"{inner if 'projection' in name else prefix}{name}": tensor for name, tensor in tensors.items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(16.0)[None]
    save_file(tensors, tmp_path / "text.safetensors")
    ours = CLIPText(config)
    load_weights(ours, tmp_path / "text.safetensors")
    assert_close(ours(IDS).hidden, theirs(IDS).last_hidden_state)
    if config.projection_dim:
        assert_close(ours(IDS).pooled, theirs(IDS).text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_text_tower_of_a_whole_clip_model_loads_with_its_projection(tmp_path, activation):
    text = to_config(replace(PLAIN, activation=activation))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs = randomise(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    ours = load_text(tmp_path)
    assert ours.config == replace(PROJECTED, activation=activation)
    assert_close(ours(IDS).hidden, theirs.text_model(IDS).last_hidden_state)
    assert_close(ours(IDS).pooled, theirs.text_projection(theirs.text_model(IDS).pooler_output))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_the_open_clip_layout_gives_the_features_of_the_same_weights_in_transformers(tmp_path, prefix):
    config = replace(PROJECTED, activation="gelu")
    theirs = published(config)
    tensors = open_clip(theirs.state_dict())
    beside = {"logit_scale": torch.zeros(()), "attn_mask": torch.zeros(16, 16), "visual.proj": torch.zeros(8, 24),
              "visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8)}
    tensors = {prefix + name: tensor for name, tensor in (beside | tensors).items()}
    assert recognise(Weights.of(tensors), LAYOUTS)[0] is LAYOUTS["open_clip"]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    ours = CLIPText(config)
    load_weights(ours, tmp_path / "open_clip_model.safetensors")
    out = theirs(IDS, output_hidden_states=True)
    assert_close(ours(IDS, skip_last=1, norm=False).hidden, out.hidden_states[-2])
    assert_close(ours(IDS).pooled, out.text_embeds)


@torch.no_grad()
def test_a_projection_that_kept_transformers_name_in_an_open_clip_file_is_not_transposed(tmp_path):
    """As diffusers' older converter wrote SDXL's single files; ComfyUI's hold position_ids at a third place."""
    config = replace(PROJECTED, activation="gelu")
    theirs = published(config)
    tensors = open_clip(theirs.state_dict())
    tensors["text_projection.weight"] = tensors.pop("text_projection").T.contiguous()
    tensors |= {"logit_scale": torch.zeros(()), "transformer.text_model.embeddings.position_ids": torch.arange(16.0)[None]}
    save_file({f"conditioner.embedders.1.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "sdxl.safetensors")
    ours = CLIPText(config)
    load_weights(ours, tmp_path / "sdxl.safetensors")
    assert_close(ours(IDS).pooled, theirs(IDS).text_embeds)


BIG_G = transformers.CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                                    hidden_act="gelu", projection_dim=1280, architectures=["CLIPTextModelWithProjection"])


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_big_g_has_a_place_for_every_tensor_in_both_of_its_layouts(layout):
    with torch.device("meta"):
        theirs = transformers.CLIPTextModelWithProjection(BIG_G).state_dict()
        ours = CLIPText(config := from_config(BIG_G.to_dict()))
    assert (config.width, config.heads, config.projection_dim, config.activation) == (1280, 20, 1280, "gelu")
    if layout == "open_clip":
        theirs = open_clip(theirs)
    found, weights = recognise(Weights.of(theirs), LAYOUTS)
    assert found is LAYOUTS[layout]
    names = {apply(found.tidy(config), name): tuple(t.shape) for name, t in theirs.items() if not name.endswith("position_ids")}
    assert published_shapes(ours.state_dict(), found.rules(config)) == names
    told = found.config_of(weights.shapes)
    assert (told.width, told.layers, told.heads, told.mlp_width) == (1280, 32, 20, 5120)


def test_what_transformers_saves_is_what_we_would_write(tmp_path):
    for config in (PLAIN, PROJECTED):
        published(config).save_pretrained(tmp_path)
        ours, found = to_config(config), json.loads((tmp_path / "config.json").read_text())
        assert {name: ours[name] for name in ours if ours[name] != found[name]} == {}
        names = load_file(tmp_path / "model.safetensors").keys()
        assert any(name.startswith("text_projection") for name in names) == bool(config.projection_dim)


def test_configs_survive_the_round_trip_through_the_published_layout():
    for config in (CLIPTextConfig(), *CONFIGS):
        assert from_config(json.loads(json.dumps(to_config(config)))) == config


def test_the_published_configs_of_whole_clip_models_are_read():
    whole = {"architectures": ["CLIPModel"], "projection_dim": 768, "vision_config": {},
             "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2}}
    assert from_config(whole) == CLIPTextConfig(projection_dim=768, eos_token_id=2)


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="hidden_act"):
        from_config({"hidden_act": "relu"})


@pytest.mark.parametrize("config, reason", [
    ({"architectures": ["T5EncoderModel"]}, "describes a T5EncoderModel: of text encoders, only CLIP's and T5's can"),
    ({"architectures": ["RobertaSeriesModelWithTransformation"]}, "only CLIP's and T5's can be read"),
    ({"architectures": ["CLIPTextModel"], "use_attention_mask": True}, "use_attention_mask: diffusers hides the padding"),
])
def test_a_text_encoder_that_is_another_one_or_is_called_otherwise_is_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        from_config(config)
    assert from_config({"architectures": ["FlaxCLIPTextModel"], "use_attention_mask": False}) == from_config({})
