"""Encode one shard of captioned pictures into one folder of latents: filters, decoding threads, VAE, counts.

The contents of a shard's folder depend only on the shard, the settings and the VAE: pictures are encoded in the order in which
they are read, and no batch contains pictures of two shards. (The last bits of the latents depend on more: see prepare.py.)

The scaling factor of the latents: it is measured once, after the autoencoder has been trained (or comes with pretrained
weights), and is frozen in the VAE's config before anything is encoded. `encode` applies it, and its value is part of
`fingerprint`, so latents in a cache are standardised for good and a cache with another factor is never used by mistake.
"""

from __future__ import annotations

import hashlib
import json
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
from torch import Tensor
from tqdm import tqdm

from tinyldm.config import DataConfig, split_weights
from tinyldm.data.cache import ShardWriter
from tinyldm.data.decoding import Framing, Unusable, decode_with_sizes, make_buckets, workers
from tinyldm.data.readers import Damaged, Sample, Skip, caption_keys, captions
from tinyldm.data.shard import read_facts
from tinyldm.data.source_kind import Shard
from tinyldm.device import autocast, begin_copy_to_host, first_line, in_parts, out_of_memory, upload
from tinyldm.files import Claims, write_file
from tinyldm.models.vae import AutoencoderKL, Posterior
from tinyldm.pictures.pixels import to_pixels
from tinyldm.pictures.resizing import resized

CHUNK = 16                      # pictures that a decoding thread takes at a time


class Item(NamedTuple):
    """A decoded sample: a picture with its captions, or the reason why it cannot be used."""

    key: str
    image: np.ndarray | None = None                     # uint8 [h, w, 3]
    captions: list[tuple[int, str]] = []
    sizes: tuple[list[int], list[int]] = ([], [])       # of the picture and of its mirror image: `Decoded.sizes`
    reason: str = ""
    detail: str = ""
    filtered: bool = False                              # outside the user's own limits, but not broken


@dataclass(frozen=True)
class Recipe:
    """How a sample is decoded and filtered before it reaches the VAE."""

    framing: Framing
    keys: tuple[str, ...]                               # caption keys, see `captions`
    min_caption: int                                    # characters
    max_caption: int                                    # characters; 0: any
    captioned: bool = True                              # False: pictures alone are wanted, with or without captions

    def __call__(self, sample: Sample | Skip) -> Item:
        """Decode and filter one sample. Anything that is wrong with it becomes a reason, never an exception."""
        if isinstance(sample, Skip):
            return Item(sample.key, reason=sample.reason, detail=sample.detail)
        texts = self.texts(sample) if self.captioned else []
        if isinstance(texts, Item):
            return texts
        try:
            decoded = decode_with_sizes(sample.picture, self.framing)
            return Item(sample.key, decoded.image, texts, (decoded.sizes(), decoded.sizes(mirrored=True)))
        except Unusable as error:
            detail = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))               # memory addresses differ from run to run
            return Item(sample.key, reason=error.reason, detail=detail, filtered=error.filtered)

    def texts(self, sample: Sample) -> list[tuple[int, str]] | Item:
        """The captions of a sample that may be used, or why there are none."""
        try:
            found = captions(sample, self.keys)
        except ValueError as error:
            return Item(sample.key, reason=str(error))
        if not found:
            return Item(sample.key, reason="no caption", detail=f"there is: {', '.join(caption_keys(sample)) or 'nothing'}")
        fitting = [(kind, text) for kind, text in found if self.min_caption <= len(text) <= (self.max_caption or len(text))]
        return fitting or Item(sample.key, reason="caption too short or too long", filtered=True)


def make_recipe(data: DataConfig, unit: int = 0, captioned: bool = True) -> Recipe:
    """The recipe of a config. unit: the sides of buckets are multiples of it, in pixels; 0: crop every picture to a square."""
    buckets = make_buckets(data.resolution, unit, data.buckets) if unit and data.buckets else ()
    return Recipe(Framing(data.resolution, buckets, data.min_side, data.max_aspect),
                  tuple(split_weights(data.caption_key)), data.min_caption, data.max_caption, captioned)


def decoded(samples: Iterable[Sample | Skip], recipe: Recipe, pool: ThreadPoolExecutor) -> Iterator[Item]:
    """Apply the recipe in several threads and yield the items in the order of the samples. (Pillow releases the GIL.)"""
    samples, pending = iter(samples), deque()
    while chunk := list(islice(samples, CHUNK)):
        pending.append(pool.submit(lambda part: [recipe(sample) for sample in part], chunk))
        if len(pending) > 2 * workers():
            yield from pending.popleft().result()
    for future in pending:
        yield from future.result()


# ---------------------------------------------------------------- the VAE


