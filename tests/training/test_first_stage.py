"""An autoencoder that is trained for its own sake (--only vae): what is held out, when training ends, which weights it ends with."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_script, pictures, thinned, train_here
from PIL import Image
from safetensors.torch import load_file

from tinyldm.config.presets import PRESETS
from tinyldm.config import parse
from tinyldm.folders.load import load_vae
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.pictures.pixels import to_pixels
from tinyldm.training import checkpoint, first_stage, vae_validation
from tinyldm.training.early_stopping import EarlyStopping
from tinyldm.training.log import read
from tinyldm.training.vae_validation import VAEValidation

KL = "--autoencoder kl --vae widths=8,16 groups=4 depth=1 middle_attention=false".split()
TAESD_WORDS = "--autoencoder taesd --vae width=8 blocks=1,1".split()
WORDS = ("--only vae --scenes 40 --resolution 16 --vae-batch-size 4 --vae-steps 6 --vae-val-every 2 --save-every 2 --keep-last 99 "
         "--log-every 1 --warmup-steps 2 --dtype fp32 --val-samples 4").split()


def train(folder: Path, monkeypatch, *words, kind=KL) -> Path:
    train_here(load_script("train"), ["--out", str(folder), *WORDS, *kind, *map(str, words)], monkeypatch)
    return folder


def rows(run: Path, name: str) -> dict:
    """step -> a value of the log."""
    return {row["step"]: row[name] for row in read(run / "log.jsonl") if name in row}


def tensors(folder: Path) -> dict:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def some_pixels() -> torch.Tensor:
    return to_pixels(np.random.default_rng(0).integers(256, size=(2, 16, 16, 3), dtype=np.uint8))


# ---------------------------------------------------------------- the result


@pytest.mark.parametrize("kind, name", [(KL, "AutoencoderKL"), (TAESD_WORDS, "AutoencoderTiny")])
def test_the_result_is_a_folder_that_diffusers_opens_with_the_same_pictures(tmp_path, monkeypatch, kind, name):
    run = train(tmp_path / "run", monkeypatch, kind=kind)
    left = ["checkpoints", "config.json", "launch", "log.jsonl", "report.html", "running.json", "samples", "vae"]
    assert sorted(path.name for path in run.iterdir()) == left
    theirs, ours = getattr(importlib.import_module("diffusers"), name).from_pretrained(run / "vae"), load_vae(run / "vae")
    x = some_pixels()
    with torch.no_grad():
        z = theirs.encode(x).latents if name == "AutoencoderTiny" else theirs.encode(x).latent_dist.mean
        torch.testing.assert_close(z, ours.encode(x).mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.decode(z).sample, ours.decode(z), atol=1e-5, rtol=1e-5)
    assert theirs.config.scaling_factor == pytest.approx(ours.config.scaling_factor) != 1


def test_the_second_stage_of_another_run_takes_the_result(tmp_path, monkeypatch):
    run = train(tmp_path / "run", monkeypatch, kind=TAESD_WORDS)
    words = ("--scenes 24 --resolution 16 --batch-size 4 --max-steps 1 --sample-steps 1 "
             "--unet widths=16,32 attention=False,True heads=1,2 groups=4 --text width=16 layers=1 heads=2 mlp_width=32").split()
    train_here(load_script("train"), ["--out", str(tmp_path / "next"), "--vae-weights", str(run / "vae"), *words], monkeypatch)
    assert_same(tensors(run / "vae"), tensors(tmp_path / "next" / "vae"))


@torch.no_grad()
@pytest.mark.parametrize("vae", [AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4)), TAESD(TAESDConfig(width=8, blocks=(1, 1))),
                                 AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4, quant_convs=False))])
def test_standardised_latents_have_unit_variance_around_their_means_and_decode_as_before(vae):
    x = some_pixels()
    z = vae.encode(x).mean
    decoded = vae.decode(z)
    vae.standardise(z)
    now = vae.encode(x).mean
    latents = vae.to_latents(now)
    torch.testing.assert_close(vae.decode(vae.from_latents(latents)), decoded, atol=1e-5, rtol=1e-5)
    own = isinstance(vae, AutoencoderKL) and not vae.config.quant_convs         # one number stands for the means of all channels
    around = z.mean() if own else z.mean((0, 2, 3), keepdim=True)
    assert vae.config.scaling_factor == pytest.approx(float(1 / (z - around).std()), rel=1e-5)
    if isinstance(vae, TAESD):
        assert torch.equal(now, z) and vae.config.shift_factor == 0
    elif own:
        assert torch.equal(now, z) and abs(latents.mean()) < 1e-5
        assert vae.config.shift_factor == pytest.approx(float(z.mean((0, 2, 3)).mean()))
    else:
        assert latents.mean((0, 2, 3)).abs().max() < 1e-5 and vae.config.shift_factor == 0


def test_convolutions_without_norms_train_in_channels_last_and_those_with_norms_do_not(tmp_path, monkeypatch):
    seen, real = [], AutoencoderObjective.losses

    def losses(self, turn, networks, batch, progress):
        weight = next(p for p in networks["vae"].parameters() if p.ndim == 4 and p.shape[2:] == (3, 3))
        seen.append([x.is_contiguous(memory_format=torch.channels_last) for x in (weight, batch.pixels)])
        return real(self, turn, networks, batch, progress)

    monkeypatch.setattr(AutoencoderObjective, "losses", losses)
    train(tmp_path / "kl", monkeypatch, "--vae-steps", 1, "--vae-val-every", 0)
    train(tmp_path / "taesd", monkeypatch, "--vae-steps", 1, "--vae-val-every", 0, kind=TAESD_WORDS)
    assert seen == [[False, False], [True, True]]


# ---------------------------------------------------------------- what is held out, and what is measured on it


def test_held_out_pictures_are_never_trained_on(tmp_path, monkeypatch):
    drawn, real = [], AutoencoderObjective.draw
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(40):                                         # each is known by its colour; captions are not needed
        Image.new("RGB", (16, 16), (6 * i, 0, 0)).save(folder / f"{i:02d}.png")
    monkeypatch.setattr(AutoencoderObjective, "draw", lambda self, samples, *more: drawn.extend(samples[:, 0, 0, 0] // 6) or
                        real(self, samples, *more))
    held_out, init = [], VAEValidation.__init__
    monkeypatch.setattr(VAEValidation, "__init__", lambda self, batch, *more: held_out.extend(
        ((batch.pixels[:, 0, 0, 0] + 1) * 127.5 / 6).round().int().tolist()) or init(self, batch, *more))
    words = ["--data", folder, "--vae-batch-size", 20, "--vae-steps", 12, "--vae-val-every", 6, "--val-samples", 3]
    train(tmp_path / "run", monkeypatch, *words)
    assert held_out == [0, 20, 39] and {*drawn} == {*range(40)} - {*held_out}


def test_validations_log_the_loss_and_psnr_of_the_means_and_draw_what_was_held_out(tmp_path, monkeypatch):
    kept, real = [], vae_validation.write_grid
    monkeypatch.setattr(vae_validation, "write_grid", lambda file, *pair: kept.append(pair) or real(file, *pair))
    run = train(tmp_path / "run", monkeypatch)
    assert [*rows(run, "val_psnr")] == [2, 4, 6] and rows(run, "val_raw").keys() == rows(run, "val_psnr").keys()
    images, _ = kept[-1]
    vae = load_vae(run / "checkpoints" / "vae-000006" / "vae")
    with torch.no_grad():
        posterior = vae.encode(to_pixels(images))
        decoded = vae.decode(posterior.mean)
    error = decoded - to_pixels(images)
    loss = error.abs().mean() + error.square().mean() + 0.012288 / (3 * 16 * 16) * posterior.kl().mean()
    assert rows(run, "val_raw")[6] == pytest.approx(float(loss), rel=1e-5)
    bytes_off = ((decoded.clamp(-1, 1) + 1) * 127.5).round() - (to_pixels(images) + 1) * 127.5
    psnr = -10 * (bytes_off / 255).square().mean((1, 2, 3)).log10()
    assert rows(run, "val_psnr")[6] == pytest.approx(float(psnr.mean()), abs=1e-3)
    assert rows(run, "latents")[6]["std"] == pytest.approx(posterior.mean.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


def test_the_grid_has_originals_reconstructions_and_four_times_their_difference(tmp_path):
    images, decoded = np.full((2, 4, 4, 3), 100, np.uint8), np.full((2, 4, 4, 3), 110, np.uint8)
    decoded[1] = 0
    vae_validation.write_grid(tmp_path / "grid.png", images, decoded)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (3 * 6 - 2, 2 * 6 - 2, 3)
    assert [[int(sheet[y, x, 0]) for x in (0, 6)] for y in (0, 6, 12)] == [[100, 100], [110, 0], [40, 255]]


def test_a_resumed_run_refuses_pictures_that_would_mix_held_out_ones_with_others(tmp_path, monkeypatch):
    run = train(tmp_path / "run", monkeypatch)
    shutil.rmtree(run / "vae"), shutil.rmtree(run / "checkpoints" / "vae-000006")
    for words in (["--vae-pictures", "20"], ["--vae-val-every", "0"]):
        with pytest.raises(ValueError, match="some would be both trained on and validated on"):
            train_here(load_script("train"), ["--out", str(run), "--resume", "yes", *words], monkeypatch)


# ---------------------------------------------------------------- early stopping


def test_patience_counts_validations_since_the_smallest_loss():
    stopping = EarlyStopping(patience=2)
    seen = [(stopping.better(step, loss), stopping.over) for step, loss in enumerate((3.0, 1.0, 2.0, 0.5, float("nan"), 0.5), 1)]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (stopping.step, stopping.loss) == (4, 0.5)
    again = EarlyStopping(patience=3)
    again.load(json.loads(json.dumps(stopping.state())), {})
    assert not again.over and again.since == 2
    assert not EarlyStopping(0).over


LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.1}


def scripted(monkeypatch, name="val_raw"):
    """Validations find these losses, the best one at step 4."""
    steps = iter(LOSSES.values())
    monkeypatch.setattr(VAEValidation, "measure", lambda self, ema, progress: {name: next(steps)})


@pytest.mark.parametrize("ema", thinned(2, [["--vae-ema", "0.5"], []]))
def test_early_stopping_ends_when_its_patience_does_with_the_weights_of_the_best_validation(tmp_path, monkeypatch, capsys, ema):
    scripted(monkeypatch, "val_ema" if ema else "val_raw")
    run = train(tmp_path / "run", monkeypatch, "--vae-steps", 20, "--early-stop", 2, *ema, "--vae-freeze", "encoder", "--vae-init",
                train(tmp_path / "first", monkeypatch, "--vae-val-every", 0) / "vae", kind=[])
    assert max(rows(run, "loss")) == 8 and rows(run, "event") == {8: "early stop"}
    assert "the weights of step 4, with the smallest validation loss, 1" in capsys.readouterr().out
    assert_same(tensors(run / "vae"), tensors(run / "checkpoints" / "vae-000004" / "vae"))      # averages, where there are some
    assert (run / "checkpoints" / "vae-000004" / "vae" / "diffusion_pytorch_model.non_ema.safetensors").exists() == bool(ema)


@pytest.mark.parametrize("died", thinned(3, [6, 4, 8]))
def test_a_run_that_is_interrupted_at_any_validation_stops_early_at_the_same_step_with_the_same_weights(tmp_path, monkeypatch, died):
    words = ["--vae-steps", 20, "--early-stop", 2, "--vae-ema", 0.5]
    scripted(monkeypatch, "val_ema")
    whole = train(tmp_path / "whole", monkeypatch, *words)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "vae")
    for folder in checkpoint.names(run):
        if int(folder.name[-6:]) > died:
            shutil.rmtree(folder)
    left = iter([loss for step, loss in LOSSES.items() if step > died])
    monkeypatch.setattr(VAEValidation, "measure", lambda self, ema, progress: {"val_ema": next(left)})
    train_here(load_script("train"), ["--out", str(run), "--resume", "yes"], monkeypatch)
    assert_same(tensors(run / "vae"), tensors(whole / "vae"))
    assert rows(run, "event") == rows(whole, "event") == {8: "early stop"} and rows(run, "loss") == rows(whole, "loss")


def test_validations_count_for_early_stopping_only_once_the_adversarial_loss_has_grown_up(tmp_path, monkeypatch):
    """Before that the loss is another one: its minimum would always be the one without a discriminator."""
    steps = iter([1.0, 2.0, 3.0, 2.5, 4.0])
    monkeypatch.setattr(VAEValidation, "measure", lambda self, ema, progress: {"val_raw": next(steps)})
    gan = "--vae-loss gan=0.5 --vae-gan start=0.2 warmup=0.3 width=8 layers=1 norm=none".split()        # 0.5 of 10 steps
    run = train(tmp_path / "run", monkeypatch, "--vae-steps", 10, "--early-stop", 9, *gan)
    state = checkpoint.read_state(run / "checkpoints" / "vae-000010")
    assert state["early_stopping"] == {"loss": 2.5, "step": 8, "since": 1}


# ---------------------------------------------------------------- averages, weights of others, time


def test_the_result_is_the_average_that_was_asked_for_and_a_resumed_run_has_the_same(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", monkeypatch, "--vae-ema", 0.3, "--save-every", 1)
    folders = [whole / "checkpoints" / f"vae-{step:06d}" / "vae" for step in range(1, 7)]
    raw = [load_file(folder / "diffusion_pytorch_model.non_ema.safetensors")["decoder.conv_in.weight"] for folder in folders]
    average = tensors(folders[0])["decoder.conv_in.weight"]
    for n, weight in enumerate(raw[1:], 2):
        decay = min(0.3, n / (n + 9))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(tensors(whole / "vae")["decoder.conv_in.weight"], average)
    assert not torch.equal(raw[-1], average)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "vae"), shutil.rmtree(run / "checkpoints" / "vae-000005"), shutil.rmtree(run / "checkpoints" / "vae-000006")
    train_here(load_script("train"), ["--out", str(run), "--resume", "yes"], monkeypatch)
    assert_same(tensors(run / "vae"), tensors(whole / "vae"))


def test_with_a_frozen_encoder_the_decoder_alone_is_trained_and_latents_keep_their_scale(tmp_path, monkeypatch):
    first = train(tmp_path / "first", monkeypatch)
    run = train(tmp_path / "run", monkeypatch, "--vae-init", first / "vae", "--vae-freeze", "encoder", kind=[])
    before, after = tensors(first / "vae"), tensors(run / "vae")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (first, run)]
    assert configs[0] == configs[1]
    whole = train(tmp_path / "whole", monkeypatch, "--vae-init", first / "vae", kind=[])
    assert not any(torch.equal(before[name], tensor) for name, tensor in tensors(whole / "vae").items() if "weight" in name)


def test_a_run_that_begins_with_the_weights_of_others_goes_on_without_them(tmp_path, monkeypatch):
    first = train(tmp_path / "first", monkeypatch, kind=TAESD_WORDS)
    whole = train(tmp_path / "whole", monkeypatch, "--vae-init", first / "vae", kind=[])
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "vae"), shutil.rmtree(tmp_path / "run" / "checkpoints" / "vae-000006"), shutil.rmtree(first)
    train_here(load_script("train"), ["--out", str(tmp_path / "run"), "--resume", "yes"], monkeypatch)
    assert_same(tensors(tmp_path / "run" / "vae"), tensors(whole / "vae"))


def test_a_budget_counts_for_the_only_stage_there_is(tmp_path, monkeypatch):
    settings = first_stage.optimisation(parse([*WORDS, "--budget", "1h"], "")[0])
    assert (settings.budget, settings.max_steps) == ("1h", 0)
    settings = first_stage.optimisation(parse(["--budget", "1h"], "")[0])       # of two stages, the first has its number of steps
    assert (settings.budget, settings.max_steps) == ("", PRESETS["tiny"]["vae_steps"])
    run = train(tmp_path / "run", monkeypatch, "--budget", "1s", "--vae-val-every", 0)
    assert (run / "vae").is_dir()


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    run = train(tmp_path / "run", monkeypatch)
    before = tensors(run / "vae")
    train_here(load_script("train"), ["--out", str(run), "--resume", "yes", "--vae-steps", "9"], monkeypatch)
    assert_same(tensors(run / "vae"), before)
    assert f"to train it further, begin another run with --vae-init {run / 'vae'}" in capsys.readouterr().out


def test_pictures_without_captions_are_good_enough(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "data", 12)
    for file in [*folder.glob("*.txt"), *folder.glob("*.json")]:
        file.unlink()
    assert (train(tmp_path / "run", monkeypatch, "--data", folder, "--vae-val-every", 0) / "vae").is_dir()
