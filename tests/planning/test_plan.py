import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path

import pytest
from helpers import thinned
import torch
from torch import nn

from tinyldm.cli import guard
from tinyldm.config import PRESETS, change, make_config, phases, preset_config
from tinyldm.durations import show_duration
from tinyldm.model import muon_matrices
from tinyldm.models.taesd import TAESD
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.planning import show
from tinyldm.planning.flops import count_flops, size, vae_flops
from tinyldm.planning.plan import OVERHEAD, check_fit, compiles, make_plan
from tinyldm.planning.show import Measured, compare, print_plan, render
from tinyldm.planning.step import muon_flops, step_seconds
from tinyldm.training.optim import make_optimizers, orthogonalise

ROOT = Path(__file__).parents[2]


def config(preset="5090_week", **changes):
    return preset_config(preset, **changes)


@lru_cache
def preset_plan(preset):
    return make_plan(config(preset))


@pytest.fixture(scope="module")
def plan():
    return preset_plan("5090_week")


def small(**changes):
    """A plan that takes a moment."""
    text = dict(width=64, layers=1, heads=1, mlp_width=64)
    return config(**dict(dit=dict(width=256, layers=2, heads=4), text_weights="", text=text) | changes)


def test_the_dit_has_the_recipe_s_parameters_and_flops(plan):
    assert size(plan.networks.net) == 278_152_208
    flops = plan.phases[0].flops
    for part, gflop in (("net", 394), ("text", 13.3), ("encode", 273), ("decode", 622)):
        assert flops[part] / 1e9 == pytest.approx(gflop, rel=0.01), part
    assert plan.phases[1].flops["encode"] / 1e9 == pytest.approx(1117, rel=0.01)


@pytest.mark.slow
def test_the_unet_has_the_recipe_s_parameters_and_flops():
    plan = preset_plan("5090_week_unet")
    assert size(plan.networks.net) / 1e6 == pytest.approx(314, rel=0.01)
    assert plan.phases[0].flops["net"] / 1e9 == pytest.approx(201, rel=0.01)


def test_halving_the_micro_batch_halves_activations_and_nothing_else(plan):
    whole, half = (plan.phases[0].memory(micro) for micro in (64, 32))
    assert [kind for kind in whole if whole[kind] != half[kind]] == ["activations (estimate)"]
    assert half["activations (estimate)"] == whole["activations (estimate)"] / 2


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizer_bytes_are_those_the_optimizers_hold(kind):
    settings = config("tiny_dit", optimizer=kind)
    phase = make_plan(settings).phases[-1]
    parameters = {f"{part}.{name}": nn.Parameter(torch.empty(p.shape)) for part, module in phase.trained.items()
                  for name, p in module.named_parameters()}
    optimizers = make_optimizers(parameters, muon_matrices(phase.trained), settings.optimisation)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(x.nbytes for optimizer in optimizers for state in optimizer.state.values()
               for x in state.values() if x.numel() > 1)
    counted = phase.memory(1)
    assert counted[f"optimizer ({kind})"] == pytest.approx(held, rel=1e-3)
    count = sum(p.numel() for p in parameters.values())
    assert counted["weights, fp32"] == counted["gradients, fp32"] == counted["averaged weights, fp32"] == 4 * count


@pytest.mark.parametrize("preset", thinned(3, PRESETS))
def test_every_preset_fits_its_gpu_and_prints_a_readable_plan(preset):
    plan = preset_plan(preset)
    assert all(phase.memory_gb() <= plan.config.plan.gpu_gb for phase in plan.phases)
    lines = render(plan).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert "TOO MUCH" not in render(plan)


