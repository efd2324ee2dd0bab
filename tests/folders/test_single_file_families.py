"""Single files of Stable Diffusion XL, 3 and FLUX.1: the networks loaded from one are exactly those of the published folder.

The files are written from diffusers' networks by tests/originals.py, apart from the package's rename rules.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import PROMPT
from originals import compvis_unet, compvis_vae, open_clip, original_flux, original_mmdit
from published import NEGATIVE, write_flux, write_sd3, write_sdxl
from safetensors.torch import save_file

from tinyldm.folders.load import load_model, load_text, load_vae
from tinyldm.folders.weights import open_weights
from tinyldm.pipeline import draw, draw_settings
from tinyldm.text.absent import AbsentText
from tinyldm.vendor_loaders.families import MORE_INPUTS

NET, VAE = "model.diffusion_model.", "first_stage_model."
BESIDE = {"model_ema.decay": torch.tensor(0.9999), "first_stage_model.loss.logvar": torch.zeros(())}
EMPTY = torch.tensor([])


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def text_model(module):
    """CLIP's state dict under the names that single files have, with its projection, if any."""
    named = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    return {name if name.startswith("text_projection") else f"text_model.{name}": tensor for name, tensor in named.items()}


def written(file, *dicts):
    save_file({name: tensor.clone().contiguous() for tensors in dicts for name, tensor in tensors.items()}, file)
    return file


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    pipeline = write_sdxl(folder := tmp_path_factory.mktemp("sdxl"))
    net = load_model(folder).net
    first = text_model(pipeline.text_encoder) | {"text_model.embeddings.position_ids": torch.arange(16.0)[None]}
    parts = {"net": prefixed(NET, compvis_unet(pipeline.unet.state_dict(), net.config)),
             "vae": prefixed(VAE, compvis_vae(pipeline.vae.state_dict())),
             "text": prefixed("conditioner.embedders.0.transformer.", first),
             "text_2": prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2.state_dict()) | {"logit_scale": torch.ones(())})}
    return SimpleNamespace(folder=folder, pipeline=pipeline, parts=parts)


def sd3_parts(pipeline, folder):
    config = pipeline.transformer.config
    parts = {"net": prefixed(NET, original_mmdit(pipeline.transformer.state_dict(), config.num_layers, config.dual_attention_layers)),
             "vae": prefixed(VAE, compvis_vae(pipeline.vae.state_dict())),
             "text": prefixed("text_encoders.clip_l.transformer.", text_model(pipeline.text_encoder)),
             "text_2": prefixed("text_encoders.clip_g.transformer.", text_model(pipeline.text_encoder_2))}
    if pipeline.text_encoder_3 is not None:
        parts["text_3"] = prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict())
        parts["text_3"].pop("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight", None)
    parts["text"]["text_encoders.clip_l.transformer.text_projection.weight"] = torch.full((64, 64), 7.0)   # which nothing uses
    return SimpleNamespace(folder=folder, pipeline=pipeline, parts=parts)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return sd3_parts(write_sd3(folder := tmp_path_factory.mktemp("sd3"), identity=True), folder)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A function: dev or not -> its folder, diffusers' pipeline, and the tensors of its parts."""
    memo = {}

    def make(dev=True):
        if dev not in memo:
            pipeline = write_flux(folder := tmp_path_factory.mktemp("flux"), guidance=dev, head_dim=128)
            net = load_model(folder).net
            memo[dev] = SimpleNamespace(folder=folder, pipeline=pipeline, parts={
                "net": original_flux(pipeline.transformer.state_dict(), net.config), "vae": compvis_vae(pipeline.vae.state_dict()),
                "text": text_model(pipeline.text_encoder), "text_2": pipeline.text_encoder_2.state_dict()})
            memo[dev].parts["text_2"].pop("encoder.embed_tokens.weight", None)
        return memo[dev]
    return make


def assert_same_model(one, other, but=()):
    """Every tensor is the same number; the configs too, but for sizes in training, which files do not state."""
    assert one.modules.keys() == other.modules.keys()
    for part in one.modules.keys() - set(but):
        a, b = one.modules[part].state_dict(), other.modules[part].state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part
        left_out = {"sample_size", "bos_token_id", "eos_token_id", "context_length"}
        assert all(getattr(one.modules[part].config, name) == value for name, value in vars(other.modules[part].config).items()
                   if name not in left_out), part
    assert one.prediction == other.prediction and one.text.join == other.text.join
    assert [type(t) for t in one.text.tokenizers] == [type(t) for t in other.text.tokenizers]
    assert one.text.tokenize([PROMPT, "", NEGATIVE]).equal(other.text.tokenize([PROMPT, "", NEGATIVE]))


