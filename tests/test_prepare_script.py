"""prepare.py and training on what it made, as a person runs them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ENVIRONMENT, ROOT, load_script, mistake, pictures, script, train_here, weights
from PIL import Image

from tinyldm.config import parse
from tinyldm.data.cache import Cache
from tinyldm.data.prepare import settings_of
from tinyldm.models.vae import AutoencoderKL, VAEConfig

TINY = ("--batch-size 4 --log-every 3 --save-every 2 --sample-every 0 --sample-steps 2 --warmup-steps 2 --max-steps 6 "
        "--unet widths=16,32 attention=False,True heads=1,2 groups=4 --text width=16 layers=1 heads=2 mlp_width=32").split()
VAE = "--autoencoder kl --vae widths=8,16 groups=4 depth=1 middle_attention=false --vae-crop 8 --vae-batch-size 4 --vae-steps 2".split()
SMALL = ["--scenes", "8", "--resolution", "16", *VAE, *TINY, "--max-steps", "2"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train(["--out", folder, *SMALL], patch)
    return folder / "vae"


def train(words, monkeypatch):
    train_here(load_script("train"), [str(word) for word in words], monkeypatch)


def test_training_on_a_prepared_cache_equals_training_that_prepares(vae, tmp_path, monkeypatch, capsys):
    data = ["--data", pictures(tmp_path / "d", 12), "--vae-weights", vae, "--resolution", 16]
    done = script("prepare.py", *data, "--out", tmp_path / "cache", "--preview", tmp_path / "sheet.png", "--decode-check", 3)
    assert done.returncode == 0, done.stderr
    assert "12 kept" in done.stdout and "posterior" in done.stdout and "PSNR of 3 pictures" in done.stdout
    assert f"--cache {tmp_path / 'cache'}" in done.stdout                              # the next command to type
    assert Image.open(tmp_path / "sheet.png").size[0] > 192
    assert Image.open(tmp_path / "cache" / "decoded.png").size == (3 * 18 - 2, 2 * 18 - 2)
    train(["--out", tmp_path / "own", *TINY, *data], monkeypatch)
    shutil.rmtree(tmp_path / "d")                                                       # the cache stands on its own
    train(["--out", tmp_path / "given", *TINY, "--cache", tmp_path / "cache", *data[2:]], monkeypatch)
    one, two = (weights(tmp_path / name / "checkpoints" / "step-000006" / "model") for name in ("own", "given"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "given" / "latents").exists()
    assert len(list((tmp_path / "given" / "tokens-16").glob("*tokens-*.npy"))) == 1        # a vocabulary of this run alone
    assert not list(tmp_path.glob("cache/shards/*/tokens-*"))
    model = json.loads((tmp_path / "given/checkpoints/step-000006/model/tinyldm.json").read_text())
    assert model["data"] == ["d"]                              # the name alone is published
    train(["--out", tmp_path / "own", "--resume", "auto", "--max-steps", 7], monkeypatch)   # needs no source either
    (tmp_path / "cache" / "index.json").write_text((tmp_path / "cache" / "index.json").read_text() + " ")
    assert "has changed since" in mistake("train", ["--out", tmp_path / "given", "--resume", "auto", "--max-steps", 7], capsys)
    other = ["--out", tmp_path / "other", *TINY, "--cache", tmp_path / "cache", *data[2:4], "--resolution", 32]
    assert "resolution 16 in the cache, 32 in this run" in mistake("train", other, capsys)
    assert not (tmp_path / "other").exists()                                            # the mended command can be typed


def test_sources_captions_views_moments_and_sizes_all_mixed_train_a_dit_and_resume(vae, tmp_path, monkeypatch):
    one, two = pictures(tmp_path / "a", 12, (16, 16)), pictures(tmp_path / "b", 12, (24, 8))
    words = ["--data", f"{one}:0.75", f"{two}:0.25", "--caption-key", "long:0.5", "short:0.5", "--flip", "--moments", "--buckets", "3",
             "--vae-weights", vae, "--resolution", 16, *TINY, "--max-steps", 4, "--network", "dit",
             "--dit", "patch=2", "width=32", "layers=1", "heads=2", "mlp_width=32", "time_dim=16", "--mask-padding"]
    train(["--out", tmp_path / "run", *words], monkeypatch)
    cache = Cache(tmp_path / "run" / "latents")
    assert cache.shape[:2] == (2, 2) and len(cache.sizes) == 2 and len(cache.captions(0)) == 3
    whole = weights(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    train(["--out", tmp_path / "run", "--resume", "auto"], monkeypatch)
    again = weights(tmp_path / "run" / "checkpoints" / "step-000004")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("words, expected", [
    (["--data", "tests"], "--vae-weights: stabilityai"),
    (["--data", "README.md", "--vae-weights", "VAE"], "is not a file that is read"),
    (["--data", "EMPTY", "--vae-weights", "VAE"], "no picture and no shard"),
    (["--data", "toyworld:0", "--vae-weights", "VAE"], "a number above 0"),
    (["--data", "toyworld", "--vae-weights", "VAE", "--resolution", "17"], "not a multiple of"),
    (["--data", "toyworld", "--vae-weights", "VAE", "--out", "docs"], "name another folder"),
    (["--data", "toyworld", "--vae-weights", "VAE", "--lr", "3"], "unknown argument"),
    (["--data", "toyworld", "--vae-weights", "VAE", "--network", "unett"], "did you mean 'unet'"),
    (["--data", "toyworld", "--vae-weights", "VAE", "--network", "mmdit", "--net", "max_positions=2", "--resolution", "64"],
     "pictures with a side of 64 pixels are larger than this mmdit takes: set --net max_positions="),
    (["--data", "EMPTY/*.tar", "--vae-weights", "VAE"], "no shard or folder matches"),
])
def test_mistakes_at_prepare_are_one_line_and_write_nothing(vae, tmp_path, capsys, words, expected):
    (tmp_path / "empty").mkdir()
    words = [word.replace("VAE", str(vae)).replace("EMPTY", str(tmp_path / "empty")) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "cache"]
    assert expected in mistake("prepare", [*words, *out], capsys)
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_preparation_says_how_to_go_on(vae, tmp_path):
    words = ["prepare.py", "--data", "toyworld", "--scenes", 6000, "--vae-weights", vae, "--resolution", 32, "--out", tmp_path / "cache"]
    # A shell's background job, which these tests may be part of, inherits that SIGINT is ignored.
    job = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=ENVIRONMENT, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.glob("cache/shards/.writing-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    out, error = job.communicate()
    assert job.returncode == 130 and "the same command continues" in out and "Traceback" not in error
    assert not list(tmp_path.glob("cache/shards/.writing-*"))


def test_help_names_every_flag_of_the_issue_in_no_time():
    done = script("prepare.py", "--help")
    flags = "--data --caption-key --flip --moments --buckets --min-side --max-aspect --max-skip --preview --decode-check --rebuild --out"
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags.split())
    assert "torch" not in script("-X", "importtime", "prepare.py", "--help").stderr


def test_every_field_that_shapes_a_cache_is_a_flag_of_prepare():
    prepare = load_script("prepare")
    config, _ = parse([], "", {}, prepare.NAMES)
    shaping = settings_of(config, AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4))).keys() - {"format", "vae", "unit"}
    assert shaping <= set(prepare.NAMES)
