import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import randomise, thinned
from safetensors.torch import save_file

from tinyldm.diffusion.grids import grid
from tinyldm.folders.load import load_model, load_vae
from tinyldm.folders.rename import export_renamed
from tinyldm.folders.save import save_model, write_part
from tinyldm.folders.single_file import checkpoint_tensors, why_not_one_file
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import draw_settings
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip, taesd, unet, vae
from tinyldm.vendor_loaders.families import SD1

PROMPT = "a red square on the left of a blue circle"
NET, VAE, TEXT1, TEXT2 = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "cond_stage_model.model."
BESIDE = {"betas": torch.zeros(1000), "alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999),
          "model_ema.num_updates": torch.tensor(7), "model_ema.diffusion_modeltime_embed0weight": torch.zeros(3, 3),
          "first_stage_model.loss.logvar": torch.zeros(()), "first_stage_model.loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}


def published(module, layout, prefix=""):
    return {prefix + name: tensor for name, tensor in export_renamed(module.state_dict(), layout.rules(module.config)).items()}


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """Stable Diffusion 1 and 2 in little, and their tokenizer."""
    tokenizer = Tokenizer.train([PROMPT] * 3, vocab_size=540, context_length=16)
    tokenizer.save(folder := tmp_path_factory.mktemp("sd") / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), width=128, layers=2, heads=2, mlp_width=64, context_length=16,
                          **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")})
    net = UNetConfig(widths=(32, 64), depth=1, attention=(True, False), heads=(8, 8), context_dim=128)
    autoencoder = randomise(AutoencoderKL(VAEConfig(widths=(32, 64), depth=1)), 3)
    one = SimpleNamespace(net=randomise(UNet(net), 1), vae=autoencoder, text=randomise(CLIPText(text), 2))
    two = SimpleNamespace(
        net=randomise(UNet(replace(net, widths=(64, 128), heads=(1, 2), linear_projection=True, upcast_attention=True, sample_size=96)), 4),
        vae=autoencoder, tower=randomise(CLIPText(replace(text, layers=3, activation="gelu", projection_dim=128)), 5))
    one.tensors = (published(one.net, unet.LAYOUTS["CompVis"], NET) | published(one.vae, vae.LAYOUTS["CompVis"], VAE)
                   | published(one.text, clip.LAYOUTS["transformers"], TEXT1)
                   | {f"{TEXT1}text_model.embeddings.position_ids": torch.arange(16.0)[None]} | BESIDE)
    two.tensors = (published(two.net, unet.LAYOUTS["CompVis"], NET) | published(two.vae, vae.LAYOUTS["CompVis"], VAE)
                   | published(two.tower, clip.LAYOUTS["open_clip"], TEXT2) | {f"{TEXT2}logit_scale": torch.ones(())} | BESIDE)
    return SimpleNamespace(one=one, two=two, tokenizer=folder)


def written(file, tensors, **beside):
    """As safetensors, or as a pickle in which a state_dict stands beside other things."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    else:
        torch.save({"state_dict": tensors} | beside if beside else tensors, file)
    return file


def same(module, expected):
    own = module.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)


def refusal(action, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


FILES = pytest.mark.parametrize("name, beside", [("sd.safetensors", {}), ("sd.ckpt", {}), ("sd.ckpt", {"global_step": 5, "epoch": 1})])


# ---- whole checkpoints


@FILES
def test_a_stable_diffusion_1_file_gives_its_three_networks_and_its_scheduler(sd, tmp_path, name, beside):
    model = load_model(written(tmp_path / name, sd.one.tensors, **beside), tokenizer=sd.tokenizer)
    for part in ("net", "vae", "text"):
        loaded, there = model.modules[part], getattr(sd.one, part)
        assert same(loaded, there.state_dict()) and loaded.config == there.config
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert model.prediction == "eps" and model.scheduler["_class_name"] == "PNDMScheduler"
    assert model.vae.config.scaling_factor == 0.18215 and model.text.tokenizers[0].pad_token == "<|endoftext|>"
    assert len(model.process) == 1000 and grid(model.process, 5)


@FILES
def test_a_stable_diffusion_2_file_predicts_v_at_96_and_its_text_tower_lacks_the_last_layer(sd, tmp_path, name, beside):
    model = load_model(written(tmp_path / name, sd.two.tensors, **beside), tokenizer=sd.tokenizer)
    assert same(model.net, sd.two.net.state_dict()) and model.net.config == sd.two.net.config
    assert same(model.vae, sd.two.vae.state_dict())
    assert model.prediction == "v" and model.scheduler["prediction_type"] == "v_prediction"
    (tower, tokenizer), = model.text.encoders
    assert tokenizer.pad_token == "!" and len(tower.layers) == 2 and tower.config.activation == "gelu"
    ids = model.text.tokenize([PROMPT, ""])
    assert torch.equal(tower(ids).hidden, sd.two.tower(ids, skip_last=1).hidden)


@pytest.mark.parametrize("which, step, asked, prediction, size", [
    ("two", 875_000, None, "eps", 64), ("two", 140_000, None, "v", 96), ("two", 0, "eps", "eps", 64),
    ("two", 875_000, "v", "v", 96), ("one", 875_000, None, "eps", 64), ("one", 470_000, "v", "v", 64)])
def test_the_prediction_is_the_asked_one_else_that_of_the_training_step(sd, tmp_path, which, step, asked, prediction, size):
    file = written(tmp_path / "sd.ckpt", getattr(sd, which).tensors, global_step=step)
    model = load_model(file, tokenizer=sd.tokenizer, prediction=asked)
    assert (model.prediction, model.net.config.sample_size) == (prediction, size)


# ---- what a file, or a file beside it, says about the prediction

EMPTY, V1 = torch.tensor([]), """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    # parameterization: "eps"
    parameterization: "v"
    linear_start: 0.00085
"""
SILENT = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"
STATED = [  # model, keys, text of the .yaml beside it, texts of the header, --prediction -> prediction
    ("one", {"v_pred": EMPTY}, "", {}, None, "v"), ("one", {"v_pred": EMPTY}, "", {}, "eps", "eps"),
    ("two", {"v_pred": EMPTY}, "", {}, None, "v"), ("two", {}, SILENT, {}, None, "eps"),
    ("one", {}, V1, {}, None, "v"), ("one", {}, V1, {}, "eps", "eps"), ("one", {}, V1.replace('"', "'"), {}, None, "v"),
    ("one", {}, V1.replace('"v"', "v   # as in 2.1"), {}, None, "v"), ("one", {}, V1.replace("    para", "    #para"), {}, None, "eps"),
    ("two", {}, V1.replace('"v"', '"eps"'), {}, None, "eps"), ("two", {"v_pred": EMPTY}, SILENT, {}, None, "v"),
    ("two", {}, "caption: a red fox\n", {}, None, "v"), ("one", {}, V1.replace('"v"', '"x0"'), {}, None, "x0"),
    ("one", {}, "", {"modelspec.prediction_type": "v"}, None, "v"), ("two", {}, "", {"modelspec.prediction_type": "epsilon"}, None, "eps"),
    ("two", {}, V1, {"modelspec.prediction_type": "epsilon"}, None, "v"), ("one", {}, "", {"modelspec.prediction_type": "v"}, "eps", "eps"),
    ("one", {}, "", {"modelspec.architecture": "stable-diffusion-v1"}, None, "eps"), ("two", {}, "", {"format": "pt"}, None, "v")]


@pytest.mark.parametrize("which, keys, yaml, header, asked, prediction", thinned(2, STATED))
def test_the_prediction_is_the_asked_one_else_what_the_file_s_keys_its_yaml_or_its_header_say(
        sd, tmp_path, which, keys, yaml, header, asked, prediction):
    file = tmp_path / "my model.v1.safetensors"
    save_file({name: tensor.clone() for name, tensor in (getattr(sd, which).tensors | keys).items()}, file, metadata=header or None)
    if yaml:
        (tmp_path / "my model.v1.yaml").write_text(yaml)
    (tmp_path / "my model.yaml").write_text("parameterization: nonsense")       # of another file
    model = load_model(file, tokenizer=sd.tokenizer, prediction=asked)
    assert model.prediction == prediction and not model.scheduler.get("rescale_betas_zero_snr")
    assert model.net.config.sample_size == (96 if which == "two" and prediction == "v" else 64)


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_key_says_that_the_curve_ends_at_pure_noise_and_the_last_entry_is_drawn_from(sd, tmp_path, which):
    tensors = getattr(sd, which).tensors | {"v_pred": EMPTY, "ztsnr": EMPTY}
    for file in (tmp_path / "sd.safetensors", tmp_path / "sd.ckpt"):
        model = load_model(written(file, tensors), tokenizer=sd.tokenizer)
        assert model.prediction == "v" and model.process.alpha[-1] == 0 and model.process.alpha[-2] > 0
        found = draw_settings(model).sampling
        assert (found.sampler, found.schedule) == ("ddim", "trailing")
        assert grid(model.process, 5, found.schedule, **found.grid)[0].t == 999


def test_a_curve_that_ends_at_pure_noise_needs_v(sd, tmp_path):
    file = written(tmp_path / "sd.safetensors", sd.one.tensors | {"ztsnr": EMPTY})
    assert f"{file} has zero terminal SNR" in (text := refusal(load_model, file, tokenizer=sd.tokenizer)) and "--prediction v" in text
    assert load_model(file, tokenizer=sd.tokenizer, prediction="v").process.alpha[-1] == 0
    assert "ztsnr" in refusal(load_model, written(file, sd.one.tensors | {"v_pred": EMPTY, "ztsnr": EMPTY}), tokenizer=sd.tokenizer,
                              prediction="eps")


def test_more_tokenizers_than_text_encoders_are_refused(sd, tmp_path):
    file = written(tmp_path / "sd.safetensors", sd.one.tensors)
    assert "2 tokenizers for a model with 1 text encoders" in refusal(load_model, file, tokenizer=[sd.tokenizer] * 2)


@pytest.mark.parametrize("yaml, header, where", [("parameterization: mu\n", {}, "sd.yaml: parameterization 'mu'"),
                                                 ("", {"modelspec.prediction_type": "rf"}, "modelspec.prediction_type 'rf'")])
def test_a_prediction_that_is_not_known_is_refused_with_the_place_that_states_it(sd, tmp_path, yaml, header, where):
    save_file({name: tensor.clone() for name, tensor in sd.one.tensors.items()}, tmp_path / "sd.safetensors", metadata=header or None)
    if yaml:
        (tmp_path / "sd.yaml").write_text(yaml)
    text = refusal(load_model, tmp_path / "sd.safetensors", tokenizer=sd.tokenizer)
    assert where in text and "epsilon, sample, v_prediction" in text
    assert load_model(tmp_path / "sd.safetensors", tokenizer=sd.tokenizer, prediction="eps").prediction == "eps"


# ---- parts that a file lacks


def without(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("lacks, expected", [
    ([VAE], "no VAE (first_stage_model.*): name"),
    (["cond_stage_model."], "no text encoder CLIP-L (cond_stage_model.*): name"),
    ([VAE, "cond_stage_model."], "no VAE (first_stage_model.*) and no text encoder CLIP-L (cond_stage_model.*): name"),
])
def test_a_checkpoint_that_lacks_a_part_says_which_and_takes_it_from_another_source(sd, tmp_path, lacks, expected):
    file = written(tmp_path / "sd.1.safetensors", without(sd.one.tensors, *lacks))
    text = refusal(load_model, file, tokenizer=sd.tokenizer)
    assert text.startswith(f"{file} holds the network of Stable Diffusion 1, but {expected}") and "--parts SOURCE" in text
    whole = written(tmp_path / "whole.safetensors", sd.one.tensors)
    model = load_model(file, tokenizer=sd.tokenizer, parts=[whole])
    assert all(same(model.modules[part], getattr(sd.one, part).state_dict()) for part in ("net", "vae", "text"))


@pytest.mark.parametrize("lacks, there", [([NET], "a VAE and a text encoder (CLIP)"), ([NET, VAE], "a text encoder (CLIP)"),
                                          ([NET, "cond_stage_model."], "a VAE")])
def test_a_file_without_a_network_says_what_it_is_instead(sd, tmp_path, lacks, there):
    text = refusal(load_model, written(tmp_path / "sd.safetensors", without(sd.one.tensors, *lacks)), tokenizer=sd.tokenizer)
    assert f"no network of one (model.diffusion_model.*): it is {there}. Name the file of the network, and this one with --parts" in text


@pytest.mark.parametrize("end", [".safetensors", ".pt", ".ckpt"])
def test_a_vae_beside_a_checkpoint_takes_the_place_of_its_own_or_of_the_one_that_it_lacks(sd, tmp_path, end):
    other = randomise(AutoencoderKL(sd.one.vae.config), 9)
    written(tmp_path / f"sd.1.vae{end}", published(other, vae.LAYOUTS["CompVis"]))
    for tensors in (sd.one.tensors, without(sd.one.tensors, VAE)):
        model = load_model(written(tmp_path / "sd.1.safetensors", tensors), tokenizer=sd.tokenizer)
        assert same(model.vae, other.state_dict()) and same(model.net, sd.one.net.state_dict())
    written(tmp_path / f"sd.1.vae{end}", {"decoder.conv_in.weight": torch.zeros(1)})
    assert f"sd.1.vae{end}" in refusal(load_model, tmp_path / "sd.1.safetensors", tokenizer=sd.tokenizer)


@pytest.mark.parametrize("lacks", [[VAE, "cond_stage_model."], [VAE], ["cond_stage_model."]])
def test_a_file_of_a_u_net_in_the_place_of_a_folder_s_draws_as_the_advice_says(sd, tmp_path, lacks):
    save_model(tmp_path / "model", net=randomise(UNet(sd.one.net.config), 7), vae=sd.one.vae, texts=[sd.one.text],
               tokenizers=[sd.tokenizer], scheduler=SD1, defaults={})
    written(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors", without(sd.one.tensors, *lacks))
    assert same(load_model(tmp_path / "model").net, sd.one.net.state_dict())


def test_text_towers_without_their_prefix_and_half_precision_are_read(sd, tmp_path):
    tensors = {name.replace("transformer.text_model.", "transformer."): tensor.half() for name, tensor in sd.one.tensors.items()}
    model = load_model(written(tmp_path / "sd.safetensors", tensors), tokenizer=sd.tokenizer)
    assert same(model.text.modules["text"], {name: tensor.half().float() for name, tensor in sd.one.text.state_dict().items()})


def test_the_autoencoder_stays_in_float32_where_the_rest_is_float16(sd, tmp_path):
    model = load_model(written(tmp_path / "sd.safetensors", sd.one.tensors), dtype=torch.float16, tokenizer=sd.tokenizer)
    dtypes = [{p.dtype for p in part.parameters()} for part in (model.net, model.text.modules["text"], model.vae)]
    assert dtypes == [{torch.float16}, {torch.float16}, {torch.float32}]


def test_what_is_written_as_one_file_is_read_back_as_the_same_model(sd, tmp_path):
    model = load_model(written(tmp_path / "sd.safetensors", sd.one.tensors), tokenizer=sd.tokenizer)
    tensors = checkpoint_tensors(model)
    assert tensors.keys() < sd.one.tensors.keys() and all(torch.equal(tensors[n], sd.one.tensors[n]) for n in tensors)
    again = load_model(written(tmp_path / "again.safetensors", tensors), tokenizer=sd.tokenizer)
    assert all(same(again.modules[part], model.modules[part].state_dict()) for part in ("net", "vae", "text"))
    assert "Stable Diffusion 1's shape" in why_not_one_file(model)          # the little one is not


BLOCK = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize("names, expected", [
    ([BLOCK], "none of the layouts CompVis fits"),
    (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.alpha"], "LoRA"),
    (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "LoRA"),
    (["first_stage_model.encoder.conv_in.weight"], "no network of one"), (["encoder.conv_in.weight", "decoder.conv_in.weight"], "no network"),
    (["control_model.time_embed.0.weight"], "a ControlNet"), (["a.weight"], "is no checkpoint of FLUX.1"),
])
def test_other_files_are_refused_by_name(tmp_path, names, expected):
    file = written(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    text = refusal(load_model, file)
    assert str(file) in text and expected in text


@pytest.mark.parametrize("change, expected", [
    (f"{NET}time_embed.2.weight", "missing 1 (time_embed.2.weight)"), (f"{NET}input_blocks.1.0.in_layers.2.weight", "missing 1"),
    (f"{NET}middle_block.1.proj_in.weight", "middle_block.1.proj_in.weight"), (f"{NET}out.2.weight", "out.2.weight"),
    (f"{NET}time_embed.0.weight", "none of the layouts CompVis fits"), (f"{VAE}encoder.conv_in.weight", "missing 1 (encoder.conv_in.weight)"),
    (f"{VAE}decoder.conv_in.weight", "decoder.conv_in.weight"), (f"{TEXT1}text_model.final_layer_norm.bias", "missing 1"),
    (f"{TEXT1}text_model.embeddings.position_embedding.weight", "size cannot be told"),
    (f"{TEXT1}text_model.embeddings.token_embedding.weight", "none of the layouts transformers, ")])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(sd, tmp_path, change, expected):
    tensors = {name: tensor for name, tensor in sd.one.tensors.items() if name != change}
    assert len(tensors) < len(sd.one.tensors)
    file = written(tmp_path / "sd.safetensors", tensors)
    text = refusal(load_model, file, tokenizer=sd.tokenizer)
    assert str(file) in text and expected in text


def test_a_checkpoint_without_a_tokenizer_says_how_to_name_one(sd, tmp_path, monkeypatch):
    file = written(tmp_path / "sd.safetensors", sd.one.tensors)
    text = refusal(load_model, file, tokenizer=tmp_path / "nowhere")
    assert "--tokenizer" in text and "vocab.json and merges.txt" in text and "nowhere" in text


# ---- autoencoders alone


VAE_FILES = [("vae.safetensors", "", {}), ("vae.ckpt", "", {"global_step": 1}), ("vae.pt", "", {}), ("sd.safetensors", VAE, {})]


@pytest.mark.parametrize("name, prefix, beside", VAE_FILES)
def test_an_autoencoder_is_read_from_its_file_alone(sd, tmp_path, name, prefix, beside):
    tensors = published(sd.one.vae, vae.LAYOUTS["CompVis"], prefix) | {
        f"{prefix}loss.discriminator.main.0.weight": torch.zeros(2), f"{prefix}loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.zeros(())}
    loaded = load_vae(written(tmp_path / name, tensors, **beside))
    assert same(loaded, sd.one.vae.state_dict()) and loaded.config == sd.one.vae.config and not loaded.training


def test_a_whole_checkpoint_serves_as_a_file_of_its_autoencoder_and_of_sdxl_s_with_its_scaling(sd, tmp_path):
    assert same(load_vae(written(tmp_path / "sd.safetensors", sd.one.tensors)), sd.one.vae.state_dict())
    xl = written(tmp_path / "xl.safetensors", sd.one.tensors | {f"{NET}label_emb.0.0.weight": torch.zeros(1, 2816)})
    loaded = load_vae(xl)
    assert same(loaded, sd.one.vae.state_dict()) and loaded.config.scaling_factor == 0.13025


@pytest.mark.parametrize("layout", ["diffusers", "CompVis"])
def test_a_config_beside_an_autoencoder_s_file_is_heeded(sd, tmp_path, layout):
    there = AutoencoderKL(replace(sd.one.vae.config, scaling_factor=0.5, groups=16))
    file = written(tmp_path / "any name.safetensors", published(there, vae.LAYOUTS[layout]))
    if layout == "diffusers":
        assert "config.json" in refusal(load_vae, file)
    (tmp_path / "config.json").write_text(json.dumps(vae.to_config(there.config)))
    assert same(load_vae(file), there.state_dict()) and load_vae(file).config == there.config


def test_sixteen_channels_need_a_config_because_two_publishers_differ(tmp_path):
    there = AutoencoderKL(VAEConfig(latent_channels=16, widths=(32, 64), depth=1, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159))
    file = written(tmp_path / "ae.safetensors", published(there, vae.LAYOUTS["CompVis"]))
    text = refusal(load_vae, file)
    assert str(file) in text and "16 latent channels" in text and "FLUX.1" in text and "diffusers folder" in text
    write_part(tmp_path / "vae", there)
    assert load_vae(tmp_path / "vae").config == there.config


@pytest.mark.parametrize("names", [["model.diffusion_model.time_embed.0.weight"], ["lora_unet_x.lora_down.weight"], ["text_model.embeddings.x"]])
def test_a_file_without_an_autoencoder_is_refused(tmp_path, names):
    file = written(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    text = refusal(load_vae, file)
    assert str(file) in text and names[0] in text


# ---- TAESD


@pytest.fixture(scope="module")
def tiny():
    return randomise(TAESD(TAESDConfig(width=8, blocks=(1, 2))), 6)


def halves(module):
    return {half: {name.removeprefix(f"{half}."): t for name, t in module.state_dict().items() if name.startswith(half)}
            for half in ("encoder", "decoder")}


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_taesd_is_read_from_the_folder_of_its_two_files(tiny, tmp_path, end):
    for half, tensors in halves(tiny).items():
        written(tmp_path / f"taesd_{half}{end}", tensors)
        if end == ".safetensors":
            (tmp_path / f"taesd_{half}.pth").write_bytes(b"not read")
    loaded = load_vae(tmp_path)
    assert isinstance(loaded, TAESD) and same(loaded, tiny.state_dict()) and loaded.config == tiny.config


def test_taesd_is_read_from_diffusers_names_with_and_without_a_config(tiny, tmp_path):
    file = written(tmp_path / "one.safetensors", published(tiny, taesd.LAYOUTS["diffusers"]))
    assert same(load_vae(file), tiny.state_dict())
    write_part(tmp_path / "vae", tiny)
    assert same(load_vae(tmp_path / "vae"), tiny.state_dict()) and load_vae(tmp_path / "vae").config == tiny.config


def test_a_folder_of_half_a_taesd_or_of_several_is_refused(tiny, tmp_path):
    for half, tensors in halves(tiny).items():
        assert str(tmp_path) in refusal(load_vae, tmp_path)             # nothing, then the encoder alone
        written(tmp_path / f"taesd_{half}.pth", tensors)
    written(tmp_path / "taesdxl_encoder.pth", halves(tiny)["encoder"])
    text = refusal(load_vae, tmp_path)
    assert "taesd_encoder.pth, taesdxl_encoder.pth" in text