def assert_same_pictures(one, other, **how):
    drawn = [draw(model, [PROMPT], [3], draw_settings(model, steps=2, **how), width=32, height=24).astype(int) for model in (one, other)]
    assert abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].std() > 10


def refusal(*args, **kwargs):
    with pytest.raises(ValueError) as error:
        load_model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Stable Diffusion XL


def test_a_file_of_stable_diffusion_xl_is_its_folder(sdxl, tmp_path):
    file = written(tmp_path / "xl.safetensors", *sdxl.parts.values(), BESIDE)
    model, folder = load_model(file, tokenizer=[sdxl.folder]), load_model(sdxl.folder)
    assert_same_model(model, folder)
    assert model.vae.config.scaling_factor == 0.13025 and model.net.config.sample_size == 128
    assert model.defaults == folder.defaults and model.defaults["zero_negative"]
    assert model.process.alpha.equal(folder.process.alpha) and draw_settings(model).sampling == draw_settings(folder).sampling
    assert_same_pictures(model, folder)


def test_its_pictures_are_those_that_diffusers_draws_from_the_file(sdxl, tmp_path):
    file = written(tmp_path / "xl.safetensors", *sdxl.parts.values(), BESIDE)
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(sdxl.folder), add_watermarker=False, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    image = np.asarray(theirs(PROMPT, num_inference_steps=2, guidance_scale=5.0, width=32, height=24,
                              generator=torch.Generator().manual_seed(3)).images[0]).astype(int)
    model = load_model(file, tokenizer=[sdxl.folder])
    ours = draw(model, [PROMPT], [3], draw_settings(model, steps=2, cfg=5.0), width=32, height=24)[0].astype(int)
    assert ours.std() > 10 and abs(ours - image).max() <= 1


@pytest.mark.parametrize("keys, prediction", [({}, "eps"), ({"v_pred": EMPTY}, "v"), ({"v_pred": EMPTY, "ztsnr": EMPTY}, "v")])
def test_finetunes_that_predict_v_say_so_by_empty_tensors(sdxl, tmp_path, keys, prediction):
    model = load_model(written(tmp_path / "xl.safetensors", *sdxl.parts.values(), keys), tokenizer=[sdxl.folder])
    assert model.prediction == prediction and (model.process.alpha[-1] == 0) == ("ztsnr" in keys)
    assert draw_settings(model).sampling.schedule == ("trailing" if "ztsnr" in keys else "leading")


def test_each_of_two_clips_finds_its_place_by_its_size_whatever_the_order_of_the_files(sdxl, tmp_path):
    file = written(tmp_path / "net.safetensors", sdxl.parts["net"])
    names = {"text": "b.safetensors", "text_2": "a.safetensors", "vae": "c.safetensors"}
    cut = {"text": "conditioner.embedders.0.transformer.", "text_2": "conditioner.embedders.1.model.", "vae": VAE}
    sources = [written(tmp_path / name, {key.removeprefix(cut[part]): tensor for key, tensor in sdxl.parts[part].items()})
               for part, name in names.items()]
    expected = load_model(sdxl.folder)
    for order in (sources, sources[::-1]):
        assert_same_model(load_model(file, tokenizer=[sdxl.folder], parts=order), expected)


def test_a_model_folder_is_a_source_of_all_parts_and_of_the_tokenizers(sdxl, tmp_path):
    for bare in (NET, ""):
        file = written(tmp_path / "net.safetensors", {bare + name.removeprefix(NET): tensor for name, tensor in sdxl.parts["net"].items()})
        assert_same_model(load_model(file, parts=[sdxl.folder]), load_model(sdxl.folder))


def test_parts_that_are_lacking_are_named_with_what_to_do(sdxl, tmp_path):
    file = written(tmp_path / "xl.safetensors", sdxl.parts["net"], sdxl.parts["text"])
    text = refusal(file, tokenizer=[sdxl.folder])
    assert str(file) in text and "Stable Diffusion XL" in text and "--parts" in text
    assert "no VAE (first_stage_model.*) and no text encoder CLIP-bigG (conditioner.embedders.1.*)" in text
    assert "CLIP-bigG" in refusal(file, tokenizer=[sdxl.folder], parts=[sdxl.folder / "vae"])


