import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from helpers import randomise
from safetensors.torch import load_file, save_file

from tinyldm.folders.load import load_model, load_text, load_tokenizer, load_vae
from tinyldm.folders.rename import export_renamed
from tinyldm.folders.save import write_part
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip

PROMPT = "a red square on the left of a blue circle"
PARTS = {"net": "unet", "vae": "vae", "text": "text_encoder"}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def pipeline(tokenizer, second):
    """diffusers' own Stable Diffusion 1 or 2 with few and random weights."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4] if second else 4, use_linear_projection=second, upcast_attention=second)
    vae = diffusers.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, hidden_act="gelu" if second else "quick_gelu", **ids))
    curve = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False)
    scheduler = (diffusers.DDIMScheduler(**curve, clip_sample=False, prediction_type="v_prediction") if second
                 else diffusers.PNDMScheduler(**curve, skip_prk_steps=True))
    for seed, module in enumerate((unet, vae, text)):
        randomise(module, seed)
    return diffusers.StableDiffusionPipeline(unet=unet, vae=vae, text_encoder=text, scheduler=scheduler, safety_checker=None,
                                             feature_extractor=None, requires_safety_checker=False, tokenizer=None)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    tokenizer = Tokenizer.train([PROMPT, "a small green triangle"] * 3, vocab_size=600, context_length=16)
    both = [pipeline(tokenizer, second) for second in (False, True)]

    def write(which, folder, **options):
        both[which].save_pretrained(folder, **options)
        index = json.loads((folder / "model_index.json").read_text()) | {"tokenizer": ["transformers", "CLIPTokenizer"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        tokenizer.save(folder / "tokenizer")
        return folder
    return SimpleNamespace(write=write, pipelines=both, tokenizer=tokenizer)


def text_of(model):
    return model.text.modules["text"]


def published_tensors(module):
    layout = next(iter(architecture(module).layouts.values()))
    return {name.removeprefix("text_model."): t for name, t in export_renamed(module.state_dict(), layout.rules(module.config)).items()}


def agrees(module, theirs, cast=lambda tensor: tensor):
    """Tensor by tensor, under published names."""
    ours = published_tensors(module)
    theirs = {name.removeprefix("text_model."): cast(t) for name, t in theirs.state_dict().items() if "position_ids" not in name}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(action, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- folders that diffusers wrote


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "30KB"}, {"variant": "fp16"},
                                     {"max_shard_size": "30KB", "variant": "fp16"}], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_of_diffusers_loads_tensor_by_tensor(published, tmp_path, which, options):
    folder, pipe = published.write(which, tmp_path / "model", **options), published.pipelines[which]
    assert bool(list(folder.rglob("*-of-*"))) == ("max_shard_size" in options)
    assert bool(list(folder.rglob("diff*.safetensors"))) == ("safe_serialization" not in options)   # transformers 5 writes no other
    for variant in (None, options.get("variant")):
        model = load_model(folder, variant=variant)
        assert agrees(model.net, pipe.unet) and agrees(model.vae, pipe.vae) and agrees(text_of(model), pipe.text_encoder)
        assert (model.net.config.heads, model.net.config.linear_projection) == (((2, 4), True) if which else ((4, 4), False))
        assert model.prediction == ("v" if which else "eps") and text_of(model).config.activation == ("gelu" if which else "quick_gelu")


@torch.no_grad()
def test_the_loaded_networks_compute_what_diffusers_and_transformers_compute(published, tmp_path):
    from tinyldm.models.layers import Cond

    for which, pipe in enumerate(published.pipelines):
        model = load_model(published.write(which, tmp_path / str(which)))
        ids = model.text.tokenize([PROMPT, "a triangle"])
        hidden = text_of(model)(ids).hidden
        assert torch.allclose(hidden, pipe.text_encoder(ids)[0], atol=1e-5)
        x, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 3])
        expected = pipe.unet(x, t, hidden).sample
        assert (model.net(x, t, Cond(hidden)) - expected).abs().max() < 1e-5 * expected.abs().max()
        z, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16)
        assert torch.allclose(model.vae.decode(z), pipe.vae.decode(z).sample, atol=1e-4)
        assert torch.allclose(model.vae.encode(image).mean, pipe.vae.encode(image).latent_dist.mean, atol=1e-4)


def test_safetensors_win_over_a_pickle_beside_them_and_a_variant_is_read_when_asked_for(published, tmp_path):
    folder, pipe = published.write(0, tmp_path / "model"), published.pipelines[0]
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{stem}.safetensors"
        other = {name: tensor + 1 for name, tensor in load_file(file).items()}
        torch.save(other, folder / part / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin"))
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, folder / part / f"{stem}.fp16.safetensors")
    model, half = load_model(folder), load_model(folder, variant="fp16")
    assert agrees(model.net, pipe.unet) and agrees(model.vae, pipe.vae) and agrees(text_of(model), pipe.text_encoder)
    assert agrees(half.net, pipe.unet, lambda t: t.half().float()) and agrees(text_of(half), pipe.text_encoder, lambda t: t.half().float())
    assert load_model(folder, prediction="v").prediction == "v"


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("old", [False, True])
def test_text_towers_of_every_age_of_transformers_load(published, tmp_path, prefix, old):
    theirs = published.pipelines[0].text_encoder
    theirs.save_pretrained(tmp_path)
    tensors = {prefix + name.removeprefix("text_model."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | ({f"{prefix}embeddings.position_ids": torch.arange(16)[None]} if old else {}), tmp_path / "model.safetensors")
    assert agrees(load_text(tmp_path), theirs)


def test_an_open_clip_folder_holds_the_same_tower(tmp_path):
    there = randomise(CLIPText(CLIPTextConfig(width=64, layers=2, heads=1, mlp_width=256, context_length=16,
                                              activation="gelu", projection_dim=24)))
    tensors = export_renamed(there.state_dict(), clip.OPEN_CLIP_RULES)
    assert tensors["transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64) and tensors["text_projection"].shape == (64, 24)
    beside = {"logit_scale": torch.ones(()), "visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(3, 1), "attn_mask": torch.ones(16, 16)}
    save_file(beside | tensors, tmp_path / "open_clip_model.safetensors")
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": {}, "text_cfg": text}}))
    loaded = load_text(tmp_path)
    write_part(tmp_path / "transformers", there)
    assert published_tensors(loaded).keys() == published_tensors(there).keys() and loaded.config == there.config
    assert all(torch.equal(tensor, there.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.tensor([[49406, 5, 6, 49407, 0, 0], [49406, 7, 49407, 0, 0, 0]])
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "transformers")
    with torch.no_grad():
        assert torch.allclose(loaded(ids).hidden, theirs(ids).last_hidden_state, atol=1e-5)
        assert torch.allclose(loaded(ids).pooled, theirs(ids).text_embeds, atol=1e-5)


def test_parts_of_a_model_are_loaded_from_the_model_s_folder(published, tmp_path):
    folder, pipe = published.write(1, tmp_path / "model"), published.pipelines[1]
    assert agrees(load_vae(folder), pipe.vae) and agrees(load_text(folder), pipe.text_encoder)
    assert (load_tokenizer(folder).encode([PROMPT]) == published.tokenizer.encode([PROMPT])).all()


# ---- damage


def lora(tensors):
    return {"mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 2), "mid_block.attentions.0.proj_in.lora_B.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("part, change, expected", [
    ("unet", lambda t: {k: v for k, v in t.items() if "mid_block" not in k}, "mid_block.attentions.0.norm.bias, "),
    ("unet", lambda t: dict(list(t.items())[:-3]), "missing 3 ("),
    ("unet", lambda t: t | {f"extra.{i}": torch.zeros(1) for i in range(5)}, "unexpected 5 (extra.0, extra.1, extra.2, ...)"),
    ("unet", lambda t: t | {"conv_in.bias": torch.zeros(17)}, "conv_in.bias is [17], expected [16]"),
    ("unet", lora, "none of the layouts diffusers, CompVis fits"),
    ("unet", lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, None),
    ("vae", lambda t: {"time_embedding.linear_1.weight": torch.zeros(1)}, "none of the layouts diffusers, CompVis fits the tensors, 1 (time_embedding.linear_1.weight)"),
    ("vae", lambda t: t | {"encoder.mid_block.attentions.0.query.weight": torch.zeros(32, 32)}, "are the same tensor encoder.mid_block.attentions.0.to_q.weight twice"),
    ("text_encoder", lambda t: {"time_embed.0.weight": torch.zeros(1)}, "none of the layouts transformers, "),
    ("text_encoder", lambda t: dict(list(t.items())[:-2]), "missing 2 ("),
])
def test_weights_that_do_not_fit_are_refused_with_their_file(published, tmp_path, part, change, expected):
    folder = published.write(0, tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file)
    if expected is None:                                    # a compiled module's prefix is a prefix as any other
        assert agrees(load_model(folder).net, published.pipelines[0].unet)
        return
    text = refusal(load_model, folder)
    assert expected in text and str(file) in text


OPENAI, LAION = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.mark.parametrize("change, expected", [
    ({"_name_or_path": OPENAI, "hidden_act": "gelu"}, f"hidden_act='gelu', but {OPENAI} was trained with 'quick_gelu'"),
    ({"_name_or_path": LAION, "hidden_act": "quick_gelu"}, f"hidden_act='quick_gelu', but {LAION} was trained with 'gelu'"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is unknown"), ({"hidden_size": 64}, "tensors have another shape"),
    ({"num_hidden_layers": 4}, "missing 16 (text_model.encoder.layers.3."), ({"num_hidden_layers": 2}, "unexpected 16 ("),
])
def test_a_text_config_that_lies_is_refused(published, tmp_path, change, expected):
    published.pipelines[0].text_encoder.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    text = refusal(load_text, tmp_path)
    assert expected in text and str(tmp_path) in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text_config, text_config_dict", [
    ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}), ({"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}),
    ({"hidden_act": "gelu", "hidden_size": 64}, None),
    ({"hidden_size": 64, "num_attention_heads": 4}, {"hidden_act": "gelu"}), ({}, {"hidden_size": 32, "num_hidden_layers": 3}),
])
def test_a_whole_clip_config_is_read_in_the_order_of_transformers(text_config, text_config_dict):
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 24, "text_config": text_config,
              "text_config_dict": text_config_dict}
    theirs = transformers.CLIPConfig(**json.loads(json.dumps({k: v for k, v in config.items() if v is not None}))).text_config
    ours = clip.from_config({k: v for k, v in config.items() if v is not None})
    for name in ("activation", "width", "heads", "layers", "mlp_width", "vocab_size", "context_length"):
        assert getattr(ours, name) == getattr(theirs, clip.FIELDS[name][0]), name
    assert ours.projection_dim == 24


def test_nothing_of_a_network_is_changed_by_weights_that_do_not_fit(published, tmp_path):
    from tinyldm.folders.build import load_weights

    folder = published.write(0, tmp_path / "model")
    net = load_model(folder).net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file({k: torch.zeros_like(t) for k, t in list(load_file(folder / UNET_FILE).items())[1:]}, folder / UNET_FILE)
    assert str(folder / UNET_FILE) in refusal(load_weights, net, folder / UNET_FILE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    other = CLIPText(replace(CLIPTextConfig(), vocab_size=9, width=8, layers=1, heads=1, mlp_width=8, context_length=4))
    assert "none of the layouts" in refusal(load_weights, other, folder / UNET_FILE)


@pytest.mark.parametrize("file, change", [
    ("model_index.json", []), ("unet/config.json", []), ("unet/config.json", {"attention_head_dim": 0}),
    ("unet/config.json", {"block_out_channels": None}), ("unet/config.json", {"block_out_channels": [10**9, 10**9]}),
    ("vae/config.json", {"layers_per_block": "two"}), ("vae/config.json", {"block_out_channels": []}),
    ("text_encoder/config.json", {"num_attention_heads": 0}), ("text_encoder/config.json", {"hidden_size": "wide"}),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}), ("scheduler/scheduler_config.json", 5),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
    ("tokenizer/tokenizer.json", {"model": None}), ("tokenizer/tokenizer_config.json", [])])
def test_a_config_with_values_that_make_no_model_is_named_in_one_line(published, tmp_path, file, change):
    path = published.write(0, tmp_path / "model") / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change if isinstance(change, dict) else change))
    assert str(path.parent) in refusal(load_model, tmp_path / "model")


def test_a_variant_that_no_part_has_is_refused(published, tmp_path):
    assert "variant 'fp61'" in refusal(load_model, published.write(0, tmp_path / "model"), variant="fp61")
