"""The scripts, run as a person runs them, on networks of a few thousand parameters."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, load_script, log_without_timing, mistake, pictures, script, thinned, train_here, weights
from PIL import Image
from safetensors.numpy import load_file

from tinyldm.config import parse
from tinyldm.data.prepare import find_shards
from tinyldm.training import checkpoint
from tinyldm.training.log import read
from tinyldm.training.preflight import check_run
from tinyldm.training.run_folder import find_model
from tinyldm.version import version


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = script("train.py", "--out", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"--model {folder}" in done.stdout                  # the next command to type
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same run in this process, where some kernels are others."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        train_here(load_script("train"), ["--out", str(folder), *SMALL], patch)
    return folder


def assert_same_run(one: Path, two: Path) -> None:
    """To the last bit of weights and optimizers, and in the log."""
    a, b = (weights(folder / "checkpoints" / "step-000006") for folder in (one, two))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert log_without_timing(one) == log_without_timing(two)


def lines(run: Path) -> list[dict]:
    """Rows of the log that tell the loss."""
    return [row for row in read(run / "log.jsonl") if "loss" in row]


def test_a_run_leaves_a_log_samples_and_a_model_folder(run):
    rows = lines(run)
    assert [row["step"] for row in read(run / "log.jsonl") if "val_ema" in row] == [6]
    assert all(len(row["t_bins"]) == 8 and row["grad_norm"] > 0 for row in rows if row["stage"] == "step")
    assert [(row["stage"], row["step"]) for row in rows] == [("vae", 3), ("step", 3), ("step", 6)]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert {file.name for file in (run / "samples").iterdir()} == {"vae.png", "step-000002.png", "step-000004.png", "step-000006.png"}
    assert "step-000004.png" in (run / "report.html").read_text()
    model = run / "checkpoints" / "step-000006" / "model"
    assert {path.name for path in model.iterdir()} >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert not list(run.rglob("*.pt")) and not list(run.rglob("*.tmp"))


def test_only_the_end_of_the_second_stage_finishes_a_run(run, tmp_path):
    states = {folder.name: checkpoint.read_state(folder).get("finished") for folder in checkpoint.names(run)}
    assert [name for name, finished in states.items() if finished] == ["step-000006"] and "vae-000004" in states
    shutil.copytree(run / "checkpoints" / "vae-000004", tmp_path / "runs" / "first stage" / "checkpoints" / "vae-000004")
    with pytest.raises(ValueError, match="no finished run"):
        find_model(None, tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["vae-000002", "step-000002"])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(run, tmp_path, point):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    stage, step = point.split("-")
    for saved in (cut / "checkpoints").iterdir():
        if saved.name.startswith("step") > (stage == "step") or saved.name.startswith(stage) and saved.name > point:
            shutil.rmtree(saved)
    if stage == "vae":
        shutil.rmtree(cut / "vae")
        shutil.rmtree(cut / "latents")
    for sample in (cut / "samples").glob("step-*"):
        if stage == "vae" or sample.stem > point:
            sample.unlink()
    done = script("train.py", "--out", cut, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    one, two = (weights(folder / "checkpoints" / "step-000006") for folder in (run, cut))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    for sample in (run / "samples").iterdir():
        assert sample.read_bytes() == (cut / "samples" / sample.name).read_bytes(), sample.name
    assert log_without_timing(run) == log_without_timing(cut)


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    held = checkpoint.lock(copy)
    done = script("train.py", "--out", copy, "--resume", "auto", "--max-steps", 7)
    held.close()
    assert done.returncode == 2 and "another process" in done.stderr and "Traceback" not in done.stderr
    assert not (copy / "checkpoints" / "step-000007").exists()


OBJECTIVES = [
    "--process edm --prediction v --loss-weight edm --times log_normal --loss huber",
    "--process linear --prediction eps --learned-variance --min-snr-gamma 5 --noise-offset 0.1 --input-perturbation 0.1 "
    "--stratified-times --times uniform --sampler ddpm",
    "--process betas --process-options betas=0.01,0.02,0.05,0.1,0.2,0.4 zero_snr=True --prediction v --learned-variance "
    "--loss-weight soft_min_snr --times normal",
    "--process ve --prediction eps --loss l1 --times mode --times-scale=-0.5",
    "--process vp --prediction x0 --loss-weight p2 --times cosmap --process-options beta_max=12",
    "--network dit --dit patch=1 width=32 layers=1 heads=2 mlp_width=32 time_dim=16 --process cosine --zero-terminal-snr "
    "--prediction v --learned-variance --stratified-times --mask-padding",
]


UNSAFE = [
    ("--process ve --prediction v --zero-terminal-snr", "--zero-terminal-snr is for tables of betas, not for ve"),
    ("--process linear --prediction eps --zero-terminal-snr", "pure noise"),
    ("--process flow --prediction eps", "pure noise"),
    ("--learned-variance", "use scaled_linear, linear, cosine or betas"),
    ("--process edm --prediction v --learned-variance", "use scaled_linear, linear, cosine or betas"),
    ("--loss hubber", "did you mean 'huber'"),
    ("--process vp --prediction v --loss-weight soft_minsnr", "did you mean 'soft_min_snr'"),
    ("--loss-weight edm", "rectified flow chooses its levels"),
    ("--prediction v --min-snr-gamma 5", "rectified flow chooses its levels"),
    ("--process cosine --prediction eps --loss-weight edm", "predict 'v'"),
    ("--process betas --prediction v", "--process-options betas="),
    ("--process edm --prediction v --process-options sigma_mx=3", "did you mean 'sigma_max'"),
    ("--times logit_norml", "did you mean 'logit_normal'"),
]


@pytest.mark.parametrize("words, expected", thinned(2, UNSAFE))
def test_unsafe_objectives_are_refused_early_with_the_reason(words, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_run(parse([*SMALL, *words.split()], "")[0])
    check_run(parse(SMALL, "")[0])


@pytest.mark.slow
@pytest.mark.parametrize("words", OBJECTIVES)
def test_every_objective_trains_goes_on_and_draws(run, tmp_path, words, monkeypatch):
    folder = tmp_path / "run"
    model = str(run / "checkpoints" / "step-000006" / "model")
    short = ["--vae-weights", model, "--max-steps", "4", "--sample-every", "0", "--log-every", "2"]
    train_here(load_script("train"), ["--out", str(folder), *SMALL, *words.split(), *short], monkeypatch)
    assert all(np.isfinite(row["loss"]) for row in lines(folder))
    whole = weights(folder / "checkpoints" / "step-000004")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    train_here(load_script("train"), ["--out", str(folder), "--resume", "auto"], monkeypatch)
    again = weights(folder / "checkpoints" / "step-000004")
    assert whole.keys() == again.keys() and all(np.array_equal(whole[name], again[name]) for name in whole)
    drawn = script("sample.py", "a red fox", "--model", folder, "--steps", 2, "--out", tmp_path / "fox.png")
    assert drawn.returncode == 0, drawn.stderr
    if "--learned-variance" in words and "dit" not in words:
        refused = script("-m", "tinyldm.export", folder, tmp_path / "public")
        assert refused.returncode == 2 and "it learned its variance" in refused.stderr and not (tmp_path / "public").exists()


def test_a_run_folder_is_not_overwritten(run, capsys):
    before = (run / "config.json").read_bytes()
    assert "--resume yes" in mistake("train", ["--out", run, *SMALL], capsys)
    assert (run / "config.json").read_bytes() == before


# Run as processes: what depends on their environment, and one mistake more at each script.
ENVIRONMENTAL = {"stabilityai/sd-vae-ft-mse", "nobody/nothing", "cuda", "17"}


def refusal(name, words, capsys) -> str:
    if not ENVIRONMENTAL.intersection(words):
        return mistake(name, words, capsys)
    done = script(f"{name}.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("words, expected", [
    (["--resolution", "17"], "not a multiple of"),
    (["--resolution", "18"], "is not a multiple of 2"),
    (["--unet", "widhts=16,32"], "did you mean 'widths'"),
    (["--unet", "widths=16,30"], "must be a multiple of"),
    (["--sampler", "eulr"], "did you mean 'euler'"),
    (["--network", "unett"], "did you mean 'unet'"),
    (["--network", "unett", "--dry-run"], "did you mean 'unet'"),
    (["--mask-padding"], "is for --network dit"),
    (["--process", "scaled_linear", "--zero-terminal-snr", "--prediction", "eps", "--dry-run"], "does not determine x0"),
    (["--mask-padding", "--dry-run"], "is for --network dit"),
    (["--objective", "denoisin"], "did you mean 'denoising'"),
    (["--times", "logitnormal"], "did you mean 'logit_normal'"),
    (["--prediction", "epsilon"], "known: eps"),
    (["--min-snr-gamma", "5"], "min_snr"),
    (["--zero-terminal-snr"], "leave it out"),
    (["--process", "scaled_linear", "--prediction", "eps", "--zero-terminal-snr"], "pure noise"),
    pytest.param(["--vae-weights", "stabilityai/sd-vae-ft-mse"], "is not in the cache", marks=pytest.mark.slow),
    (["--text-weights", "README.md"], "README.md is damaged (Error while deserializing header"),
    (["--text-weights", "docs"], "docs/config.json does not exist"),
    (["--data", "NOWHERE"], "no such file or folder"),
    pytest.param(["--device", "cuda"], "--device cpu", marks=pytest.mark.slow),
    (["--device", "tpu"], "unknown --device"),
    (["--prediction", "eps"], "eps"),
    (["--shift", "-1"], "must be a positive number"),
    (["--vae-crop", "9"], "not a multiple of"),
    (["--resume", "maybe"], "unknown --resume"),
    (["--stages", "16=0.5", "18=0.5", "--unet", "widths=16,32,32", "attention=False,False,False", "heads=1,1,1"], "not a multiple of"),
    (["--max-steps", "0", "--deadline", "2001-01-01T00:00+00:00"], "--deadline 2001-01-01T00:00+00:00 has passed"),
    (["--ema-widths", "0.05", "0.4"], "must lie between 0 and 0.288"),
    (["--ema-widths", "wide"], "numbers between 0 and 0.288"),
    (["--fsdp"], "name a pretrained one with --text-weights" if torch.__version__ >= "2.8" else "needs torch 2.8"),
    (["--track", "tensorbord"], "did you mean 'tensorboard'"),
    (["--stages", "256"], "--stages 256=0.8 512=0.2"),
])
def test_mistakes_at_train_are_one_line_and_leave_no_run_behind(tmp_path, capsys, words, expected):
    words = ["--out", str(tmp_path / "run"), *SMALL, *(word.replace("NOWHERE", str(tmp_path / "nowhere")) for word in words)]
    assert expected in refusal("train", words, capsys)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "vae").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoints(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); import signal; " \
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    done = script("-c", limit, "train.py", "--out", copy, "--resume", "auto", "--max-steps", 8)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {path.name for path in (run / "checkpoints").iterdir()}


def test_one_command_starts_a_run_and_continues_it_every_time_it_is_typed(undisturbed, tmp_path, monkeypatch, capsys):
    """As a requeue script does. The first start dies before it has written anything but its lock, the second while it trains."""
    words = ["--out", str(tmp_path / "run"), "--preset", "tiny", *SMALL, "--resume", "auto"]
    train = load_script("train")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(importlib.import_module("tinyldm.training.run_folder"), "write_settings", lambda config: 1 / 0)
        train_here(train, words, patch)
    (tmp_path / "run" / "running.json").write_text('{"seconds": 3600}')        # of a run that ended before its first checkpoint
    train_here(train, words, monkeypatch, stop_after=3)
    assert f"new run in {tmp_path / 'run'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "running.json").read_text())["seconds"] < 3600
    for _ in range(2):                                          # once more than needed: it is done
        train_here(train, words, monkeypatch)
        assert f"continuing the run in {tmp_path / 'run'}" in capsys.readouterr().out
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("word", thinned(2, ["auto", "no"]))
def test_a_run_that_died_before_its_first_checkpoint_starts_again(run, tmp_path, monkeypatch, word):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "launch"):
        shutil.copy(run / name, folder / name)
    (folder / "running.json").write_text('{"seconds": 3600}')
    words = ["--out", str(folder), *SMALL, "--resume", word, "--vae-weights", "", "--max-steps", "2", "--sample-every", "0"]
    train_here(load_script("train"), words, monkeypatch)
    assert (folder / "checkpoints" / "step-000002").exists()
    seconds = json.loads((folder / "running.json").read_text())["seconds"]
    assert seconds > 3600 if word == "auto" else seconds < 3600         # the time of a run that is continued was used, too


@pytest.mark.slow
def test_an_interrupted_first_stage_goes_on_with_the_same_pictures_and_reads_none_again(undisturbed, tmp_path, monkeypatch):
    vae_pictures = importlib.import_module("tinyldm.training.vae_pictures")
    folder, read, real = tmp_path / "run", [], vae_pictures.usable_pictures
    monkeypatch.setattr(vae_pictures, "usable_pictures", lambda *words: read.append(len([*real(*words)])) or real(*words))
    train = load_script("train")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.Trainer, "watch_loss", lambda self, update: 1 / (3 - self.step))       # dies in step 3 of 4
        train_here(train, ["--out", str(folder), *SMALL], patch)
    kept = next(folder.glob("vae-pictures-*/pictures.npy"))
    assert read == [24] and np.load(kept).shape == (24, 16, 16, 3)
    train_here(train, ["--out", str(folder), "--resume", "auto"], monkeypatch)
    assert read == [24] and not list(folder.glob("*vae-pictures*"))            # and it takes no room afterwards
    assert_same_run(undisturbed, folder)


@pytest.mark.parametrize("damage, changes", [("cut", []), ("", ["--vae-pictures", "9"]), ("no room", [])])
def test_pictures_that_are_damaged_or_asked_for_in_another_number_are_read_again(tmp_path, monkeypatch, damage, changes):
    vae_pictures = importlib.import_module("tinyldm.training.vae_pictures")
    if damage == "no room":                                     # then none are kept
        monkeypatch.setattr(vae_pictures.shutil, "disk_usage", lambda path: SimpleNamespace(free=16_384 * 16 * 16 * 3))
    context = SimpleNamespace(folder=tmp_path, signals=SimpleNamespace(check=lambda: None))
    pictures = np.array(vae_pictures.training_pictures(parse(SMALL, "")[0], context))
    kept = list(tmp_path.glob("vae-pictures-*/pictures.npy"))
    assert len(kept) == (damage != "no room")
    if damage == "cut":
        kept[0].write_bytes(kept[0].read_bytes()[:-1])
    again = vae_pictures.training_pictures(parse([*SMALL, *changes], "")[0], context)
    assert np.array_equal(pictures, again) if not changes else len(again) == 9
    assert len(list(tmp_path.iterdir())) == len(kept)


@pytest.mark.parametrize("data, out", thinned(3, [(".", "run"), ("PLACE", "link/run"), ("../pictures", "../pictures/runs/a/b")]))
def test_a_run_inside_its_folder_of_pictures_is_no_part_of_its_data(run, tmp_path, monkeypatch, data, out):
    place = pictures(tmp_path / "pictures", 12)
    (tmp_path / "pictures" / "link").symlink_to(tmp_path / "pictures")
    monkeypatch.chdir(place)
    words = ["--data", data.replace("PLACE", str(place)), "--out", out, "--vae-weights", str(run / "vae"), *SMALL, "--max-steps", "2"]
    listed = lambda: [(shard.name, shard.stamp) for shard in find_shards(parse(words, "")[0].data, 0)[0][1]]
    before = listed()
    train_here(load_script("train"), words, monkeypatch)
    assert list((place / out / "samples").glob("*.png")) and listed() == before
    index = json.loads((place / out / "latents" / "index.json").read_text())
    assert [sum(group["count"] for group in shard["groups"]) for shard in index["sources"][0]["shards"]] == [12]


@pytest.mark.parametrize("data, out", [(".", "."), ("pictures", "link"), ("PLACE", "pictures/")])
def test_a_run_in_the_very_folder_of_its_pictures_is_refused(tmp_path, monkeypatch, capsys, data, out):
    place = pictures(tmp_path / "pictures", 2)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place if data == "." else tmp_path)
    said = mistake("train", ["--data", data.replace("PLACE", str(place)), "--out", out, *SMALL], capsys)
    assert "is the folder of --data" in said and "name another, such as --out" in said and len(list(place.iterdir())) == 6


@pytest.mark.slow
def test_a_run_with_relative_paths_is_resumed_from_anywhere(run, tmp_path, monkeypatch):
    """Its VAE, its captions and its latents are not there yet when it is stopped."""
    (tmp_path / "home").mkdir()
    pictures(tmp_path / "home" / "pictures", 12)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    words = ["--data", "pictures", "--out", "../run", *SMALL]
    train = load_script("train")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.Trainer, "watch_loss", lambda self, update: 1 / (3 - self.step))
        train_here(train, words, patch)
    monkeypatch.chdir(tmp_path / "away")
    train_here(train, ["--out", "../run", "--resume", "auto"], monkeypatch)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (tmp_path / "run" / "checkpoints" / "step-000006").exists()
    assert (settings["data"], settings["directory"]) == (["pictures"], str(tmp_path / "home"))


@pytest.mark.parametrize("words", [["--text", "layers=2"], ["--optimizer", "adamw"]])
def test_a_run_keeps_its_architecture(run, capsys, words):
    assert "a run keeps its " + words[0] in mistake("train", ["--out", run, "--resume", "auto", *words], capsys)


def test_a_run_survives_being_asked_for_another_architecture(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "copy")
    words = ["--out", str(tmp_path / "copy"), "--resume", "auto"]
    assert "a run keeps its --unet" in mistake("train", [*words, "--unet", "widths=32,32"], capsys)
    train_here(load_script("train"), [*words, "--max-steps", "7"], monkeypatch)
    assert (tmp_path / "copy" / "samples" / "step-000007.png").exists()


@pytest.mark.slow
def test_pretrained_parts_are_used_as_they_are(run, tmp_path, monkeypatch):
    model = run / "checkpoints" / "step-000006" / "model"
    words = ["--out", tmp_path / "run", *SMALL, "--vae-weights", model, "--text-weights", model]
    train_here(load_script("train"), [str(word) for word in words], monkeypatch)
    new = tmp_path / "run" / "checkpoints" / "step-000006" / "model"
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, two = load_file(model / part), load_file(new / part)
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one), part
    drawn = script("sample.py", "a red fox", "--model", tmp_path / "run", "--no-ema", "--out", tmp_path / "fox.png")
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, numbers):
    """Several signals: as when a terminal closes, or systemd stops a torchrun."""
    folder = tmp_path / "run"
    # A shell's background job, which these tests may be part of, inherits that SIGINT is ignored.
    process = subprocess.Popen([sys.executable, "train.py", "--out", folder, *SMALL, "--max-steps", "100000"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in numbers])
    try:
        while not (folder / "checkpoints" / "step-000002").exists() and process.poll() is None:
            time.sleep(0.05)
        for number in numbers:                                  # the first two may arrive together, in either order
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in [128 + number for number in numbers]
    assert f"python train.py --out {folder} --resume yes" in out
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] >= 2


def test_pictures_of_ones_own_train_too(tmp_path, monkeypatch):
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (20 + i, 24), (30 * i, 100, 200)).save(data / f"{i}.jpg")
        (data / f"{i}.txt").write_text(f"colour number {i}")
    words = ["--out", str(tmp_path / "run"), *SMALL, "--data", str(data), "--max-steps", "2", "--vae-steps", "2"]
    train_here(load_script("train"), words, monkeypatch)
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()


@pytest.mark.slow
def test_one_seed_gives_one_picture_at_any_batch_size(run, tmp_path):
    for size in (1, 3):
        done = script("sample.py", "a red fox", "a blue cat", "-n", 2, "--model", run, "--batch-size", size, "--seed", 5,
                      "--sampler", "ddpm", "--cfg", 3, "--out", tmp_path / str(size))
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "1").glob("*.png"))
    assert names == ["0001-5-a-red-fox.png", "0002-6-a-red-fox.png", "0003-5-a-blue-cat.png", "0004-6-a-blue-cat.png", "0005-5-grid.png"]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "3" / "0005-5-grid.png")
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / size / name)).astype(int) for size in "13")
        assert abs(one - three).max() <= 1
    fox = [np.asarray(Image.open(tmp_path / "1" / name)).astype(int) for name in names[:2]]
    assert abs(fox[0] - fox[1]).max() > 10                     # another seed is another picture


def test_pictures_carry_their_settings(run, tmp_path):
    draw_here(["--negative-prompt", "blue", "--cfg", 7.5, "--steps", 2, "--model", run, "--out", tmp_path / "fox.png"])
    text = Image.open(tmp_path / "fox.png").text["parameters"]
    assert text == ("a red fox\nNegative prompt: blue\nSteps: 2, Sampler: dpmpp_2m, Schedule type: flow_sigmas, CFG scale: 7.5, Seed: 0, "
                    f"Size: 16x16, Model: small step-000006, Trained with: {version()}, Precision: fp32, Version: tinyldm {version()}, RNG: CPU")


@pytest.mark.parametrize("words, expected", [
    ([], "no prompt"),
    (["a fox", "--model", "RUN", "--sampler", "eulr"], "did you mean 'euler'"),
    pytest.param(["a fox", "--model", "RUN", "--width", "17"], "use 16 or 20", marks=pytest.mark.slow),
    (["a fox", "--model", "NOWHERE"], "does not exist"),
    pytest.param(["a fox", "--model", "nobody/nothing"], "is not in the cache", marks=pytest.mark.slow),
    (["a fox", "--model", "RUN", "--mask", "x.png"], "--init-image"),
    (["a fox", "--model", "RUN", "--init-image", "NOWHERE"], "No such file"),
    (["a fox", "--model", "RUN", "--revision", "main"], "for a hub id"),
    (["a fox", "--stepz", "3"], "did you mean '--steps'"),
    (["a fox", "--model", "RUN", "--schedule", "karas"], "did you mean 'karras'"),
    (["a fox", "--model", "RUN", "--num-images", "0"], "at least 1"),
    (["a fox", "--model", "RUN", "--eta", "0.5"], "--sampler ddim"),
    (["a fox", "--model", "RUN", "--dtype", "fp8"], "unknown --dtype"),
    (["a fox", "--model", "RUN", "--out", "fox.jpg"], ".png"),
    (["--from-file", "NOWHERE"], "No such file"),
])
def test_mistakes_at_sample_are_one_line_and_write_nothing(run, tmp_path, capsys, words, expected):
    names = {"RUN": str(run), "NOWHERE": str(tmp_path / "nowhere")}
    words = ["--out", str(tmp_path / "out"), *(names.get(word, word) for word in words)]
    assert expected in refusal("sample", words, capsys)
    assert not list(tmp_path.rglob("*.png"))


def draw_here(words, prompt="a red fox") -> None:
    sample = load_script("sample")
    sample.ARGS = sample.parse([str(word) for word in [prompt, "--steps", 1, *words]])
    sample.main()


@pytest.mark.parametrize("out, there, written", [
    ("sd1.5", False, "sd1.5/0001-0-a-red-fox.png"), ("my.run", True, "my.run/0001-0-a-red-fox.png"),
    ("v1.0/", False, "v1.0/0001-0-a-red-fox.png"), ("fox.png", True, "fox.png/0001-0-a-red-fox.png"),
    ("fox.jpg", True, "fox.jpg/0001-0-a-red-fox.png"), ("sd1.5/fox.v2.png", False, "sd1.5/fox.v2.png"), ("FOX.PNG", False, "FOX.PNG")])
def test_a_folder_s_name_may_have_dots_and_one_that_exists_is_a_folder(run, tmp_path, out, there, written):
    if there:
        (tmp_path / out).mkdir()
    draw_here(["--model", run, "--out", f"{tmp_path}/{out}"])
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    marked = out.rstrip("/").rpartition("/")[0] if written == out else out.rstrip("/")       # the folder, where sample.py made one
    assert found == {written} | ({f"{marked}/.tinyldm-output"} if marked and not there else set())
    assert Image.open(tmp_path / written).format == "PNG"


NUMBERED = ["0001-0-a-red-fox.png", "0001-0-a-red-fox.webp"]


@pytest.mark.parametrize("out, written", [("sd1.5", NUMBERED), ("x.gif", NUMBERED), ("fox.v1.5.gif", ["fox.v1.5.gif", "fox.v1.5.png"]),
                                          ("fox.v1.5.png", ["fox.v1.5.png", "fox.v1.5.webp"])])
def test_an_animation_and_its_strip_keep_a_name_with_dots(run, tmp_path, out, written):
    (tmp_path / "x.gif").mkdir()
    draw_here(["--model", run, "--interpolate", 5, "--frames", 2, "--out", tmp_path / out])
    assert sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file() and path.name[0] != ".") == sorted(written)


def test_drawn_pictures_in_a_folder_of_pictures_are_no_data(run, tmp_path, monkeypatch):
    place = pictures(tmp_path / "pictures", 3)
    monkeypatch.chdir(place)
    listed = lambda: [(shard.name, shard.stamp) for shard in find_shards(parse(["--data", "."], "")[0].data, 0)[0][1]]
    before = listed()
    draw_here(["--model", run])
    assert list((place / "samples").glob("*.png")) and listed() == before


@pytest.mark.parametrize("flag, words", [("--dtype", ["float16", "bfloat16", "FP32"]), ("--device", ["CPU", "gpu:0", "cuda:1"])])
def test_precisions_and_devices_are_called_what_people_call_them(flag, words):
    evaluate = load_script("evaluate")
    own = {"bfloat16": "bf16", "FP32": "fp32", "CPU": "cpu", "gpu:0": "cuda:0", "cuda:1": "cuda:1"}
    for word in words:
        if word == "float16":                                   # not for autocast
            with pytest.raises(SystemExit):
                evaluate.parse(["run", flag, word])
        else:
            assert getattr(evaluate.parse(["run", flag, word]), flag[2:]) == own[word]


def test_a_long_prompt_is_drawn_and_the_part_left_out_is_named(run, tmp_path, capsys):
    draw_here(["--model", run, "--out", tmp_path / "x.png"], "a red fox " * 12 + "and a zebra")
    said = capsys.readouterr().err
    assert (tmp_path / "x.png").exists() and "and a zebra" in said and "24 tokens" in said