def test_two_sources_of_one_part_and_a_source_of_none_are_refused(sdxl, sd3, tmp_path):
    file = written(tmp_path / "xl.safetensors", *sdxl.parts.values())
    other = written(tmp_path / "other.vae", sdxl.parts["vae"])
    shutil.move(other, other := tmp_path / "other.safetensors")
    text = refusal(file, tokenizer=[sdxl.folder], parts=[sdxl.folder / "vae", other])
    assert "both hold a VAE" in text and "other.safetensors" in text
    wide = refusal(file, tokenizer=[sdxl.folder], parts=[sd3.folder / "text_encoder_3"])
    assert "text_encoder_3 holds a text encoder (T5), but Stable Diffusion XL takes a VAE and CLIP-L, CLIP-bigG" in wide
    assert "--parts" in refusal(sdxl.folder, parts=[other])


def test_a_part_that_is_named_replaces_the_file_s_own(sdxl, tmp_path):
    changed = {name: tensor + 1 for name, tensor in sdxl.parts["vae"].items()}
    file = written(tmp_path / "xl.safetensors", *(sdxl.parts | {"vae": changed}).values())
    assert_same_model(load_model(file, tokenizer=[sdxl.folder], parts=[sdxl.folder / "vae"]), load_model(sdxl.folder))


def test_the_first_text_encoder_of_a_whole_checkpoint_is_that_of_its_folder(sdxl, tmp_path):
    found, expected = load_text(written(tmp_path / "xl.safetensors", *sdxl.parts.values())), load_text(sdxl.folder)
    assert replace(found.config, bos_token_id=expected.config.bos_token_id, eos_token_id=expected.config.eos_token_id) == expected.config
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_a_whole_checkpoint_is_a_source_of_its_parts(sdxl, tmp_path):
    file, whole = written(tmp_path / "net.safetensors", sdxl.parts["net"]), written(tmp_path / "xl.safetensors", *sdxl.parts.values())
    assert_same_model(load_model(file, tokenizer=[sdxl.folder], parts=[whole]), load_model(sdxl.folder))
    assert load_vae(whole).config.scaling_factor == 0.13025


# ---- Stable Diffusion 3 and 3.5


@pytest.mark.parametrize("qk_norm, dual", [(False, False), (True, True), (True, False)])
def test_a_file_of_stable_diffusion_3_with_everything_inside_is_its_folder(tmp_path, qk_norm, dual):
    made = sd3_parts(write_sd3(tmp_path / "model", qk_norm, dual, identity=True), tmp_path / "model")
    model = load_model(written(tmp_path / "sd3.safetensors", *made.parts.values()), tokenizer=[made.folder])
    folder = load_model(made.folder)
    assert_same_model(model, folder)
    assert model.text.modules["text"].projection.weight.equal(torch.eye(64))
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (1.5305, 0.0609)
    assert model.defaults == folder.defaults and draw_settings(model).sampling == draw_settings(folder).sampling
    assert_same_pictures(model, folder)


def test_a_file_of_stable_diffusion_3_without_t5_draws_with_zeros_for_it_as_its_folder_does(sd3, tmp_path, capsys):
    inside = [tensors for part, tensors in sd3.parts.items() if part != "text_3"]
    model = load_model(written(tmp_path / "sd3.safetensors", *inside), tokenizer=[sd3.folder])
    assert "without T5" in capsys.readouterr().err
    folder = load_model(sd3.folder, without={"text_encoder_3"})
    assert isinstance(model.text.encoders[2].module, AbsentText)
    assert_same_model(model, folder)
    assert_same_pictures(model, folder)
    whole = written(tmp_path / "whole.safetensors", *sd3.parts.values())
    assert_same_model(load_model(whole, tokenizer=[sd3.folder], without={"text_encoder_3"}), folder)
    assert "without" not in capsys.readouterr().err                 # which was asked for


def test_a_transformer_alone_takes_its_encoders_from_files_named_at_will(sd3, tmp_path):
    bare = {name.removeprefix(NET): tensor for name, tensor in sd3.parts["net"].items()}
    cut = {"text": "text_encoders.clip_l.transformer.", "text_2": "text_encoders.clip_g.transformer.",
           "text_3": "text_encoders.t5xxl.transformer.", "vae": VAE}
    sources = [written(tmp_path / f"{i}.safetensors", {key.removeprefix(prefix): t for key, t in sd3.parts[part].items()})
               for i, (part, prefix) in enumerate(cut.items())]
    model = load_model(written(tmp_path / "net.safetensors", bare), tokenizer=[sd3.folder], parts=sources)
    assert_same_model(model, load_model(sd3.folder))


