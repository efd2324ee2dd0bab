"""python -m tinyldm.adapters: the commands that read and write files of adapters, and models with them."""

import json
import re
import shlex
import shutil

import pytest
import torch
from helpers import ROOT, load_script, script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_adapters import command, refused, weights

from tinyldm.adapters import __main__ as commands
from tinyldm.adapters.commands import COMMANDS
from tinyldm.adapters.files import read_adapter
from tinyldm.folders.load import load_model


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.slow
def test_extraction_of_a_merged_model_is_the_adapter_again(place, tmp_path, capsys):
    command(capsys, "merge", place / "model", tmp_path / "tuned", "--lora", place / "a.safetensors")
    printed = command(capsys, "extract", place / "model", tmp_path / "tuned", tmp_path / "out.safetensors", "--rank", "4")
    model = load_model(place / "model")
    found, expected = (read_adapter(file, model).changes() for file in (tmp_path / "out.safetensors", place / "a.safetensors"))
    assert found.keys() == expected.keys() == {"net", "text"} and found["net"].keys() == expected["net"].keys()
    for part, own in expected.items():
        assert all(torch.allclose(found[part][name].delta(), change.delta(), atol=1e-4) for name, change in own.items())
    assert "layers of rank 4; kept energy 100.00% of all changes" in printed and "left out" not in printed
    small = command(capsys, "extract", place / "model", tmp_path / "tuned", tmp_path / "small.safetensors", "--rank", "1",
                    "--layout", "kohya")
    energy = [change.delta().square().sum() for own in expected.values() for change in own.values()]
    best = [torch.linalg.svdvals(change.delta().flatten(1))[0].square() for own in expected.values() for change in own.values()]
    assert f"kept energy {sum(best) / sum(energy):.2%} of all changes" in small
    assert json.loads(header(tmp_path / "small.safetensors")["tinyldm"])["extracted_from"] == "tuned"


def test_extraction_names_what_a_lora_cannot_hold(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "tuned")
    file = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    tensors["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] += 1
    save_file(tensors, file)
    printed = command(capsys, "extract", place / "model", tmp_path / "tuned", tmp_path / "out.safetensors")
    assert "1 layers of rank 1" in printed                                  # a constant matrix has rank 1
    assert "left out: 1 biases, norms and embeddings that differ, too (net.conv_in.bias)" in printed
    error = refused(capsys, "extract", place / "model", place / "model", tmp_path / "none.safetensors")
    assert "have the same weights in all layers" in error and not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("name", ["a", "b"])                                # diffusers' names without alpha, kohya's with it
def test_resize_keeps_names_and_the_strongest_part_of_every_change(name, place, tmp_path, capsys):
    source, out = place / f"{name}.safetensors", tmp_path / "small.safetensors"
    printed = command(capsys, "resize", source, out, "--rank", "3")
    model = load_model(place / "model")
    before, after = (read_adapter(file, model).changes() for file in (source, out))
    assert load_file(source).keys() == load_file(out).keys() and header(out)["ss_network_dim"] == "3"
    total = kept = 0.0
    for part, own in before.items():
        for key, change in own.items():
            values = torch.linalg.svdvals(change.delta().flatten(1))
            small = after[part][key]
            assert small.rank == 3
            assert (small.delta() - change.delta()).norm() == pytest.approx(values[3:].norm().item(), abs=1e-4)
            total, kept = total + values.square().sum(), kept + values[:3].square().sum()
    assert f"layers of rank 3; kept energy {kept / total:.2%} of all changes, least in " in printed
    whole = command(capsys, "resize", source, tmp_path / "whole.safetensors", "--keep", "1")
    assert "kept energy 100.00%" in whole


def test_convert_writes_the_other_names_and_back(place, tmp_path, capsys):
    model_flag = ("--model", place / "model")
    command(capsys, "convert", place / "a.safetensors", tmp_path / "kohya.safetensors", *model_flag, "--layout", "kohya", "--dtype", "fp16")
    tensors = load_file(tmp_path / "kohya.safetensors")
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    command(capsys, "convert", tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", *model_flag, "--layout", "diffusers")
    model = load_model(place / "model")
    before, after = (read_adapter(file, model).changes() for file in (place / "a.safetensors", tmp_path / "back.safetensors"))
    for part, own in before.items():
        assert all(torch.allclose(after[part][name].delta(), change.delta(), atol=2e-3) for name, change in own.items())
    assert json.loads(header(tmp_path / "back.safetensors")["tinyldm"])["base_model"] == "model"


def test_show_tells_the_precision_of_the_weights_not_that_of_their_scale(tmp_path, capsys):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 32).half(), f"{name}.lora_up.weight": torch.ones(32, 2).half(),
               f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "half.safetensors")
    assert "precision: float16" in command(capsys, "show", tmp_path / "half.safetensors")


def test_show_tells_kinds_ranks_scales_and_what_the_header_says(place, capsys):
    printed = command(capsys, "show", place / "b.safetensors")
    assert "for Stable Diffusion 1 or 2" in printed and "layers: LoRA (" in printed and "ranks: 4\n" in printed
    assert "scales (alpha / rank): 0.5\n" in printed and "precision: float32" in printed and "ss_network_dim: 4" in printed


