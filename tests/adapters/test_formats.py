"""The names in adapters' files: kohya's of every family beside other accounts of the layouts, old and wild spellings, and what is
refused."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import combinations
from originals import compvis_unet, original_flux, original_mmdit
from published import PIPELINES
from safetensors.torch import save_file
from small_adapters import tensors_of, trained
from small_models import unet_model

from tinyldm.adapters.files import locate, read_adapter, read_layers, save_adapter
from tinyldm.adapters.formats import layers_in
from tinyldm.adapters.merge import apply_adapters
from tinyldm.adapters.targets import target_layers
from tinyldm.folders.build import WithoutInitialWeights
from tinyldm.folders.load import load_model
from tinyldm.folders.rename import load_renamed
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.unet import UNet, UNetConfig

lora = partial(trained, rank=3)

# Family -> (diffusers' weights, the network's config) -> the layout of kohya's paths, and the weights under its names.
ORIGINALS = {
    "sd1": lambda tensors, config: ("diffusers", tensors), "sd2": lambda tensors, config: ("diffusers", tensors),
    "sdxl": lambda tensors, config: ("CompVis", compvis_unet(tensors, config)),
    "sd3": lambda tensors, config: ("original", original_mmdit(tensors, config.layers, config.dual_layers)),
    "flux": lambda tensors, config: ("original", original_flux(tensors, config)),
}
TEXTS = {"sd1": {"text": "te"}, "sd2": {"text": "te"}, "sdxl": {"text": "te1", "text_2": "te2"},
         "sd3": {"text": "te1", "text_2": "te2", "text_3": "te3"}, "flux": {"text": "te1", "text_2": "te3"}}


def factors(weight, rank, generator):
    """Random A and B beside a weight, and their product at a scale of alpha / rank = 1 / rank."""
    out, *ins = weight.shape
    down, up = torch.randn(rank, *ins, generator=generator), torch.randn(out, rank, *[1] * (len(ins) - 1), generator=generator)
    return down, up, (up.flatten(1) @ down.flatten(1)).view(weight.shape) / rank


def text_layers(module):
    """The linear layers of a text encoder of transformers under the paths of every version: name -> weight."""
    weights = {name: p for name, p in module.state_dict().items()
               if re.search(r"(self_attn|mlp|SelfAttention|DenseReluDense)\.\w+\.weight", name) and "relative" not in name}
    return {name if "text_model." in name or ".block." in name else f"text_model.{name}": weight for name, weight in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("sdxl", "sd2"))) for name in PIPELINES])


def test_kohya_s_names_of_every_layer_of_every_family_are_read(name, published, tmp_path):
    """The sum is what comes of the same changes of the weights under the names of the original code, which are loaded as such."""
    folder, pipeline = published(name)
    model, plain = load_model(folder), load_model(folder)
    generator, tensors, changed = torch.Generator().manual_seed(4), {}, {}
    network = pipeline.components.get("unet") or pipeline.transformer
    layout, weights = ORIGINALS[name](network.state_dict(), model.net.config)
    for key, weight in weights.items():
        changed[key] = weight
        if key.endswith(".weight") and weight.dim() in (2, 4) and "pos_embed" not in key:
            down, up, delta = factors(weight, 2, generator)
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
            changed[key] = weight + delta
    load_renamed(plain.net, changed, architecture(plain.net).layouts[layout].rules(plain.net.config))
    for part, prefix in TEXTS[name].items():
        module = getattr(pipeline, part.replace("text", "text_encoder"))
        as_published = ("text_model.", "encoder.block.", "shared", "text_projection", "encoder.final_layer_norm")
        whole = {key if key.startswith(as_published) else f"text_model.{key}": tensor
                 for key, tensor in module.state_dict().items() if key != "encoder.embed_tokens.weight"}
        for key, weight in text_layers(module).items():
            down, up, delta = factors(weight, 2, generator)
            stem = f"lora_{prefix}_" + key.removesuffix(".weight").replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
            whole[key] = weight + delta
        encoder = plain.modules[part]
        load_renamed(encoder, whole, next(iter(architecture(encoder).layouts.values())).rules(encoder.config))
    save_file(tensors, tmp_path / "kohya.safetensors")
    apply_adapters(model, [(tmp_path / "kohya.safetensors", 1.0)])
    moved = 0
    for part, module in model.modules.items():
        before = dict(load_model(folder).modules[part].named_parameters())
        for key, p in module.named_parameters():
            assert torch.allclose(p, plain.modules[part].get_parameter(key), atol=1e-5), (part, key)
            moved += not torch.equal(p, before[key])
    assert moved >= len(tensors) // 3


def same_changes(one, two):
    one, two = one.changes(), two.changes()
    assert one.keys() == two.keys()
    for part in one:
        assert one[part].keys() == two[part].keys()
        for key, change in one[part].items():
            assert torch.allclose(change.delta(), two[part][key].delta(), atol=1e-6), key


@pytest.mark.parametrize("layout, name", combinations(2, ["diffusers", "kohya"], PIPELINES))


def test_an_adapter_that_was_written_is_read_again(name, layout, published, tmp_path):
    model = load_model(published(name)[0])
    made = lora(model, net=("attention", "mlp", "conv", "modulation"), **{part: ("attention", "mlp") for part in TEXTS[name]})
    file = tmp_path / "dog.safetensors"
    save_adapter(file, made, model, {"base_model": "tiny", "trigger": "a sks dog"}, layout)
    found = read_adapter(file, model)
    for part, each in made.items():
        assert found.changes()[part].keys() == each.changes().keys()
        for key, change in each.changes().items():
            assert torch.allclose(found.changes()[part][key].delta(), change.delta(), atol=1e-6), key
    assert "a sks dog" in found.metadata["tinyldm"] and found.metadata["ss_sd_model_name"] == "tiny"
    assert found.metadata["ss_base_model_version"] == {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3",
                                                       "flux": "flux1"}[name]
    if layout == "kohya" and name not in ("sd3", "flux"):
        assert found.metadata["ss_network_dim"] == "3" and found.metadata["ss_network_alpha"] == "2"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_network_that_is_published_nowhere_keeps_its_own_names(layout, tmp_path):
    model = replace(unet_model(), net=DiT(DiTConfig(width=32, layers=2, heads=2, context_dim=32, mlp_width=64)))
    made = lora(model, net=("attention", "mlp"), text=("mlp",))
    save_adapter(tmp_path / "a.safetensors", made, model, {}, layout)
    found = read_adapter(tmp_path / "a.safetensors", model)
    assert all(torch.allclose(found.changes()[part][key].delta(), change.delta(), atol=1e-6)
               for part, each in made.items() for key, change in each.changes().items())
    first = {"diffusers": "transformer.blocks.0.attn.to_out", "kohya": "lora_unet_blocks_0_attn_to_out"}[layout]
    assert first in read_layers(tmp_path / "a.safetensors").layers
    shallow = replace(model, net=DiT(replace(model.net.config, layers=1)))
    with pytest.raises(ValueError, match="the model has no 10 .* The model is one whose network is a DiT: is the adapter for another fam"):
        read_adapter(tmp_path / "a.safetensors", shallow)


def test_fused_layers_that_share_a_keep_their_rank_and_others_add_up(published, tmp_path):
    """BFL's qkv: with one A for all three, up [3 * width, r]; else [3 * width, 3r] in blocks."""
    model = load_model(published("flux")[0])
    key = "double_blocks.0.image.attn.to_"
    changes = dict(lora(model, net=("attention",))["net"].changes())
    mine = {f"{key}{x}.weight": changes[f"{key}{x}.weight"] for x in "qkv"}
    save_adapter(tmp_path / "three.safetensors", {"net": mine}, model, {}, "kohya")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    fields = read_layers(tmp_path / "three.safetensors").layers[stem]
    assert fields["down"].shape == (9, 64) and fields["up"].shape == (192, 9)
    assert float(fields["alpha"]) == 6.0 and not fields["up"][:64, 3:].any() and not fields["up"][64:128, :3].any()
    save_adapter(tmp_path / "two.safetensors", {"net": {name: mine[name] for name in list(mine)[1:]}}, model, {}, "kohya")
    fields = read_layers(tmp_path / "two.safetensors").layers[stem]
    assert fields["down"].shape == (6, 64) and not fields["up"][:64].any()
    one = {name: type(change)(mine[f"{key}q.weight"].down, change.up, change.scale) for name, change in mine.items()}
    save_adapter(tmp_path / "one.safetensors", {"net": one}, model, {}, "kohya")
    fields = read_layers(tmp_path / "one.safetensors").layers[stem]
    assert fields["down"].shape == (3, 64) and float(fields["alpha"]) == 2.0
    for file in ("three", "one"):
        found = read_adapter(tmp_path / f"{file}.safetensors", model).changes()["net"]
        for name, change in (mine if file == "three" else one).items():
            assert torch.allclose(found[name].delta(), change.delta(), atol=1e-6)