def test_a_plan_that_does_not_fit_is_refused_with_advice_that_fits():
    tight = dict(batch_size=4096, gpu_gb=4.0, stages={})
    with pytest.raises(ValueError, match="--gpu-gb") as error:
        make_plan(small(**tight, grad_accum=1))
    accum, gb = re.search(r"--grad-accum (\d+) .* would fit, at ([\d.]+) GB", str(error.value)).groups()
    followed = make_plan(small(**tight, grad_accum=int(accum)))
    assert followed.phases[0].memory_gb() == pytest.approx(float(gb), abs=0.05)
    with pytest.raises(ValueError):
        make_plan(small(**tight, grad_accum=int(accum) // 2))
    with pytest.raises(ValueError, match="shrink it .--net or --grad-checkpointing"):
        make_plan(small(**tight | {"gpu_gb": 1.8}))


def test_a_later_phase_that_does_not_fit_is_refused_with_the_flag_of_the_first():
    settings = small(batch_size=1024, grad_accum=1, stages={"64": 1, "512": 1}, resolution=64)
    phase = make_plan(settings, must_fit=False).phases[1]
    assert phase.micro == 16
    settings = change(settings, gpu_gb=phase.memory_gb(8) + 1e-3)
    with pytest.raises(ValueError, match=r"at 512 px .* --grad-accum 2 \(micro-batch 8\) would fit") as error:
        check_fit(settings, phase, 1)
    assert f"at {phase.memory_gb(8):.1f} GB" in str(error.value)
    assert phases(change(settings, grad_accum=2))[1].optimisation.grad_accum == 1024 // 8


def test_the_vae_stage_is_refused_with_its_own_knob():
    with pytest.raises(ValueError) as error:
        make_plan(config("tiny", vae_batch_size=4096, gpu_gb=4.0))
    size = int(re.search(r"--vae-batch-size (\d+) would fit", str(error.value))[1])
    make_plan(config("tiny", vae_batch_size=size, gpu_gb=4.0))


def test_a_phase_of_larger_pictures_has_smaller_micro_batches_and_fits(plan):
    small, large = plan.phases
    assert (small.micro, large.micro) == (64, 16) and large.config.optimisation.grad_accum == 32
    assert large.memory_gb() < 32 < large.memory_gb(32)


def test_micro_batches_that_do_not_divide_the_batch_are_counted_by_the_largest():
    assert make_plan(small(batch_size=10, grad_accum=4, stages={})).phases[0].micro == 3


# ---------------------------------------------------------------- time


def test_the_budget_is_what_encoding_training_and_the_rest_take(plan):
    encoding = 4_600_000 * (273e9 + 1117e9) / (0.45 * 209.5e12) / 3600
    assert sum(s.encoding for s in plan.phases) == pytest.approx(encoding, rel=1e-3)
    training = 168 * 0.96 - encoding
    assert [s.hours for s in plan.phases] == pytest.approx([0.79 * training, 0.21 * training], rel=1e-3)
    assert plan.hours == pytest.approx(168, rel=1e-4)
    for phase in plan.phases:
        flops = phase.steps * 512 * (phase.flops["net"] + phase.flops["text"])
        assert flops == pytest.approx(phase.hours * 3600 * 0.55 * 209.5e12, rel=1e-6)
    assert "in all 7 d 0 h: encoding 18 h 49 m, training 5 d 22 h, evaluation and restarts 6 h 43 m" in render(plan)


def test_shares_need_not_add_up_to_one():
    a, b = (make_plan(small(stages={"64": share, "128": 3 * share}, resolution=64)).phases for share in (0.25, 10))
    assert [s.steps for s in a] == pytest.approx([s.steps for s in b], abs=1)
    assert a[1].hours == pytest.approx(3 * a[0].hours, rel=1e-3)


def test_max_steps_are_shared_out_to_the_last_and_hours_follow():
    plan = make_plan(small(stages={"64": 1, "128": 1, "256": 1}, resolution=64, max_steps=1000, budget=""))
    assert [s.steps for s in plan.phases] == [333, 334, 333]
    assert plan.phases[2].hours == pytest.approx(333 * 512 / plan.phases[2].rate / 3600)
    assert not plan.budget_hours and "TOO MUCH" not in render(plan)


def test_a_deadline_is_planned_from_now_and_the_earlier_end_counts():
    at = (datetime.now() + timedelta(hours=50)).isoformat(timespec="minutes")
    alone, earlier, later = (make_plan(small(stages={}, deadline=at, budget=budget)) for budget in ("", "20h", "90h"))
    assert alone.budget_hours == pytest.approx(50, abs=0.1) == later.budget_hours and earlier.budget_hours == 20
    assert alone.hours == pytest.approx(50, abs=0.1)
    with pytest.raises(ValueError, match="has passed"):
        make_plan(small(deadline="2020-01-31T18:00", budget=""))


def test_what_comes_before_training_takes_its_time_from_it():
    plan = make_plan(config("tiny", max_steps=0, budget="10s"))
    vae, net = plan.phases
    assert vae.hours > 0 and net.encoding > 0
    assert net.hours + net.encoding + vae.hours == pytest.approx(10 / 3600 * 0.96, rel=1e-3)


@pytest.mark.parametrize("changes, expected", thinned(2, [
    ({}, False), (dict(pictures=120_000_000), True), (dict(pictures=400_000_000), True), (dict(budget="1h"), True),
    (dict(budget="2h", cache=["somewhere"]), False)]))
def test_a_budget_that_encoding_eats_up_is_said(changes, expected):
    plan = make_plan(small(**dict(stages={}) | changes))
    assert ("TOO MUCH for --budget" in render(plan)) is expected
    if changes.get("budget") == "1h":
        assert plan.phases[0].steps == 0


def test_a_plan_without_the_number_of_pictures_says_what_is_missing():
    assert "--pictures N" in render(make_plan(small(stages={}, pictures=0)))


@pytest.mark.parametrize("changes, message", [
    (dict(budget="long"), "'long' is not a span"), (dict(gpu_tflops=0.0), "--gpu-tflops"), (dict(deadline="tomorrow"), "'tomorrow'"),
    (dict(stages={"250": 1.0}), "use 256")])
def test_numbers_that_make_no_plan_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(small(**changes))


# ---------------------------------------------------------------- memory, again


@pytest.mark.parametrize("preset, changes, compiled", thinned(8, [
    ("5090_week", {}, True), ("5090_week", dict(fsdp=True), False), ("5090_week", dict(compile=False), False),
    ("tiny", {}, False), ("5090_week", dict(budget="20m", pictures=0), False), ("5090_week", dict(fsdp=True, compile=True), True),
    ("tiny", dict(compile=True), True), ("tiny", dict(max_steps=10**8), True)]))
def test_a_run_is_planned_as_compiled_where_it_will_be_and_uncompiled_networks_with_more_memory(preset, changes, compiled):
    settings = dict(dit=dict(width=256, layers=2, heads=4), stages={}) if preset == "5090_week" else {}
    found, certain = (make_plan(config(preset, **settings | more)).phases[-1] for more in (changes, changes | dict(compile=compiled)))
    assert found.compiled is compiled and found.memory() == certain.memory() and found.encoding == pytest.approx(certain.encoding)
    factors = {part: found.activations / sum(found.saved.values()) for part in found.saved}
    assert ("text" in found.saved) is (preset == "tiny")
    expected = sum(size * (1 if compiled and part == "net" else 1.6) for part, size in found.saved.items())
    assert found.activations == pytest.approx(expected) and min(factors.values()) >= 1


@pytest.mark.parametrize("device, compiled", [("cuda", True), ("cpu", False), ("mps", False)])
def test_only_on_gpus_compiling_is_the_default_and_only_for_jobs_that_are_long_enough(device, compiled):
    assert compiles(config(), 168, device) is compiled and not compiles(config(), 0.4, device)
    assert compiles(config(compile=True), 0, device) and not compiles(config(compile=False), 168, device)


@pytest.mark.slow
def test_a_sharded_week_does_not_fit_unless_it_is_compiled_or_checkpointed():
    make_plan(config(fsdp=True), must_fit=False)
    for changes in (dict(fsdp=True), dict(compile=False)):
        with pytest.raises(ValueError, match="micro-batch 64 at 256 px needs 37.5 GB"):
            make_plan(config(**changes))


# ---------------------------------------------------------------- encoding, sample grids, the parts of a step


def test_the_memory_of_encoding_and_of_a_sample_grid_is_planned(plan):
    small, large = plan.phases
    vae = plan.networks.vae
    assert [round(phase.peaks["encode"] * 32 / 1e9, 1) for phase in plan.phases] == [3.8, 15.1]     # counted by hand, layer by layer
    for phase in plan.phases:
        assert phase.encoding_gb(vae) == pytest.approx((4 * size(vae) + 32 * phase.peaks["encode"]) / 1e9 + 1.5)
    kept = 4 * size(plan.networks.net) * 2 + small.memory()["optimizer (muon)"] + 4 * size(plan.networks.text, vae)
    for phase, at_once in ((small, 16), (large, 4)):
        expected = kept + phase.memory()["two batches, fp32"] + at_once * phase.peaks["decode"]
        assert phase.grid_gb() == pytest.approx(expected / 1e9 + 1.5)
    text = render(plan)
    assert re.search(r"encoding, 32 pictures at once \(estimate\) +5\.6\d\d +16\.9\d\d", text)
    assert re.search(r"sample grid, 16 pictures \(estimate\) +8\.6\d\d +8\.7\d\d", text)
    latents = [4 * 32 * 32, 4 * 64 * 64]                       # x0 and noise; 77 vectors of 768 numbers; this batch and the next
    for phase, numbers in zip(plan.phases, latents):
        assert phase.memory()["two batches, fp32"] == 2 * 512 * 4 * (2 * numbers + 77 * 768)


def test_fewer_pictures_at_once_need_less_memory_to_encode(plan):
    eight = replace(plan.phases[1], config=change(plan.phases[1].config, encode_batch_size=8))
    assert plan.phases[1].encoding_gb(plan.networks.vae) - eight.encoding_gb(plan.networks.vae) == pytest.approx(
        24 * plan.phases[1].peaks["encode"] / 1e9)


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (24, 48), (96, 24), (16, 8, 3, 3)])
def test_muon_s_flops_are_those_that_it_makes(shape):
    matrix = torch.empty(1, shape[0], math.prod(shape[1:]), device="meta")
    assert muon_flops([torch.Size(shape)]) == count_flops(lambda: orthogonalise(matrix))


