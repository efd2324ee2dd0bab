"""One shard of a cache: its files, their layout, and how they are written.

    shard.json             how many samples were read, kept and skipped; how many there are of each size
    latents-32x32.npy      float16 [n, views, parts, c, h, w], one file per size (latent rows x columns)
    captions.npy           uint8: all captions in UTF-8, concatenated
    ends.npy               int64 [m]: the byte after the last of each caption
    first.npy              int64 [n + 1]: the number of each sample's first caption; samples count size by size, row by row
    pictures-32x32.npy     uint8 [n, 32 k, 32 k, 3], with --keep-pictures k: the pictures, without their mirror images
    kinds.npy              uint8 [m]: the index of the caption key that each caption comes from
    sizes.npy              int32 [n, views, 6]: height and width of the picture as it was found, top and left of the crop in the
                           scaled picture, height and width of the crop, in pixels (`Decoded.sizes`); older caches have none
    tokens-HASH.npy        uint16 or uint32 [m, L]: token ids; HASH: the first 12 digits of the tokenizer's fingerprint

n samples with m captions. views: 1, or 2 with the mirrored picture. parts: 1 (mean) or 2 (mean, standard deviation). Every
file has a header of 4,096 bytes, one page, so a row whose size is a whole number of pages begins on a page, and reading it
from the disk fetches nothing else.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEADER = 4096               # bytes
Size = tuple[int, int]
AGAIN = "run prepare.py again: it repairs what is missing"
FACTS = ("name", "stamp", "read", "kept", "skipped", "filtered", "groups", "captions", "shape", "stats")
SIZES = 6                   # numbers of a sample in sizes.npy


class ShardWriter:
    """Writes one shard's arrays into a folder, which the caller then moves to its final name.

    Latents are written as they arrive, and only captions are held in memory. The same samples in the same order give the
    same bytes, however they are divided into batches.
    """

    def __init__(self, folder: Path):
        self.folder, self.shape = folder, []
        self._files: dict = {}
        self._captions: dict[Size, list[list[tuple[int, bytes]]]] = {}
        self._sizes: dict[Size, list[np.ndarray]] = {}
        self.pictures = 0                                       # pixels per latent of the pictures, along each side; 0: none

    def add(self, latents: np.ndarray, captions: list[list[tuple[int, str]]], sizes: Sequence | None = None,
            pictures: np.ndarray | None = None) -> None:
        """latents: float16 [b, views, parts, c, h, w], of any size; captions: for each sample one or more (kind, text);
        sizes: [b, views, 6], see above; None: not known, which must hold for all samples of the shard; pictures: uint8 [b, k h, k w, 3],
        the same."""
        if latents.dtype != np.float16 or latents.ndim != 6 or len(captions) != len(latents):
            raise ValueError(f"latents {latents.dtype} {list(latents.shape)} for {len(captions)} samples: "
                             "pass float16 [b, views, parts, c, h, w], and the captions of each of the b samples")
        if not all(captions):
            raise ValueError("a sample has no caption: leave it out, or give it an empty one")
        shape = list(latents.shape[1:4])
        if self.shape and shape != self.shape:
            raise ValueError(f"latents of {shape} views, parts, channels after some of {self.shape}: a shard has one shape")
        if not len(latents):
            return
        self.shape, size = shape, (latents.shape[4], latents.shape[5])
        if size not in self._captions:
            self._captions[size], self._sizes[size] = [], []
        self._append(latents_name(size), np.ascontiguousarray(latents, "<f2"))
        if pictures is not None:
            self.pictures = pictures.shape[1] // size[0]
            self._append(pictures_name(size), np.ascontiguousarray(pictures))
        self._captions[size] += [[(kind, text.encode("utf-8", "replace")) for kind, text in sample] for sample in captions]
        if sizes is not None:
            self._sizes[size].append(np.asarray(sizes, "<i4").reshape(len(latents), shape[0], SIZES))

    def _append(self, name: str, rows: np.ndarray) -> None:
        """Write rows [b, ...] to the end of a file."""
        if name not in self._files:
            self._files[name] = open(self.folder / name, "wb")
            self._files[name].write(bytes(HEADER))              # a placeholder: the number of rows is known only in close()
        self._files[name].write(rows.data)

    def close(self) -> dict:
        """Finish the files. Returns {"groups", "captions", "shape", "sizes"} for shard.json (shape: [] without samples; sizes:
        whether they are known), and where there are pictures, {"pictures": pixels per latent of these}."""
        groups = [{"size": list(size), "count": len(self._captions[size])} for size in sorted(self._captions)]
        for size, captions in self._captions.items():
            self._finish(latents_name(size), header("<f2", (len(captions), *self.shape, *size)))
            if self.pictures:
                self._finish(pictures_name(size), header("|u1", (len(captions), *(self.pictures * side for side in size), 3)))
        samples = [sample for size in sorted(self._captions) for sample in self._captions[size]]
        captions = [caption for sample in samples for caption in sample]
        if samples:
            text = b"".join(text for _, text in captions)
            arrays = {"captions": np.frombuffer(text, "|u1"), "kinds": np.array([kind for kind, _ in captions], "|u1"),
                      "ends": np.cumsum([len(text) for _, text in captions], dtype="<i8"),
                      "first": np.cumsum([0, *map(len, samples)], dtype="<i8")}
            if known := [array for size in sorted(self._sizes) for array in self._sizes[size]]:
                arrays["sizes"] = np.concatenate(known)
            for name, array in arrays.items():
                (self.folder / f"{name}.npy").write_bytes(header(array.dtype.str, array.shape) + array.tobytes())
        facts = {"groups": groups, "captions": len(captions), "shape": self.shape, "sizes": any(self._sizes.values())}
        return facts | ({"pictures": self.pictures} if self.pictures else {})

    def _finish(self, name: str, head: bytes) -> None:
        self._files[name].seek(0)
        self._files[name].write(head)
        self._files[name].close()


def read_facts(folder: Path) -> dict:
    """The contents of a shard's shard.json; {} where it is missing, damaged, or just being replaced by another process."""
    try:
        facts = json.loads((folder / "shard.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def check_shard(folder: Path) -> dict:
    """The entry of a shard for index.json. ValueError unless its arrays have the sizes that shard.json implies."""
    try:
        facts = json.loads((folder / "shard.json").read_text("utf-8"))
        shard = {key: facts.get(key) for key in FACTS} | {"name": folder.name, "text_bytes": 0, "kinds": 0}
        # Only what there is, or an older cache's index would not stay as it was.
        shard |= {name: facts[name] for name in ("sizes", "pictures") if facts.get(name)}
        if shard["captions"]:
            shard["text_bytes"] = int(np.load(folder / "ends.npy", mmap_mode="r")[-1])
            shard["kinds"] = int(np.load(folder / "kinds.npy", mmap_mode="r").max()) + 1
    except (OSError, ValueError) as error:              # JSONDecodeError is a ValueError
        raise ValueError(f"shard {folder} is incomplete ({error}): {AGAIN}") from error
    check_sizes(folder, file_sizes(shard))
    return shard


def file_sizes(shard: dict) -> dict[str, int]:
    """The name of each array file of a shard, and its size in bytes."""
    if not shard["captions"]:
        return {}
    views, parts, channels = shard["shape"]
    sizes = {latents_name(group["size"]): 2 * group["count"] * views * parts * channels * group["size"][0] * group["size"][1]
             for group in shard["groups"]}
    if k := shard.get("pictures"):
        sizes |= {pictures_name((h, w)): 3 * group["count"] * k * h * k * w for group in shard["groups"] for h, w in [group["size"]]}
    n, m = count_samples(shard), shard["captions"]
    sizes |= {"captions.npy": shard["text_bytes"], "ends.npy": 8 * m, "first.npy": 8 * (n + 1), "kinds.npy": m}
    sizes |= {"sizes.npy": 4 * n * views * SIZES} if shard.get("sizes") else {}
    return {name: HEADER + size for name, size in sizes.items()}


def check_sizes(folder: Path | str, sizes: dict[str, int], fix: str | None = None) -> None:
    """ValueError, with the fix, unless each file {name: bytes} exists in the folder with exactly this size."""
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        try:
            found = os.stat(path).st_size
        except OSError:
            raise ValueError(f"{path} is missing: {fix or AGAIN}") from None
        if found != size:
            raise ValueError(f"{path} has {found:,} bytes and should have {size:,}: "
                             f"{fix or f'delete {folder} and run prepare.py again'}")


def count_samples(shard: dict) -> int:
    return sum(group["count"] for group in shard["groups"])


def read_captions(folder: Path) -> list[str]:
    """All captions of a shard, in the order of their numbers."""
    text, ends = np.load(folder / "captions.npy").tobytes(), np.load(folder / "ends.npy").tolist()
    return [text[start:end].decode() for start, end in zip([0, *ends], ends)]


def latents_name(size: Sequence[int]) -> str:
    return f"latents-{size[0]}x{size[1]}.npy"


def pictures_name(size: Sequence[int]) -> str:
    return f"pictures-{size[0]}x{size[1]}.npy"


def tokens_name(fingerprint: str) -> str:
    return f"tokens-{fingerprint[:12]}.npy"


def header(dtype: str, shape: Sequence[int]) -> bytes:
    """The header of an .npy file (format version 1.0), padded to HEADER bytes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10) + text.encode().ljust(HEADER - 11) + b"\n"


def read_header(file: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype of an array file whose header `header` wrote."""
    with open(file, "rb") as opened:
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
    return shape, dtype