@torch.no_grad()
def posterior(vae: AutoencoderKL, images: np.ndarray, device: torch.device, dtype: str) -> Posterior:
    """uint8 [b, h, w, 3] -> the VAE's posterior, float32 on the device, where the pixels are converted to floats."""
    pixels = to_pixels(upload(torch.from_numpy(images), device))
    with autocast(device, dtype):
        mean, logvar = vae.encode(pixels)
    return Posterior(mean.float(), logvar.float())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, dtype: str, flip: bool) -> Tensor:
    """uint8 [b, h, w, 3] -> float16 [b, views, 2, c, h, w] on the device: mean and standard deviation of the standardised latents."""
    encoded = []
    for view in [images, np.ascontiguousarray(images[:, :, ::-1])] if flip else [images]:
        mean, logvar = posterior(vae, view, device, dtype)
        std = (0.5 * logvar).exp() * vae.config.scaling_factor
        encoded.append(torch.stack([vae.to_latents(mean), std], dim=1))                 # [b, 2, c, h, w]
    return torch.stack(encoded, dim=1).half()


class BatchSize:
    """The number of pictures that are encoded at once: as in the settings, until memory runs out. What fits then is noted in the cache's
    folder for processes that begin later, a restart among them, because the last bits of the latents depend on it."""

    def __init__(self, folder: Path, most: int, claims: Claims):
        self.file, self.claims, self.count = folder / "encode_batch_size", claims, most
        self.count = self._smallest()
        if self.count < most:
            print(f"encoding {self.count} pictures at once, not {most}, as {self.file} says since memory ran out: delete it to try again")

    def halve(self, batch: list[Item]) -> None:
        """After memory has run out with this batch. ValueError where it was a single picture."""
        height, width, _ = batch[0].image.shape
        if len(batch) == 1:
            raise ValueError(f"out of memory while a single picture of {width}x{height} pixels is encoded: use fewer pixels "
                             "(--resolution), a smaller autoencoder (--vae-weights), or a GPU with more memory")
        with self.claims.held(self.file.name):
            self.count = max(1, self.count // 2)
            self.count = self._smallest()
            write_file(self.file, f"{self.count}\n")
        tqdm.write(f"out of memory with {len(batch)} pictures of {width}x{height} pixels: encoding goes on with {self.count} at once")

    def _smallest(self) -> int:
        """The smaller one of the noted size and this one."""
        try:
            return max(1, min(self.count, int(self.file.read_text(encoding="utf-8"))))
        except (OSError, ValueError):                          # nothing noted
            return self.count


class CompiledVAE:
    """An autoencoder that encodes whole batches by a compiled graph, which has static shapes and, as nothing needs gradients, fused norms
    and convolutions in channels-last. Incomplete batches, the last of each picture size in a shard, are encoded without it: padding
    them would cost more time than it saves. The results are equal up to rounding. Where compiling fails, all goes on without it."""

    def __init__(self, vae: AutoencoderKL, size: BatchSize):
        self.vae, self.size, self.config, self.to_latents = vae, size, vae.config, vae.to_latents
        self.compiled: Callable[[Tensor], Posterior] | None = None
        try:
            self.compiled = torch.compile(vae.encode, dynamic=False)
        except RuntimeError as error:                          # a Python that this torch cannot compile
            self._go_without(error)

    def encode(self, pixels: Tensor) -> Posterior:
        if self.compiled is None or len(pixels) != self.size.count:
            return self.vae.encode(pixels)
        try:
            return self.compiled(pixels)
        except Exception as error:                             # of many kinds: no compiler, no Triton, a bug in Inductor
            if out_of_memory(error):
                raise
            self._go_without(error)
        return self.vae.encode(pixels)

    def _go_without(self, error: Exception) -> None:
        tqdm.write(f"torch.compile failed, pictures are encoded without it: {first_line(error)}")
        self.compiled = None


def fingerprint(vae: AutoencoderKL) -> str:
    """A hash of the VAE's weights and config, which includes the scaling factor of its latents; not of the picture size."""
    facts = {name: value for name, value in asdict(vae.config).items() if name != "sample_size"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- one shard


class Encoder:
    """Encodes the items of one shard and writes its folder. A batch holds pictures of one size, in the order in which they came.

    While a GPU encodes a batch, the latents of the one before are checked and written."""

    def __init__(self, settings: DataConfig, dtype: str, vae: AutoencoderKL | CompiledVAE, device: torch.device, size: BatchSize,
                 folder: Path):
        self.settings, self.dtype, self.vae, self.device, self.size, self.folder = settings, dtype, vae, device, size, folder
        self.writer, self.waiting, self.buffers = ShardWriter(folder), {}, {}
        self.unwritten: tuple[list[Item], Callable[[], np.ndarray]] | None = None   # a batch that is being encoded, and its latents
        self.counts = {True: Counter(), False: Counter()}                           # {filtered: samples by reason}
        self.log = open(folder / "skipped.jsonl", "w", encoding="utf-8")
        self.read = self.kept = 0
        self.sums = dict.fromkeys(("numbers", "sum", "squares", "variance"), 0.0)   # over all latents; `variance`: of the posterior

    def add(self, item: Item) -> None:
        self.read += 1
        if item.image is None:
            return self.drop(item)
        waiting = self.waiting.setdefault(item.image.shape, [])
        waiting.append(item)
        while len(waiting) >= self.size.count:
            self.flush(waiting)

    def drop(self, item: Item) -> None:
        """Count a sample that is left out, and log it with its reason."""
        self.counts[item.filtered][item.reason] += 1
        row = {"shard": self.folder.name.removeprefix(".writing-"), "key": item.key, "reason": item.reason}
        detail = {"detail": item.detail[:200]} if item.detail and item.detail != item.reason else {}
        self.log.write(json.dumps(row | detail) + "\n")

    def encode(self, batch: list[Item], dtype: str) -> Tensor:
        shape = (self.settings.encode_batch_size, *batch[0].image.shape)
        if shape not in self.buffers:                          # reused for every batch: the first use of new memory is slow
            self.buffers[shape] = np.empty(shape, np.uint8)
        images = np.stack([item.image for item in batch], out=self.buffers[shape][:len(batch)])
        return encode(self.vae, images, self.device, dtype, self.settings.flip)

    def flush(self, waiting: list[Item]) -> None:
        """Encode a batch from the beginning of a list of pictures of one size, and take it off the list. Where memory runs out, the list
        stays as it is and the next batches are smaller."""
        batch = waiting[:self.size.count]
        try:
            latents = begin_copy_to_host(self.encode(batch, self.dtype))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            latents = None
        if latents is None:                                    # outside of the block, where the error's tensors are freed
            torch.cuda.empty_cache()                           # for cuBLAS and cuDNN, which cannot use what torch keeps
            return self.size.halve(batch)
        del waiting[:len(batch)]
        self.write()
        self.unwritten = batch, latents

    def write(self) -> None:
        """Write the latents of the last batch. Drops those that are not finite even in float32."""
        if self.unwritten is None:
            return
        (batch, latents), self.unwritten = self.unwritten, None
        z = latents()
        fine = np.isfinite(z).all(axis=(1, 2, 3, 4, 5))
        if not fine.all():                                     # a VAE can overflow in 16 bits: encode these again in 32
            again = [item for item, good in zip(batch, fine.tolist()) if not good]
            encode_again = lambda part: self.encode(part, "fp32").cpu().numpy()
            z[~fine] = np.concatenate([*in_parts(encode_again, again, self.size.count)])
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
        size = [self.settings.keep_pictures * side for side in z.shape[4:]]
        pictures = np.stack([resized(item.image, *size) for item in batch]) if all(size) else None
        self.writer.add(z if self.settings.moments else z[:, :, :1], [item.captions for item in batch],
                        [item.sizes[:z.shape[1]] for item in batch], pictures)

    def close(self) -> dict[str, Any]:
        """Encode the incomplete batches and finish the files. Returns the counts and sizes for shard.json."""
        for shape in sorted(self.waiting):
            while self.waiting[shape]:
                self.flush(self.waiting[shape])
        self.write()
        arrays = self.writer.close()
        self.log.close()
        return {"read": self.read, "kept": self.kept, "skipped": dict(sorted(self.counts[False].items())),
                "filtered": dict(sorted(self.counts[True].items())), "stats": self.sums} | arrays


def encode_shard(shard: Shard, items: Callable[[Iterable], Iterator[Item]], make_encoder: Callable[[Path], Encoder],
                 settings: str, folder: Path, tick: Callable[[], None], content: str = "") -> None:
    """Encode a shard into a new folder. settings: their digest. tick: called after every item. content: the hash of the shard's
    contents, "" where it is not known.

    A shard that is not an archive, or that turns out to be damaged as a whole (`Damaged`), is written without samples, and all
    samples that were read from it are logged with this reason.
    """
    folder.mkdir()
    encoder, keys = make_encoder(folder), []

    def samples() -> Iterator[Sample | Skip]:                  # and remember their keys
        try:
            for sample in shard.read():
                keys.append(sample.key)
                yield sample
        except ValueError as error:
            raise Damaged(str(error)) from error

    try:
        for item in items(samples()):
            encoder.add(item)
            tick()
    except Damaged as error:
        tqdm.write(f"the whole shard is left out: {error}")
        encoder.close()
        shutil.rmtree(folder)
        folder.mkdir()
        encoder = make_encoder(folder)
        for key in keys or [""]:
            encoder.add(Item(key, reason="archive damaged", detail=str(error)))
    facts = {"name": shard.name, "url": shard.url, "stamp": shard.stamp, "content": content, "settings": settings} | encoder.close()
    (folder / "shard.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def read_shard(folder: Path, shard: Shard, settings: str) -> dict[str, Any] | None:
    """The contents of a cached shard's shard.json. None where the shard is not in the cache, was made with other settings
    (given as a digest), has changed at its source since, or its shard.json is damaged."""
    facts = read_facts(folder / "shards" / shard.name)
    return facts if (facts.get("stamp"), facts.get("settings")) == (shard.stamp, settings) else None
