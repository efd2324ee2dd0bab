"""Averages after the fact: from a run whose weights went a known way, the average of any width is a known one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import randomise, script, small_text, thinned, weights
from safetensors import safe_open

from tinyldm import reconstruct
from tinyldm.cli import guard
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.training import checkpoint
from tinyldm.training.ema import to_gamma
from tinyldm.vendor_loaders.scheduler import to_config

STEPS = (100, 200, 300, 400)
DEFAULTS = {"preset": "tiny", "resolution": 16, "sampler": "euler", "steps": 2, "cfg": 3.0}


@pytest.fixture(scope="module")
def parts():
    tokenizer, text = small_text()
    return SimpleNamespace(
        dit=randomise(DiT(DiTConfig(width=16, layers=1, heads=2, mlp_width=16, context_dim=32, time_dim=16)), 1),
        mmdit=randomise(MMDiT(MMDiTConfig(in_channels=4, out_channels=4, width=16, layers=2, heads=2, context_dim=32, pooled_dim=32,
                                          max_positions=4, sample_size=8)), 6),
        unet=randomise(UNet(UNetConfig(widths=(8,), depth=1, attention=(True,), heads=(2,), context_dim=32, groups=4, sample_size=8)), 2),
        vae=randomise(AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4, sample_size=16)), 3),
        text=randomise(CLIPText(text), 4), second=randomise(CLIPText(replace(text, projection_dim=8)), 5), tokenizer=tokenizer)


def course(sigma_rel, step):
    """The average, of this width after this step, of weights that are 1 + (s / 400)^2 times their first value."""
    gamma, s = to_gamma(sigma_rel), np.arange(1, step + 1, dtype=np.float64)
    shares = s ** (gamma + 1) - (s - 1) ** (gamma + 1)
    return float((shares * (1 + (s / 400) ** 2)).sum() / step ** (gamma + 1))


@pytest.fixture
def make_run(parts, tmp_path):
    """make_run(network, ...) writes a run as train.py leaves it: averages of every width at every step."""
    def make(network="dit", widths=("0.05", "0.1"), steps=STEPS, text_weights="", encoders=1, name_of=lambda name: name):
        run, net = tmp_path / f"run-{network}", getattr(parts, network)
        texts = dict(list({"text": parts.text, "text_2": parts.second}.items())[:encoders])
        trained = {"net": net} if text_weights else {"net": net} | texts
        scheduler = to_config("flow", {}, "flow", "euler", flow_match=network != "unet")
        for step in steps:
            at = lambda part, width: {name: x * course(float(width), step) for name, x in trained[part].named_parameters()}
            raw = {part: {name: x * 7 for name, x in module.state_dict().items()} for part, module in trained.items()}
            averaged = {part: (module, module.state_dict() | at(part, widths[0])) for part, module in trained.items()}

            def fill(folder):
                save_model(folder / "model", net=averaged["net"], vae=parts.vae, non_ema=raw,
                           texts=[averaged.get(part, module) for part, module in texts.items()],
                           tokenizers=[parts.tokenizer] * encoders, scheduler=scheduler, defaults=DEFAULTS | {"step": step})
                checkpoint.save_tensors(folder / "averages.safetensors", {
                    f"{float(width)}/{part}.{name_of(name)}": x
                    for width in widths[1:] for part in trained for name, x in at(part, width).items()})

            checkpoint.write(run, "step", step, fill, {}, keep=9)
        (run / "config.json").write_text(json.dumps({"preset": "tiny", "ema_widths": list(widths), "text_weights": text_weights}))
        return run
    return make


@pytest.fixture
def made(monkeypatch, tmp_path, capsys):
    """made(run, "--flag", ...) runs the command in this process -> the folder that it wrote."""
    def call(run, *words):
        folder = tmp_path / "made"
        monkeypatch.setattr(reconstruct, "ARGS", reconstruct.parse([str(run), "--out", str(folder), *map(str, words)]), raising=False)
        guard(reconstruct.main)
        return folder
    return call


def scale(tensors, first):
    """The number that all tensors are multiples by of the first ones."""
    ratios = torch.cat([(x / first[name]).flatten() for name, x in tensors.items()])
    assert ratios.max() - ratios.min() < 1e-5
    return ratios.double().mean().item()


@pytest.mark.parametrize("network, words, width, step", [
    *thinned(3, [("mmdit", ["--width", 0.08], 0.08, 400), ("unet", ["--width", 0.06, "--step", 300], 0.06, 300),
                 ("dit", ["--width", 0.08], 0.08, 400)])])
def test_an_average_of_another_width_and_step_is_the_one_training_would_have_kept(parts, make_run, made, network, words, width, step):
    model = load_model(made(make_run(network), *words))
    expected = course(width, step)
    for part, first in (("net", getattr(parts, network)), ("text", parts.text)):
        found = dict(model.modules[part].named_parameters())
        assert scale(found, dict(first.named_parameters())) == pytest.approx(expected, abs=4e-3)
        assert all(torch.equal(x, dict(first.named_buffers())[name]) for name, x in model.modules[part].named_buffers())
    assert min(abs(expected - course(other, 400)) for other in (0.05, 0.1)) > 5e-3            # not just one of those kept


@pytest.mark.slow
def test_averages_of_older_runs_name_the_one_block_of_a_u_net_s_transformer_without_a_number(parts, make_run, made):
    run = make_run("unet", name_of=lambda name: name.replace(".blocks.0.", ".block."))
    with safe_open(run / "checkpoints" / "step-000400" / "averages.safetensors", "np") as tensors:
        assert any(".attentions.0.block.norm1." in name for name in tensors.keys())
    model = load_model(made(run, "--width", 0.06, "--step", 300))
    assert scale(model.net.state_dict(), parts.unet.state_dict()) == pytest.approx(course(0.06, 300), abs=4e-3)


@pytest.mark.parametrize("width", thinned(2, [0.05, 0.1]))
def test_a_width_that_was_kept_comes_out_as_it_was(parts, make_run, made, width, capsys):
    model = load_model(made(make_run(), "--width", width, "--step", 200))
    assert scale(model.net.state_dict(), parts.dit.state_dict()) == pytest.approx(course(width, 200), abs=1e-6)
    assert ": 0.0% off" in capsys.readouterr().out


def test_all_but_the_weights_is_the_newest_checkpoint_s(make_run, made):
    run = make_run()
    folder, newest = made(run, "--width", 0.08, "--step", 300), run / "checkpoints" / "step-000400" / "model"
    names = lambda model: {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    raw = {name for name in names(newest) if "non_ema" in name}
    assert raw and names(folder) == names(newest) - raw
    other = {name for name in names(folder) if (folder / name).read_bytes() != (newest / name).read_bytes()}
    assert other == {"tinyldm.json", "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert json.loads((folder / "tinyldm.json").read_text()) == DEFAULTS | {"step": 300, "ema_width": 0.08}


def test_a_frozen_text_encoder_is_taken_as_it_is(parts, make_run, made):
    model = load_model(made(make_run(text_weights="openai/clip-vit-large-patch14"), "--width", 0.08))
    assert scale(model.net.state_dict(), parts.dit.state_dict()) == pytest.approx(course(0.08, 400), abs=2e-3)
    assert scale(model.modules["text"].state_dict(), parts.text.state_dict()) == 1


def test_every_text_encoder_is_averaged(parts, make_run, made):
    run = make_run(encoders=2)
    folder = made(run, "--width", 0.08)
    model, expected = load_model(folder), course(0.08, 400)
    assert list(model.text.modules) == ["text", "text_2"] and (folder / "tokenizer_2").is_dir()
    for part, first in (("net", parts.dit), ("text", parts.text), ("text_2", parts.second)):
        assert scale(model.modules[part].state_dict(), first.state_dict()) == pytest.approx(expected, abs=4e-3)


def test_all_widths_that_were_kept_are_used(parts, make_run, made, capsys):
    """A width beyond two of three: the third one's tensors make it."""
    model = load_model(made(make_run(widths=("0.05", "0.1", "0.2")), "--width", 0.17))
    assert scale(model.net.state_dict(), parts.dit.state_dict()) == pytest.approx(course(0.17, 400), abs=4e-3)


