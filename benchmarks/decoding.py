"""Decoding pictures to squares: tinyldm.data.decoding beside Pillow alone, in 1 and 2 threads of one process.

    python benchmarks/decoding.py [--data photos.tar] [--resolution 256] [--pictures 100] [--rounds 5]

Pillow alone is Image.open, convert("RGB"), ImageOps.fit with the same filter, np.array. The pictures are the tar's, or
random smooth ones; they are brought to each size (bicubic) and saved as JPEG of quality 90 or as PNG, `same size` with
--data as they are. The two take turns, the first of a pair changes from round to round; medians. PSNR compares what
`decode` gives with draft and without, so it is the price of decoding a JPEG at a fraction of its size: the lowest of
all pictures, and the median.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin
from PIL import __version__ as pillow_version

from tinyldm.data.decoding import FILTER, Framing, decode

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
    """Pictures per second of each, medians."""
    found: list[list[float]] = [[], []]
    with ThreadPoolExecutor(threads) as pool:
        for i in range(rounds + 1):
            for which in (0, 1)[::1 - 2 * (i % 2)]:
                begun = time.perf_counter()
                for _ in pool.map((one, two)[which], pictures):
                    pass
                if i:                                           # the first round warms up
                    found[which].append(len(pictures) / (time.perf_counter() - begun))
    return statistics.median(found[0]), statistics.median(found[1])


def draft_quality(ours: Decode, pictures: list[bytes]) -> str:
    """PSNR in dB between drafted and undrafted results: lowest / median, or `exact`."""
    drafted = [ours(data) for data in pictures]
    draft = JpegImagePlugin.JpegImageFile.draft
    JpegImagePlugin.JpegImageFile.draft = lambda *_: None
    try:
        whole = [ours(data) for data in pictures]
    finally:
        JpegImagePlugin.JpegImageFile.draft = draft
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(drafted, whole)]
    if not any(errors):
        return "exact"
    decibels = [10 * np.log10(255 ** 2 / max(error, 1e-3)) for error in errors]
    return f"{min(decibels):.1f} / {statistics.median(decibels):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a tar with .jpg pictures; without it, random smooth ones")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    r = args.resolution
    same = photos(args.data, args.pictures) if args.data else random_pictures(args.pictures, r)
    some = same[:max(1, len(same) // 2)]                        # the larger, the fewer
    cases = {f"same size, JPEG ({r} px)" if not args.data else "as they are, JPEG": same,
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


if __name__ == "__main__":
    main()