# Spelling -> part, path and side in diffusers' present layout -> the name of the tensor.
SIDE = {"A": "down", "B": "up"}


def old(path):
    """The path of diffusers before 0.17: with attention processors, and in text encoders with the names of the U-Net's attention."""
    if "self_attn" in path:
        return re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", path)
    return re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", path)


SPELLINGS = {
    "present": lambda part, path, side: f"{part}.{path}.lora_{side}.weight",
    "with the adapter's name": lambda part, path, side: f"{part}.{path}.lora_{side}.default.weight",
    "before peft": lambda part, path, side: f"{part}.{path}.{'lora_linear_layer' if part != 'unet' else 'lora'}.{SIDE[side]}.weight",
    "with processors": lambda part, path, side: f"{part}.{old(path)}_lora.{SIDE[side]}.weight",
    "without text_model": lambda part, path, side: f"{part}.{path.removeprefix('text_model.')}.lora_{side}.weight",
    "kohya": lambda part, path, side: f"lora_{'unet' if part == 'unet' else 'te'}_{path.replace('.', '_')}.lora_{SIDE[side]}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_old_spellings_of_diffusers_are_read(spelling, published, tmp_path):
    model = load_model(published("sd1")[0])
    save_adapter(tmp_path / "new.safetensors", lora(model, net=("attention",), text=("attention",)), model, {})
    new = read_adapter(tmp_path / "new.safetensors", model)
    tensors = {}
    for name, fields in read_layers(tmp_path / "new.safetensors").layers.items():
        part, path = name.split(".", 1)
        for field, side in (("down", "A"), ("up", "B")):
            tensors[SPELLINGS[spelling](part, path, side)] = fields[field]
    save_file(tensors, tmp_path / "old.safetensors")
    same_changes(new, read_adapter(tmp_path / "old.safetensors", model))


@pytest.mark.parametrize("prefix", ["", "lora_transformer_", "lycoris_", "base_model.model.", "transformer.base_model.model."])
def test_other_programs_prefixes_of_diffusers_paths_are_read(prefix, published, tmp_path):
    model = load_model(published("flux")[0])
    save_adapter(tmp_path / "new.safetensors", lora(model, net=("attention", "mlp")), model, {})
    new, tensors = read_adapter(tmp_path / "new.safetensors", model), {}
    for name, fields in read_layers(tmp_path / "new.safetensors").layers.items():
        path = name.removeprefix("transformer.")
        stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        tensors |= {f"{stem}.lora_A.weight": fields["down"], f"{stem}.lora_B.weight": fields["up"]}
    save_file(tensors, tmp_path / "other.safetensors")
    same_changes(new, read_adapter(tmp_path / "other.safetensors", model))


@pytest.mark.parametrize("name, part, theirs, ours", [
    ("sd1", "text", "lora_te1_", "lora_te_"), ("flux", "text_2", "lora_te2_", "lora_te3_"), ("sd3", "text_3", "lora_te3_", "lora_te3_")])
def test_text_encoders_are_also_counted_in_the_model_s_own_order(name, part, theirs, ours, published, tmp_path):
    """OneTrainer's te1 of an only text encoder, and its te2 of FLUX's T5, which is kohya's te3."""
    model = load_model(published(name)[0])
    save_adapter(tmp_path / "kohya.safetensors", lora(model, **{part: ("attention",)}), model, {}, "kohya")
    tensors = tensors_of(tmp_path / "kohya.safetensors")
    assert all(key.startswith(ours) for key in tensors)
    save_file({key.replace(ours, theirs): tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
    same_changes(*(read_adapter(tmp_path / f"{each}.safetensors", model) for each in ("kohya", "other")))


@pytest.mark.parametrize("spell", [
    lambda block, path: f"diffusion_model.double_blocks.{block}.{path}.lora_A.weight",
    lambda block, path: f"base_model.model.double_blocks.{block}.{path}.lora_A.weight",
    lambda block, path: f"double_blocks.{block}.processor.{path.split('.')[1]}_lora{1 if path.startswith('img') else 2}.down.weight",
])
def test_black_forest_labs_paths_of_other_programs_are_read(spell, published, tmp_path):
    """ai-toolkit's, fal's and xlabs'. One change of qkv is of q, k and v, a third of the rows each."""
    model = load_model(published("flux")[0])
    tensors, expected = {}, {}
    for stream, ours in (("img", "image"), ("txt", "text")):
        down, up = torch.randn(2, 64), torch.randn(192, 2)
        name = spell(1, f"{stream}_attn.qkv")
        tensors |= {name: down, name.replace("lora_A", "lora_B").replace(".down.", ".up."): up}
        expected |= {f"double_blocks.1.{ours}.attn.to_{x}.weight": up[64 * i : 64 * i + 64] @ down for i, x in enumerate("qkv")}
    save_file(tensors, tmp_path / "file.safetensors")
    found = read_adapter(tmp_path / "file.safetensors", model).changes()
    assert found.keys() == {"net"} and found["net"].keys() == expected.keys()
    assert all(torch.allclose(found["net"][name].delta(), delta, atol=1e-5) for name, delta in expected.items())


def test_a_file_with_every_layer_under_two_layouts_is_applied_once_and_half_of_one_is_refused(published, tmp_path):
    model = load_model(published("sdxl")[0])
    made = lora(model, net=("attention",))
    for layout in ("diffusers", "kohya"):
        save_adapter(tmp_path / f"{layout}.safetensors", made, model, {}, layout)
    both = {name: tensor for layout in ("diffusers", "kohya") for name, tensor in tensors_of(tmp_path / f"{layout}.safetensors").items()}
    save_file(both, tmp_path / "both.safetensors")
    same_changes(read_adapter(tmp_path / "both.safetensors", model), read_adapter(tmp_path / "kohya.safetensors", model))
    most = {name: tensor for name, tensor in both.items() if "output_blocks" not in name}       # of one layout a part
    save_file(most, tmp_path / "most.safetensors")
    same_changes(read_adapter(tmp_path / "most.safetensors", model), read_adapter(tmp_path / "kohya.safetensors", model))
    half = {name: tensor for name, tensor in both.items() if not ("mid_block" in name or "output_blocks" in name)}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="changes one layer twice, as .* and as .*, and others once"):
        read_adapter(tmp_path / "half.safetensors", model)


@pytest.mark.parametrize("network, config, groups, count", [
    (UNet, UNetConfig(), ("attention", "mlp"), 192),
    (UNet, UNetConfig(widths=(320, 640, 1280), attention=(False, True, True), heads=(5, 10, 20), context_dim=2048, linear_projection=True,
                      transformer_layers=(1, 2, 10), pooled_dim=1280), ("attention", "mlp"), 722),
    (CLIPText, CLIPTextConfig(), ("attention", "mlp"), 72),
    (Flux, FluxConfig(), ("attention", "mlp", "modulation"), 304),
])
def test_our_groups_are_as_many_layers_of_the_published_sizes_as_kohya_s_trainer_adapts(network, config, groups, count):
    """Its log says: create LoRA for U-Net: 192 modules (Stable Diffusion 1), 722 (XL); Text Encoder: 72 (CLIP-L); FLUX: 304."""
    with torch.device("meta"), WithoutInitialWeights():
        net = network(config)
    wanted, row = {f"{name}.weight" for name in target_layers(net, groups)}, architecture(net)
    layout = row.kohya(config) or next(iter(row.layouts))
    layers = layers_in("net", net, layout, row.layouts[layout])
    assert sum(any(place.key in wanted for place in layer.places) for layer in layers) == count


def test_alpha_of_diffusers_header_and_its_patterns_are_obeyed(tmp_path):
    """peft's settings, as save_lora_weights(..., unet_lora_adapter_metadata=...) writes them."""
    stated = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"mid_block.*to_q": 8}, "text_encoder.lora_alpha": 3,
              "text_encoder.r": 4, "text_encoder.use_rslora": True}
    save_file({"unet.a.to_q.lora_A.weight": torch.zeros(4, 2), "unet.mid_block.b.to_q.lora_A.weight": torch.zeros(4, 2),
               "text_encoder.q.lora_A.weight": torch.zeros(4, 2)},
              tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(stated)})
    file = read_layers(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="peft's settings of the adapter hold a value that cannot be read"):
        file._replace(stated={"unet.lora_alpha": "much"}).scale("unet.a.to_q")
    names = ("unet.a.to_q", "unet.mid_block.b.to_q", "text_encoder.q", "text_encoder_2.q")
    assert [file.scale(name)(4) for name in names] == [0.5, 2, 1.5, None]


