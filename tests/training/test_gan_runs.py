"""Runs of train.py whose autoencoder has a discriminator: what is trained when, what a checkpoint holds, what the log tells."""

import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, log_without_timing, mistake, thinned, train_here, weights
from preparing import CPU, make_vae

from tinyldm.config import make_config
from tinyldm.objectives import adversarial
from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World
from tinyldm.training.learner import Learner
from tinyldm.training.log import read
from tinyldm.training.trained import TrainedAutoencoder

GAN = ("--vae-loss gan=0.5 --vae-gan width=4 layers=1 norm=batch start=0.25 warmup=0.25 lr=0.01 r1=0.1 lecam=0.1 --vae-steps 8 "
       "--max-steps 1 --sample-every 0 --val-every 0 --log-every 1 --save-every 2").split()


@pytest.fixture(scope="module")
def train():
    return load_script("train")


def run(train, folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        train_here(train, ["--out", str(folder), *SMALL, *GAN, *words], patch)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train):
    return run(train, tmp_path_factory.mktemp("gan") / "whole")


def at(folder, step: int) -> dict:
    return weights(folder / "checkpoints" / f"vae-{step:06d}")


def resume(train, whole, folder, step: int):
    """A copy of the run as it was after this step of its first stage, resumed to its end."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "vae"), shutil.rmtree(folder / "latents")
    for saved in (folder / "checkpoints").iterdir():
        if saved.name > f"vae-{step:06d}" or saved.name.startswith("step"):
            shutil.rmtree(saved)
    with pytest.MonkeyPatch.context() as patch:
        train_here(train, ["--out", str(folder), "--resume", "yes"], patch)
    return folder


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("step", thinned(2, [6, 2]))
def test_a_resumed_run_ends_as_the_undisturbed_one(tmp_path, train, whole, step):
    """From before the discriminator's start and from after it."""
    halves = resume(train, whole, tmp_path / "halves", step)
    assert equal(weights(whole / "vae"), weights(halves / "vae")) and equal(at(whole, 8), at(halves, 8))
    assert log_without_timing(whole) == log_without_timing(halves)
    kept = [name.partition(":")[2] for name in at(whole, 8) if name.startswith("objective.safetensors")]
    assert {"discriminator.weight", "discriminator.averages", "discriminator.noted", "discriminator.net.main.0.weight"} <= {*kept}
    assert any(name.startswith("optimizer.safetensors:discriminator.net") for name in at(whole, 8))


@pytest.mark.slow
def test_so_does_one_in_micro_batches(tmp_path, train):
    whole = run(train, tmp_path / "whole", "--grad-accum", "2")
    halves = resume(train, whole, tmp_path / "halves", 6)
    assert equal(weights(whole / "vae"), weights(halves / "vae")) and equal(at(whole, 8), at(halves, 8))


def test_micro_batches_change_nothing_where_no_norm_looks_at_the_batch(tmp_path, train):
    words = [*"--vae-gan width=4 layers=1 norm=group start=0.25 r1=0.1 lecam=0.1 --optimizer adamw --dtype fp32".split()]
    one, two = (at(run(train, tmp_path / count, *words, "--grad-accum", count), 8) for count in ("1", "2"))
    assert one.keys() == two.keys()
    for name in one:
        if not name.startswith("optimizer"):
            torch.testing.assert_close(torch.as_tensor(one[name]), torch.as_tensor(two[name]), rtol=1e-3, atol=1e-4)


def test_the_discriminator_is_trained_from_its_start_on_and_the_log_tells_its_loss(whole):
    states = [{name: tensor for name, tensor in at(whole, step).items() if ":discriminator.net" in name and "objective" in name}
              for step in (2, 4, 6)]
    rows = [row for row in read(whole / "log.jsonl") if row["stage"] == "vae" and "loss" in row]
    assert [row["loss_discriminator"] is None for row in rows] == [True, True] + [False] * 6         # 0.25 of 8 steps
    assert all("gan_weight" not in row for row in rows[:2]) and all(row["gan_weight"] > 0 for row in rows[2:])
    assert not equal(states[0], states[1]) and not equal(states[1], states[2])
    first = {name: tensor for name, tensor in at(whole, 2).items() if name.startswith("optimizer.safetensors:discriminator")}
    assert not first                                            # it has taken no step yet


def test_the_autoencoder_is_the_same_as_without_until_the_decoder_begins_to_listen(tmp_path, train, whole):
    with pytest.MonkeyPatch.context() as patch:
        train_here(train, ["--out", str(tmp_path / "plain"), *SMALL, *GAN[GAN.index("--vae-steps"):]], patch)
    same = [equal({name: tensor for name, tensor in at(whole, step).items() if name.startswith("vae/")},
                  {name: tensor for name, tensor in at(tmp_path / "plain", step).items() if name.startswith("vae/")}) for step in (2, 8)]
    assert same == [True, False]


def test_a_collapse_is_an_event_of_the_log(tmp_path, train, monkeypatch):
    monkeypatch.setattr(adversarial, "WATCHED", 2)
    monkeypatch.setattr(adversarial, "SAME", 1e9)
    folder = run(train, tmp_path / "run")
    events = [row for row in read(folder / "log.jsonl") if row.get("event") == "collapse"]
    assert [(row["stage"], row["step"]) for row in events] == [("vae", 4)]      # after two steps of the discriminator, and once
    assert "answers alike to reconstructions and originals" in events[0]["text"]


def test_mistakes_are_one_line_and_leave_no_run_behind(tmp_path, capsys):
    for words, said in ((["--vae-loss", "gan=1", "--vae-gan", "kind=hing"], "did you mean 'hinge'"),
                        (["--vae-loss", "gan=1", "--vae-crop", "16"], "16 px are too small for --vae-loss gan, which takes 24 px"),
                        (["--vae-loss", "lpips=1", "--vae-lpips", str(tmp_path / "nothing")], "does not exist")):
        assert said in mistake("train", ["--out", tmp_path / "run", *SMALL, *words], capsys)
        assert not (tmp_path / "run").exists()


def test_only_the_decoder_of_a_frozen_encoder_is_trained_and_only_its_moments_are_kept():
    vae, config = make_vae(), make_config(vae_freeze="encoder")
    objective = AutoencoderObjective(config.autoencoder, vae)
    own, (turn,) = Learner(TrainedAutoencoder(vae), objective, config.optimisation, World(), CPU, average=False), objective.turns
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    batch = objective.draw(np.zeros((2, 8, 8, 3), np.uint8), torch.Generator(), 2, slice(None))
    objective.losses(turn, {"vae": vae}, batch, 0.0).mean().backward()
    own.update(turn, 1.0, 1.0)
    moved = {name.partition(".")[0] for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    kept = {name.split(".")[1] for name in checkpoint.optimizer_tensors(own.all_optimizers, own.parameters)}
    assert moved == kept == {"decoder", "post_quant_conv"}


def test_the_discriminator_has_the_betas_of_its_settings_and_the_autoencoder_those_of_the_run():
    objective = AutoencoderObjective(make_config(vae_loss=dict(gan=1), vae_gan=dict(width=4, lr=0.02)).autoencoder, vae := make_vae())
    own = Learner(TrainedAutoencoder(vae), objective, make_config(optimizer="adamw").optimisation, World(), CPU, average=False)
    found = {name: [(group["betas"], group["peak_lr"]) for optimizer in optimizers for group in optimizer.param_groups]
             for name, optimizers in own.optimizers.items()}
    assert found == {"autoencoder": [((0.9, 0.95), 4e-3)], "discriminator": [((0.5, 0.9), 0.02)]}
