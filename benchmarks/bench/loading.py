"""Cases of `load`: networks of Stable Diffusion 1 from files of diffusers' layout in the page cache, each time in a fresh process.

The time is until every weight has been read once, because a peer that keeps the file's dtype returns tensors whose data are still on
the disk; `call` is the time until the call returns. 6 GB are written for --scale full, and removed afterwards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bench.compare import Case, Options, Side, Work
from benchmarks.bench.pairs import CLIP_L, CLIP_SMALL, CLIP_TINY, KL8, KL8_SMALL, KL8_TINY, PAIRS, SD1, SD1_SMALL, SD1_TINY, Row
from tinyldm.device import DTYPES
from tinyldm.files import read_json
from tinyldm.folders.build import load_network
from tinyldm.folders.save import write_part
from tinyldm.folders.weights import find_weights, mapped_weights, open_weights
from tinyldm.model import architecture

ROWS = [Row("U-Net", "unet", SD1, {"full": ({}, 1, 8), "small": (SD1_SMALL, 1, 8), "tiny": (SD1_TINY, 1, 8)}),
        Row("VAE", "decode", KL8, {"full": ({}, 1, 32), "small": (KL8_SMALL, 1, 32), "tiny": (KL8_TINY, 1, 32)}),
        Row("CLIP", "clip", CLIP_L, {"full": ({}, 1, 77), "small": (CLIP_SMALL, 1, 77), "tiny": (CLIP_TINY, 1, 77)})]
Load = Callable[[Path, torch.dtype], nn.Module]
STORED = ("fp32", "fp16")           # loaded as --dtype says
CHECKED = 1000                      # numbers of each weight that are compared


def on_meta(row: Row, scale: str) -> nn.Module:
    with torch.device("meta"):
        return PAIRS[row.kind].module(row.at(scale)[0])


def write(row: Row, stored: str, options: Options) -> Path:
    """A part folder with random weights -> its path. OSError where the disk has no room."""
    folder = Path(options.folder) / f"{row.name}-{stored}"
    if not folder.exists():
        module, dtype = on_meta(row, options.scale), DTYPES[stored]
        needed, free = sum(p.numel() for p in module.parameters()) * dtype.itemsize, shutil.disk_usage(options.folder).free
        if needed > free:
            raise OSError(f"{options.folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed: pass another --folder")
        torch.manual_seed(0)
        write_part(folder, module, {name: (torch.randn(p.shape) * 0.02).to(dtype) for name, p in module.state_dict().items()})
    for file in folder.iterdir():
        file.read_bytes()                                       # into the page cache
    return folder


def our_loader(row: Row) -> Load:
    found = architecture(PAIRS[row.kind].module)

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        config = found.from_config(read_json(folder / "config.json", "run this command from the start"))
        return load_network(found.module, config, open_weights(find_weights(folder, found.stem)), "cpu", dtype)
    return load


def our_mapping_loader(row: Row) -> Load:
    """As `sample.py --map-weights` loads."""
    load = our_loader(row)

    def mapped(folder: Path, dtype: torch.dtype) -> nn.Module:
        with mapped_weights():
            return load(folder, dtype)
    return mapped


def their_loader(row: Row) -> Load:
    """The peer's class is imported here, before any time is measured."""
    if row.kind == "clip":
        from transformers import CLIPTextModel
        return lambda folder, dtype: CLIPTextModel.from_pretrained(folder, dtype=dtype)
    import diffusers
    found = {"unet": diffusers.UNet2DConditionModel, "decode": diffusers.AutoencoderKL}[row.kind]
    return lambda folder, dtype: found.from_pretrained(folder, torch_dtype=dtype)


def build(loader: Callable[[Row], Load], row: Row, stored: str, options: Options) -> Work:
    load, folder, dtype = loader(row), Path(options.folder) / f"{row.name}-{stored}", DTYPES[options.dtype]
    torch.ones(8).sum()                                         # torch's initialisation happens at the first operation

    @torch.inference_mode()
    def call() -> dict[str, float]:
        begun = time.perf_counter()
        module = load(folder, dtype)
        took = time.perf_counter() - begun
        for p in module.parameters():
            p.sum()
        return {"call": took}

    @torch.inference_mode()
    def output() -> Tensor:
        """The beginning of every weight, in an order that both libraries share."""
        heads = sorted(p.flatten()[:CHECKED].float().tolist() for p in load(folder, dtype).parameters())
        return torch.cat([torch.tensor(head) for head in heads])

    return Work(call, torch.device("cpu"), output)


def cases(options: Options) -> list[Case]:
    if options.compile or options.device != "cpu":
        raise ValueError("load measures reading into main memory: leave out --compile and --device")
    made = []
    for row in ROWS:
        for stored in STORED:
            sides = [Side("tinyldm", partial(build, our_loader, row, stored, options)),
                     Side("tinyldm, mapped", partial(build, our_mapping_loader, row, stored, options))]
            if options.peer != "none":
                sides.append(Side(PAIRS[row.kind].library, partial(build, their_loader, row, stored, options), peer=True))
            made.append(Case(f"{row.name}, {stored} -> {options.dtype}", sides, lambda: 0, 0.0, partial(write, row, stored, options),
                             fresh=True))
    return made
