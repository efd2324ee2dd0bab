"""train.py on several processes, as torchrun starts them: the same run as on one, up to float rounding."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ENVIRONMENT, ROOT, SMALL, script, weights

from tinyldm.training import checkpoint
from tinyldm.training.log import read

WORDS = [*SMALL, "--batch-size", "8", "--dtype", "fp32", "--optimizer", "adamw", "--log-every", "1"]


def torchrun(processes: int, *words) -> subprocess.CompletedProcess:
    return script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words)


def losses(run: Path) -> list[float]:
    rows = [row for row in read(run / "log.jsonl") if row["stage"] == "step"]
    return [row[name] for row in rows for name in ("loss", "val_raw", "val_ema") if name in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = script("train.py", *WORDS, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_alike(one: Path, two: Path) -> None:
    """Adam divides by the gradient's size: where that is nothing but rounding (biases before a norm), so is the step."""
    assert len(losses(one)) == 8 and losses(one) == pytest.approx(losses(two), rel=2e-5)
    one, two = (weights(run / "checkpoints" / "step-000006" / "model") for run in (one, two))
    assert one.keys() == two.keys()
    apart = np.concatenate([np.abs(one[name] - two[name]).ravel() for name in one])
    moved = 4e-3                                               # what a step of Adam's moves a weight by
    assert np.mean(apart > 1e-2 * moved) < 0.01 and apart.max() < 6 * moved


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_as_one(alone, tmp_path, processes):
    done = torchrun(processes, "train.py", *WORDS, "--out", tmp_path / "run", "--grad-accum", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("new run in") == 1                # one speaks for all
    assert_alike(alone, tmp_path / "run")


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path, processes):
    cut = tmp_path / "cut"
    shutil.copytree(alone, cut)
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(cut / "checkpoints" / name)
    done = torchrun(processes, "train.py", "--out", cut, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_alike(alone, cut)


ONLY = ("--only vae --scenes 40 --resolution 16 --vae-batch-size 6 --vae-steps 4 --vae-val-every 2 --early-stop 3 --vae-ema 0.5 "
        "--val-samples 4 --log-every 1 --dtype fp32 --optimizer adamw "
        "--autoencoder kl --vae widths=8,16 groups=4 depth=1 middle_attention=false --vae-loss gan=0.5 "
        "--vae-gan start=0 warmup=0 width=8 layers=1 norm=none").split()


@pytest.mark.slow
def test_several_processes_train_an_autoencoder_alone_as_one_does(tmp_path):
    """With a discriminator, whose adaptive weight is that of the whole batch."""
    done = script("train.py", *ONLY, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = torchrun(2, "train.py", *ONLY, "--out", tmp_path / "two", "--grad-accum", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the VAE trains on 40 pictures") == 1              # one process draws them for all
    found = [[row[name] for row in read(tmp_path / run / "log.jsonl") for name in ("loss", "val_ema", "val_psnr", "loss_discriminator",
                                                                                   "gan_weight") if name in row] for run in ("one", "two")]
    assert len(found[0]) == 16 and found[0] == pytest.approx(found[1], rel=1e-3)
    one, two = (weights(tmp_path / run / "vae") for run in ("one", "two"))
    apart = np.concatenate([np.abs(one[name] - two[name]).ravel() for name in one])
    assert np.mean(apart > 1e-2 * 3e-3) < 0.02 and apart.max() < 6 * 3e-3       # see assert_alike
    assert not list((tmp_path / "two").glob("*vae-pictures*"))


def start_by_hand(words: list, processes: int = 2) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    return [subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT | place | {"RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("number, code, said", [(signal.SIGKILL, 2, "another of the 2 processes has ended"),
                                                pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.slow)])
def test_a_dead_process_ends_all_and_a_polite_one_saves_first(alone, tmp_path, number, code, said):
    run = tmp_path / "run"
    jobs = start_by_hand(["train.py", *WORDS, "--vae-weights", alone / "vae", "--max-steps", 100_000, "--sample-every", 0,
                          "--keep-last", 2, "--out", run])
    try:
        while not checkpoint.names(run):
            assert all(job.poll() is None for job in jobs), jobs[0].communicate()
            time.sleep(0.05)
        jobs[1].send_signal(number)
        out, error = jobs[0].communicate(timeout=60)
        jobs[1].communicate(timeout=60)
    finally:
        for job in jobs:
            job.kill()
    assert jobs[0].returncode == code and said in error and "Traceback" not in error
    if number == signal.SIGTERM:
        assert jobs[1].returncode == 143 and f"--out {run} --resume yes" in out


@pytest.mark.slow
def test_processes_that_draw_other_initial_weights_train_with_those_of_the_first(alone, tmp_path):
    start = tmp_path / "start.py"
    start.write_text("import os, runpy, sys, torch\n"
                     "seed = torch.manual_seed\n"
                     "torch.manual_seed = lambda number: seed(number + int(os.environ['RANK']))\n"
                     "sys.argv, sys.path[0] = sys.argv[1:], os.getcwd()\n"
                     "runpy.run_path('train.py', run_name='__main__')\n")
    jobs = start_by_hand([start, "train.py", *WORDS, "--vae-weights", alone / "vae", "--sample-every", 0, "--out", tmp_path / "run"])
    try:
        ends = [job.communicate(timeout=100) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], ends     # a checkpoint is refused where weights differ
    assert_alike(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_starts_a_killed_run_again_from_its_checkpoint(alone, tmp_path, processes):
    run = tmp_path / "run"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", 3, "train.py", *WORDS,
             "--out", run, "--vae-weights", alone / "vae", "--max-steps", 60, "--save-every", 10]
    job = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    while not checkpoint.names(run):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    ranks = [int(re.search(r"\d+", str(path))[0]) for path in Path("/proc").glob("[0-9]*/cmdline")
             if b"train.py" in (line := path.read_bytes()) and str(run).encode() in line and b"torch.distributed.run" not in line]
    subprocess.run(["kill", "-9", str(max(ranks))], check=True)
    _, error = job.communicate(timeout=300)
    assert job.returncode == 0, error
    assert checkpoint.read_state(checkpoint.newest_undamaged(run))["finished"]
    done = script("train.py", *words[8:], "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert losses(run)[:60] == pytest.approx(losses(tmp_path / "whole")[:60], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_network_trains_draws_and_saves_as_a_whole_one(alone, tmp_path):
    model = alone / "checkpoints" / "step-000006" / "model"
    words = ["train.py", *WORDS, "--vae-weights", model, "--text-weights", model, "--ema-widths", "0.05", "0.1", "--grad-checkpointing"]
    done = torchrun(2, *words, "--fsdp", "--out", tmp_path / "sharded")
    assert done.returncode == 0, done.stderr
    whole = script(*words, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
    assert len(list((tmp_path / "sharded" / "samples").glob("step-*.png"))) == 3
    shutil.rmtree(tmp_path / "sharded" / "checkpoints" / "step-000006")                    # and on, without the other process
    again = script("train.py", "--out", tmp_path / "sharded", "--resume", "auto", "--no-fsdp")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