def test_every_command_takes_the_folder_of_a_run_for_a_model_and_for_an_adapter(place, tmp_path, capsys):
    """Of its newest checkpoint: number 10 comes after 9."""
    def run(name, file, source):
        for step, what in (("step-000009", place / "b.safetensors"), ("step-000010", source)):
            (folder := tmp_path / name / "checkpoints" / step).mkdir(parents=True)
            (folder / file).symlink_to(what)
        return tmp_path / name

    base, dog = run("base", "model", place / "model"), run("dog", "adapter.safetensors", place / "a.safetensors")
    by_file, by_run = ([place / "model", place / "a.safetensors"], [base, dog])
    for model, adapter in (by_file, by_run):
        at = lambda name: tmp_path / f"{name}-{model.parent == tmp_path}.safetensors"
        command(capsys, "merge", model, tmp_path / f"merged-{model is base}", "--lora", f"{adapter}:0.5")
        command(capsys, "convert", adapter, at("converted"), "--model", model, "--layout", "kohya")
        command(capsys, "resize", adapter, at("resized"), "--rank", 2)
        command(capsys, "extract", model, tmp_path / f"merged-{model is base}", at("extracted"), "--rank", 2)
    assert command(capsys, "show", dog).partition(": ")[2] == command(capsys, "show", place / "a.safetensors").partition(": ")[2]
    for name in ("converted", "resized", "extracted"):
        one, two = (load_file(tmp_path / f"{name}-{which}.safetensors") for which in (False, True))
        assert one and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    one, two = (weights(load_model(tmp_path / f"merged-{which}")) for which in (False, True))
    plain = weights(load_model(place / "model"))
    assert all(torch.equal(one[key], two[key]) for key in one) and any(not torch.equal(one[key], plain[key]) for key in one)
    assert json.loads((tmp_path / "merged-True" / "tinyldm.json").read_text())["adapters"] == ["dog:0.5"]


@pytest.mark.parametrize("words, message", [
    (["resize", "a.safetensors", "out.safetensors"], "resize needs one of --rank N and --keep E"),
    (["resize", "a.safetensors", "out.safetensors", "--rank", "0"], "--rank 0 must be 1 or more"),
    (["resize", "a.safetensors", "out.safetensors", "--keep", "1.5"], "--keep 1.5 must lie above 0 and at most at 1"),
    (["resize", "a.safetensors", "out.bin", "--rank", "2"], "adapters are written as .safetensors"),
    (["resize", "a.safetensors", "a.safetensors", "--rank", "2"], "a.safetensors is there already: name another file"),
    (["merge", "model", "out"], "merge needs an adapter: --lora FILE"),
    (["merge", "model", "model", "--lora", "a.safetensors"], "model is there already and not empty"),
    (["convert", "a.safetensors", "out.safetensors", "--model", "model", "--layout", "a1111"], "unknown layout of adapters 'a1111'"),
    (["extract", "model", "other", "out.safetensors"], "not a model folder"),
    (["show", "model"], "is a whole model, no adapter"),
    (["show", "half.safetensors"], "half.safetensors: unet.conv_in: it is LoRA without up"),
    (["resize", "lokr.safetensors", "out.safetensors", "--rank", "1"], "lokr.safetensors: unet.conv_in is not plain LoRA"),
    (["frobnicate"], "invalid choice"),
])
def test_mistakes_at_the_command_line_are_one_line_and_write_nothing(words, message, place, tmp_path, monkeypatch, capsys):
    for name in ("model", "a.safetensors"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "other").mkdir()
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    save_file({f"unet.conv_in.lokr_w{i}": torch.zeros(2, 2) for i in (1, 2)}, tmp_path / "lokr.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, *words)
    assert sorted(tmp_path.iterdir()) == before


def test_the_commands_and_the_code_in_the_document_are_right(place, tmp_path, monkeypatch):
    content = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    lines = [line.partition(" # ")[0] for line in re.findall(r"^python .*", content, re.MULTILINE)]
    parse = {"sample.py": load_script("sample").parse, "-m tinyldm.adapters": commands.parse}
    monkeypatch.chdir(tmp_path)
    for line, name in ((line, name) for line in lines for name in parse if line.startswith(f"python {name} ")):
        assert parse[name](shlex.split(line.removeprefix(f"python {name} ")))
    assert {*re.findall(r"tinyldm.adapters (\w+)", "".join(lines))} == COMMANDS.keys() and len(lines) > 8
    model = load_model(place / "model")
    code = next(block for block in re.findall(r"```python\n(.*?)```", content, re.DOTALL) if "LoRAConfig" in block)
    exec(code.replace("rank=16", "rank=8").replace('"up": 32', '"up": 4'), {"model": model})
    assert {change.rank for change in read_adapter("dog.safetensors", model).changes()["net"].values()} == {8, 4}
    assert not [line for line in content.splitlines() if len(line) > 135]


def test_the_command_line_runs_as_a_module_and_helps_without_torch(place):
    code = ("import runpy, sys\nsys.argv = ['adapters', '--help']\ntry:\n    runpy.run_module('tinyldm.adapters', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code and 'torch' not in sys.modules")
    done = script("-c", code)
    assert done.returncode == 0 and "merge MODEL folder/ --lora" in done.stdout, done.stderr
