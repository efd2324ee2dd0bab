"""From one shard of captioned pictures to one folder of encoded latents: recipe, threads, VAE, counts.

What a shard's folder holds depends on the shard, the settings and the VAE alone: pictures are encoded in their order of
arrival, in batches that never reach beyond the shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tinyldm.config import Config, split_weights
from tinyldm.data.cache import ShardWriter
from tinyldm.data.decoding import Framing, Unusable, decode, make_buckets
from tinyldm.data.readers import Damaged, Sample, Skip, caption_keys, captions
from tinyldm.data.sources import Shard
from tinyldm.device import autocast
from tinyldm.models.vae import AutoencoderKL, Posterior
from tinyldm.pipeline import to_pixels

CHUNK = 16                      # pictures per piece of work of a decoding thread


class Item(NamedTuple):
    """A sample on its way: a picture with captions, or the reason why it is none."""

    key: str
    image: np.ndarray | None = None                     # uint8 [h, w, 3]
    captions: list[tuple[int, str]] = []
    reason: str = ""
    detail: str = ""
    filtered: bool = False                              # dropped by the user's own limits, not for a fault


@dataclass(frozen=True)
class Recipe:
    """What is done to every sample before the VAE sees it."""

    framing: Framing
    keys: tuple[str, ...]
    min_caption: int
    max_caption: int

    def __call__(self, sample: Sample | Skip) -> Item:
        """Whatever a picture from the internet can do wrong ends as a reason here, not as an exception."""
        if isinstance(sample, Skip):
            return Item(sample.key, reason=sample.reason, detail=sample.detail)
        try:
            found = captions(sample, self.keys)
        except ValueError as error:
            return Item(sample.key, reason=str(error))
        if not found:
            return Item(sample.key, reason="no caption", detail=f"there is: {', '.join(caption_keys(sample)) or 'nothing'}")
        fitting = [(kind, text) for kind, text in found if self.min_caption <= len(text) <= (self.max_caption or len(text))]
        if not fitting:
            return Item(sample.key, reason="caption too short or too long", filtered=True)
        try:
            return Item(sample.key, decode(sample.picture, self.framing), fitting)
        except Unusable as error:
            detail = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))               # an address differs from run to run
            return Item(sample.key, reason=error.reason, detail=detail, filtered=error.filtered)


def make_recipe(config: Config, unit: int = 0) -> Recipe:
    """unit: pixels that sides are a multiple of, for --buckets; 0: every picture is cropped square."""
    buckets = make_buckets(config.resolution, unit, config.buckets) if unit and config.buckets else ()
    return Recipe(Framing(config.resolution, buckets, config.min_side, config.max_aspect),
                  tuple(split_weights(config.caption_key)), config.min_caption, config.max_caption)


def workers() -> int:
    """Decoding threads: as many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoded(samples: Iterable[Sample | Skip], recipe: Recipe, pool: ThreadPoolExecutor) -> Iterator[Item]:
    """Items in the order of the samples, made by several threads (Pillow lets go of the interpreter's lock)."""
    samples, pending = iter(samples), deque()
    while chunk := list(islice(samples, CHUNK)):
        pending.append(pool.submit(lambda some: [recipe(sample) for sample in some], chunk))
        if len(pending) > 2 * workers():
            yield from pending.popleft().result()
    for future in pending:
        yield from future.result()


# ---------------------------------------------------------------- the VAE


@torch.no_grad()
def posterior(vae: AutoencoderKL, images: np.ndarray, device: torch.device, dtype: str) -> Posterior:
    """uint8 [b, h, w, 3] -> the VAE's posterior, float32 on the device; pixels become floats there."""
    pixels = to_pixels(torch.from_numpy(images).to(device, non_blocking=True))
    with autocast(device, dtype):
        mean, logvar = vae.encode(pixels)
    return Posterior(mean.float(), logvar.float())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, dtype: str, flip: bool) -> np.ndarray:
    """uint8 [b, h, w, 3] -> float16 [b, views, 2, c, h, w]: mean and std of what diffusion runs on, of every view."""
    made = []
    for view in [images, np.ascontiguousarray(images[:, :, ::-1])] if flip else [images]:
        mean, logvar = posterior(vae, view, device, dtype)
        std = (0.5 * logvar).exp() * vae.config.scaling_factor
        made.append(torch.stack([vae.to_latents(mean), std], dim=1))
    return torch.stack(made, dim=1).half().cpu().numpy()


