"""What a training step does, in which order and with which weights: seen from outside, in a run of train.py."""

import sys

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, pictures, train_here
from outcomes import awake, flags

from tinyldm.config import parse
from tinyldm.folders.load import load_model
from tinyldm.objectives.denoising import Denoising
from tinyldm.training import second_stage
from tinyldm.training.ema import EMA
from tinyldm.training.learner import Learner
from tinyldm.training.validation import Validation

TINY = dict(resolution=8, autoencoder="kl", vae=dict(latent_channels=8, widths=(8, 8), groups=4, depth=1, middle_attention=False),
            vae_steps=1, vae_batch_size=2,
            network="dit", dit=dict(patch=2, width=8, layers=1, heads=1, mlp_width=8, time_dim=8), lr=0.1, muon_lr=0.1,
            text=dict(width=8, layers=1, heads=1, mlp_width=8, context_length=16), batch_size=4, max_steps=3, warmup_steps=0, decay=0.0,
            log_every=1, save_every=1, val_every=1, sample_every=1, sample_prompts="a red fox", sample_steps=1, dtype="fp32", keep_last=9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Settings of a run on a few pictures, with an autoencoder."""
    folder = tmp_path_factory.mktemp("step")
    data = dict(data=[str(pictures(folder / "data", 12, (12, 12)))])
    with pytest.MonkeyPatch.context() as patch:
        train_here(load_script("train"), ["--out", str(folder / "run"), *flags(TINY | data | dict(max_steps=1, sample_every=0))], patch)
    return TINY | data | dict(vae_weights=str(folder / "run" / "vae"))


@pytest.fixture
def run(prepared, tmp_path, monkeypatch):
    """A function: train with these settings, in tmp_path."""
    monkeypatch.setattr(second_stage, "new_network", awake(second_stage.new_network))
    train = load_script("train")

    def run(**settings):
        train_here(train, ["--out", str(tmp_path), *flags(prepared | settings)], monkeypatch)
    run.train = train
    return run


def spy(monkeypatch, owner, name: str, look) -> None:
    """Call look(*arguments) before owner.name(*arguments)."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **options: (look(*arguments, **options), real(*arguments, **options))[1])


def values(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.parameters.items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 0) -> bool:
    return one.keys() == two.keys() and all((one[name] - two[name]).abs().max() <= tolerance for name in one)


def stored(run, step: int, ema: bool) -> dict[str, torch.Tensor]:
    """The weights in the model folder of a checkpoint."""
    model = load_model(run / "checkpoints" / f"step-{step:06d}" / "model", ema=ema)
    return {f"{part}.{name}": p.detach() for part in ("net", "text") for name, p in model.modules[part].named_parameters()}


def test_a_step_does_its_parts_in_this_order(run, monkeypatch):
    done = []
    for owner, name, label in [(run.train, "clip", "clip"), (Learner, "update", "update"), (Learner, "average", "average"),
                               (Denoising, "after_step", "after step"), (Learner, "log_row", "row"), (Validation, "measure", "validation"),
                               (second_stage.LatentStage, "draw_samples", "pictures"), (run.train.Trainer, "save", "checkpoint")]:
        spy(monkeypatch, owner, name, lambda *_, label=label, **__: done.append(label))
    spy(monkeypatch, torch.Tensor, "backward", lambda *_: done.append("backward"))
    run(grad_accum=2, max_steps=2)
    step = ["backward", "backward", "clip", "update", "average", "after step", "row", "validation", "pictures", "checkpoint"]
    assert done == 2 * step


def test_gradients_are_clipped_to_the_limit_before_the_update_and_the_row_tells_their_norm_before(run, monkeypatch, tmp_path):
    norms, clipped = [], []
    spy(monkeypatch, run.train, "clip", lambda weights, limit: norms.append(torch.nn.utils.get_total_norm([p.grad for p in weights])))
    spy(monkeypatch, Learner, "update", lambda learner, turn, norm, *_, **__: clipped.append(
        (norm, torch.nn.utils.get_total_norm([p.grad for p in learner.weights(turn)]))))
    run(grad_clip=0.01)
    assert len(norms) == 3 and min(norms) > 0.02
    for before, (told, after) in zip(norms, clipped):
        assert told == pytest.approx(before.item()) and after.item() == pytest.approx(0.01, rel=1e-3)


def test_the_stored_model_is_the_average_of_the_weights_of_all_steps_and_its_non_ema_variant_the_last_ones(run, monkeypatch, tmp_path):
    seen = []                                                   # the initial weights, then those after each update
    spy(monkeypatch, Learner, "update", lambda learner, *_, **__: seen.append(values(learner)) if not seen else None)
    spy(monkeypatch, Learner, "average", lambda learner, step: seen.append(values(learner)))
    run(ema_decay=0.15)
    average = seen[0]
    for n, weights in enumerate(seen[1:], 1):
        decay = min(0.15, n / (n + 9))
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in weights.items()}
    assert equal(stored(tmp_path, 3, ema=True), average, 1e-6) and equal(stored(tmp_path, 3, ema=False), seen[3])
    assert not equal(average, seen[3], 1e-3)


