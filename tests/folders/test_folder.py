import json
import os
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from helpers import PROMPT, randomise, small_text, thinned
from safetensors.torch import load_file, save_file
from small_models import mmdit_model

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.samplers import ddim, dpmpp_2m, final
from tinyldm.folders.build import load_weights
from tinyldm.folders.load import load_model, load_text, load_vae
from tinyldm.folders.save import save_model, save_part, save_weights
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.t5 import T5, T5Config
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.text.absent import AbsentText, AbsentTokenizer
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.vendor_loaders import scheduler

FLOW = scheduler.to_config("flow", {"shift": 3.0}, "flow")
UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def parts():
    tokenizer, text = small_text()
    return SimpleNamespace(
        net=randomise(UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(2, 2), context_dim=32,
                                      groups=8, sample_size=16)), 1),
        dit=randomise(DiT(DiTConfig(width=32, layers=2, heads=2, mlp_width=64, context_dim=32)), 2),
        vae=randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8, sample_size=32)), 3),
        text=randomise(CLIPText(text), 4),
        tokenizer=tokenizer)


@pytest.fixture
def save(parts, tmp_path):
    """save(net=...) writes a folder of `parts` with those exceptions and returns its path."""
    def write(name="model", **changes):
        whole = dict(net=parts.net, vae=parts.vae, texts=[parts.text], tokenizers=[parts.tokenizer], scheduler=FLOW,
                     defaults={"sampler": "dpmpp_2m", "steps": 20})
        save_model(tmp_path / name, **(whole | changes))
        return tmp_path / name
    return write


def same(module, state_dict):
    own = module.state_dict()
    return own.keys() == state_dict.keys() and all(torch.equal(own[key], state_dict[key]) for key in own)


def text_of(model):
    return model.text.modules["text"]


def scaled(module, factor):
    return {key: tensor * factor for key, tensor in module.state_dict().items()}