def test_checkpoints_of_stage_1_are_passed_over(parts, make_run, made, capsys):
    run = make_run()
    checkpoint.write(run, "vae", 300, lambda folder: None, {}, keep=9)
    model = load_model(made(run, "--width", 0.08))
    assert scale(model.net.state_dict(), parts.dit.state_dict()) == pytest.approx(course(0.08, 400), abs=4e-3)
    assert "at step 100, 200, 300, 400" in capsys.readouterr().out


def test_damaged_checkpoints_are_left_out_and_named(parts, make_run, made, capsys):
    run = make_run()
    (run / "checkpoints" / "step-000400" / "averages.safetensors").write_bytes(b"cut")
    model = load_model(made(run, "--width", 0.08))
    assert "checkpoint step-000400 is damaged" in capsys.readouterr().out
    assert scale(model.net.state_dict(), parts.dit.state_dict()) == pytest.approx(course(0.08, 300), abs=2e-3)


def test_the_run_is_left_as_it_was(make_run, made):
    run = make_run()
    before = weights(run)
    made(run, "--width", 0.08)
    assert before.keys() == weights(run).keys()
    assert all((before[name] == x).all() for name, x in weights(run).items())


def test_a_width_that_is_far_from_what_was_kept_is_told(make_run, made, capsys):
    run = make_run(steps=(400,))
    made(run, "--width", 0.2)
    assert "--keep-every" in capsys.readouterr().out


