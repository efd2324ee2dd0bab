"""What drawing takes, said before weights are read, beside what it then takes."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors
import torch
from helpers import PROMPT, thinned
from published import write_flux, write_sd3, write_sdxl
from safetensors.torch import load_file, save_file
from small_models import MODELS, drawn, mmdit_model, unet_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyldm import pipeline
from tinyldm.diffusion.guidance import SkipLayers
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.model import Model, repeated_blocks
from tinyldm.offload import weight_bytes
from tinyldm.pipeline import draw, draw_settings
from tinyldm.planning import drawing
from tinyldm.planning.drawing import Order, bytes_on_disk, network_calls, on_meta, plan_drawing, render, sized, weights_that_fit
from tinyldm.planning.memory import RESERVE
from tinyldm.planning.peak import LivePeak


@pytest.fixture
def folder(tmp_path):
    model = unet_model()
    save_model(tmp_path / "model", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return tmp_path / "model"


def order(model: Model, at_once: int = 1, prompts=("", PROMPT), **options) -> Order:
    fields = {name: options.pop(name) for name in ("sampler", "steps", "cfg") if name in options}
    shape = {name: options.pop(name) for name in ("width", "height", "strength", "inverted") if name in options}
    return Order(draw_settings(model, **fields)._replace(**options), prompts, at_once, **shape)


def counted_calls(model: Model, asked: Order) -> int:
    """Pictures that the network really gets in order to draw one."""
    got = []
    hook = model.net.register_forward_pre_hook(lambda net, inputs: got.append(len(inputs[0])))
    draw(model, [PROMPT], [0], asked.settings)
    hook.remove()
    return sum(got)


# ---- what is counted is what is done


@pytest.mark.parametrize("options", thinned(4, [
    {}, {"cfg": 1.0}, {"sampler": "heun", "steps": 5}, {"interval": (0.5, 4.0)}, {"skip": SkipLayers((1,), start=0.0, stop=0.9)},
    {"skip": SkipLayers((0, 2), start=0.0, stop=1.0), "cfg": 1.0}]), ids=str)
def test_the_networks_calls_are_those_of_a_real_picture(options):
    model = mmdit_model()
    asked = sized(model, order(model, **options))
    planned = plan_drawing(model, asked)
    assert planned.calls == counted_calls(model, asked) > 2


@pytest.mark.parametrize("sampler, calls", thinned(6, [("heun", 14), ("edm", 14), ("unipc", 8), ("ddim", 8), ("dpmpp_2m", 8), ("ddpm", 8)]))
def test_guidance_doubles_the_calls_and_samplers_of_second_order_add_theirs(sampler, calls):
    model = unet_model()
    assert plan_drawing(model, order(model, sampler=sampler, steps=4)).calls == calls
    assert plan_drawing(model, order(model, sampler=sampler, steps=4, cfg=1.0)).calls == calls // 2


def test_a_picture_to_start_from_saves_steps_and_its_inversion_adds_some():
    model = unet_model()
    whole, half, inverted = (sum(network_calls(model, sized(model, order(model, steps=8, cfg=1.0, **shape))).values())
                             for shape in ({}, {"strength": 0.5}, {"strength": 0.5, "inverted": True}))
    assert (whole, half, inverted) == (8, 4, 4 + 3 * 4)         # three iterations for each step (diffusion/ode.py)


@pytest.mark.parametrize("name, options", [
    ("unet", {}), pytest.param("unet", {"cfg": 1.0}, marks=pytest.mark.slow), ("mmdit", {"skip": SkipLayers((1,), start=0.0, stop=0.9)})])
def test_the_flops_of_all_parts_are_those_of_a_real_picture(name, options):
    model = MODELS[name]()
    asked = order(model, **options)
    planned = plan_drawing(model, asked).parts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:       # the fused kernel is not counted on a CPU
        draw(model, [PROMPT], [0], asked.settings)
    captions = 2 if asked.settings.guided else 1
    text = sum(part.flops for name, part in planned.items() if name.startswith("text"))
    assert counter.get_total_flops() == captions * text + planned["net"].flops + planned["vae"].flops
    assert min(part.flops for part in planned.values()) > 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_activations_are_what_a_real_forward_pass_makes(name):
    model = MODELS[name]()
    asked = sized(model, order(model, at_once=3))
    planned = plan_drawing(model, asked).parts
    net_inputs = []
    hook = model.net.register_forward_pre_hook(lambda net, inputs: net_inputs.append(inputs))
    draw(model, [PROMPT] * 3, [0, 1, 2], asked.settings)
    hook.remove()
    x, t, cond = net_inputs[0]
    latents = torch.randn(3, *x.shape[1:])
    for part, forward in {"net": lambda: model.net(x, t, replace(cond, memo={})), "vae": lambda: model.vae.decode(latents)}.items():
        with LivePeak() as memory:
            forward()
        assert planned[part].activations == pytest.approx(memory.peak, rel=0.1), part


@pytest.mark.slow
def test_larger_pictures_and_batches_need_more_and_a_large_one_is_decoded_in_tiles(monkeypatch):
    model = unet_model()
    planned = lambda count, width, height: plan_drawing(model, order(model, count, width=width, height=height)).parts
    one, four, wide, large = planned(1, 16, 16), planned(4, 16, 16), planned(1, 32, 16), planned(1, 320, 320)
    assert four["net"].activations == pytest.approx(4 * one["net"].activations, rel=0.05)
    assert wide["net"].flops > 2 * one["net"].flops                 # convolutions twice, attention four times
    monkeypatch.setattr(pipeline, "PIXELS_AT_ONCE", 320 * 320 - 1)
    tiled = planned(1, 320, 320)
    assert tiled["vae"].activations < 0.7 * large["vae"].activations and tiled["vae"].flops > large["vae"].flops
    assert tiled["net"][1:] == large["net"][1:] and tiled["net"].weights == weight_bytes(model.net)


# ---- memory


@pytest.mark.parametrize("name", MODELS)
def test_peaks_are_weights_and_the_activations_of_the_part_that_works(name):
    model = MODELS[name]()
    plan = plan_drawing(model, order(model))
    parts = plan.parts
    blocks = sorted(map(weight_bytes, repeated_blocks(model.net)))
    by_blocks = {part: weight_bytes(module) - (sum(blocks[:-2]) if part == "net" else 0) for part, module in model.modules.items()}
    assert {part: planned.block_weights for part, planned in parts.items()} == by_blocks
    assert [*parts] == [*model.text.modules, "net", "vae"]
    activations = {part: planned.activations for part, planned in parts.items()}
    assert plan.peaks() == {
        "": sum(map(weight_bytes, model.modules.values())) + max(activations.values()) + RESERVE,
        "parts": max(weight_bytes(module) + activations[part] for part, module in model.modules.items()) + RESERVE,
        "blocks": max(by_blocks[part] + activations[part] for part in parts) + RESERVE}
    assert plan.peaks()["blocks"] <= plan.peaks()["parts"] < plan.peaks()[""]


@pytest.mark.slow
def test_bytes_are_those_of_the_dtype_that_was_asked_for(folder):
    full, half, mixed = (load_model(folder, "meta", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    plans = [plan_drawing(each, order(each)).parts for each in (full, half, mixed)]
    for part in plans[0]:
        assert plans[0][part].weights == 2 * plans[1][part].weights == weight_bytes(full.modules[part])
    assert plans[2]["vae"].weights == plans[0]["vae"].weights and plans[2]["net"].weights == plans[1]["net"].weights


def test_what_fits_beside_the_activations(monkeypatch):
    model = mmdit_model()
    most = max(part.activations for part in plan_drawing(model, order(model)).parts.values())
    assert weights_that_fit(model, order(model), torch.device("cpu")) is None
    monkeypatch.setattr(drawing, "free_memory", lambda device: 10**9)
    assert weights_that_fit(model, order(model), torch.device("cuda")) == 900_000_000 - most


def test_a_model_with_weights_is_planned_as_its_shapes_and_keeps_them():
    model = mmdit_model()
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    shapes = on_meta(model)
    assert all(p.is_meta and p.dtype == before[name].dtype for name, p in shapes.net.named_parameters())
    numbers = [{part: planned[1:] for part, planned in plan_drawing(each, order(each)).parts.items()} for each in (model, shapes)]
    assert numbers[0] == numbers[1]
    assert all(torch.equal(p, before[name]) for name, p in model.net.named_parameters())


# ---- sources


@pytest.mark.slow
def test_no_tensor_of_a_folder_is_read_and_none_need_be_there(folder, monkeypatch):
    complete, size = load_model(folder), sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    monkeypatch.setattr(safetensors.safe_open, "get_tensor", None)
    with pytest.raises(ValueError, match="'NoneType' object is not callable"):
        load_model(folder)
    model = load_model(folder, "meta")
    assert {name: p.shape for name, p in model.net.named_parameters()} == {name: p.shape for name, p in complete.net.named_parameters()}
    assert all(tensor.is_meta for module in model.modules.values() for tensor in module.parameters())
    assert bytes_on_disk(folder, model) == size
    first = render(plan_drawing(model, order(model)), "model", None)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    without = load_model(folder, "meta")
    assert bytes_on_disk(folder, without) is None and render(plan_drawing(without, order(without)), "model", None) == first


def test_a_header_that_does_not_fit_its_config_is_refused_as_it_would_be(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 48}))
    with pytest.raises(ValueError, match="another shape than UNet"):
        load_model(folder, "meta")


@pytest.mark.parametrize("write, join, parts", [(write_sdxl, "sdxl", 2), (write_sd3, "sd3", 3), (write_flux, "flux", 2)])
@pytest.mark.slow
def test_a_hub_id_is_planned_with_the_text_encoders_and_the_rule_of_its_pipeline(write, join, parts, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    names = {file.relative_to(tmp_path / "whole").as_posix() for file in (tmp_path / "whole").rglob("*") if file.is_file()}

    def fetch(repo, revision, needed):
        for name in needed(names):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "whole" / name, tmp_path / "cache" / name)
        return tmp_path / "cache"

    monkeypatch.setattr("tinyldm.folders.hub.fetch", fetch)
    model, whole = load_model("someone/a-model", "meta"), load_model(tmp_path / "whole")
    plan = plan_drawing(model, order(model))
    assert model.text.join == join and [*plan.parts] == [*[f"text_{i}" if i > 1 else "text" for i in range(1, parts + 1)], "net", "vae"]
    assert {part: planned.weights for part, planned in plan.parts.items()} == {
        part: weight_bytes(module) for part, module in whole.modules.items()}
    assert not [*(tmp_path / "cache").rglob("*.safetensors")] and bytes_on_disk("someone/a-model", model) is None


def test_shards_count_once(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = sorted(tensors := load_file(file))
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1::2] for i in (1, 2)}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / "unet" / shard, {"format": "pt"})
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "unet" / f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    model = load_model(folder, "meta")
    assert bytes_on_disk(folder, model) == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_table_says_it_all():
    model = unet_model()
    asked = order(model, at_once=4, prompts=["", PROMPT, "a red fox", PROMPT])
    plan = plan_drawing(model, asked)
    text = render(plan, "some/model", 12_345_678)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    net, peaks = plan.parts["net"], plan.peaks()
    count = sum(p.numel() for p in model.net.parameters())
    assert lines[0] == "some/model: nothing is drawn, and no weights are read"
    assert (f"net (UNet) {count:,} float32 {4 * count / 1e9:.3f} {net.activations / 1e9:.3f} {net.flops / 1e12:.4g}") in lines
    assert "activations (estimate): 4 x 16x16, cfg 3; 3 captions" in lines
    assert f"--offload parts {peaks['parts'] / 1e9:.1f}" in lines and f"all parts there {peaks[''] / 1e9:.1f}" in lines
    assert "network calls per picture: 6 (3 steps of ddim, cfg 3)" in lines and "weights to read: 0.012 GB" in lines
    assert "weights to read: not on this machine yet" in render(plan, "some/model", None)


def test_a_size_that_cannot_be_drawn_is_refused():
    model = unet_model()
    with pytest.raises(ValueError, match="image size 18 is not a multiple of 4"):
        plan_drawing(model, order(model, width=18))


def test_a_model_that_was_planned_draws_as_before():
    model = unet_model()
    before = drawn(model)
    plan_drawing(model, order(model))
    assert (drawn(model) == before).all()
