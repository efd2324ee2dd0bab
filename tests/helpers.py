"""What several test files share."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tinyldm.cli import guard
from tinyldm.config import parse
from tinyldm.data import toyworld
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.training.log import read

ROOT = Path(__file__).parent.parent
PROMPT = "a red square on the left of a blue circle"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}


def script(*words, env=ENVIRONMENT, **options) -> subprocess.CompletedProcess:
    """Run a script as a person does."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=env, **options)


def load_script(name: str):
    """A script, such as train.py, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mistake(name: str, words, capsys) -> str:
    """Run a script in this process, which saves seconds, up to the one line of error that it ends with."""
    module, handlers = load_script(name), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words = [str(word) for word in words]
    flash, same_bits = torch.backends.cuda.flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    streams = (sys.stdout, sys.stderr)
    try:
        with pytest.raises(SystemExit) as end:
            if hasattr(module, "FLAGS"):                       # train.py and prepare.py: the fields of a config, and these
                module.CONFIG, module.ARGS = parse(words, "", module.FLAGS, getattr(module, "NAMES", ()))
            else:
                module.ARGS = module.parse(words)
            guard(module.main)
    finally:
        sys.stdout, sys.stderr = streams
        torch.backends.cuda.enable_flash_sdp(flash)             # train.py changes both on a CPU
        torch.use_deterministic_algorithms(same_bits)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


SMALL = ("--scenes 24 --resolution 16 --vae-crop 8 --vae-batch-size 4 --batch-size 4 --log-every 3 --save-every 2 "
         "--keep-last 99 --sample-every 2 --sample-steps 2 --warmup-steps 2 --vae-steps 4 --max-steps 6 "
         "--autoencoder kl --vae latent_channels=8 widths=8,16 groups=4 depth=1 middle_attention=false "
         "--unet widths=16,32 attention=False,True heads=1,2 groups=4 "
         "--text width=16 layers=1 heads=2 mlp_width=32").split()


def pictures(folder: Path, count: int, size=(16, 16)) -> Path:
    """Scenes of the toy world as files, with captions long and short."""
    folder.mkdir()
    for i in range(count):
        drawn = toyworld.sample(i, max(size), 0)
        Image.fromarray(drawn.image).crop((0, 0, *size)).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.json").write_text(json.dumps({"long": drawn.caption, "short": ["scene", f"number {i}"]}))
        (folder / f"{i:04d}.txt").write_text(drawn.caption)
    return folder


def train_here(train, words: list[str], monkeypatch, stop_after: int | None = None) -> None:
    """train.py's main job in this process: faster than another one, and open to monkeypatching. stop_after: as if interrupted
    in the second stage while that step was in progress."""
    train.CONFIG, train.ARGS = parse(words, "", train.FLAGS)
    signals = SimpleNamespace(received=0, check=lambda: None)
    for switch in ("prefer_plain_attention", "deterministic"):                  # for the whole process
        monkeypatch.setattr(train, switch, lambda: None)
    monkeypatch.setattr(train, "Signals", lambda: signals)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))      # which main() wraps
    locked = []
    monkeypatch.setattr(train.checkpoint, "lock", locked.append)
    if stop_after is None:
        return train.main()
    real = train.turns_at

    def turns_at(objective, step, progress):                    # called where step `step` begins
        if not isinstance(objective, AutoencoderObjective):     # steps of the second stage are counted
            signals.received = signal.SIGTERM if step + 1 == stop_after else 0
        return real(objective, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train, "turns_at", turns_at)
        with pytest.raises(SystemExit) as end:
            train.main()
    assert end.value.code == 128 + signal.SIGTERM


def whole_and_cut(folder: Path, words: list[str], monkeypatch, lost: tuple[int, ...] = (4, 6)) -> tuple[Path, Path]:
    """Two runs of train.py: one left alone, and a copy of it that has lost the checkpoints of these steps and was resumed."""
    train, whole, cut = load_script("train"), folder / "whole", folder / "cut"
    train_here(train, ["--out", str(whole), *words], monkeypatch)
    shutil.copytree(whole, cut)
    for step in lost:
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    train_here(train, ["--out", str(cut), "--resume", "auto"], monkeypatch)
    return whole, cut


TIMING = {"seconds", "images_per_second", "mfu", "memory_gb", "running"}


def log_without_timing(run: Path) -> list[dict]:
    """The rows of a run's log, without what depends on the clock and the machine."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in read(run / "log.jsonl")]


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors in all files below a folder."""
    return {f"{file.relative_to(folder)}:{name}": tensor
            for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.no_grad()
def randomise(module, seed=0):
    """Weights of unit gain, biases and norms away from 0 and 1: nothing that a wrong name could hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.copy_(noise * p[0].numel() ** -0.5 if p.dim() > 1 else gain + 0.2 * noise)
    return module.eval()


def small_text():
    """A tokenizer trained on two captions, PROMPT among them, and the config of a small text tower for it."""
    tokenizer = Tokenizer.train([PROMPT, "a small green triangle"] * 3, vocab_size=600, context_length=16)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return tokenizer, CLIPTextConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=2, mlp_width=64, context_length=16, **ids)


# ---- grids of cases, thinned: all of them run with `pytest -m "slow or not slow"`


def later(every, *places):
    """The mark of a combination, from the indices of its values on their axes: one diagonal in `every` is in the fast suite,
    the others are `-m slow`. Where two axes are about that long, each value of each axis is in the fast suite."""
    return pytest.mark.slow if sum(places) % every else ()


def combinations(every, *axes):
    """All combinations of one value of each axis, marked by later()."""
    numbered = (zip(*pairs) for pairs in product(*map(enumerate, axes)))
    return [pytest.param(*values, marks=later(every, *places)) for places, values in numbered]


def thinned(every, cases):
    """The cases, marked by later(). Those that are marked already stay as they are."""
    unpacked = [(case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if hasattr(case, "marks") else pytest.param(*values, marks=later(every, place))
            for place, (case, values) in enumerate(zip(cases, unpacked))]
