"""Checkpoints: folders that are there whole or not at all, and hold nothing but safetensors and JSON.

RUN/checkpoints/vae-000300/    vae/, optimizer.safetensors, state.json         stage 1
RUN/checkpoints/step-001000/   model/, optimizer.safetensors, state.json       stage 2

`model/` is the model folder of the whole library: averaged weights, the raw ones as its non_ema variant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tinyldm.files import replace_folder

STAGES = ("vae", "step")                                   # in the order a run goes through them


def names(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [path for stage in STAGES for path in run.glob(f"checkpoints/{stage}-*")]
    return sorted((path for path in found if (path / "state.json").exists()),
                  key=lambda path: (STAGES.index(path.name.split("-")[0]), int(path.name.split("-")[1])))


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def write(run: Path, stage: str, step: int, fill: Callable[[Path], None], state: dict, keep: int) -> Path:
    """Put in place, whole, what `fill` writes into a folder, and state.json; then drop all but the newest `keep`."""
    folder = run / "checkpoints" / f"{stage}-{step:06d}"

    def fill_all(torso: Path) -> None:
        torso.mkdir()
        fill(torso)
        (torso / "state.json").write_text(json.dumps({"stage": stage, "step": step, **state}, indent=1))

    replace_folder(folder, fill_all)
    for old in names(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def save_optimizers(file: Path, optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> None:
    """Every optimizer's state as tensors named PARAMETER/KEY. OSError where the disk is full."""
    by_id = {id(p): name for name, p in parameters.items()}
    tensors = {f"{by_id[id(p)]}/{key}": value.detach().cpu().contiguous()
               for optimizer in optimizers for p, state in optimizer.state.items() for key, value in state.items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error} (is the disk full?)") from None


def load_optimizers(file: Path, optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> None:
    """The way back. Moments are restored into the memory layout of their parameter: fused AdamW silently corrupts
    contiguous moments beside channels_last weights."""
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                name, _, part = key.rpartition("/")
                p, value = parameters[name], tensors.get_tensor(key)
                restored = torch.empty_like(p).copy_(value) if value.shape == p.shape else value.to(p.device)
                owner[id(p)].state[p][part] = restored.requires_grad_(False)
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{file} does not fit this run: {error}. Is it a checkpoint of another configuration?") from None
