"""Adapters in the weights of a model: strengths, sums, and the commands that read and write files and folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import PROMPT, load_script, mistake
from PIL import Image
from safetensors.torch import save_file
from small_adapters import command, weights
from small_models import mmdit_model

from tinyldm.adapters.files import locate, read_adapter, save_adapter
from tinyldm.adapters.low_rank import EXACT, LowRank, approximated, truncated
from tinyldm.adapters.merge import apply_adapters
from tinyldm.config.adapter_arguments import Wanted, wanted
from tinyldm.folders.load import load_model


def deltas(place, name, model):
    return {f"{part}.{key}": change.delta() for part, own in read_adapter(place / f"{name}.safetensors", model).changes().items()
            for key, change in own.items()}


def applied(place, *adapters):
    model = load_model(place / "model")
    apply_adapters(model, [wanted(each) if isinstance(each, str) else each for each in adapters])
    return weights(model)


def test_several_adapters_add_up_each_at_its_strengths_and_all_else_keeps_its_bits(place):
    model = load_model(place / "model")
    base, one, two = weights(model), deltas(place, "a", model), deltas(place, "b", model)
    found = applied(place, f"{place / 'a.safetensors'}:0.5:2", f"{place / 'b.safetensors'}:-1")
    assert one.keys() & two.keys() and any(name.startswith("text.") for name in one)
    for name, weight in base.items():
        factor = 2.0 if name.startswith("text.") else 0.5
        expected = weight + factor * one.get(name, 0) - two.get(name, torch.zeros(()))
        assert torch.allclose(found[name], expected, atol=1e-6), name
        assert torch.equal(found[name], weight) == (name not in one and name not in two)


def test_strength_zero_is_the_base_model_bit_for_bit_and_a_text_strength_of_zero_leaves_the_text_encoder(place):
    base = weights(load_model(place / "model"))
    zero = applied(place, f"{place / 'a.safetensors'}:0")
    assert all(torch.equal(zero[name], weight) for name, weight in base.items())
    net = applied(place, f"{place / 'a.safetensors'}:1:0")
    changed = {name.split(".")[0] for name, weight in base.items() if not torch.equal(net[name], weight)}
    assert changed == {"net"}


def test_what_was_merged_is_taken_out_again_to_rounding(place):
    model = load_model(place / "model")
    base = weights(model)
    for strength in (0.8, -0.8):
        apply_adapters(model, [(place / "a.safetensors", strength)])
    assert all(torch.allclose(weight, base[name], atol=1e-6) for name, weight in weights(model).items())


def test_blocks_have_strengths_of_their_own(place):
    file = str(place / "b.safetensors")
    whole, blocks = applied(place, file), applied(place, f"{file}:1:down=0.5,up=0,up.1.attentions=2")
    base = weights(load_model(place / "model"))
    for name in whole:
        factor = 2 if ".up.1.attentions." in name else 0 if ".up." in name else 0.5 if ".down." in name else 1
        assert torch.allclose(blocks[name], base[name] + factor * (whole[name] - base[name]), atol=1e-6), name
    with pytest.raises(ValueError, match=r"b.safetensors: the network has no block left: there are .*down, down.0"):
        applied(place, f"{place / 'b.safetensors'}:1:left=0.5")


def test_sums_are_made_in_float32_and_rounded_once(place):
    """In bfloat16 one sum after the other would lose changes that are below its last bit."""
    model = load_model(place / "model", dtype=torch.bfloat16)
    key = "up.1.attentions.0.blocks.0.self_attention.to_q.weight"
    weight = model.net.get_parameter(key)
    with torch.no_grad():
        weight.fill_(1.0)
    small = LowRank(torch.full((1, 16), 1e-3), torch.ones(16, 1), 1.0)                  # an eighth of what changes 1 in bfloat16
    for i in range(8):
        save_adapter(place / f"small{i}.safetensors", {"net": {key: small}}, model, {})
    apply_adapters(model, [(place / f"small{i}.safetensors", 1.0) for i in range(8)])
    assert torch.equal(weight, torch.full_like(weight, 1.0078125))
    model = load_model(place / "model", dtype=torch.bfloat16)
    base, change = weights(model), deltas(place, "b", model)
    apply_adapters(model, [(place / "b.safetensors", 1.0)])
    for name, weight in weights(model).items():
        assert name not in change or torch.equal(weight, (base[name].float() + change[name]).bfloat16()), name


def test_dora_is_relative_to_the_weight_itself_whatever_else_is_added(place):
    model = load_model(place / "model")
    name, key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "middle.attentions.0.blocks.0.self_attention.to_q.weight"
    weight = model.net.get_parameter(key).detach().clone()
    down, up, magnitude = torch.randn(2, 32), torch.randn(32, 2), torch.rand(32) + 1
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_magnitude_vector": magnitude},
              place / "dora.safetensors")
    other = deltas(place, "b", model)[f"net.{key}"]
    changed = weight + up @ down
    expected = changed * (magnitude[:, None] / changed.norm(dim=1, keepdim=True)) - weight
    for order in (("dora", "b"), ("b", "dora")):
        model = load_model(place / "model")
        apply_adapters(model, [(place / f"{each}.safetensors", 0.5) for each in order])
        assert torch.allclose(model.net.get_parameter(key), weight + 0.5 * (expected + other), atol=1e-5)


def test_dora_of_fused_columns_and_an_unfused_adapter_of_the_same_layer_meet(tmp_path):
    """Norms of columns of qkv go over all of q, k and v: each of these is changed by the norm of the fused weight before any change."""
    model = mmdit_model()
    q, k, v = (model.net.get_parameter(f"blocks.0.image.attn.to_{x}.weight").detach().clone() for x in "qkv")
    down, up, magnitude = torch.randn(2, 32), torch.randn(96, 2), torch.rand(1, 32) + 1
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": magnitude},
              tmp_path / "fused.safetensors")
    other = LowRank(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    save_adapter(tmp_path / "k.safetensors", {"net": {"blocks.0.image.attn.to_k.weight": other}}, model, {})
    apply_adapters(model, [(tmp_path / "k.safetensors", 1.0), (tmp_path / "fused.safetensors", 1.0)])
    changed = torch.cat([q, k, v]) + up @ down
    expected = (changed * (magnitude / changed.norm(dim=0, keepdim=True))).chunk(3)
    for x, part, extra in zip("qkv", expected, (0, other.delta(), 0)):
        assert torch.allclose(model.net.get_parameter(f"blocks.0.image.attn.to_{x}.weight"), part + extra, atol=1e-5), x


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(place):
    model = load_model(place / "model")
    base = weights(model)
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 2), "unet.nowhere.lora_B.weight": torch.zeros(2, 2)}, place / "odd.safetensors")
    with pytest.raises(ValueError, match="odd.safetensors"):
        apply_adapters(model, [(place / "a.safetensors", 1.0), (place / "odd.safetensors", 1.0)])
    assert all(torch.equal(weight, base[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("word, expected", [
    ("dog.safetensors", Wanted("dog.safetensors")), ("runs/dog:0.8", Wanted("runs/dog", 0.8)), ("dog:1:0", Wanted("dog", 1.0, 0.0)),
    ("C:\\dog.safetensors:.5", Wanted("C:\\dog.safetensors", 0.5)), ("a:b", Wanted("a:b")), ("dog:-1", Wanted("dog", -1.0)),
    ("dog:0.5:down=0.5,up.1=0", Wanted("dog", 0.5, None, {"down": 0.5, "up.1": 0.0})), ("dog:up=2", Wanted("dog", blocks={"up": 2.0})),
])
def test_strengths_stand_behind_the_path(word, expected):
    assert wanted(word) == expected and wanted(str(expected)) == expected


def test_a_run_is_named_for_the_adapter_of_its_newest_checkpoint(place, tmp_path):
    for step, name in (("step-000010", "b"), ("step-000200", "a")):
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
        shutil.copy(place / f"{name}.safetensors", tmp_path / "run" / "checkpoints" / step / "adapter.safetensors")
    newest = tmp_path / "run" / "checkpoints" / "step-000200"
    assert locate(tmp_path / "run") == locate(newest) == newest / "adapter.safetensors"
    assert locate(newest / "adapter.safetensors") == newest / "adapter.safetensors"
    (tmp_path / "diffusers").mkdir()
    shutil.copy(place / "a.safetensors", tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert locate(tmp_path / "diffusers").name == "pytorch_lora_weights.safetensors"


# ---------------------------------------------------------------- sample.py


@pytest.mark.slow
def test_sample_draws_with_adapters_and_says_so_in_the_picture(place, tmp_path, capsys):
    module, pictures = load_script("sample"), {}
    a, b = place / "a.safetensors", place / "b.safetensors"
    command(capsys, "merge", place / "model", tmp_path / "merged", "--lora", f"{a}:0.5:1", "--lora", b)
    for name, more in {"plain": [], "zero": ["--lora", f"{a}:0"], "both": ["--lora", f"{a}:0.5:1", "--lora", b],
                       "merged": ["--model", tmp_path / "merged"]}.items():
        words = [PROMPT, "--model", place / "model", "--steps", "2", "--out", tmp_path / f"{name}.png", *more]
        module.ARGS = module.parse([str(word) for word in words])
        module.main()
        pictures[name] = Image.open(tmp_path / f"{name}.png")
    plain, zero, both, merged = (np.asarray(picture).astype(int) for picture in pictures.values())
    assert np.array_equal(plain, zero) and abs(plain - both).max() > 8 and np.array_equal(both, merged)
    assert 'LoRA: "a.safetensors:0.5:1 b.safetensors:1"' in pictures["both"].info["parameters"]
    assert "LoRA" not in pictures["plain"].info["parameters"]
    capsys.readouterr()
    module.ARGS = module.parse([PROMPT, "--model", str(place / "model"), "--lora", str(a), "--dry-run"])      # without weights
    module.main()
    assert "net (UNet)" in capsys.readouterr().out
    defaults = json.loads((tmp_path / "merged" / "tinyldm.json").read_text())
    assert defaults["adapters"] == ["a.safetensors:0.5:1", "b.safetensors:1"]


@pytest.mark.parametrize("words, message", [
    (["--lora", "nothing.safetensors"], "nothing.safetensors does not exist"),
    (["--lora", "model"], "model is a whole model, no adapter: name it as the model"),
    (["--lora", "model/unet/diffusion_pytorch_model.safetensors"], "is no adapter"),
    (["--lora", "cut.safetensors"], "cut.safetensors is damaged"),
    (["--lora", "a.safetensors:1:2:3"], "has 3 strengths"),
    (["--lora", "a.safetensors:1:up=high"], "a.safetensors:1:up=high: high is no strength of an adapter"),
    (["--lora", "a.safetensors:inf"], "inf is no strength of an adapter"),
    (["--model", "a.safetensors"], "which changes another model: name that one with --model, and this file with --lora"),
    (["--model", "lokr.safetensors"], "a LoRA or its like, which changes another model"),
    (["<lora:dog:0.8>"], "name the adapter's file with --lora dog.safetensors:0.8"),
])
def test_mistakes_with_adapters_are_one_line(words, message, place, tmp_path, monkeypatch, capsys):
    for name in ("model", "a.safetensors"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "cut.safetensors").write_bytes((place / "a.safetensors").read_bytes()[:-9])
    save_file({"unet.conv_in.lokr_w1": torch.zeros(2, 2)}, tmp_path / "lokr.safetensors")
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in words else ["--model", "model"]
    caption = [] if words[0].startswith("<") else ["a fox"]
    assert message in mistake("sample", [*caption, *words, *model], capsys)
    assert not (tmp_path / "samples").exists()


# ---------------------------------------------------------------- ranks


def random_change(rank, out=24, ins=(40,), scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, *ins, generator=generator), torch.randn(out, rank, *[1] * (len(ins) - 1), generator=generator), scale)


@pytest.mark.parametrize("ins", [(40,), (6, 3, 3)])
def test_resizing_is_the_best_approximation_of_the_dense_change_and_its_energy_is_told(ins):
    change = random_change(8, ins=ins)
    dense = change.delta().flatten(1).double()
    values = torch.linalg.svdvals(dense)
    for rank in (1, 3, 8):
        kept = truncated(change, rank)
        error = (kept.change.delta().flatten(1) - dense).norm()
        assert kept.change.rank == rank and kept.change.shape == change.shape
        assert error.item() == pytest.approx(values[rank:].norm().item(), abs=1e-4)         # Eckart-Young
        assert kept.energy == pytest.approx((values[:rank].square().sum() / values.square().sum()).item(), abs=1e-5)
    assert truncated(change, 99).change.rank == 8


def test_a_fraction_of_energy_chooses_the_lowest_rank_that_keeps_it():
    change = random_change(8)
    values = torch.linalg.svdvals(change.delta().double()).square()
    for energy in (0.5, 0.9, 1.0):
        rank = next(i for i in range(1, 9) if values[:i].sum() / values.sum() >= energy * (1 - 1e-6))
        assert truncated(change, energy=energy).change.rank == rank


def test_a_large_dense_change_is_approximated_as_well_by_random_projections():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 120, generator=generator))[0] for size in (200, 150))
    values = 0.8 ** torch.arange(120.0)
    dense = left * values @ right.T
    rank = 10
    assert min(dense.shape) > EXACT * rank
    kept = approximated(dense, rank)
    assert (kept.change.delta() - dense).norm() == pytest.approx(values[rank:].norm().item(), rel=1e-3)
    assert kept.energy == pytest.approx((values[:rank].square().sum() / values.square().sum()).item(), rel=1e-4)
    assert torch.equal(approximated(dense, rank).change.down, kept.change.down)
    zero = approximated(torch.zeros(6, 5), 2)
    assert zero.energy == 1.0 and not zero.change.delta().any()
