"""Decoding pictures to squares: tinyldm.data.decoding compared with Pillow alone, in 1 and 2 threads of one process.

    python benchmarks/decoding.py [--data photos.tar] [--resolution 256] [--pictures 100] [--rounds 5]

Pillow alone is Image.open, convert("RGB"), ImageOps.fit with the same filter, np.array. The pictures come from the tar, or
are random smooth ones; they are resized to each size (bicubic) and saved as JPEG of quality 90 or as PNG. With --data, the first
row uses the files as they are. The two decoders take turns, and which one begins alternates from round to round; medians. PSNR
compares the results of `decode` with and without JPEG draft mode, so it is the cost in quality of decoding a JPEG at a fraction
of its size: the lowest of all pictures, and the median.

The last table is the complete job of prepare.py on tar shards of the pictures (reading, matching captions, decoding, latents,
flushing to the disk) with a VAE that does nothing, and Pillow alone in as many threads on bytes in memory.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from PIL import __version__ as pillow_version
from torch import nn

from tinyldm.config import make_config
from tinyldm.data import encoding
from tinyldm.data.decoding import FILTER, Framing, decode
from tinyldm.data.prepare import prepare
from tinyldm.models.vae import Posterior, VAEConfig

Decode = Callable[[bytes], np.ndarray]


def photos(path: str, count: int) -> list[bytes]:
    """The first JPEGs of a tar."""
    with tarfile.open(path, "r|*") as tar:
        found = []
        for member in tar:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")) and len(found) < count:
                found.append(tar.extractfile(member).read())
    if not found:
        raise SystemExit(f"error: --data {path}: no .jpg in it; leave --data out for random pictures")
    return found


def random_pictures(count: int, size: int) -> list[bytes]:
    """Smooth pictures with detail at several scales."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        total = np.zeros((size, size, 3))
        for cells in (4, 16, 64):
            layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += (np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC)) - 127.5) * 2 / cells ** 0.5
        found.append(encode(Image.fromarray(np.clip(total + 127.5, 0, 255).astype(np.uint8)), "JPEG", 92))
    return found


def encode(image: Image.Image, form: str, quality: int = 90) -> bytes:
    data = io.BytesIO()
    image.save(data, form, quality=quality)
    return data.getvalue()


def at_size(pictures: list[bytes], size: int, form: str) -> list[bytes]:
    return [encode(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC), form)
            for data in pictures]


def pillow_alone(resolution: int) -> Decode:
    return lambda data: np.array(ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (resolution, resolution), FILTER))


def rates(one: Decode, two: Decode, pictures: list[bytes], threads: int, rounds: int) -> tuple[float, float]:
    """Pictures per second of each decoder, medians."""
    found: list[list[float]] = [[], []]
    with ThreadPoolExecutor(threads) as pool:
        for i in range(rounds + 1):
            for which in (0, 1)[::1 - 2 * (i % 2)]:
                begun = time.perf_counter()
                for _ in pool.map((one, two)[which], pictures):
                    pass
                if i:                                           # the first round is a warm-up
                    found[which].append(len(pictures) / (time.perf_counter() - begun))
    return statistics.median(found[0]), statistics.median(found[1])


def draft_quality(ours: Decode, pictures: list[bytes]) -> str:
    """PSNR in dB between the results with and without draft mode: lowest / median, or `exact`."""
    drafted = [ours(data) for data in pictures]
    draft = JpegImagePlugin.JpegImageFile.draft
    JpegImagePlugin.JpegImageFile.draft = lambda *_: None
    try:
        undrafted = [ours(data) for data in pictures]
    finally:
        JpegImagePlugin.JpegImageFile.draft = draft
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(drafted, undrafted)]
    if not any(errors):
        return "exact"
    decibels = [10 * np.log10(255 ** 2 / max(error, 1e-3)) for error in errors]
    return f"{min(decibels):.1f} / {statistics.median(decibels):.1f}"