def test_the_parts_of_a_step_are_estimated_from_their_flops_and_bytes(plan):
    small, large = plan.phases
    parts, net = step_seconds(small), size(plan.networks.net)
    assert parts["text encoder"] == pytest.approx(0.9 * 512 * 13.3e9 / (0.55 * 209.5e12), rel=0.01)     # a tenth has no caption
    assert parts["casts, gradient sums"] == pytest.approx(8 * 18 * net / 1.5e12)
    assert step_seconds(large)["casts, gradient sums"] == pytest.approx(4 * parts["casts, gradient sums"])
    assert step_seconds(replace(small, config=change(small.config, optimizer="adamw")))["optimizers, averages"] == pytest.approx(
        40 * net / 1.5e12)
    assert sum(parts.values()) < 0.15 * small.batch / small.rate
    trained = preset_plan("tiny").phases[-1]                   # its text encoder is trained: dropped captions are encoded too
    assert step_seconds(trained)["text encoder"] == pytest.approx(64 * trained.flops["text"] / (0.55 * 209.5e12))


@pytest.mark.parametrize("widths, copies", thinned(2, [([], 1), (["0.05"], 1), (["0.05", "0.1", "0.2"], 3)]))
def test_every_width_is_one_more_copy_of_the_weights(widths, copies):
    phase = make_plan(small(stages={}, ema_widths=widths)).phases[0]
    assert phase.memory()["averaged weights, fp32"] == copies * phase.memory()["weights, fp32"]


