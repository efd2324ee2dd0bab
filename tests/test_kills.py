"""kill -9 at any moment, and other accidents: the finished run is that of an undisturbed one, to the last byte."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (ENVIRONMENT, ROOT, SMALL, load_script, log_without_timing, mistake, pictures, randomise, script, small_text,
                     train_here, weights)

from tinyldm.folders.save import save_texts
from tinyldm.models.clip_text import CLIPText
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.training import checkpoint, clock
from tinyldm.training.log import read

STEPS = ["--max-steps", "12", "--save-every", "3", "--sample-every", "4", "--val-every", "4", "--keep-last", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run_with_kills(words: list, folder: Path, kills: int, seed: int, env=ENVIRONMENT, latest=6, at_work=lambda seconds: seconds > 1,
                   on_kill=lambda: None) -> int:
    """Start train.py, kill it at some moment, start it again, and so on; in the end leave it alone. -> the number of kills that hit
    it at work (before the first second is over, nothing is there that could be hurt). Half of them come soon after it wrote
    something, half of them at any moment in the first `latest` seconds."""
    rng, hits = random.Random(seed), 0
    files = lambda: {str(Path(inside, name)) for inside, _, names in os.walk(folder) for name in names}    # (rglob fails if one vanishes)
    for attempt in range(10 * kills + 1):
        resume = ["--resume", "auto"] if (folder / "config.json").exists() else []
        before, begun = files(), time.monotonic()
        job = subprocess.Popen([sys.executable, *map(str, words), "--out", str(folder), *resume], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        if hits < kills:
            if soon := rng.random() < 0.5:
                while job.poll() is None and files() <= before:
                    time.sleep(0.005)
            try:
                job.wait(rng.uniform(0, 0.5) if soon else rng.uniform(0, latest))
            except subprocess.TimeoutExpired:
                job.kill()
                on_kill()
                hits += at_work(time.monotonic() - begun)
        _, error = job.communicate()
        if job.returncode == 0 and hits:
            return hits
        if job.returncode == 0:                                # sooner done than killed
            shutil.rmtree(folder)
            continue
        assert job.returncode == -signal.SIGKILL, error
    raise AssertionError("it never came to an end")


def assert_same(one: Path, two: Path, steps: int) -> None:
    for name in (f"checkpoints/step-{steps:06d}", "samples", "latents", "vae"):
        assert contents(one / name) == contents(two / name), name
    assert log_without_timing(one) == log_without_timing(two)
    assert not [path for path in two.rglob(".writing-*")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = script("train.py", *SMALL, *STEPS, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_kills_change_nothing(whole, tmp_path):
    run_with_kills(["train.py", *SMALL, *STEPS], tmp_path / "run", kills=2, seed=1)
    assert_same(whole, tmp_path / "run", 12)


@pytest.mark.slow
def test_kills_change_nothing_of_a_run_on_a_frozen_text_encoder_that_changes_meanwhile(tmp_path):
    tokenizer, config = small_text()
    for seed, name in ((1, "source"), (1, "changing"), (2, "other")):
        save_texts(tmp_path / name, TextEncoders([TextEncoder(randomise(CLIPText(config), seed), tokenizer)]))
    words = lambda name: ["train.py", *SMALL, *STEPS, "--text-weights", tmp_path / name]
    done = script(*words("source"), "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    run_with_kills(words("changing"), tmp_path / "run", kills=6, seed=2, on_kill=lambda: (tmp_path / "run" / "text").is_dir() and (
        shutil.rmtree(tmp_path / "changing"), shutil.copytree(tmp_path / "other", tmp_path / "changing")))
    assert_same(tmp_path / "whole", tmp_path / "run", 12)
    assert contents(tmp_path / "whole" / "text") == contents(tmp_path / "run" / "text")
    file = "text_encoder/model.safetensors"
    assert os.path.samefile(tmp_path / "run" / "text" / file, tmp_path / "run" / "checkpoints" / "step-000012" / "model" / file)


@pytest.mark.slow
def test_thirty_kills_in_both_stages_and_in_preparing_change_nothing(tmp_path):
    files = sorted(pictures(tmp_path / "d", 600, (32, 32)).iterdir())
    for i in range(5):
        with tarfile.open(tmp_path / f"s-{i}.tar", "w") as tar:
            for file in files[i * len(files) // 5:(i + 1) * len(files) // 5]:
                tar.add(file, file.name)
    words = ["train.py", *SMALL, "--data", tmp_path / "s-*.tar", "--resolution", 32, "--vae-steps", 60, "--max-steps", 200,
             "--save-every", 5, "--keep-last", 2, "--keep-every", 50, "--sample-every", 25, "--val-every", 10, "--ema-widths", "0.05", "0.1"]
    done = script(*words, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert run_with_kills(words, tmp_path / "run", kills=30, seed=0) > 20
    assert_same(tmp_path / "whole", tmp_path / "run", 200)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "state cut"])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(whole, tmp_path, damage, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoints" / "step-000012"
    file = newest / "state.json" if damage == "state cut" else newest / "optimizer.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(b"" if damage == "empty" else data[:len(data) // 2])
    found = checkpoint.newest_undamaged(folder)
    assert found.name == "step-000009" and "step-000012 is damaged" in capsys.readouterr().out
    if damage == "cut":                                        # the rest is the same for all of them
        assert script("train.py", "--out", folder, "--resume", "auto").returncode == 0
        assert_same(whole, folder, 12)


@contextmanager
def small_disk(place: Path, options: str):
    """A disk of its own mounted there, which takes an administrator."""
    place.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "ro") as disk:
        assert "Read-only" in mistake("train", [*SMALL, "--out", disk / "run"], capsys)


@pytest.mark.slow
def test_a_full_disk_stops_with_the_reason_and_with_room_the_run_goes_on(whole, tmp_path):
    with small_disk(tmp_path / "disk", "size=1400k") as disk:
        done = script("train.py", *SMALL, *STEPS, "--out", disk / "run")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "make room" in done.stderr or "is the disk full" in done.stderr or "No space left" in done.stderr
        shutil.copytree(disk / "run", tmp_path / "run")
    assert checkpoint.names(tmp_path / "run")                  # what there was is still there, and good
    assert script("train.py", "--out", tmp_path / "run", "--resume", "auto").returncode == 0
    assert_same(whole, tmp_path / "run", 12)


@pytest.mark.slow
def test_a_clock_that_is_set_back_and_forth_changes_nothing(whole, tmp_path, monkeypatch):
    train, real, jumps = load_script("train"), time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-1e6, 1e6))
    words = [*SMALL, *STEPS, "--vae-weights", str(whole / "vae")]
    train_here(train, [*words, "--out", str(tmp_path / "jumping")], monkeypatch)
    monkeypatch.setattr(time, "time", real)
    train_here(load_script("train"), [*words, "--out", str(tmp_path / "quiet")], monkeypatch)
    one, two = (weights(tmp_path / name / "checkpoints" / "step-000012") for name in ("jumping", "quiet"))
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    assert log_without_timing(tmp_path / "jumping") == log_without_timing(tmp_path / "quiet")


@pytest.mark.slow
def test_a_budget_counts_running_time_over_kills_and_ends_with_a_low_rate(whole, tmp_path, monkeypatch):
    """On a clock of our own: a look at it takes 0.1 s, so a step takes about so much."""
    train, ticks = load_script("train"), [0]

    def running(self):
        ticks[0] += 1
        self.file.write_text(f'{{"seconds": {self.before + ticks[0] * 0.1}}}')
        return self.before + ticks[0] * 0.1

    words = [*SMALL, "--vae-weights", str(whole / "vae"), "--max-steps", "0", "--budget", "7s", "--save-every", "10", "--log-every", "1",
             "--sample-every", "0", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(train.Clock, "running", running)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: ticks[0] * 0.1))
    train_here(train, words, monkeypatch, stop_after=25)
    spent, ticks[0] = [row for row in read(tmp_path / "run" / "log.jsonl") if "loss" in row][-1]["running"], 0
    (tmp_path / "run" / "running.json").unlink()               # the checkpoint knows, too
    train_here(train := load_script("train"), ["--out", str(tmp_path / "run"), "--resume", "auto"], monkeypatch)
    rows = [row for row in read(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert spent < rows[25]["running"] < spent + 2 and 6.5 < rows[-1]["running"] <= 7.2
    assert rows[-1]["lr_factor"] < 0.05 and max(row["lr_factor"] for row in rows) == 1
    assert checkpoint.read_state(checkpoint.newest_undamaged(tmp_path / "run"))["finished"]
    plans = [row for row in read(tmp_path / "run" / "log.jsonl") if row.get("event") == "plan"]
    assert plans and all(row["total_steps"] > 0 and row["finish"] for row in plans)
