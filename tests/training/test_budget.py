import re
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyldm.cli import guard
from tinyldm.config import PRESETS, Config
from tinyldm.training.budget import (
    count_flops, count_kept, empty, forwards, make_plan, memory, meta_networks, need, print_plan, render, size)
from tinyldm.training.optim import make_optimizers

ROOT = Path(__file__).parents[2]


def config(preset="5090_week", **changes):
    return Config(**(PRESETS[preset] | {"preset": preset} | changes))


@lru_cache
def preset_plan(preset):
    return make_plan(config(preset))


@pytest.fixture(scope="module")
def plan():
    return preset_plan("5090_week")


def linear(*shape):
    with torch.device("meta"):
        return nn.Linear(*shape)


def test_the_dit_has_the_recipe_s_parameters_and_flops(plan):
    assert size(plan.networks.net) == 278_152_208
    flops = plan.stages[0].flops
    for part, gflop in (("net", 394), ("text", 13.3), ("encode", 273), ("decode", 622)):
        assert flops[part] / 1e9 == pytest.approx(gflop, rel=0.01), part
    assert plan.stages[1].flops["encode"] / 1e9 == pytest.approx(1117, rel=0.01)


def test_the_unet_has_the_recipe_s_parameters_and_flops():
    plan = preset_plan("5090_week_unet")
    assert size(plan.networks.net) / 1e6 == pytest.approx(314, rel=0.01)
    assert plan.stages[0].flops["net"] / 1e9 == pytest.approx(201, rel=0.01)


def test_attention_is_counted(monkeypatch):
    call = forwards(meta_networks(config(dit=dict(layers=3))), 256)["net"]
    whole = count_flops(call)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: q)
    assert whole - count_flops(call) == 3 * 4 * 1024 * 256 * (256 + 77)    # q k^T and p v, over image and text


def test_a_linear_layer_has_two_flops_per_weight_and_row():
    layer = linear(30, 50)
    assert count_flops(lambda: layer(empty(7, 30))) == 2 * 7 * 30 * 50


def test_kept_bytes_of_two_layers_match_the_closed_form():
    first, second = linear(30, 50), linear(50, 20)
    kept, casts = count_kept(lambda: second(F.gelu(first(empty(7, 30)))))
    assert kept == 2 * 7 * (30 + 50 + 50)                     # both layers' inputs, and what gelu got; in bf16
    assert casts == 2 * (30 * 50 + 50 + 50 * 20 + 20)
    assert count_kept(lambda: second(F.gelu(first(empty(7, 30)))), torch.float32) == (4 * 7 * (30 + 50 + 50), 0)


def test_attention_keeps_no_matrix_of_weights():
    layer = linear(64, 64)

    def attend(n):
        q = layer(empty(1, 1, n, 64))
        return F.scaled_dot_product_attention(q, q, q)

    small, large = (count_kept(lambda: attend(n))[0] for n in (100, 1000))
    assert large == 10 * small


@pytest.mark.parametrize("part", ["net", "encode"])
def test_activations_grow_with_the_batch(part):
    networks = meta_networks(config(dit=dict(layers=2)))
    one, four = (count_kept(forwards(networks, 128, batch)[part])[0] for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.01)


def test_halving_the_micro_batch_halves_activations_and_nothing_else(plan):
    whole, half = (memory(plan.config, plan.stages[0], micro) for micro in (64, 32))
    assert [kind for kind in whole if whole[kind] != half[kind]] == ["activations (estimate)"]
    assert half["activations (estimate)"] == whole["activations (estimate)"] / 2


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizer_bytes_are_those_the_optimizers_hold(kind):
    settings = config("tiny_dit", optimizer=kind)
    stage = make_plan(settings).stages[-1]
    parameters = {f"{part}.{name}": nn.Parameter(torch.empty(p.shape)) for part, module in stage.trained.items()
                  for name, p in module.named_parameters()}
    optimizers = make_optimizers(parameters, kind=kind, lr=0.0, muon_lr=0.0)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.step()
        else:
            for p in optimizer.param_groups[0]["params"]:
                optimizer.nesterov(p, 0.9)
    held = sum(x.nbytes for optimizer in optimizers for state in optimizer.state.values()
               for x in state.values() if x.numel() > 1)
    counted = memory(settings, stage, 1)
    assert counted[f"optimizer ({kind})"] == pytest.approx(held, rel=1e-3)
    count = sum(p.numel() for p in parameters.values())
    assert counted["weights, fp32"] == counted["gradients, fp32"] == counted["averaged weights, fp32"] == 4 * count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_its_gpu_and_prints_a_readable_plan(preset):
    plan = preset_plan(preset)
    assert all(need(plan.config, stage, stage.micro) <= plan.config.gpu_gb for stage in plan.stages)
    lines = render(plan).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert "TOO MUCH" not in render(plan)


def test_a_plan_that_does_not_fit_is_refused_with_advice_that_fits():
    small = dict(dit=dict(width=256, layers=2, heads=4), batch_size=4096, gpu_gb=4.0, hours={})
    with pytest.raises(ValueError, match="--gpu-gb") as error:
        make_plan(config(**small, grad_accum=1))
    accum, gb = re.search(r"--grad-accum (\d+) .* would fit, at ([\d.]+) GB", str(error.value)).groups()
    followed = make_plan(config(**small, grad_accum=int(accum)))
    assert need(followed.config, followed.stages[0], 4096 // int(accum)) == pytest.approx(float(gb), abs=0.05)
    with pytest.raises(ValueError):
        make_plan(config(**small, grad_accum=int(accum) // 2))
    with pytest.raises(ValueError, match="shrink it"):
        make_plan(config(**small | {"gpu_gb": 2.0}))


def test_the_vae_stage_is_refused_with_its_own_knob():
    with pytest.raises(ValueError) as error:
        make_plan(config("tiny", vae_batch_size=4096, gpu_gb=4.0))
    size = int(re.search(r"--vae-batch-size (\d+) would fit", str(error.value))[1])
    make_plan(config("tiny", vae_batch_size=size, gpu_gb=4.0))


def test_a_stage_at_another_size_gets_a_micro_batch_that_fits(plan):
    small, large = plan.stages
    assert small.micro == 64 and large.micro < small.micro and 512 % large.micro == 0
    assert need(plan.config, large, 2 * large.micro) > plan.config.gpu_gb


def test_hours_become_steps_at_the_stated_share_of_the_peak(plan):
    stage = plan.stages[0]
    flops = stage.steps * stage.batch * (stage.flops["net"] + stage.flops["text"])
    assert flops == pytest.approx(110 * 3600 * 0.55 * 209.5e12, rel=1e-3)


@pytest.mark.parametrize("changes, message", [
    (dict(hours={"256": "long"}), "--hours 256=long"), (dict(gpu_tflops=0.0), "--gpu-tflops"),
    (dict(resolution=250), "use 256")])
def test_numbers_that_make_no_plan_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config(**changes))


def test_eager_training_is_planned_with_more_memory():
    compiled, eager = (make_plan(config("tiny", compile=value)).stages[-1].kept for value in (None, False))
    assert eager > compiled


def test_the_dry_run_answers_in_seconds_and_writes_nothing(tmp_path):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train.py", "--preset", "5090_week", "--dry-run"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "278,152,208" in done.stdout
    assert not list(tmp_path.iterdir())
    assert time.perf_counter() - start < 60                  # 5 s on an idle core; this leaves room for busy machines


def test_a_plan_that_does_not_fit_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        guard(lambda: print_plan(config("tiny", gpu_gb=1.0)))
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.count("\n") == 1 and "--gpu-gb" in err