def fingerprint(vae: AutoencoderKL) -> str:
    """Hash of the VAE's weights and of the numbers that standardise its latents."""
    facts = {name: value for name, value in asdict(vae.config).items() if name != "sample_size"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- one shard


class Encoder:
    """Items in, a shard's folder out. Pictures of one size are encoded together, in order of arrival."""

    def __init__(self, config: Config, vae: AutoencoderKL, device: torch.device, folder: Path):
        self.config, self.vae, self.device, self.folder = config, vae, device, folder
        self.writer, self.waiting, self.buffers = ShardWriter(folder), {}, {}
        self.counts = {True: Counter(), False: Counter()}                           # of reasons: filtered, skipped
        self.log = open(folder / "skipped.jsonl", "w", encoding="utf-8")
        self.read = self.kept = 0
        self.sums = dict.fromkeys(("numbers", "sum", "squares", "variance"), 0.0)   # over all latents; posterior variance

    def add(self, item: Item) -> None:
        self.read += 1
        if item.image is None:
            return self.drop(item)
        batch = self.waiting.setdefault(item.image.shape, [])
        batch.append(item)
        if len(batch) == self.config.encode_batch_size:
            self.flush(self.waiting.pop(item.image.shape))

    def drop(self, item: Item) -> None:
        self.counts[item.filtered][item.reason] += 1
        row = {"shard": self.folder.name.removeprefix(".writing-"), "key": item.key, "reason": item.reason}
        detail = {"detail": item.detail[:200]} if item.detail and item.detail != item.reason else {}
        self.log.write(json.dumps(row | detail) + "\n")

    def flush(self, batch: list[Item]) -> None:
        """Encode pictures of one size and write them, but for those whose latents are not finite even in float32."""
        shape = (self.config.encode_batch_size, *batch[0].image.shape)
        if shape not in self.buffers:                          # kept: new memory is slow to touch
            self.buffers[shape] = np.empty(shape, np.uint8)
        images = np.stack([item.image for item in batch], out=self.buffers[shape][:len(batch)])
        z = encode(self.vae, images, self.device, self.config.dtype, self.config.flip)
        fine = np.isfinite(z).all(axis=(1, 2, 3, 4, 5))
        if not fine.all():                                     # 16 bits can overflow in a VAE: once more, in 32
            z[~fine] = encode(self.vae, images[~fine], self.device, "fp32", self.config.flip)
            fine = np.isfinite(z).all(axis=(1, 2, 3, 4, 5))
            for item, good in zip(batch, fine.tolist()):
                if not good:
                    self.drop(item._replace(reason="latents not finite"))
            z, batch = z[fine], [item for item, good in zip(batch, fine.tolist()) if good]
        if not batch:
            return
        mean, std = z[:, :, 0].astype(np.float32), z[:, :, 1].astype(np.float32)
        for name, value in (("numbers", mean.size), ("sum", mean.sum(dtype=float)), ("squares", (mean * mean).sum(dtype=float)),
                            ("variance", (std * std).sum(dtype=float))):
            self.sums[name] += float(value)
        self.kept += len(batch)
        self.writer.add(z if self.config.moments else z[:, :, :1], [item.captions for item in batch])

    def close(self) -> dict[str, Any]:
        """Encode what waits, finish the files -> what shard.json says of them."""
        for shape in sorted(self.waiting):
            self.flush(self.waiting[shape])
        arrays = self.writer.close()
        self.log.close()
        return {"read": self.read, "kept": self.kept, "skipped": dict(sorted(self.counts[False].items())),
                "filtered": dict(sorted(self.counts[True].items())), "stats": self.sums} | arrays


def encode_shard(shard: Shard, items: Callable[[Iterable], Iterator[Item]], make_encoder: Callable[[Path], Encoder],
                 settings: str, folder: Path, tick: Callable[[], None]) -> None:
    """Write a shard's folder. One that is no archive, or whose checksum shows at its end that nothing of it can be
    trusted, is written empty, with that reason for all its samples. settings: their digest."""
    folder.mkdir()
    encoder, keys = make_encoder(folder), []

    def noted() -> Iterator[Sample | Skip]:
        try:
            for sample in shard.read():
                keys.append(sample.key)
                yield sample
        except ValueError as error:
            raise Damaged(str(error)) from error

    try:
        for item in items(noted()):
            encoder.add(item)
            tick()
    except Damaged as error:
        tqdm.write(f"left out whole: {error}")
        encoder.close()
        shutil.rmtree(folder)
        folder.mkdir()
        encoder = make_encoder(folder)
        for key in keys or [""]:
            encoder.add(Item(key, reason="archive damaged", detail=str(error)))
    facts = {"name": shard.name, "url": shard.url, "stamp": shard.stamp, "settings": settings} | encoder.close()
    (folder / "shard.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def read_shard(folder: Path, shard: Shard, settings: str) -> dict[str, Any] | None:
    """What a cache's shard.json says; None where the shard is not there, was made with other settings, or has changed at
    its source since."""
    file = folder / "shards" / shard.name / "shard.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return facts if (facts.get("stamp"), facts.get("settings")) == (shard.stamp, settings) else None
