"""Adapters in diffusers and here, live: a file written here and loaded by pipe.load_lora_weights draws the same picture, and one that
peft and diffusers wrote draws the same here, to one 8-bit step, text encoders included, at several strengths."""

import re
from copy import deepcopy
from importlib.metadata import version

import numpy as np
import pytest
import torch
from published import PIPELINES, PROMPT
from safetensors.torch import save_file

from tinyldm.adapters.files import save_adapter
from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.adapters.merge import apply_adapters
from tinyldm.folders.load import load_model
from tinyldm.pipeline import draw, draw_settings

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
newer = pytest.mark.skipif(version("peft") < "0.21", reason="peft before 0.21 loads these adapters in another way")

SIZE = dict(width=32, height=24)
TEXTS = {"sd1": ["text"], "sd2": ["text"], "sdxl": ["text", "text_2"], "sd3": ["text", "text_2"], "flux": ["text"]}     # CLIPs
STRENGTHS = (0.0, 0.5, 1.0)


def largest_are_slow(names, *more):
    """The same names; those of the largest pipelines and of `more` are slow proofs."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ("sdxl", "sd2", *more) else name for name in names]


@pytest.fixture
def published(published):
    """The same, without the adapters of earlier tests."""
    def without_adapters(name):
        folder, pipeline = published(name)
        pipeline.unload_lora_weights()
        return folder, pipeline
    return without_adapters


def theirs(pipeline):
    generator = torch.Generator().manual_seed(3)
    return (pipeline(PROMPT, num_inference_steps=3, generator=generator, output_type="np", **SIZE).images * 255).round().astype(int)


def ours(folder, file, strength):
    model = load_model(folder)
    apply_adapters(model, [(file, strength)])
    return draw(model, [PROMPT], [3], draw_settings(model, steps=3), **SIZE).astype(int)


def assert_same(folder, pipeline, file, strengths=STRENGTHS):
    """Our pictures with the file are those of the pipeline, which has loaded the same adapter as `a`."""
    drawn = []
    for strength in strengths:
        pipeline.set_adapters("a", strength)
        drawn.append(ours(folder, file, strength))
        assert abs(drawn[-1] - theirs(pipeline)).max() <= 1 and drawn[-1].std() > 10, strength
    assert all(abs(one - two).max() > 8 for one, two in zip(drawn, drawn[1:])), "the adapter changes too little to prove anything"


def made(model, name, net=("attention", "mlp", "conv", "modulation")):
    """Random adapters of all parts: scales and ranks differ between them."""
    torch.manual_seed(1)
    found = {"net": LoRA(model.net, LoRAConfig(4, alpha=2.0, targets=net, conv_rank=3))}
    found |= {part: LoRA(model.modules[part], LoRAConfig(3, targets=("attention", "mlp"))) for part in TEXTS[name]}
    for each in found.values():
        for branch in each.branches.values():
            torch.nn.init.normal_(branch.up, std=0.25)
    return found


@newer
@pytest.mark.parametrize("name", largest_are_slow(PIPELINES, "sd3"))
def test_an_adapter_written_here_draws_the_same_picture_in_diffusers(name, published, tmp_path):
    folder, pipeline = published(name)
    model = load_model(folder)
    save_adapter(tmp_path / "a.safetensors", made(model, name), model, {"base_model": "tiny"})
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    assert_same(folder, pipeline, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", largest_are_slow(["sd1", "sdxl"]))         # of FLUX diffusers knows one width, and of SD 3 it reads no names of kohya's
def test_an_adapter_written_under_kohya_s_names_draws_the_same_picture_in_diffusers(name, published, tmp_path):
    folder, pipeline = published(name)
    model = load_model(folder)
    save_adapter(tmp_path / "a.safetensors", made(model, name), model, {}, "kohya")
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    assert_same(folder, pipeline, tmp_path / "a.safetensors")


NET = {"sd1": ("unet", ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"]),
       "sdxl": ("unet", ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv2", "downsamplers.0.conv"]),
       "sd3": ("transformer", ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "ff.net.0.proj", "norm1.linear"]),
       "flux": ("transformer", ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "ff_context.net.2",
                          "norm.linear"])}


def layers_of_peft(module, targets, generator, **options):
    """The tensors of an adapter that peft made beside a module, random numbers, and its settings."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    module = peft.inject_adapter_in_model(config, deepcopy(module), adapter_name="a")
    with torch.no_grad():
        for key, p in module.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            elif "magnitude" in key:
                p.mul_(1 + 0.5 * torch.rand(p.shape, generator=generator))
    module.peft_config = {"a": config}
    return peft.get_peft_model_state_dict(module, adapter_name="a"), config.to_dict()