def test_an_adapter_is_written_whole_or_not_at_all(published, tmp_path, monkeypatch):
    model = load_model(published("sd1")[0])
    made = lora(model, net=("attention",))
    with pytest.raises(ValueError, match="unknown layout of adapters 'khoya': did you mean 'kohya'"):
        save_adapter(tmp_path / "a.safetensors", made, model, {}, "khoya")
    with pytest.raises(ValueError, match="the model has no part text_2 that an adapter can change: it has net, text"):
        save_adapter(tmp_path / "a.safetensors", {"text_2": made["net"]}, model, {})
    with pytest.raises(ValueError, match="UNet has no weight nothing.weight that an adapter can change"):
        save_adapter(tmp_path / "a.safetensors", {"net": {"nothing.weight": next(iter(made["net"].changes().values()))}}, model, {})
    with pytest.raises(ValueError, match="the adapter changes nothing"):
        save_adapter(tmp_path / "a.safetensors", {}, model, {})
    assert not [*tmp_path.iterdir()]


def test_half_precision_files_and_pickles_of_tensors_are_read(published, tmp_path):
    model = load_model(published("sd1")[0])
    made = lora(model, net=("attention",))
    save_adapter(tmp_path / "whole.safetensors", made, model, {})
    save_adapter(tmp_path / "half.safetensors", made, model, {}, dtype=torch.float16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half.safetensors").values()} == {torch.float16}
    torch.save(tensors_of(tmp_path / "whole.safetensors"), tmp_path / "pytorch_lora_weights.bin")
    whole = read_adapter(tmp_path / "whole.safetensors", model)
    same_changes(whole, read_adapter(tmp_path / "pytorch_lora_weights.bin", model))
    for key, change in read_adapter(tmp_path / "half.safetensors", model).changes()["net"].items():
        assert torch.allclose(change.delta(), whole.changes()["net"][key].delta(), atol=2e-3)


def test_of_a_run_the_adapter_of_the_newest_whole_checkpoint_is_read(tmp_path):
    for name in ("step-000900", "step-1000000", "step-999999", "step-1000001~"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter.safetensors").touch()
    assert locate(tmp_path).parent.name == "step-1000000"