def test_sample_grids_are_drawn_with_the_averages_and_training_goes_on_with_the_weights(run, monkeypatch, tmp_path):
    drawn, modes, trained = [], [], []
    spy(monkeypatch, second_stage, "draw", lambda model, prompts, seeds, how: drawn.append(
        {f"{part}.{name}": p.detach().clone() for part in ("net", "text") for name, p in model.modules[part].named_parameters()}))
    spy(monkeypatch, second_stage, "draw", lambda model, prompts, seeds, how: modes.append((model.net.training, [*prompts], [*seeds])))
    spy(monkeypatch, Learner, "update", lambda learner, *_, **__: trained.append(values(learner)))
    run()
    for step in (1, 2, 3):
        averages, weights = (stored(tmp_path, step, ema) for ema in (True, False))
        assert equal(drawn[step - 1], averages) and not equal(averages, weights, 1e-3)
    assert equal(trained[1], stored(tmp_path, 1, ema=False)) and equal(trained[2], stored(tmp_path, 2, ema=False))
    assert modes == 3 * [(False, ["a red fox"] * 2, [0, 1])]    # the same prompts and seeds in every grid


def test_val_raw_and_val_ema_are_the_losses_of_the_weights_and_of_their_averages(run, monkeypatch):
    expected, measure = [], Validation.measure

    def measured(validation, ema, progress):
        found, raw = measure(validation, ema, progress), {name: p.detach().clone() for name, p in ema.parameters.items()}
        losses = []
        for weights in (raw, ema.shadow, raw):
            with torch.no_grad():
                for name, p in ema.parameters.items():
                    p.copy_(weights[name])
            losses.append(validation(progress)["loss"])
        expected.append(losses)
        assert (found["val_raw"], found["val_ema"]) == pytest.approx(losses[:2], rel=1e-6) and losses[0] == losses[2]
        return found

    monkeypatch.setattr(Validation, "measure", measured)
    run(val_samples=4)
    assert len(expected) == 3 and all(abs(raw - averaged) > 1e-3 * raw for raw, averaged, _ in expected)


def test_averages_move_in_every_step_with_its_number_also_after_an_update_that_was_skipped(run, monkeypatch):
    counted, calls, real = [], [], Denoising.losses

    def losses(objective, turn, networks, batch, progress):
        calls.append(torch.is_grad_enabled())
        return real(objective, turn, networks, batch, progress) * (float("nan") if sum(calls) == 2 and calls[-1] else 1)

    monkeypatch.setattr(Denoising, "losses", losses)
    spy(monkeypatch, EMA, "update", lambda ema, n: counted.append(n))
    run(max_steps=4)
    assert counted == [1, 2, 3, 4]


def test_after_a_rollback_samples_noise_times_and_captions_are_those_of_later_batches(run, monkeypatch, tmp_path):
    """Position: steps and skipped batches together. What it names is the same, whichever way led there."""
    draw, trainer, seen = Denoising.draw, run.train.Trainer, {0: [], 2: []}

    def drawn(objective, samples, *more):
        seen[skipped].append((samples.samples, draw(objective, samples, *more)))
        return seen[skipped][-1][1]

    monkeypatch.setattr(Denoising, "draw", drawn)
    monkeypatch.setattr(run.train, "Trainer", lambda stage, context, last, _: trainer(stage, context, last, skipped))
    for skipped, steps in ((0, 4), (2, 2)):
        run(out=str(tmp_path / str(skipped)), max_steps=steps, caption_dropout=0.5)
    for (samples, batch), (others, other) in zip(seen[2], seen[0][2:], strict=True):
        assert np.array_equal(samples, others) and all(one is two is None or torch.equal(one, two) for one, two in zip(batch, other))


@pytest.mark.parametrize("device, asked, expected", [
    ("cpu", False, ["plain attention", "same bits"]), ("cuda", True, ["same bits"]), ("cuda", False, [])])
def test_training_on_a_cpu_is_deterministic_and_on_a_gpu_where_that_is_asked_for(monkeypatch, device, asked, expected):
    train, called = load_script("train"), []

    def stop(config):
        raise ValueError("far enough")

    train.CONFIG, train.ARGS = parse(flags(dict(deterministic=asked)), "", train.FLAGS)
    for name, value in {"pick_device": lambda name: torch.device(device), "check_run": stop,
                        "prefer_plain_attention": lambda: called.append("plain attention"),
                        "deterministic": lambda: called.append("same bits")}.items():
        monkeypatch.setattr(train, name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))      # which main() wraps
    with pytest.raises(ValueError, match="far enough"):
        train.main()
    assert called == expected


def test_a_u_net_is_trained_in_channels_last_on_a_cpu(tmp_path, monkeypatch):
    seen, real = [], Denoising.losses

    def losses(self, turn, networks, *rest):
        seen.append(networks["net"].conv_out.weight.is_contiguous(memory_format=torch.channels_last))
        return real(self, turn, networks, *rest)

    monkeypatch.setattr(Denoising, "losses", losses)
    train_here(load_script("train"), [*SMALL, "--max-steps", "1", "--sample-every", "0", "--out", str(tmp_path / "run")], monkeypatch)
    assert seen and all(seen)
