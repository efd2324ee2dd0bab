"""Where the host waits for a GPU: exactly here, and nowhere else. Both stages of train.py and sample.py, on a GPU that is pretended.

A GPU is kept busy by a host that runs ahead of it. Each wait costs the time from the end of all queued work until new work arrives.
"""

import threading
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from helpers import SMALL, load_script, train_here
from pretend_gpu import GPU, PretendGpu

from tinyldm import device
from tinyldm.diffusion.loss import sample_losses
from tinyldm.diffusion.process import make_process
from tinyldm.models.clip_text import CLIPText
from tinyldm.objectives.denoising import Denoising
from tinyldm.training.meter import Meter
from tinyldm.training.validation import Validation, equal_parts

BATCH, LATENTS, LENGTH = (4,), (4, 8, 8, 8), 24                 # shapes; the tokens of a caption
COMMON = [*SMALL, "--no-compile", "--save-every", "99", "--sample-every", "0", "--vae-steps", "3", "--max-steps", "5", "--grad-accum", "2"]
DIT = "--network dit --dit patch=2 width=16 layers=2 heads=2 mlp_width=32 time_dim=16".split()
TABLE = "--process scaled_linear --prediction eps --learned-variance --input-perturbation 0.1".split()

# The file and function that wait, and torch's name of what they do: how often.
STEP = {"tinyldm/training/distributed.py clip: __float__": 1,           # the gradient norm: whether to skip the update
        "tinyldm/training/learner.py update: __float__": 1}             # the loss, for the same reason: known when the norm is
MEASURED = STEP | {"tinyldm/training/learner.py update: __float__": 2}  # in every step that is logged, the size of its update too
ROW = STEP | {"tinyldm/training/meter.py row: tolist": 1}               # before the step that follows, what is written to the log
DRAWING = {"tinyldm/pipeline.py draw: to": 1,                           # the first noise, when nothing is queued
           "tinyldm/pipeline.py decode: __bool__": 1,                   # whether the pictures are finite
           "tinyldm/pictures/pixels.py to_bytes: to": 1}                # the pictures


class Step:
    """What happened from the end of one step to the end of the next."""

    def __init__(self, gpu: PretendGpu, start: int, stop: int, calls: list):
        self.waits, self.calls = gpu.waits(start, stop), calls
        self.uploads, self.pins = gpu.shapes("upload", start, stop), gpu.shapes("pin", start, stop)