@pytest.mark.parametrize("preset, share", thinned(2, [("tiny", 0.6), ("5090_week", 0.3)]))
def test_a_plan_with_checkpointing_has_less_memory_fewer_images_and_the_same_useful_work(preset, share):
    plain, checkpointed = (make_plan(config(preset, stages={}, grad_checkpointing=value)).phases[-1] for value in (False, True))
    kind = "activations (estimate)"
    assert checkpointed.memory()[kind] < share * plain.memory()[kind]
    assert checkpointed.memory() | {kind: 0} == plain.memory() | {kind: 0}
    assert checkpointed.useful == plain.useful
    assert checkpointed.rate == pytest.approx(plain.rate * plain.useful / (plain.useful + plain.flops["net"] / 3))


# ---------------------------------------------------------------- a running job


MEASURED = Measured(2.0, 256.0, 0.498, 24.25, 230_000, "Friday 18:00")


def test_plan_and_measurement_stand_side_by_side(plan, monkeypatch):
    planned = []                                                # it takes seconds, and the fixture has made it already
    monkeypatch.setattr(show, "make_plan", lambda settings, must_fit=True: planned.append(settings) or plan)
    text = compare(plan.phases[0].config, MEASURED, plan.config)
    assert planned == [plan.config]
    lines = text.splitlines()
    assert lines[0].split() == ["after", "200", "steps", "plan", "measured"]
    rows = {line[:20].strip(): [line[20:40].strip(), line[40:].strip()] for line in lines[1:]}
    phase, total = plan.phases[0], sum(s.steps for s in plan.phases)
    assert rows["seconds per step"] == [f"{512 / phase.rate:.4g}", "2"]
    assert rows["images per second"] == [f"{phase.rate:.4g}", "256"]
    assert rows["TFLOP/s, useful"] == ["115.2", f"{256 * phase.useful / 1e12:.4g}"]
    assert rows["MFU"] == ["55.0%", "49.8%"]
    assert rows["memory, GB"] == ["26.3", "24.2"]
    assert rows["steps in all"] == [f"{total:,}", "230,000"]
    assert rows["finish"] == ["after 7d", "Friday 18:00"]
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.slow
def test_the_phase_that_runs_is_the_one_compared():
    settings = small(stages={"64": 1, "128": 1}, resolution=64, pictures=0)
    first, second = (compare(phase, MEASURED, settings).splitlines() for phase in phases(settings))
    assert first[6:8] == second[6:8]                           # steps in all, finish
    assert float(first[1].split()[-2]) < 0.5 * float(second[1].split()[-2])


