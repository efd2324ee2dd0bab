"""What several test files share."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tinyldm.cli import guard
from tinyldm.config import parse
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
PROMPT = "a red square on the left of a blue circle"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}


def script(*words, **options) -> subprocess.CompletedProcess:
    """Run a script as a person does."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, **options)


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
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        with pytest.raises(SystemExit) as end:
            if hasattr(module, "FLAGS"):                       # train.py and prepare.py: the fields of a config, and these
                module.CONFIG, module.ARGS = parse(words, "", module.FLAGS, getattr(module, "NAMES", ()))
            else:
                module.ARGS = module.parse(words)
            guard(module.main)
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)             # train.py switches it off on a CPU
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


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
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, CLIPTextConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=2, mlp_width=64, context_length=16, **ids)