def test_a_flow_predicts_nothing_else(sd3, tmp_path):
    file = written(tmp_path / "sd3.safetensors", *sd3.parts.values())
    assert "leave out --prediction eps" in refusal(file, tokenizer=[sd3.folder], prediction="eps")


@pytest.mark.slow
def test_of_a_whole_file_only_the_part_that_is_asked_for_is_read(sd3, tmp_path, tensors_read):
    file = written(tmp_path / "sd3.safetensors", *sd3.parts.values())
    vae = load_vae(file)
    assert sorted(tensors_read) == sorted(sd3.parts["vae"])
    assert all(torch.equal(tensor, load_vae(sd3.folder).state_dict()[name]) for name, tensor in vae.state_dict().items())


# ---- FLUX.1


@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize("prefix", ["", NET])
@pytest.mark.slow
def test_a_transformer_of_flux_alone_with_its_parts_is_its_folder(flux, tmp_path, dev, prefix):
    made = flux(dev)
    file = written(tmp_path / "flux.safetensors", prefixed(prefix, made.parts["net"]))
    sources = [written(tmp_path / f"{part}.safetensors", made.parts[part]) for part in ("text_2", "vae", "text")]
    model, folder = load_model(file, tokenizer=[made.folder], parts=sources), load_model(made.folder)
    assert_same_model(model, folder)
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (0.3611, 0.1159)
    assert model.net.config.guidance == dev and model.defaults == folder.defaults
    assert model.text.tokenizers[1].context_length == (512 if dev else 256)
    assert draw_settings(model).sampling == draw_settings(folder).sampling and type(model.process) is type(folder.process)
    assert_same_pictures(model, folder)


def test_a_whole_file_of_flux_has_its_vae_under_another_prefix(flux, tmp_path):
    made = flux()
    prefixes = {"net": NET, "vae": "vae.", "text": "text_encoders.clip_l.transformer.", "text_2": "text_encoders.t5xxl.transformer."}
    file = written(tmp_path / "flux.safetensors", *(prefixed(prefixes[part], made.parts[part]) for part in prefixes))
    assert_same_model(load_model(file, tokenizer=[made.folder]), load_model(made.folder))
    assert load_vae(file).config.shift_factor == 0.1159


def test_flux_needs_its_t5(flux, tmp_path):
    made = flux()
    file = written(tmp_path / "flux.safetensors", made.parts["net"])
    text = refusal(file, tokenizer=[made.folder], parts=[made.folder / "vae", made.folder / "text_encoder"])
    assert "FLUX.1" in text and "no text encoder T5" in text and "--parts" in text
    assert "cannot draw without text_encoder_2" in refusal(file, parts=[made.folder], without={"text_encoder_2"})


def test_weights_stored_in_8_bits_are_cast_and_multiplied_with_their_scales(flux, tmp_path):
    made, exact = flux(), torch.float8_e4m3fn
    plain = {name: tensor.to(exact) for name, tensor in made.parts["net"].items()}
    model = load_model(written(tmp_path / "fp8.safetensors", plain), parts=[made.folder])
    expected = {name: tensor.to(exact).float() for name, tensor in load_model(made.folder).net.state_dict().items()}
    assert all(tensor.equal(expected[name]) for name, tensor in model.net.state_dict().items())
    name = "double_blocks.0.img_attn.qkv"
    scaled = made.parts["net"] | {f"{name}.weight": plain[f"{name}.weight"], f"{name}.scale_weight": torch.tensor(0.5),
                                  f"{name}.scale_input": torch.tensor(2.0), "scaled_fp8": torch.zeros(2, dtype=exact)}
    query = load_model(written(tmp_path / "scaled.safetensors", scaled), parts=[made.folder]).net.state_dict()
    query = query["double_blocks.0.image.attn.to_q.weight"]
    assert query.equal(plain[f"{name}.weight"].float()[: len(query)] * 0.5)


def test_streaming_a_checkpoint_s_part_skips_the_others(sdxl, tmp_path):
    file = written(tmp_path / "xl.safetensors", *sdxl.parts.values())
    only = open_weights(file).renamed(lambda name: name if name.startswith(VAE) else "")
    assert {name for name, _ in only.stream()} == only.shapes.keys() == sdxl.parts["vae"].keys()


# ---- near misses


