"""How fast the loader reads a cache in shuffled order, and how long opening ten million samples takes.

    python benchmarks/loader.py [--samples 200000] [--rounds 5] [--folder /tmp]

A synthetic cache (4x32x32 latents, 77 tokens, one caption each: 8.2 kB a sample) is written below --folder and removed
afterwards. Samples per second in batches of 256 for four ways of reading, which take turns; medians. `warm`: the files are in the
page cache; `cold`: after asking the system to drop them from it (Linux). Then caches of ten million samples in sparse files, which
take no space on the disk: a fresh process opens one and reads, which measures time and memory but not the disk.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

BATCH, ROWS, SHAPE, SIZE, LENGTH = 256, 10_000, (1, 1, 4), (32, 32), 77


class NoiseTokenizer:
    """Random ids for any caption."""

    fingerprint, context_length = "5" * 64, LENGTH

    def __len__(self) -> int:
        return 49408

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.random.default_rng(len(texts)).integers(49408, size=(len(texts), LENGTH))


TOKENIZER = NoiseTokenizer()


def write_cache(folder: Path, samples: int) -> None:
    """A cache of noise, in shards of ROWS samples."""
    from tinyldm.data.cache import ShardWriter, write_index, write_tokens
    rng, names = np.random.default_rng(0), []
    for first in range(0, samples, ROWS):
        names.append(f"{first // ROWS:05d}")
        shard = folder / "shards" / names[-1]
        shard.mkdir(parents=True)
        writer, rows = ShardWriter(shard), min(ROWS, samples - first)
        writer.add(rng.standard_normal((rows, *SHAPE, *SIZE), np.float32).astype(np.float16), [[(0, "a caption")]] * rows)
        (shard / "shard.json").write_text(json.dumps(writer.close() | {"name": names[-1], "kept": rows}), encoding="utf-8")
    write_index(folder, {}, [{"spec": "noise", "shards": names}])
    write_tokens(folder, TOKENIZER)
    os.sync() if hasattr(os, "sync") else None          # pages that are not yet on the disk cannot be dropped


def write_holes(folder: Path, shards: int, rows: int) -> None:
    """A cache of zeros in sparse files, which take no space where the file system supports them."""
    from tinyldm.data.cache import write_index
    from tinyldm.data.shard import HEADER, header, latents_name, tokens_name
    arrays = {latents_name(SIZE): ("<f2", (rows, *SHAPE, *SIZE)), "captions.npy": ("|u1", (0,)), "ends.npy": ("<i8", (rows,)),
              "first.npy": ("<i8", (rows + 1,)), "kinds.npy": ("|u1", (rows,)),
              tokens_name(TOKENIZER.fingerprint): ("<u2", (rows, LENGTH))}
    names = [f"{i:05d}" for i in range(shards)]
    for name in names:
        shard = folder / "shards" / name
        shard.mkdir(parents=True)
        for file, (dtype, shape) in arrays.items():
            (shard / file).write_bytes(header(dtype, shape))
            os.truncate(shard / file, HEADER + np.dtype(dtype).itemsize * int(np.prod(shape)))
        facts = {"groups": [{"size": SIZE, "count": rows}], "captions": rows, "shape": SHAPE, "name": name, "kept": rows}
        (shard / "shard.json").write_text(json.dumps(facts), encoding="utf-8")
    write_index(folder, {}, [{"spec": "holes", "shards": names}])


NAMES = ("Loader.batch, prefetched (latents and tokens, float32)", "Cache.latents", "np.load(mmap_mode='r')", "the same with MADV_RANDOM")


def ways(folder: Path) -> dict[str, Callable[[int, int], None]]:
    """A function (start, stop) for each way of reading. All read batches start .. stop - 1 of the same order."""
    from tinyldm.data.cache import Cache
    from tinyldm.data.loader import Loader, prefetch
    cache = Cache(folder)
    loader = Loader(cache, [TOKENIZER.fingerprint], batch_size=BATCH, seed=0)
    maps = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("shards/*/latents-*.npy"))]
    advised = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("shards/*/latents-*.npy"))]
    for array in advised:
        if hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)

    def run(start: int, stop: int) -> None:
        for _ in prefetch(loader.batch, start, stop):
            pass

    def latents(start: int, stop: int) -> None:
        for step in range(start, stop):
            cache.latents(loader.order.batch(step))

    def mapped(arrays: list[np.ndarray], start: int, stop: int) -> None:
        for step in range(start, stop):
            samples, out = loader.order.batch(step), np.empty((BATCH, *SHAPE, *SIZE), np.float16)
            for shard in np.unique(samples // ROWS):
                selected = samples // ROWS == shard
                out[selected] = arrays[shard][samples[selected] % ROWS]

    return dict(zip(NAMES, (run, latents, partial(mapped, maps), partial(mapped, advised))))


def drop_pages(folder: Path) -> None:
    """Ask the system to drop the files from the page cache."""
    for file in folder.glob("shards/*/*.npy"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, count: int, rounds: int, cold: bool) -> dict[str, list[float]]:
    """Samples per second of each way in each round. Cold rounds are short, as the slowest way reads only hundreds per second."""
    steps = 8 if cold else count // BATCH // 4
    rates: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name in NAMES:
            read = None
            if cold:
                drop_pages(folder)                      # before the files are mapped: mapped pages cannot be dropped
            read = ways(folder)[name]
            if not cold and not turn:
                read(0, count // BATCH)                 # read everything once, so that it is in the page cache
            start = time.perf_counter()
            read(turn * steps, (turn + 1) * steps)
            rates.setdefault(name, []).append(steps * BATCH / (time.perf_counter() - start))
    return rates


def anonymous() -> float:
    """MB of resident memory of this process that are not file pages (Linux)."""
    status = Path("/proc/self/status")
    return int(re.search(r"RssAnon:\s*(\d+)", status.read_text(encoding="utf-8"))[1]) / 1e3 if status.exists() else float("nan")


def child(folder: Path) -> None:
    """In a fresh process: open a cache, read one batch, then many. Prints the figures as JSON."""
    start = time.perf_counter()
    import torch  # noqa: F401
    torch_s, torch_mb, start = time.perf_counter() - start, anonymous(), time.perf_counter()
    from tinyldm.data.cache import Cache
    from tinyldm.data.loader import Loader, prefetch
    loader = Loader(Cache(folder), [TOKENIZER.fingerprint], batch_size=BATCH, seed=0)
    loader.batch(0)
    first_s, first_mb, start = time.perf_counter() - start, anonymous(), time.perf_counter()
    steps = 200
    for _ in prefetch(loader.batch, 1, 1 + steps):
        pass
    rate = steps * BATCH / (time.perf_counter() - start)
    print(json.dumps([torch_s, first_s, torch_mb, first_mb, anonymous(), rate]))


def main() -> None:
    from tinyldm.cli import Parser
    parser = Parser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folder = Path(work) / "cache"
        write_cache(folder, args.samples)
        conditions = ["warm"] + ["cold"] * hasattr(os, "posix_fadvise")
        rates = {condition: measure(folder, args.samples, args.rounds, condition == "cold") for condition in conditions}
        print(f"Samples per second of {args.samples:,} in shuffled batches of {BATCH} "
              f"(median of {args.rounds} rounds, slowest to fastest)\n")
        print("| |" + "|".join(conditions) + "|\n|---|" + "---:|" * len(conditions))
        for name in NAMES:
            cells = [f"{statistics.median(rate[name]):,.0f} ({min(rate[name]):,.0f} to {max(rate[name]):,.0f})"
                     for rate in rates.values()]
            print(f"| {name} | {' | '.join(cells)} |")
    print("\nTen million samples, a fresh process each (medians)\n")
    print("| shards | import torch, s | open and first batch, s | anonymous after torch, MB | after the first batch | "
          "after 200 | samples/s |\n|---|---:|---:|---:|---:|---:|---:|")
    for shards, rows in ((100, 100_000), (2000, 5000)):
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            write_holes(Path(work), shards, rows)
            command = [sys.executable, __file__, "--child", work]
            runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(args.rounds)]
            torch_s, first_s, *memory, rate = map(statistics.median, zip(*runs))
            megabytes = " | ".join(f"{mb:.0f}" for mb in memory)
            print(f"| {shards:,} x {rows:,} | {torch_s:.2f} | {first_s:.2f} | {megabytes} | {rate:,.0f} |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    child(Path(sys.argv[2])) if sys.argv[1:2] == ["--child"] else main()
