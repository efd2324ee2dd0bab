"""Public models in small: what drawing will take is said before their weights are read, and they draw the same part by part."""

import numpy as np
import pytest
from helpers import PROMPT
from pretend_gpu import GPU, PretendGpu
from originals import compvis_unet
from published import NEGATIVE, write_flux, write_sd3, write_sdxl
from safetensors.torch import save_file

from tinyldm.folders.load import load_model
from tinyldm.model import repeated_blocks
from tinyldm.offload import BlockByBlock, offload
from tinyldm.pipeline import draw, draw_settings
from tinyldm.planning.drawing import Order, bytes_on_disk, plan_drawing, render

FAMILIES = {"sdxl": (write_sdxl, ("text", "text_2")), "sd3": (write_sd3, ("text", "text_2", "text_3")),
            "flux": (write_flux, ("text", "text_2"))}


@pytest.fixture(scope="module", params=FAMILIES)
def public(request, tmp_path_factory):
    """Its folder, and the names of its text encoders."""
    write, texts = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("public") / request.param
    write(folder)
    return folder, texts


def test_its_plan_is_made_of_shapes_alone(public):
    folder, texts = public
    model, real = load_model(folder, "meta"), load_model(folder)
    settings = draw_settings(model, steps=3)
    plan = plan_drawing(model, Order(settings, [NEGATIVE, PROMPT], 2))
    assert [*plan.parts] == [*texts, "net", "vae"] and all(planned.flops > 0 < planned.activations for planned in plan.parts.values())
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert {part: count(planned.module) for part, planned in plan.parts.items()} == {
        part: count(module) for part, module in real.modules.items()}
    calls = []
    hook = real.net.register_forward_pre_hook(lambda net, inputs: calls.append(len(inputs[0])))
    draw(real, [PROMPT], [0], settings)
    hook.remove()
    assert plan.calls == sum(calls) == (6 if settings.guided else 3)
    disk = bytes_on_disk(folder, model)
    assert disk == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert f"weights to read: {disk / 1e9:.3f} GB" in render(plan, "model", disk)


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_it_draws_the_same_to_the_last_bit_part_by_part(public, how):
    folder, texts = public
    model = load_model(folder)
    pictures = lambda model: draw(model, [PROMPT, NEGATIVE], [1, 7], draw_settings(model, steps=3), negative=NEGATIVE)
    expected = pictures(model)
    with PretendGpu() as gpu:
        moved = offload(model, GPU, how)
        assert np.array_equal(pictures(moved), expected) and not gpu.mixed
        by_blocks = {part for part, mover in moved.placement.movers.items() if isinstance(mover, BlockByBlock)}
    assert by_blocks == ({"net", *({texts[-1]} if repeated_blocks(model.modules[texts[-1]]) else ())} if how == "blocks" else set())


def test_without_its_t5_stable_diffusion_3_moves_the_rest(tmp_path):
    write_sd3(tmp_path / "sd3")
    model, shapes = (load_model(tmp_path / "sd3", device, without={"text_encoder_3"}) for device in ("cpu", "meta"))
    assert [*plan_drawing(shapes, Order(draw_settings(shapes), [PROMPT], 1)).parts] == ["text", "text_2", "net", "vae"]
    t5 = sum(file.stat().st_size for file in (tmp_path / "sd3" / "text_encoder_3").glob("*.safetensors"))
    assert bytes_on_disk(tmp_path / "sd3", shapes) == bytes_on_disk(tmp_path / "sd3", load_model(tmp_path / "sd3", "meta")) - t5
    expected = draw(model, [PROMPT], [1], draw_settings(model, steps=2))
    with PretendGpu():
        assert np.array_equal(draw(offload(model, GPU, "blocks"), [PROMPT], [1], draw_settings(model, steps=2)), expected)


@pytest.mark.slow
def test_a_single_file_and_the_sources_of_its_other_parts_are_planned_by_their_headers(tmp_path):
    pipeline, folder, file = write_sdxl(tmp_path / "sdxl"), tmp_path / "sdxl", tmp_path / "xl.safetensors"
    net = compvis_unet(pipeline.unet.state_dict(), load_model(folder, "meta").net.config)
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in net.items()}, file)
    model, whole = load_model(file, "meta", parts=[folder]), load_model(folder, "meta")
    plans = [plan_drawing(each, Order(draw_settings(each, steps=2), [PROMPT], 1, 32, 32)) for each in (model, whole)]
    assert all(p.is_meta for module in model.modules.values() for p in module.parameters())
    numbers = [{part: planned[1:] for part, planned in plan.parts.items()} for plan in plans]
    assert numbers[0] == numbers[1] and plans[0].calls == plans[1].calls
    others = sum(found.stat().st_size for found in folder.glob("[vt]*/*.safetensors"))
    assert bytes_on_disk(file, model, parts=[folder]) == file.stat().st_size + others
