"""Loading Stable Diffusion 1's networks from diffusers' layout: seconds and peak memory, of tinyldm and of diffusers or transformers.

    python benchmarks/loading.py [--scale full|small] [--rounds 5] [--folder /tmp]

Random weights of Stable Diffusion 1.5's shapes are written below --folder (6 GB, removed afterwards). Every load runs
in a fresh process, alternately with our code and with diffusers or transformers, with the files in the page cache. `load` is the
call alone; `ready` adds reading every weight once, because a peer that keeps the file's dtype returns tensors whose data are
still on the disk. Memory: the increase of allocated and mapped memory from before the call until ready. Medians. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from tinyldm.cli import need
from tinyldm.files import read_json
from tinyldm.folders.build import load_network
from tinyldm.folders.save import write_part
from tinyldm.folders.weights import find_weights, open_weights
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig

FULL = {UNet: UNetConfig(), AutoencoderKL: VAEConfig(), CLIPText: CLIPTextConfig()}
SMALL = {UNet: replace(FULL[UNet], widths=(64, 128, 256, 256)),
         AutoencoderKL: replace(FULL[AutoencoderKL], widths=(32, 64, 128, 128)),
         CLIPText: replace(FULL[CLIPText], width=192, heads=3, mlp_width=768)}
NETWORKS = {network.__name__: network for network in FULL}
CASES = [(network, stored, loaded) for network in NETWORKS
         for stored, loaded in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32"))]


def meta(network: type, config) -> torch.nn.Module:
    with torch.device("meta"):
        return network(config)


def write(folder: Path, configs: dict) -> None:
    """Write a part folder with random weights for every network and every dtype on disk."""
    for network, config in configs.items():
        module = meta(network, config)
        weights = {name: torch.randn(p.shape) * 0.02 for name, p in module.state_dict().items()}
        for dtype in dict.fromkeys(stored for _, stored, _ in CASES):
            path = folder / f"{network.__name__}-{dtype}"
            write_part(path, module, {name: w.to(getattr(torch, dtype)) for name, w in weights.items()})


def ours(path: Path, network: str, dtype: torch.dtype):
    row = architecture(NETWORKS[network])
    config = row.from_config(read_json(path / "config.json", "run this script from the start"))
    return load_network(NETWORKS[network], config, open_weights(find_weights(path, row.stem)), "cpu", dtype)


def peer(network: str):
    """The peer's loading function. It is imported here, before the time is measured."""
    if network == "CLIPText":
        from transformers import CLIPTextModel
        return lambda path, _, dtype: CLIPTextModel.from_pretrained(path, dtype=dtype)
    import diffusers
    found = {"UNet": diffusers.UNet2DConditionModel, "AutoencoderKL": diffusers.AutoencoderKL}[network]
    return lambda path, _, dtype: found.from_pretrained(path, torch_dtype=dtype)


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak since it was reset): anonymous and mapped pages."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)[1]) * 1024


def child(who: str, folder: str, network: str, stored: str, dtype: str) -> None:
    """Load once and print the time and memory it took, as JSON."""
    load = ours if who == "ours" else peer(network)
    torch.ones(8).sum()                                         # torch's initialisation happens at the first operation
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")     # reset the peak to the current value
    before, begun = resident("VmRSS"), time.perf_counter()
    module = load(Path(folder) / f"{network}-{stored}", network, getattr(torch, dtype))
    loaded = time.perf_counter() - begun
    with torch.inference_mode():
        total = sum(float(p.sum()) for p in module.parameters())
    ready = time.perf_counter() - begun
    size = sum(p.nbytes for p in module.parameters())
    assert total == total and {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    print(json.dumps({"load": loaded, "ready": ready, "peak": resident("VmHWM") - before, "size": size}))


def run(*words: str) -> dict:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def table(folder: Path, rounds: int) -> None:
    print("| network, file -> memory | GB | load s: tinyldm | peer | ready s: tinyldm | peer | ratio "
          "| peak / weights: tinyldm | peer |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in CASES:
        for file in (folder / f"{case[0]}-{case[1]}").iterdir():
            file.read_bytes()                                   # read the file into the page cache
        runs = {"ours": [], "peer": []}
        for i in range(rounds):
            for who in ("ours", "peer")[::1 - 2 * (i % 2)]:     # which one runs first alternates
                runs[who].append(run(who, str(folder), *case))
        one, two = ({key: statistics.median(r[key] for r in found) for key in found[0]} for found in runs.values())
        print(f"| {case[0]}, {case[1]} -> {case[2]} | {one['size'] / 1e9:.2f} | {one['load']:.2f} | {two['load']:.2f} "
              f"| {one['ready']:.2f} | {two['ready']:.2f} | {one['ready'] / two['ready']:.2f} "
              f"| {one['peak'] / one['size']:.2f} | {two['peak'] / two['size']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where there is room for the weights")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    need("diffusers", "transformers")
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("memory is read from /proc: run this on Linux")
    configs = FULL if args.scale == "full" else SMALL
    needed = 6 * sum(p.numel() for network, config in configs.items() for p in meta(network, config).parameters())
    if needed > (free := shutil.disk_usage(args.folder).free):
        sys.exit(f"{args.folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed: pass another --folder")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), configs)
        table(Path(folder), args.rounds)


if __name__ == "__main__":
    main()