def test_the_misfit_is_the_distance_between_the_weightings():
    kept, wanted, step = [(300, 0.05), (400, 0.05), (400, 0.1)], 0.08, 400
    x = (np.arange(400_000) + 0.5) / 1000
    profile = lambda at, width: np.where(x < at, (to_gamma(width) + 1) * (x / at) ** to_gamma(width) / at, 0.0)
    shares = reconstruct.coefficients(kept, wanted, step)
    goal = profile(step, wanted)
    off = sum(share * profile(*one) for share, one in zip(shares, kept)) - goal
    assert reconstruct.misfit(kept, wanted, step) == pytest.approx((off @ off / (goal @ goal)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("words, message", [
    (["--width", 0.3], "between 0 and 0.288"), (["--width", 0], "between 0 and 0.288"), (["--width", "wide"], "--width"),
    (["--width", 0.08, "--step", 401], "after the last undamaged checkpoint of {run}, at step 400"),
    (["--width", 0.08, "--step", 0], "averages begin at step 1"), ([], "--width")])
def test_mistakes_are_one_line(make_run, made, capsys, words, message):
    run = make_run()
    with pytest.raises(SystemExit) as end:
        made(run, *words)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message.format(run=run) in lines[0]


def test_what_is_no_run_with_averages_is_refused(make_run, made, tmp_path, capsys):
    def refusal(run, **config):
        if config:
            (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit) as end:
            made(run, "--width", 0.08)
        assert end.value.code == 2
        return capsys.readouterr().err

    run = make_run(steps=(100,))
    assert "is no run folder" in refusal(tmp_path / "nothing")
    assert "train with --ema-widths" in refusal(run, preset="tiny", ema_widths=[])
    assert "train with --ema-widths" in refusal(run, preset="tiny")
    assert "averages.safetensors does not hold 0.2/net." in refusal(run, preset="tiny", ema_widths=["0.05", "0.2"])
    (run / "checkpoints" / "step-000100" / "state.json").unlink()
    assert "no undamaged checkpoint" in refusal(run)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "something").touch()
    assert "not empty" in refusal(run)


def test_help_and_mistakes_answer_without_torch(tmp_path):
    words = ["-X", "importtime", "-m", "tinyldm.reconstruct"]
    assert "torch" not in script(*words, "--help").stderr
    done = script("-m", "tinyldm.reconstruct", tmp_path, "--width", 0.1, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path} is no run folder: its config.json cannot be read\n"


@pytest.mark.slow
def test_sample_draws_from_it(make_run, made, tmp_path):
    folder = made(make_run("unet"), "--width", 0.08)
    done = script("sample.py", "a red square", "--model", folder, "--out", tmp_path / "out.png")
    assert done.returncode == 0 and (tmp_path / "out.png").exists(), done.stderr
