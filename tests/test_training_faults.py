"""What a week brings: steps that are not finite, a loss that diverges, too little memory, pictures that fail."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, log_without_timing, thinned, train_here, weights
from safetensors.numpy import load_file, save_file

from tinyldm.objectives.denoising import Denoising
from tinyldm.training import checkpoint, loss_monitor, second_stage
from tinyldm.training.log import Log, read


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_here(load_script("train"), ["--out", str(folder), *SMALL, "--max-steps", "1"], patch)
    return folder / "vae"


@pytest.fixture
def train(monkeypatch):
    return load_script("train")


def quick(vae, out, *words) -> list[str]:
    return [*SMALL, "--vae-weights", str(vae), "--sample-every", "0", "--dtype", "fp32", "--out", str(out), *map(str, words)]


def events(run) -> list[dict]:
    return [row for row in read(run / "log.jsonl") if "event" in row]


def spoil(monkeypatch, change):
    """Let `change` (loss, call) -> loss stand between the objective and training."""
    calls, real = [], Denoising.losses

    def losses(self, turn, networks, batch, progress):
        calls.append(len(batch.x0))
        return change(real(self, turn, networks, batch, progress), len(calls))

    monkeypatch.setattr(Denoising, "losses", losses)
    return calls


def test_a_batch_that_is_not_finite_is_left_out_noted_and_survived(vae, tmp_path, monkeypatch, train):
    spoil(monkeypatch, lambda loss, call: loss * (float("nan") if call == 2 else 1))
    train_here(train, quick(vae, tmp_path / "run"), monkeypatch)
    assert [(row["event"], row["step"]) for row in events(tmp_path / "run")] == [("skipped", 2)]
    assert "batch 1" in events(tmp_path / "run")[0]["text"]                      # for a replay: as it was drawn
    assert [row["skipped"] for row in read(tmp_path / "run" / "log.jsonl") if "loss" in row] == [1, 1]
    assert all(np.isfinite(tensor).all() for tensor in weights(tmp_path / "run" / "checkpoints" / "step-000006").values())


MASKED = "--network dit --dit patch=2 width=32 layers=1 heads=2 mlp_width=32 time_dim=16 --mask-padding".split()


@pytest.mark.parametrize("network", thinned(2, [MASKED, []]))
def test_k_unequal_micro_batches_train_as_one_batch(vae, tmp_path, monkeypatch, network):
    for name, parts in (("micro", "3"), ("whole", "1")):                        # of 2, 1 and 1 pictures, dropped captions among them
        words = quick(vae, tmp_path / name, "--grad-accum", parts, "--caption-dropout", "0.5", "--log-every", 1, *network)
        train_here(load_script("train"), words, monkeypatch)
    losses = [[row["loss"] for row in read(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("micro", "whole")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_the_objective_is_told_how_much_of_the_training_is_over(vae, tmp_path, monkeypatch, train):
    passed, real = [], Denoising.losses

    def losses(self, turn, networks, batch, progress):
        passed.append(progress)
        return real(self, turn, networks, batch, progress)

    monkeypatch.setattr(Denoising, "losses", losses)
    words = quick(vae, tmp_path / "run", "--val-samples", 0, "--grad-accum", 2, "--stages", "16=0.5", "32=0.5")
    train_here(train, words, monkeypatch, stop_after=4)
    train_here(load_script("train"), ["--out", str(tmp_path / "run"), "--resume", "auto"], monkeypatch)
    assert passed == [step / 6 for step in range(6) for _ in range(2 if step < 3 else 4)]      # larger pictures, more micro-batches


def test_ten_in_a_row_stop_the_run_and_what_was_saved_stays(vae, tmp_path, monkeypatch, train):
    spoil(monkeypatch, lambda loss, call: loss * (float("inf") if call > 3 else 1))
    with pytest.raises(ValueError, match="not finite in 10 updates in a row, up to batch 12"):
        train_here(train, quick(vae, tmp_path / "run", "--max-steps", 40, "--save-every", 3), monkeypatch)
    state = checkpoint.read_state(checkpoint.newest_undamaged(tmp_path / "run"))
    assert state["step"] == 12 and state["meter"]["in_a_row"] == 9


def test_out_of_memory_halves_the_micro_batch_and_the_batch_stays(vae, tmp_path, monkeypatch, train):
    real = Denoising.losses

    def losses(self, turn, networks, batch, progress):
        if len(batch.x0) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, turn, networks, batch, progress)

    train_here(train, quick(vae, tmp_path / "whole", "--val-samples", 0), monkeypatch)
    monkeypatch.setattr(Denoising, "losses", losses)
    train_here(train, quick(vae, tmp_path / "run", "--val-samples", 0), monkeypatch)
    one, two = ([row["loss"] for row in read(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("whole", "run"))
    assert one == pytest.approx(two, rel=1e-4)
    texts = [row["text"] for row in events(tmp_path / "run") if row["event"] == "memory"]
    assert texts == ["out of memory: micro-batch 2, accumulation 2", "out of memory: micro-batch 1, accumulation 4"]


def test_out_of_memory_with_a_single_picture_is_an_error(vae, tmp_path, monkeypatch, train):
    def losses(*batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Denoising, "losses", losses)
    with pytest.raises(ValueError, match="out of memory with a picture of 16 px alone"):
        train_here(train, quick(vae, tmp_path / "run"), monkeypatch)


def test_other_errors_are_not_taken_for_a_lack_of_memory(vae, tmp_path, monkeypatch, train):
    def losses(*batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Denoising, "losses", losses)
    with pytest.raises(RuntimeError, match="mat1"):
        train_here(train, quick(vae, tmp_path / "run"), monkeypatch)


def test_pictures_and_validation_may_fail_and_training_goes_on(vae, tmp_path, monkeypatch, train, capsys):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: no more")

    monkeypatch.setattr(second_stage, "draw", broken)
    monkeypatch.setattr(second_stage.Validation, "measure", broken)
    train_here(train, quick(vae, tmp_path / "run", "--sample-every", 2), monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("the sample grid failed, training goes on: CUDA error") == 3 and "validation failed" in printed
    assert checkpoint.read_state(checkpoint.newest_undamaged(tmp_path / "run"))["finished"]


def note_positions(monkeypatch, train) -> list[int]:
    """-> the positions of the batches that are trained on, in their order. (They are drawn some steps ahead, and those that were drawn
    when the loss diverged are drawn again.)"""
    drawn, positions, trained = [], {}, []
    generator, draw, losses = train.generator, Denoising.draw, Denoising.losses

    def noted_generator(stream, seed, position):
        drawn.append(position)
        return generator(stream, seed, position)

    def noted_draw(self, *arguments):
        batch = draw(self, *arguments)
        positions[float(batch.eps.sum())] = drawn[-1]
        return batch

    def noted_losses(self, turn, networks, batch, progress):
        trained.append(positions[float(batch.eps.sum())])
        return losses(self, turn, networks, batch, progress)

    monkeypatch.setattr(train, "generator", noted_generator)
    monkeypatch.setattr(Denoising, "draw", noted_draw)
    monkeypatch.setattr(Denoising, "losses", noted_losses)
    return trained


@pytest.mark.slow
def test_a_loss_that_has_diverged_rolls_back_and_skips_the_batches(vae, tmp_path, monkeypatch, train):
    monkeypatch.setattr(loss_monitor, "WARMUP", 20)
    trained = note_positions(monkeypatch, train)
    spoil(monkeypatch, lambda loss, call: loss * (20 if 45 <= trained[-1] < 72 else 1))
    words = quick(vae, tmp_path / "run", "--max-steps", 75, "--save-every", 10, "--rollback", "--val-samples", 0, "--keep-last", 5)
    train_here(train, words, monkeypatch)
    rows = events(tmp_path / "run")
    assert [row["event"] for row in rows][:1] == ["rollback"] and rows[0]["step"] == 40
    assert trained == list(range(len(trained)))                                 # no batch was trained on twice, spoilt ones least of all
    state = checkpoint.read_state(checkpoint.newest_undamaged(tmp_path / "run"))
    assert state["step"] == 75 and state["window"] == len(trained) - 75 > 15


@pytest.mark.slow
def test_without_the_switch_a_spike_is_only_noted(vae, tmp_path, monkeypatch, train):
    monkeypatch.setattr(loss_monitor, "WARMUP", 20)
    spoil(monkeypatch, lambda loss, call: loss * (20 if call == 45 else 1))
    train_here(train, quick(vae, tmp_path / "run", "--max-steps", 50, "--val-samples", 0, "--save-every", 50), monkeypatch)
    assert [(row["event"], row["step"]) for row in events(tmp_path / "run")] == [("spike", 45)]


@pytest.mark.slow
def test_before_the_first_checkpoint_there_is_nothing_to_roll_back_to(vae, tmp_path, monkeypatch, train):
    monkeypatch.setattr(loss_monitor, "WARMUP", 20)
    spoil(monkeypatch, lambda loss, call: loss * (20 if call >= 50 else 1))
    with pytest.raises(ValueError, match="before the first checkpoint"):
        words = quick(vae, tmp_path / "run", "--max-steps", 100, "--save-every", 90, "--rollback", "--val-samples", 0)
        train_here(train, words, monkeypatch)


@pytest.mark.slow
def test_checkpointed_blocks_and_averages_of_two_widths_go_on_bit_for_bit(vae, tmp_path, monkeypatch, train):
    words = ["--ema-widths", "0.05", "0.1", "--grad-checkpointing", "--stages", "16=0.5", "32=0.5"]
    train_here(train, quick(vae, tmp_path / "whole", *words), monkeypatch)
    train_here(load_script("train"), quick(vae, tmp_path / "cut", *words, "--max-steps", 6), monkeypatch, stop_after=2)
    train_here(load_script("train"), ["--out", str(tmp_path / "cut"), "--resume", "auto"], monkeypatch)
    one, two = (weights(tmp_path / name / "checkpoints" / "step-000006") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert any(name.startswith("averages.safetensors:0.1/net.") for name in one)
    assert log_without_timing(tmp_path / "whole") == log_without_timing(tmp_path / "cut")
    sizes = [row["resolution"] for row in events(tmp_path / "whole") if row["event"] == "stage"]
    assert sizes == [32]


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_costs_neither_the_run_nor_a_row(tmp_path, monkeypatch, train):
    """The first write of a row fails in each stage; in the first stage there is no other and no checkpoint after it."""
    words, real, seen = [*SMALL, "--save-every", "100", "--sample-every", "0"], Log._append, set()

    def append(self):
        stage = self.unwritten and json.loads(self.unwritten.splitlines()[0])["stage"]
        if stage and stage not in seen:
            seen.add(stage)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    train_here(train, [*words, "--out", str(tmp_path / "quiet")], monkeypatch)
    monkeypatch.setattr(Log, "_append", append)
    train_here(load_script("train"), [*words, "--out", str(tmp_path / "full")], monkeypatch)
    assert seen == {"vae", "step"} and log_without_timing(tmp_path / "full") == log_without_timing(tmp_path / "quiet")
    assert [(row["stage"], row["step"]) for row in read(tmp_path / "full" / "log.jsonl") if "loss" in row] == [
        ("vae", 3), ("step", 3), ("step", 6)]


@pytest.mark.parametrize("fate", thinned(2, ["changed", "gone"]))
def test_a_resumed_run_keeps_its_pretrained_parts_whatever_becomes_of_their_source(vae, tmp_path, monkeypatch, fate):
    shutil.copytree(vae.parent / "checkpoints" / "step-000001" / "model", source := tmp_path / "source")
    pretrained = ["--vae-weights", str(source), "--text-weights", str(source), "--sample-every", "0"]
    train_here(load_script("train"), ["--out", str(tmp_path / "whole"), *SMALL, *pretrained], monkeypatch)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / name)
    if fate == "gone":
        shutil.rmtree(source)
    else:                                                       # another VAE and text encoder, and a tokenizer that pads otherwise
        for file in (*source.glob("vae/*.safetensors"), *source.glob("text_encoder/*.safetensors")):
            save_file({name: 1 - tensor for name, tensor in load_file(file).items()}, file)
        names = source / "tokenizer" / "tokenizer_config.json"
        names.write_text(json.dumps(json.loads(names.read_text()) | {"pad_token": "!"}))
    train_here(load_script("train"), ["--out", str(tmp_path / "cut"), "--resume", "auto"], monkeypatch)
    whole, cut = (tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "cut"))
    for file in (path.relative_to(whole) for path in (whole / "model").rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    whole, cut = weights(whole), weights(cut)
    assert whole.keys() == cut.keys() and all(np.array_equal(whole[name], cut[name]) for name in whole)