def refusal(action, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- our own way out and in


def test_what_was_saved_loads_bit_for_bit_ready_to_sample(save, parts):
    model = load_model(save())
    assert same(model.net, parts.net.state_dict()) and same(model.vae, parts.vae.state_dict())
    (text, tokenizer), = model.text.encoders
    assert same(text, parts.text.state_dict())
    assert (model.net.config, model.vae.config, text.config) == (parts.net.config, parts.vae.config, parts.text.config)
    assert (tokenizer.encode([PROMPT]) == parts.tokenizer.encode([PROMPT])).all() and model.text.join == "single"
    assert model.process.shift == 3.0 and model.prediction == "flow" and model.scheduler == FLOW
    assert model.defaults == {"sampler": "dpmpp_2m", "steps": 20}
    assert list(model.modules) == ["net", "vae", "text"]
    for part in model.modules.values():
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_a_dit_folder_loads_bit_for_bit(save, parts):
    config = scheduler.to_config("flow", {"shift": 3.0}, "flow", flow_match=True)
    path = save(net=parts.dit, scheduler=config, non_ema={"net": scaled(parts.dit, 2)})
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    model, raw = load_model(path), load_model(path, ema=False)
    assert same(model.net, parts.dit.state_dict()) and model.net.config == parts.dit.config
    assert same(raw.net, scaled(parts.dit, 2))
    shift = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler").config.shift
    assert shift == model.process.shift == 3.0


def test_a_folder_of_ours_that_joins_texts_as_stable_diffusion_3_does_may_lack_t5_too(save):
    made = mmdit_model()
    encoders = made.text.encoders[:2]
    path = save(net=made.net, vae=made.vae, texts=[module for module, _ in encoders], tokenizers=[words for _, words in encoders],
                defaults={"text_join": "sd3"})
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"      # its scheduler is our own
    model = load_model(path)
    assert [type(module) for module, _ in model.text.encoders] == [CLIPText, CLIPText, AbsentText]
    found = model.text.encode([PROMPT], torch.device("cpu"))
    zeros = TextEncoders([*encoders, TextEncoder(AbsentText(64, 256), AbsentTokenizer())], "sd3")       # as many tokens as SD 3's T5 reads
    expected = zeros.encode([PROMPT], torch.device("cpu"))
    assert found.context.shape == (1, 16 + 256, 64)
    assert torch.equal(found.context, expected.context) and torch.equal(found.pooled, expected.pooled)


def test_only_a_folder_of_ours_that_may_lack_t5_is_drawn_with_without_it(save):
    made, t5 = mmdit_model(), randomise(T5(T5Config(vocab_size=128, width=64, layers=1, heads=2, mlp_width=32)))
    modules, words = zip(*made.text.encoders[:2])
    path = save("three", net=made.net, vae=made.vae, texts=[*modules, t5], tokenizers=[*words, words[0]],
                defaults={"text_join": "sd3"})
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    model = load_model(path, without={"text_encoder_3"})
    assert isinstance(model.text.encoders[2].module, AbsentText) and list(model.text.modules) == ["text", "text_2"]
    assert "cannot draw without text_encoder_3" in refusal(load_model, save("one"), without={"text_encoder_3"})


def test_the_dtype_is_that_asked_for(save):
    model = load_model(save(), dtype=torch.bfloat16)
    assert {p.dtype for part in model.modules.values() for p in part.parameters()} == {torch.bfloat16}


def test_averaged_weights_are_read_by_default_and_raw_ones_with_ema_false(save, parts):
    ema, raw = scaled(parts.net, 0.5), scaled(parts.net, 2)
    path = save(net=(parts.net, ema), texts=[(parts.text, scaled(parts.text, 3))],
                non_ema={"net": raw, "text": parts.text.state_dict()})
    model = load_model(path)
    assert same(model.net, ema) and same(text_of(model), scaled(parts.text, 3))
    model = load_model(path, ema=False)
    assert same(model.net, raw) and same(text_of(model), parts.text.state_dict())
    assert (path / "unet/diffusion_pytorch_model.non_ema.safetensors").exists()
    assert (path / "text_encoder/model.non_ema.safetensors").exists()


def test_a_text_encoder_without_raw_weights_serves_both_and_a_network_without_them_is_refused(save, parts):
    model = load_model(save("with", non_ema={"net": scaled(parts.net, 2)}), ema=False)
    assert same(model.net, scaled(parts.net, 2)) and same(text_of(model), parts.text.state_dict())
    assert "no raw weights" in refusal(load_model, save("without"), ema=False)


def test_frozen_parts_are_linked_rather_than_copied_and_a_later_save_leaves_them_alone(save, parts):
    first = save("first")
    second = save("second", vae=first / "vae", texts=[str(first / "text_encoder")], tokenizers=[first / "tokenizer"])
    assert os.path.samefile(first / VAE_FILE, second / VAE_FILE)
    assert os.path.samefile(first / "tokenizer/vocab.json", second / "tokenizer/vocab.json")
    other = AutoencoderKL(replace(parts.vae.config, scaling_factor=7.0))
    save_part(first / "vae", other)
    assert same(load_vae(first), other.state_dict()) and load_vae(first).config == other.config
    assert same(load_vae(second), parts.vae.state_dict()) and load_vae(second).config == parts.vae.config
    shutil.rmtree(first)
    assert same(load_model(second).vae, parts.vae.state_dict())


def test_where_the_file_system_has_no_hard_links_frozen_parts_are_copied(save, parts, monkeypatch):
    first = save("first")
    def no_links(*args):
        raise OSError("not supported")
    monkeypatch.setattr(os, "link", no_links)
    second = save("second", vae=first / "vae")
    assert not os.path.samefile(first / VAE_FILE, second / VAE_FILE)
    assert same(load_model(second).vae, parts.vae.state_dict())


def test_a_vae_is_saved_and_loaded_alone(parts, tmp_path, save):
    save_part(tmp_path / "autoencoder", parts.vae)
    assert same(load_vae(tmp_path / "autoencoder"), parts.vae.state_dict())
    assert same(load_vae(save()), parts.vae.state_dict())
    assert {p.dtype for p in load_vae(tmp_path / "model" / "vae", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_text_encoder_is_loaded_alone(save, parts):
    text = load_text(save() / "text_encoder")
    assert same(text, parts.text.state_dict()) and text.config == parts.text.config and not text.training


def test_channels_last_weights_are_saved_and_come_back_contiguous(save, parts):
    net = UNet(parts.net.config).to(memory_format=torch.channels_last)
    load = load_model(save(net=net)).net
    assert same(load, net.state_dict()) and all(p.is_contiguous() for p in load.parameters())


# ---- refusals


def test_an_existing_folder_is_never_written_into(save):
    save()
    with pytest.raises(FileExistsError):
        save()


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", UNET_FILE, VAE_FILE,
                                  "text_encoder/config.json", "text_encoder/model.safetensors",
                                  "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(save, file):
    path = save()
    (path / file).unlink()
    assert str(path / file) in refusal(load_model, path)


def test_a_missing_folder_and_a_missing_tokenizer_are_named(save, tmp_path):
    assert "does not exist" in refusal(load_model, tmp_path / "nowhere") and "not a model folder" in refusal(load_model, tmp_path)
    path = save()
    shutil.rmtree(path / "tokenizer")
    assert "no tokenizer" in refusal(load_model, path)


@pytest.mark.parametrize("size", [0, 5, 200, 5000])
def test_a_damaged_weights_file_is_named(save, size):
    path = save()
    content = (path / UNET_FILE).read_bytes()
    (path / UNET_FILE).write_bytes(content[:size])
    text = refusal(load_model, path)
    assert f"{path / UNET_FILE} is damaged" in text and "download" in text


def test_a_damaged_config_is_named(save):
    path = save()
    (path / "vae/config.json").write_text("{")
    assert f"{path / 'vae/config.json'} is damaged" in refusal(load_model, path)


def test_missing_extra_and_misshapen_tensors_are_named_with_their_file(save):
    path = save()
    tensors = load_file(path / UNET_FILE)
    conv = tensors["conv_in.weight"]
    narrow = conv[:, :3].contiguous()
    for change, expected in (({"conv_in.weight": narrow}, "conv_in.weight is [16, 3, 3, 3], expected [16, 4, 3, 3]"),
                             ({"more": conv.clone()}, "unexpected 1 (more)"),
                             ({"conv_in.weight": None}, "missing 1 (conv_in.weight)")):
        (path / UNET_FILE).unlink()                             # older versions of safetensors hand out tensors that are still in the file
        save_file({k: t for k, t in (tensors | change).items() if t is not None}, path / UNET_FILE, {"format": "pt"})
        text = refusal(load_model, path)
        assert expected in text and str(path / UNET_FILE) in text


def test_another_architecture_is_refused(save, parts):
    path = save()
    xl, video = "StableDiffusionXLPipeline", "UNet3DConditionModel"
    for file, change, expected in (("model_index.json", {"_class_name": xl}, "joins 2 text encoders"),
                                   ("unet/config.json", {"_class_name": video}, video),
                                   ("unet/config.json", {"block_out_channels": [24, 32]}, "linear_1.weight"),
                                   ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type")):
        content = (path / file).read_text()
        (path / file).write_text(json.dumps(json.loads(content) | change))
        text = refusal(load_model, path)
        assert expected in text and str(path) in text
        (path / file).write_text(content)
    dit = save("dit", net=parts.dit)
    content = json.loads((dit / "transformer/config.json").read_text())
    (dit / "transformer/config.json").write_text(json.dumps(content | {"registers": 4}))
    assert "registers" in refusal(load_model, dit)
    (dit / "transformer/config.json").write_text(json.dumps(content | {"_class_name": "PixArtTransformer2DModel"}))
    assert "PixArtTransformer2DModel" in refusal(load_model, dit)


def test_weights_of_a_compiled_or_other_module_are_not_written(parts, tmp_path):
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in parts.net.state_dict().items()}
    assert "compiled" in refusal(save_weights, tmp_path / "x.safetensors", parts.net, compiled)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_disk_that_takes_no_more_is_an_oserror_with_the_path(parts, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "x.safetensors"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(file)):
            save_weights(file, parts.net)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match="nowhere"):
        save_weights(tmp_path / "nowhere" / "x.safetensors", parts.net)
    save_weights(file, parts.net)
    again = UNet(parts.net.config)
    load_weights(again, file)
    assert same(again, parts.net.state_dict())


# ---- diffusers and transformers


def test_diffusers_and_transformers_open_every_part_with_the_same_tensors(save, parts):
    path = save()
    for theirs, folder in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae"),
                           (transformers.CLIPTextModel, "text_encoder")):
        module, report = theirs.from_pretrained(path / folder, output_loading_info=True)
        assert not any(report.values()), report
        stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
        ours = {name.removeprefix("text_model."): t for name, t in load_file(path / folder / f"{stem}.safetensors").items()}
        found = {name.removeprefix("text_model."): t for name, t in module.state_dict().items()}
        assert ours.keys() == found.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    tokens = transformers.CLIPTokenizer.from_pretrained(path / "tokenizer")(PROMPT, padding="max_length").input_ids
    assert tokens == parts.tokenizer.encode([PROMPT])[0].tolist()


def test_the_raw_weights_are_the_variant_non_ema(save, parts):
    path = save(non_ema={"net": scaled(parts.net, 2)})
    variant = diffusers.UNet2DConditionModel.from_pretrained(path / "unet", variant="non_ema")
    assert torch.equal(variant.conv_in.weight, 2 * parts.net.conv_in.weight)


@torch.no_grad()
def ours(model, sampler, levels, eps):
    """Pictures from the prompt, without guidance."""
    context = text_of(model)(model.text.tokenize([PROMPT])).hidden
    def denoise(x, level):
        return to_x0(model.prediction, x, model.net(x, torch.tensor([level.t]), Cond(context)), level)
    return model.vae.decode(model.vae.from_latents(final(sampler(denoise, eps, levels))))


@torch.no_grad()
def theirs(path, eps, steps):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(PROMPT, latents=eps, num_inference_steps=steps, guidance_scale=1.0, output_type="latent").images
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample


EPS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


# Not cosine with eps: it starts where x0 is eps amplified 20,000 times, and rounding alone separates the two.
@pytest.mark.parametrize("process, prediction", thinned(2, [(process, prediction) for process in ("scaled_linear", "linear", "cosine")
                                                 for prediction in ("eps", "x0", "v")
                                                 if (process, prediction) != ("cosine", "eps")]))
def test_the_exported_pipeline_draws_the_picture_that_ddim_draws_here(save, process, prediction):
    path = save(scheduler=scheduler.to_config(process, {}, prediction))
    model = load_model(path)
    a, b = ours(model, ddim, grid(model.process, 5), EPS), theirs(path, EPS, 5)
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_the_exported_flow_pipeline_draws_the_picture_that_dpmpp_2m_draws_here(save):
    path, steps, shift = save(), 6, 3.0
    levels = []
    for i in range(steps):                                    # diffusers' flow times: (1 - i/n) * 0.999, in whole numbers
        t = (1 - i / steps) * 0.999
        t = shift * t / (1 + (shift - 1) * t)
        levels.append(Level(float(int(1000 * t)), 1 - t, t))
    a, b = ours(load_model(path), dpmpp_2m, [*levels, Level(0.0, 1.0, 0.0)], EPS), theirs(path, EPS, steps)
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_only_folders_that_stable_diffusion_pipeline_runs_correctly_say_so(save, parts):
    own = scheduler.to_config("flow", {}, "v")
    shifted = AutoencoderKL(replace(parts.vae.config, shift_factor=0.1))
    projected = CLIPText(replace(parts.text.config, projection_dim=8))
    for name, changes in (("own", {"scheduler": own}), ("shifted", {"vae": shifted}), ("projected", {"texts": [projected]})):
        path = save(name, **changes)
        assert json.loads((path / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
        load_model(path)
    assert json.loads((save("plain") / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_a_folder_written_by_diffusers_loads(save, parts, tmp_path):
    config = scheduler.to_config("scaled_linear", {}, "v")
    diffusers.StableDiffusionPipeline.from_pretrained(save(scheduler=config)).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert same(model.net, parts.net.state_dict()) and same(model.vae, parts.vae.state_dict())
    assert same(text_of(model), parts.text.state_dict()) and model.prediction == "v" and model.defaults == {}
    assert (model.text.tokenizers[0].encode([PROMPT]) == parts.tokenizer.encode([PROMPT])).all()


def test_a_whole_clip_model_file_serves_as_text_encoder(save, parts):
    path = save()
    file = path / "text_encoder/model.safetensors"
    more = {"vision_model.embeddings.class_embedding": torch.zeros(3), "logit_scale": torch.zeros(()),
            "visual_projection.weight": torch.zeros(2, 2), "text_projection.weight": torch.zeros(2, 2),
            "text_model.embeddings.position_ids": torch.arange(16.0)[None]}
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert same(text_of(load_model(path)), parts.text.state_dict())
