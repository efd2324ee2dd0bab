"""Encode captioned pictures into a cache of latents, once, before training: decode, filter, crop, VAE, token ids.

    python prepare.py --data my_pictures/ --vae-weights stabilityai/sd-vae-ft-mse --out cache/mine --preview sheet.png
    python prepare.py --data "shards/{000..045}.tar:0.7" more/:0.3 --caption-key dense:0.75 short:0.25 --vae-weights ... --out ...
    python prepare.py --preset 5090_week                     the encoding that train.py --preset 5090_week would begin with
    torchrun --nproc-per-node 8 prepare.py ...               several GPUs; or the same command on several hosts
    python train.py --cache cache/mine --vae-weights stabilityai/sd-vae-ft-mse ...

If it is stopped or killed, the same command continues with the next shard. skipped.jsonl in the cache lists every sample that
could not be used, with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from tinyldm.cli import begin, guard, outlive_terminal
from tinyldm.config import Config, parse

NAMES = ("preset", "seed", "device", "dtype", "compile", "data", "scenes", "caption_key", "resolution", "buckets", "flip", "moments",
         "keep_pictures", "stages", "min_side", "max_aspect", "min_caption", "max_caption", "max_skip", "encode_batch_size", "vae_weights",
         "text_weights", "network", "unet", "dit", "net")


def count(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of pictures")
    return int(text)


FLAGS = {
    "--out": dict(default="", metavar="FOLDER", help="the cache (default: runs/PRESET/latents, where train.py looks for it)"),
    "--rebuild": dict(action="store_true", help="replace a cache that was made with other settings"),
    "--preview": dict(default="", metavar="FILE.png", help="first write a sheet of cropped pictures with their captions"),
    "--decode-check": dict(type=count, default=0, metavar="N", help="first write N pictures, each above its reconstruction by the "
                           "VAE, to OUT/decoded.png, and print the PSNR"),
}

if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    CONFIG, ARGS = parse(sys.argv[1:], __doc__, FLAGS, NAMES)

import numpy as np
import torch

from tinyldm.data.cache import write_tokens
from tinyldm.data.encoding import posterior
from tinyldm.data.cache_folder import check_folder
from tinyldm.data.prepare import phase_folders, prepare, some_pictures
from tinyldm.device import fast_convolutions, in_parts, pick_device
from tinyldm.folders.load import load_vae
from tinyldm.folders.texts import load_texts, tokenizer_only
from tinyldm.models.vae import AutoencoderKL
from tinyldm.pictures.pixels import psnr, to_bytes, write_picture
from tinyldm.pictures.sheet import captioned, tile, two_lines
from tinyldm.pipeline import decode
from tinyldm.planning.flops import check_sides
from tinyldm.planning.texts import token_counts
from tinyldm.training.signals import Interrupted, Signals


def write_preview(config: Config, file: Path, signals: Signals) -> None:
    """Write a sheet of 48 square crops with their captions, taken evenly from all shards."""
    items, _ = some_pictures(config, 48, signals.check)
    sheet = captioned([item.image for item in items], [two_lines(item.captions[0][1]) for item in items])
    write_picture(file, np.asarray(sheet))
    print(f"preview of {len(items)} pictures: {file}")


def decode_check(config: Config, vae: AutoencoderKL, device: torch.device, count: int, file: Path, signals: Signals) -> None:
    """Write a sheet of pictures, each above its reconstruction from the mean of the posterior, and print the PSNR."""
    images = np.stack([item.image for item in some_pictures(config, count, signals.check)[0]])

    def reconstruct(batch: np.ndarray) -> np.ndarray:
        signals.check()
        return to_bytes(decode(vae, vae.to_latents(posterior(vae, batch, device, config.run.dtype).mean)))

    with torch.no_grad():
        decoded = np.concatenate([*in_parts(reconstruct, images, config.data.encode_batch_size)])
    decibels = psnr(decoded, images)
    rows = [part for start in range(0, len(images), 8) for part in (images[start : start + 8], decoded[start : start + 8])]
    width = min(8, len(images))
    blank = np.full((-len(images) % width, *images.shape[1:]), 255, np.uint8)
    rows[-2:] = [np.concatenate([row, blank]) for row in rows[-2:]]
    write_picture(file, tile(np.concatenate(rows), columns=width))
    lowest_to_highest = f"{decibels.min():.2f} to {decibels.max():.2f}"
    print(f"PSNR of {len(images)} pictures through the VAE: {decibels.mean():.2f} dB ({lowest_to_highest}): {file}")


def main() -> None:
    config, out = CONFIG, Path(ARGS.out or f"runs/{CONFIG.run.preset}/latents")
    if not config.autoencoder.weights:
        raise ValueError("which VAE? Name one with --vae-weights: stabilityai/sd-vae-ft-mse, for example, or the vae folder of a run")
    device, signals = pick_device(config.run.device), Signals()
    compile = device.type == "cuda" if config.run.compile is None else config.run.compile
    if device.type == "cuda":
        fast_convolutions()
    vae = load_vae(config.autoencoder.weights, device)
    check_sides(config, vae.config.downscale)                   # refuses a misspelt network, too, before anything is written
    texts = load_texts(config.text.weights, "", partial(token_counts, config), tokenizer_only) if config.text.weights else None
    folders = phase_folders(config, out)
    for _, folder in folders:
        check_folder(folder)
    try:
        if os.environ.get("RANK", "0") == "0":
            if ARGS.preview:
                write_preview(config, Path(ARGS.preview), signals)
            if ARGS.decode_check:
                decode_check(config, vae, device, ARGS.decode_check, folders[0][1] / "decoded.png", signals)
        done = [(prepare(phase, folder, vae, device, ARGS.rebuild, signals.check, compile), folder) for phase, folder in folders]
    except Interrupted:
        print(f"stopped; finished shards stay in {out}: the same command continues")
        sys.exit(128 + signals.received)
    for report, folder in done:
        if report is None:
            return print(f"this process is done; others are still encoding into {folder}")
        print(report)
        for tokenizer in texts.tokenizers if texts else []:
            write_tokens(folder, tokenizer)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{size / 1e6:,.1f} MB in {folder}")
    print(f"python train.py --cache {' '.join(str(folder) for _, folder in done)} --vae-weights {config.autoencoder.weights} ...")


if __name__ == "__main__":
    outlive_terminal()
    guard(main)
