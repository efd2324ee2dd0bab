"""The same command gives the same bits, whatever else the machine does; a run that is interrupted, too."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, script
from test_kills import assert_same, contents, run_with_kills

from tinyldm.models.layers import TextFeatures
from tinyldm.text.encoders import encode

TWO_THREADS = {"env": ENVIRONMENT | {"OMP_NUM_THREADS": "2"}}
# The networks, picture size and batch sizes of the preset; only the number of steps and of pictures is smaller.
TINY = ["train.py", "--preset", "tiny", "--scenes", "500", "--vae-pictures", "500", "--val-samples", "64", "--log-every", "1",
        "--sample-steps", "4", "--save-every", "4", "--keep-last", "99"]
STEPS = ["--max-steps", "16", "--sample-every", "8", "--val-every", "8"]


@contextmanager
def busy_core():
    """Another process that keeps a core busy, and so takes it from one thread or the other."""
    job = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        job.kill(), job.wait()


def train(words: list, folder: Path) -> Path:
    done = script(*words, "--out", folder, **TWO_THREADS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of both stages at the preset's real sizes on two threads."""
    return train([*TINY, *STEPS, "--vae-steps", 16], tmp_path_factory.mktemp("same") / "whole")


@pytest.mark.slow
def test_both_stages_of_the_real_preset_give_the_same_bits_on_two_threads_and_beside_a_busy_process(whole, tmp_path):
    with busy_core():
        train([*TINY, *STEPS, "--vae-steps", 16], tmp_path / "busy")
    assert contents(whole / "checkpoints" / "vae-000016") == contents(tmp_path / "busy" / "checkpoints" / "vae-000016")
    assert_same(whole, tmp_path / "busy", 16)


@pytest.mark.slow
def test_kills_in_the_second_stage_of_the_real_preset_change_nothing_on_two_threads(whole, tmp_path):
    words = [*TINY, *STEPS, "--vae-weights", whole / "vae", "--cache", whole / "latents"]
    begun = time.monotonic()
    second, log = train(words, tmp_path / "second"), tmp_path / "run" / "log.jsonl"
    whole_run = time.monotonic() - begun                        # on a busy machine it takes minutes until the second stage is reached
    assert contents(whole / "checkpoints" / "step-000016") == contents(second / "checkpoints" / "step-000016")

    def in_second_stage(seconds: float) -> bool:
        return log.exists() and log.stat().st_mtime > time.time() - seconds     # this attempt wrote to the log, or cut it to resume

    # A fast machine finishes after few kills: one that hit the second stage is enough.
    assert run_with_kills(words, tmp_path / "run", kills=6, seed=3, latest=whole_run, at_work=in_second_stage, **TWO_THREADS) > 0
    assert_same(second, tmp_path / "run", 16)


def test_features_of_repeated_captions_have_the_same_gradient_in_every_order_of_the_threads():
    """64 captions, 40 of them different: the gradient of a caption that occurs twice is a sum."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    hidden, inverse = torch.randn(40, 24, 128, requires_grad=True), torch.randint(40, (64,))
    given = torch.randn(64, 24, 128)

    class Fixed(torch.nn.Module):
        def forward(self, ids):
            return TextFeatures(hidden, hidden[:, 0])

    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(encode(Fixed(), torch.zeros(40, 16), inverse, torch.device("cpu"), False, {}).context, hidden,
                                         given)[0] for _ in range(60)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    exact = torch.zeros(40, 24, 128, dtype=torch.float64).index_add(0, inverse, given.double())
    assert torch.allclose(gradients[0].double(), exact, rtol=1e-5, atol=1e-6)