@pytest.mark.slow
def test_a_run_on_a_known_gpu_is_compared_with_the_plan_for_that_one(monkeypatch):
    monkeypatch.setattr(show, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    settings = small(stages={})
    text, expected = compare(settings, MEASURED), make_plan(change(settings, gpu_tflops=989.0)).phases[0]
    assert f"{expected.batch / expected.rate:.4g}" in text.splitlines()[1] and "55.0%" in text


def test_on_a_cpu_the_plan_is_said_to_be_another_machine_s():
    text = compare(config("tiny"), MEASURED._replace(mfu=None, memory_gb=None))
    assert text.endswith("(the plan is for a GPU of 209.5 TFLOP/s, this is a CPU)") or torch.cuda.is_available()
    assert re.search(r"MFU +55.0% +-\n", text) and re.search(r"memory, GB +\S+ +-\n", text)


def test_what_does_not_fit_or_cannot_be_planned_is_compared_all_the_same():
    assert "-\n" not in compare(small(stages={}, gpu_gb=1.0), MEASURED)
    text = compare(small(stages={}, budget="", deadline="2020-01-31T18:00"), MEASURED)
    assert re.search(r"seconds per step +- +2\n", text) and re.search(r"finish +- +Friday", text)


DEADLINE = "2999-01-31T18:00+00:00"


@pytest.mark.parametrize("changes, finish", thinned(2, [
    (dict(budget="20h"), "after 20h"),
    (dict(budget="", deadline=DEADLINE), DEADLINE), (dict(budget="20h", deadline=DEADLINE), "after 20h"),
    (dict(budget="99999999d", deadline=DEADLINE), DEADLINE)]))
def test_the_plan_finishes_when_the_first_of_its_ends_does(changes, finish):
    assert re.search(rf"finish +{re.escape(finish)} +Friday", compare(small(**dict(stages={}) | changes), MEASURED))


def test_a_plan_by_steps_finishes_after_all_of_its_time():
    settings = small(stages={}, budget="", max_steps=1000)
    plan = make_plan(settings)
    assert plan.hours == pytest.approx((plan.phases[0].hours + plan.phases[0].encoding) / 0.96)
    assert re.search(rf"finish +after {show_duration(3600 * plan.hours)} +Friday", compare(settings, MEASURED))


@pytest.mark.slow
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


# ---------------------------------------------------------------- an autoencoder alone


def test_the_plan_of_an_autoencoder_alone_has_its_steps_memory_and_hours():
    words = dict(only="vae", vae=dict(widths=(32, 64), depth=1), resolution=64, vae_crop=32, vae_batch_size=6, grad_accum=2)
    plan = make_plan(make_config(**words, vae_steps=100))
    phase, = plan.phases
    assert (phase.batch, phase.micro, phase.steps) == (6, 3, 100)
    vae = AutoencoderKL(VAEConfig(widths=(32, 64), depth=1))
    assert sum(p.numel() for p in plan.networks.vae.parameters()) == sum(p.numel() for p in vae.parameters())
    assert phase.useful == vae_flops(vae, 32)
    assert phase.hours == pytest.approx(600 * vae_flops(vae, 32) / (0.55 * 209.5e12) / 3600)
    timed = make_plan(make_config(**words, vae_steps=0, max_steps=0, budget="1h"))
    assert timed.phases[0].hours == pytest.approx(1 - OVERHEAD, rel=1e-4)
    averaged = make_plan(make_config(**words, vae_steps=100, vae_ema=0.9)).phases[0].memory()
    added = {kind: value - phase.memory()[kind] for kind, value in averaged.items()}
    assert added.pop("averaged weights, fp32") == 4 * size(vae) and not any(added.values())
    text = render(plan)
    assert "unet" not in text and "text encoder" not in text and "sample grid" not in text and "3 x 2" in text
    with pytest.raises(ValueError, match="--grad-accum 6 would fit|single images need"):
        make_plan(make_config(**words, vae_steps=100, gpu_gb=1e-5))


def test_the_plan_of_another_class_of_autoencoder_counts_that():
    plan = make_plan(make_config(only="vae", autoencoder="taesd", vae=dict(width=8, blocks=(1, 1)), resolution=16, vae_steps=3))
    assert isinstance(plan.networks.vae, TAESD)