class NoVAE(nn.Module):
    """Stands in for the VAE: returns latents of the right shape without computing anything."""

    config = VAEConfig()

    def encode(self, pixels: torch.Tensor) -> Posterior:
        size = (len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        return Posterior(torch.zeros(1, 1, 1, 1).expand(size), torch.zeros(1, 1, 1, 1).expand(size))

    to_latents = staticmethod(lambda z: z)


def write_shards(folder: Path, pictures: list[bytes], shards: int, copies: int) -> None:
    for number in range(shards):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for i, data in enumerate(pictures * copies):
                for end, content in (("jpg", data), ("json", b'{"id": %d}' % i), ("txt", b"a photo, number %d" % i)):
                    member = tarfile.TarInfo(f"{i:06d}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def preparing(pictures: list[bytes], resolution: int, rounds: int, shards: int = 3) -> tuple[float, float, float]:
    """Pictures per second: the complete job, the same without converting pixels to floats for the VAE, and Pillow alone."""
    copies = -(-1000 // len(pictures))
    found: list[list[float]] = [[], [], []]
    real = encoding.to_pixels
    torch.set_num_threads(1)                                    # with a GPU, torch computes nothing on the CPU here
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(encoding.workers()) as pool:
        write_shards(Path(work), pictures, shards, copies)
        config = make_config(data=[f"{work}/*.tar"], resolution=resolution, dtype="fp32")
        for i in range(rounds):
            for which in range(3):
                begun = time.perf_counter()
                if which == 2:
                    for _ in pool.map(pillow_alone(resolution), pictures * copies * shards):
                        pass
                else:
                    encoding.to_pixels = real if which == 0 else lambda images: images.permute(0, 3, 1, 2)
                    prepare(config, Path(work) / f"cache-{i}-{which}", NoVAE(), torch.device("cpu"))
                found[which].append(len(pictures) * copies * shards / (time.perf_counter() - begun))
    encoding.to_pixels = real
    return tuple(statistics.median(rates) for rates in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a tar with .jpg pictures; without it, random smooth ones")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    r = args.resolution
    same = photos(args.data, args.pictures) if args.data else random_pictures(args.pictures, r)
    some = same[:max(1, len(same) // 2)]                        # fewer pictures for the larger sizes
    cases = {f"same size, JPEG ({r} px)" if not args.data else "the files unchanged, JPEG": same,
             f"{2 * r} -> {r}, JPEG": at_size(some, 2 * r, "JPEG"), f"{4 * r} -> {r}, JPEG": at_size(some, 4 * r, "JPEG"),
             f"{r}, PNG": at_size(same, r, "PNG"), f"{2 * r} -> {r}, PNG": at_size(some, 2 * r, "PNG")}
    ours, theirs = (lambda data: decode(data, Framing(r))), pillow_alone(r)
    print(f"Pillow {pillow_version}, {os.cpu_count()} hardware threads, {len(same)} pictures, pictures/s\n")
    print("| pictures | PSNR of draft, dB | 1 thread: tinyldm | Pillow | ratio | 2 threads: tinyldm | Pillow | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for name, pictures in cases.items():
        pairs = [rates(ours, theirs, pictures, threads, args.rounds) for threads in (1, 2)]
        cells = " | ".join(f"{a:.0f} | {b:.0f} | {a / b:.2f}" for a, b in pairs)
        print(f"| {name} | {draft_quality(ours, pictures)} | {cells} |", flush=True)
    complete, unconverted, alone = preparing(same, r, args.rounds)
    print("\n| prepare.py with a VAE that does nothing | pictures/s | of Pillow alone |\n|---|---:|---:|")
    for name, rate in (("the complete job", complete), ("without converting pixels to floats, which a GPU does", unconverted),
                       ("Pillow alone", alone)):
        print(f"| {name} | {rate:.0f} | {rate / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
