"""The scripts, run as a person runs them, on networks of a few thousand parameters."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SMALL, load_script, log_without_timing, mistake, script, train_here, weights
from PIL import Image
from safetensors.numpy import load_file

from tinyldm.config import parse
from tinyldm.training import checkpoint
from tinyldm.training.log import read
from tinyldm.training.preflight import check_run
from tinyldm.training.run_folder import find_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = script("train.py", "--out", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"--model {folder}" in done.stdout                  # the next command to type
    return folder


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


@pytest.mark.parametrize("words, expected", UNSAFE)
def test_unsafe_objectives_are_refused_early_with_the_reason(words, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_run(parse([*SMALL, *words.split()], "")[0])
    check_run(parse(SMALL, "")[0])


@pytest.mark.parametrize("words", [words if i == 2 else pytest.param(words, marks=pytest.mark.slow)
                                   for i, words in enumerate(OBJECTIVES)])
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
    assert "--resume auto" in mistake("train", ["--out", run, *SMALL], capsys)
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
    (["--mask-padding", "--dry-run"], "is for --network dit"),
    (["--objective", "denoisin"], "did you mean 'denoising'"),
    (["--times", "logitnormal"], "did you mean 'logit_normal'"),
    (["--prediction", "epsilon"], "known: eps"),
    (["--min-snr-gamma", "5"], "min_snr"),
    (["--zero-terminal-snr"], "leave it out"),
    (["--process", "scaled_linear", "--prediction", "eps", "--zero-terminal-snr"], "pure noise"),
    (["--vae-weights", "stabilityai/sd-vae-ft-mse"], "is not in the cache"),
    (["--text-weights", "README.md"], "a text encoder is read from its folder"),
    (["--text-weights", "docs"], "docs/config.json does not exist"),
    (["--data", "NOWHERE"], "no such file or folder"),
    (["--device", "cuda"], "--device cpu"),
    (["--device", "tpu"], "unknown device"),
    (["--prediction", "eps"], "eps"),
    (["--shift", "-1"], "must be a positive number"),
    (["--vae-crop", "9"], "not a multiple of"),
    (["--resume", "maybe"], "unknown --resume"),
    (["--stages", "16=0.5", "18=0.5", "--unet", "widths=16,32,32", "attention=False,False,False", "heads=1,1,1"], "not a multiple of"),
    (["--max-steps", "0", "--deadline", "2001-01-01T00:00"], "--deadline 2001-01-01T00:00 has passed"),
    (["--ema-widths", "0.05", "0.4"], "must lie between 0 and 0.288"),
    (["--ema-widths", "wide"], "numbers between 0 and 0.288"),
    (["--fsdp"], "name a pretrained one with --text-weights"),
    (["--track", "tensorbord"], "did you mean 'tensorboard'"),
    (["--stages", "256"], "--stages 256=0.8 512=0.2"),
])
def test_mistakes_at_train_are_one_line_and_leave_no_run_behind(tmp_path, capsys, words, expected):
    words = ["--out", str(tmp_path / "run"), *SMALL, *(word.replace("NOWHERE", str(tmp_path / "nowhere")) for word in words)]
    assert expected in refusal("train", words, capsys)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "vae").exists()


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoints(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); import signal; " \
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    done = script("-c", limit, "train.py", "--out", copy, "--resume", "auto", "--max-steps", 8)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("words", [["--text", "layers=2"], ["--optimizer", "adamw"]])
def test_a_run_keeps_its_architecture(run, capsys, words):
    assert "a run keeps its " + words[0] in mistake("train", ["--out", run, "--resume", "auto", *words], capsys)


def test_a_run_survives_being_asked_for_another_architecture(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "copy")
    words = ["--out", str(tmp_path / "copy"), "--resume", "auto"]
    assert "a run keeps its --unet" in mistake("train", [*words, "--unet", "widths=32,32"], capsys)
    train_here(load_script("train"), [*words, "--max-steps", "7"], monkeypatch)
    assert (tmp_path / "copy" / "samples" / "step-000007.png").exists()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, number):
    folder = tmp_path / "run"
    # A shell's background job, which these tests may be part of, inherits that SIGINT is ignored.
    process = subprocess.Popen([sys.executable, "train.py", "--out", folder, *SMALL, "--max-steps", "100000"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    try:
        while not (folder / "checkpoints" / "step-000002").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"python train.py --out {folder} --resume auto" in out
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


def test_one_seed_gives_one_picture_at_any_batch_size(run, tmp_path):
    for size in (1, 3):
        done = script("sample.py", "a red fox", "a blue cat", "-n", 2, "--model", run, "--batch-size", size, "--seed", 5,
                      "--sampler", "ddpm", "--cfg", 3, "--out", tmp_path / str(size))
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["0001-5-a-red-fox.png", "0002-6-a-red-fox.png", "0003-5-a-blue-cat.png", "0004-6-a-blue-cat.png", "0005-5-grid.png"]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "3" / "0005-5-grid.png")
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / size / name)).astype(int) for size in "13")
        assert abs(one - three).max() <= 1
    fox = [np.asarray(Image.open(tmp_path / "1" / name)).astype(int) for name in names[:2]]
    assert abs(fox[0] - fox[1]).max() > 10                     # another seed is another picture


def test_pictures_carry_their_settings(run, tmp_path):
    done = script("sample.py", "a red fox", "--negative-prompt", "blue", "--cfg", 7.5, "--model", run, "--out", tmp_path / "fox.png")
    assert done.returncode == 0, done.stderr
    text = Image.open(tmp_path / "fox.png").text["parameters"]
    assert text == ("a red fox\nNegative prompt: blue\nSteps: 2, Sampler: dpmpp_2m, Schedule type: flow_sigmas, CFG scale: 7.5, Seed: 0, "
                    "Size: 16x16, Model: tiny, RNG: CPU")


@pytest.mark.parametrize("words, expected", [
    ([], "no prompt"),
    (["a fox", "--model", "RUN", "--sampler", "eulr"], "did you mean 'euler'"),
    (["a fox", "--model", "RUN", "--width", "17"], "use 16 or 20"),
    (["a fox", "--model", "NOWHERE"], "does not exist"),
    (["a fox", "--model", "nobody/nothing"], "is not in the cache"),
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


def test_a_long_prompt_is_drawn_and_the_part_left_out_is_named(run, tmp_path):
    done = script("sample.py", "a red fox " * 12 + "and a zebra", "--model", run, "--out", tmp_path / "x.png")
    assert done.returncode == 0 and "and a zebra" in done.stderr and "24 tokens" in done.stderr