@pytest.mark.parametrize("name", largest_are_slow(NET, "sd3", "flux"))
def test_an_adapter_of_peft_s_saved_by_diffusers_draws_the_same_picture_here(name, published, tmp_path):
    """alpha is not the rank: it is in the header."""
    folder, pipeline = published(name)
    generator, (part, targets), layers = torch.Generator().manual_seed(2), NET[name], {}
    texts = [each.replace("text", "text_encoder") for each in TEXTS[name]]
    for each in (part, *texts):
        wanted = targets if each == part else ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
        tensors, config = layers_of_peft(getattr(pipeline, each), wanted, generator)
        layers |= {f"{each}_lora_layers": tensors, f"{each}_lora_adapter_metadata": {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
            if key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora")}}
    type(pipeline).save_lora_weights(str(tmp_path), **layers)
    pipeline.load_lora_weights(str(tmp_path), adapter_name="a")
    assert_same(folder, pipeline, tmp_path / "pytorch_lora_weights.safetensors")


def test_an_adapter_in_peft_s_own_folder_draws_the_same_picture_here(published, tmp_path):
    """adapter_model.safetensors under base_model.model., with alpha in adapter_config.json."""
    folder, pipeline = published("sd1")
    wrapped = peft.get_peft_model(deepcopy(pipeline.unet), peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=NET["sd1"][1], rank_pattern={"conv1": 2}, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    changed = type(pipeline)(**{**pipeline.components, "unet": wrapped.merge_and_unload()}, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    drawn = ours(folder, tmp_path, 1.0)
    assert abs(drawn - theirs(changed)).max() <= 1 and abs(drawn - ours(folder, tmp_path, 0.0)).max() > 8


@newer
def test_dora_of_peft_s_draws_the_same_picture_here(published, tmp_path):
    folder, pipeline = published("sd1")
    generator = torch.Generator().manual_seed(2)
    tensors, config = layers_of_peft(pipeline.unet, ["to_q", "to_k", "to_v", "to_out.0", "conv1"], generator, use_dora=True)
    assert any("magnitude" in key for key in tensors)
    settings = {key: config[key] for key in ("r", "lora_alpha", "use_dora")} | {"target_modules": sorted(config["target_modules"])}
    type(pipeline).save_lora_weights(str(tmp_path), unet_lora_layers=tensors, unet_lora_adapter_metadata=settings)
    pipeline.load_lora_weights(str(tmp_path), adapter_name="a")
    drawn = ours(folder, tmp_path, 1.0)
    assert abs(drawn - theirs(pipeline)).max() <= 1 and abs(drawn - ours(folder, tmp_path, 0.0)).max() > 8


def kohya(path, part):
    return f"lora_{part}_{path.replace('.', '_')}"


def test_names_of_kohya_s_written_by_hand_draw_the_same_picture_in_both(published, tmp_path):
    """Stable Diffusion 1, with both halves, alpha unlike the rank, and a 3x3 convolution (LoCon)."""
    folder, pipeline = published("sd1")
    generator, tensors = torch.Generator().manual_seed(6), {}
    wanted = r"attn\d\.to_(q|k|v|out\.0)\.weight|proj_in\.weight|ff\.net\.\d(\.proj)?\.weight|resnets\.0\.conv1\.weight"
    parts = {"unet": (pipeline.unet, wanted), "te": (pipeline.text_encoder, r"self_attn\.\w+_proj\.weight|mlp\.fc\d\.weight")}
    for part, (module, pattern) in parts.items():
        for key, weight in module.state_dict().items():
            if re.search(f"({pattern})$", key):
                path = key.removesuffix(".weight")
                stem = kohya(path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}", part)
                out, *ins = weight.shape
                rank = 2 if len(ins) > 1 else 4
                tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *ins, generator=generator) * weight[0].numel() ** -0.5
                tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, *[1] * (len(ins) - 1), generator=generator) * 0.3
                tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    assert len(tensors) > 100 and any("conv1" in name for name in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    assert_same(folder, pipeline, tmp_path / "a.safetensors")


def test_two_adapters_at_their_own_strengths_are_the_sum_in_both(published, tmp_path):
    folder, pipeline = published("sd1")
    model = load_model(folder)
    for number, file in enumerate(("a", "b")):
        torch.manual_seed(number)
        lora = LoRA(model.net, LoRAConfig(4, targets=("attention",)))
        for branch in lora.branches.values():
            torch.nn.init.normal_(branch.up, std=0.3)
        save_adapter(tmp_path / f"{file}.safetensors", {"net": lora}, model, {})
        pipeline.load_lora_weights(str(tmp_path), weight_name=f"{file}.safetensors", adapter_name=file)
    pipeline.set_adapters(["a", "b"], [0.7, -0.4])
    apply_adapters(model, [(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", -0.4)])
    drawn = draw(model, [PROMPT], [3], draw_settings(model, steps=3), **SIZE).astype(int)
    assert abs(drawn - theirs(pipeline)).max() <= 1 and not np.array_equal(drawn, ours(folder, tmp_path / "a.safetensors", 0.7))