def watch(words: list[str]) -> SimpleNamespace:
    """Train on a pretended GPU -> the GPU, and by stage and number the steps after the first."""
    train, gpu, marks, calls, threads = load_script("train"), PretendGpu(), [], [], set()
    ended, encode, draw = train.Trainer.watch_loss, CLIPText.forward, Denoising.draw

    def watch_loss(trainer, update):
        marks.append((trainer.stage.name, trainer.step, len(gpu.events), len(calls)))
        return ended(trainer, update)

    def forward(module, ids, **options):
        calls.append((len(ids), torch.is_grad_enabled()))
        return encode(module, ids, **options)

    def drawn(*arguments):
        if marks and marks[-1][0] == "step":
            threads.add(threading.current_thread().name)
        return draw(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "watch_loss", watch_loss)
        patch.setattr(CLIPText, "forward", forward)
        patch.setattr(Denoising, "draw", drawn)
        patch.setattr(torch.compiler, "reset", lambda: None)    # nothing is compiled here, and loading the compiler takes seconds
        with gpu:
            train_here(train, words, patch)
    steps = {(stage, step): Step(gpu, begin, end, calls[first:last])
             for (before, _, begin, first), (stage, step, end, last) in zip(marks, marks[1:]) if before == stage}
    return SimpleNamespace(gpu=gpu, steps=steps, threads=threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def unet(folder):
    """An autoencoder, then a U-Net and its text encoder on flow, in float32."""
    return watch(["--out", str(folder / "unet"), *COMMON, "--dtype", "fp32"])


@pytest.fixture(scope="module")
def dit(folder, unet):
    """A DiT with a frozen text encoder, that learns its variance on a table, in bfloat16."""
    model = folder / "unet" / "checkpoints" / "step-000005" / "model"
    return watch(["--out", str(folder / "dit"), *COMMON, *DIT, *TABLE, "--vae-weights", str(folder / "unet" / "vae"),
                  "--text-weights", str(model)])


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("run", ["unet", "dit"])
def test_a_step_waits_for_the_gradient_norm_and_for_nothing_before_it(run, request):
    run = request.getfixturevalue(run)
    assert not run.gpu.mixed
    assert [run.steps["step", step].waits for step in (2, 3, 4, 5)] == [STEP, MEASURED, ROW, STEP]


def test_the_first_stage_waits_as_little(unet):
    assert unet.steps["vae", 2].waits == STEP and unet.steps["vae", 3].waits == MEASURED


def test_a_discriminator_costs_the_waits_of_another_update_and_with_a_row_of_the_log_those_of_what_it_tells(folder):
    """And the report's picture of reconstructions, which is drawn with the first row, and later once a minute."""
    gan = "--vae-loss gan=0.5 --vae-gan width=4 layers=1 start=0 r1=1 lecam=1 --vae-latents eq=1 noise=0.1 --dtype fp32".split()
    run = watch(["--out", str(folder / "gan"), *COMMON, *gan, "--vae-steps", "4", "--max-steps", "1"])
    assert not run.gpu.mixed
    assert run.steps["vae", 2].waits == {what: 2 * count for what, count in STEP.items()}
    assert run.steps["vae", 4].waits == run.steps["vae", 2].waits | {       # after the third step, which is logged
        "tinyldm/training/meter.py row: tolist": 2, "tinyldm/objectives/adversarial.py log_row: tolist": 1,
        "tinyldm/objectives/adversarial.py notes: tolist": 1,
        "tinyldm/pictures/pixels.py to_bytes: to": 1, "tinyldm/training/vae_validation.py work: to": 1}


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_latents_noise_and_captions_are_copied_once_per_step_and_the_large_ones_are_page_locked_by_another_thread(unet, dit, number):
    trained, frozen = (run.steps["step", number] for run in (unet, dit))
    captions = Counter((count, LENGTH) for count, _ in trained.calls)                   # those that differ, in each micro-batch
    assert trained.uploads == Counter({LATENTS: 2, BATCH: 1, (2,): 2}) + captions       # latents and noise; times; which caption is whose
    assert trained.pins == captions + Counter({(2,): 2})
    (count, _), = frozen.calls
    assert frozen.uploads == {LATENTS: 3, BATCH: 2, (count, LENGTH): 1}                 # the perturbed noise is another
    assert frozen.pins == {BATCH: 1, (count, LENGTH): 1}


def test_random_numbers_are_drawn_in_the_thread_that_reads_the_latents(unet, dit):
    assert unet.threads == dit.threads == {"prefetch"}


def test_a_frozen_text_encoder_is_called_once_per_step_without_gradients_a_trained_one_per_micro_batch_with_them(unet, dit):
    for step in (2, 3, 4, 5):
        (count, with_gradients), = dit.steps["step", step].calls
        assert 1 < count <= 4 and not with_gradients
        assert len(unet.steps["step", step].calls) == 2 and all(grad and count <= 2 for count, grad in unet.steps["step", step].calls)


@pytest.mark.parametrize("words, steps", [
    ([], {}), (["--sampler", "ddim", "--eta", "1"], {"tinyldm/diffusion/noise.py randn_like: to": 2})])     # none in the last step
def test_drawing_waits_before_and_after_all_steps_and_in_these_only_for_fresh_noise(folder, unet, words, steps):
    sample, gpu = load_script("sample"), PretendGpu()
    model = str(folder / "unet" / "checkpoints" / "step-000005" / "model")
    words = ["-n", "2", "--steps", "3", "--cfg", "3", "--model", model, "--out", str(folder / "drawn"), *words]
    sample.ARGS = sample.parse(["a red fox", *words])
    opened, open_model = [], sample.open_model
    sample.open_model = lambda args: (open_model(args), opened.append(len(gpu.events)))[0]
    with gpu:
        sample.main()
    assert not gpu.mixed and gpu.waits(opened[0]) == DRAWING | steps


# ---------------------------------------------------------------- one by one


def test_an_update_that_is_kept_waits_for_nothing():
    with PretendGpu() as gpu:
        meter = Meter(GPU)
        meter.add(torch.ones(4).to(GPU), 0.25, torch.rand(4).to(GPU))
        start = len(gpu.events)
        meter.keep(3.0)
        assert gpu.waits(start) == {}
        assert meter.row() | {"t_bins": None} == {"loss": 1.0, "grad_norm": 3.0, "t_bins": None}


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "flow"])
def test_the_tables_of_a_process_are_copied_to_the_device_once(name):
    process = make_process(name)
    with PretendGpu() as gpu:
        t, x0 = torch.rand(4).to(GPU), torch.randn(4, 2, 2, 2).to(GPU)
        net = lambda x, t, cond: torch.cat([x, x], 1)[:, :2 if name == "flow" else 4]
        how = dict(prediction="flow" if name == "flow" else "eps")
        first = sample_losses(net, x0, x0, t, None, process, **how)
        start = len(gpu.events)
        again = sample_losses(net, x0, x0, t, None, process, **how)
        assert gpu.waits(start) == {} and not gpu.mixed
    assert torch.equal(first, again)
    assert torch.equal(again, sample_losses(net, *(tensor.clone() for tensor in (x0, x0, t)), None, process, **how))


def test_without_page_locked_memory_a_batch_is_copied_all_the_same_and_that_is_said_once(monkeypatch, capsys):
    asked = []

    def nothing_left(tensor):
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(device, "pin_refusals", [])
    with PretendGpu() as gpu, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", nothing_left)
        for _ in range(2):
            assert device.upload(torch.arange(3), GPU).device == GPU
    assert [event.kind for event in gpu.events] == ["wait"] * 2 and len(asked) == 1
    assert capsys.readouterr().out.startswith("no pinned memory for batches (CUDA error: out of memory): ")


def test_only_copies_from_pinned_memory_are_not_waited_for():
    """PyTorch #189690: MPS reads ordinary memory later, when the caller may have freed it."""
    for pinned in (False, True):
        tensor = SimpleNamespace(device=torch.device("cpu"), is_pinned=lambda pinned=pinned: pinned,
                                 to=lambda where, non_blocking: (where.type, non_blocking))
        assert device.upload(tensor, torch.device("mps")) == ("mps", pinned)


# ---------------------------------------------------------------- sizes, for each of which torch.compile makes a graph


class Held(NamedTuple):
    x: torch.Tensor
    nothing: torch.Tensor | None


@pytest.mark.parametrize("count, largest, sizes", [
    (100, 64, {50}), (128, 64, {64}), (1000, 64, {50}), (40, 64, {40}), (101, 64, {50, 51}), (15, 8, {5}), (7, 1, {1})])
def test_validation_has_micro_batches_of_one_size_where_that_is_possible(count, largest, sizes):
    seen, batch = [], Held(torch.ones(count), None)
    losses = lambda micro, progress: seen.append(len(micro.x)) or micro.x
    Validation(batch, largest, torch.device("cpu"), losses, lambda micro, device: micro)()
    assert set(seen) == sizes and sum(seen) == count and len(seen) == equal_parts(count, largest)