def tensors(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


ONE = (1,)
NEAR = {
    "refiner": ({"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": ONE, f"{NET}input_blocks.0.0.weight": (384, 4, 3, 3)},
                "Stable Diffusion XL's refiner"),
    "playground 2.5": ({"edm_mean": ONE, f"{NET}input_blocks.0.0.weight": (320, 4, 3, 3)}, "Playground 2.5"),
    "cosxl": ({"edm_vpred.sigma_max": ONE, f"{NET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "EDM's continuous process"),
    "svd": ({f"{NET}input_blocks.1.1.time_stack.0.attn1.to_q.weight": ONE, "edm_vpred.sigma_max": ONE}, "Stable Video Diffusion"),
    "cascade": ({"clip_txt_mapper.weight": ONE}, "Stable Cascade"),
    "auraflow": ({"model.double_layers.0.attn.w1q.weight": ONE, "double_layers.0.attn.w1q.weight": ONE}, "AuraFlow"),
    "pixart": ({"t_block.1.weight": ONE, "y_embedder.y_proj.fc1.weight": ONE}, "PixArt"),
    "lora of kohya": ({"lora_unet_x.lora_down.weight": ONE}, "a LoRA"),
    "lora of diffusers": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": ONE}, "a LoRA"),
    "controlnet": ({"control_model.time_embed.0.weight": ONE}, "a ControlNet"),
    "diffusers' network": ({"down_blocks.0.resnets.0.norm1.weight": ONE, "conv_norm_out.weight": ONE}, "a network alone under diffusers' names"),
    "vae": ({"encoder.down.0.block.0.norm1.weight": ONE, "decoder.conv_in.weight": ONE}, "it is a VAE. Name the file of the network"),
    "clip": ({"text_model.embeddings.token_embedding.weight": ONE}, "it is a text encoder (CLIP)"),
    "t5": ({"shared.weight": ONE, "encoder.block.0.layer.0.SelfAttention.q.weight": ONE}, "it is a text encoder (T5"),
    "nothing known": ({"a.weight": ONE}, "is no checkpoint of FLUX.1, Stable Diffusion 1"),
}


@pytest.mark.parametrize("which", NEAR)
def test_a_near_miss_is_refused_in_one_line_that_says_what_it_is(tmp_path, which):
    shapes, said = NEAR[which]
    file = written(tmp_path / "model.safetensors", tensors(**shapes))
    text = refusal(file)
    assert str(file) in text and said in text


@pytest.mark.parametrize("channels", MORE_INPUTS)
def test_a_u_net_that_takes_a_picture_too_is_refused_as_what_it_is(sdxl, tmp_path, channels):
    wide = sdxl.parts["net"] | {f"{NET}input_blocks.0.0.weight": torch.zeros(64, channels, 3, 3)}
    text = refusal(written(tmp_path / "xl.safetensors", wide), parts=[sdxl.folder])
    assert f"takes {channels} channels and makes 4: it is {MORE_INPUTS[channels]}" in text


@pytest.mark.parametrize("change, said", [
    ({"img_in.weight": (256, 384)}, "FLUX.1 Fill"), ({"img_in.weight": (256, 128)}, "Canny or Depth"),
    ({"single_stream_modulation.lin.weight": ONE}, "FLUX.2"), ({"distilled_guidance_layer.in_proj.bias": ONE}, "Chroma")])
def test_relatives_of_flux_are_refused_as_what_they_are(flux, tmp_path, change, said):
    file = written(tmp_path / "flux.safetensors", flux().parts["net"] | tensors(**change))
    assert said in refusal(file, parts=[flux().folder])


@pytest.mark.parametrize("part", ["vae", "text_2"])
def test_a_text_encoder_or_vae_without_a_tensor_is_refused(sdxl, tmp_path, part):
    damaged = dict(list(sdxl.parts[part].items())[1:])
    file = written(tmp_path / "xl.safetensors", *(sdxl.parts | {part: damaged}).values())
    assert str(file) in refusal(file, tokenizer=[sdxl.folder])


def test_a_vae_in_diffusers_layout_needs_its_config_beside_it(sdxl, tmp_path):
    (tmp_path / "net").mkdir()
    file = written(tmp_path / "net" / "xl.safetensors", *(sdxl.parts[part] for part in ("net", "text", "text_2")))
    alone = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.copy(sdxl.folder / "vae" / alone.name, alone)
    assert "config.json" in refusal(file, tokenizer=[sdxl.folder], parts=[alone])
    shutil.copy(sdxl.folder / "vae" / "config.json", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] == 0.13025
    assert_same_model(load_model(file, tokenizer=[sdxl.folder], parts=[alone]), load_model(sdxl.folder))
