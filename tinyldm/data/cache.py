"""A cache of encoded pictures: latents, captions and token ids in plain .npy files, read by position.

    CACHE/settings.json        what every shard was made with
    CACHE/index.json           written last: all that opening needs
    CACHE/shards/NAME/         one folder per shard of the source, in place whole or not at all (`tinyldm.data.shard`)

Nothing is held in memory per sample and few files are open at once: ten million samples in thousands of shards open in
a second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tinyldm.data.positional import Files
from tinyldm.data.shard import (HEADER, ShardWriter, Size, check_shard, check_sizes, count_samples, file_sizes, header,
                                latents_name, read_captions, read_header, tokens_name)
from tinyldm.files import Claims, write_file

__all__ = ["Cache", "ShardWriter", "write_index", "write_tokens"]
CHUNK = 4096                # captions encoded at once


def write_index(folder: Path, settings: dict, sources: list[dict]) -> None:
    """Write index.json from the shards in place. sources: [{"spec": ..., "shards": [names in order]}].

    ValueError: a shard is not there or not whole, is named twice, or differs from the others in shape.
    """
    out: list[dict] = []
    seen: dict[str, list] = {}
    for source in sources:
        shards = []
        for name in source["shards"]:
            if name in seen:
                raise ValueError(f"shard {name} is named twice: give every shard a name of its own")
            shard = check_shard(folder / "shards" / name)
            seen[name] = shard["shape"]
            shards.append(shard)
        out.append({"spec": source["spec"], "shards": shards})
    shapes = {name: shape for name, shape in seen.items() if shape}
    usual = next(iter(shapes.values()), None)
    for name, shape in shapes.items():
        if shape != usual:
            raise ValueError(f"shard {name} holds latents of {shape} views, parts, channels, those before it of {usual}: "
                             f"delete {folder / 'shards'} and run prepare.py again")
    content = {"settings": settings, "sources": out}
    write_file(folder / "index.json", json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def write_tokens(folder: Path, tokenizer, place: Path | None = None) -> None:
    """Encode the captions of every shard of the cache that has no tokens of this tokenizer.

    place: a folder for the token ids, where they are not to be part of the cache.
    """
    claims = Claims((place or folder) / "claims")
    with claims.held("tokens"):
        _write_tokens([folder / "shards" / shard["name"] for source in read_index(folder)["sources"] for shard in source["shards"]],
                      tokenizer, place)
    claims.close()


def _write_tokens(shards: list[Path], tokenizer, place: Path | None) -> None:
    dtype = "<u2" if max(tokenizer.vocab.values()) < 1 << 16 else "<u4"
    for shard in shards:
        if not (ends := shard / "ends.npy").exists():
            continue                                                    # no samples kept
        file = Path(_tokens_file(str(shard), tokenizer.fingerprint, place))
        shape = ((ends.stat().st_size - HEADER) // 8, tokenizer.context_length)
        if not file.exists() or file.stat().st_size != HEADER + shape[0] * shape[1] * np.dtype(dtype).itemsize:
            captions = read_captions(shard)
            chunks = [captions[at:at + CHUNK] for at in range(0, len(captions), CHUNK)]
            rows = [tokenizer.encode(chunk).astype(dtype).tobytes() for chunk in chunks]
            write_file(file, b"".join([header(dtype, shape), *rows]))


class Cache:
    """A cache opened for reading, by any number of threads.

    Samples have flat numbers 0 .. len - 1: source by source, size by size, shard by shard, row by row.
    settings: what it was made with. sources: their specs. shape: (views, parts, channels). sizes: latent (rows, columns)
    present. place: where token ids are, if not in the cache. ranges: for each source {size: range of flat numbers}. kinds: one more than the highest caption kind.

    ValueError, with the fix: not a finished cache, a file missing or of the wrong size, or no samples in it.
    """

    def __init__(self, folder: Path, tokens: Path | None = None):
        self.folder, self.place = Path(folder), tokens
        index = read_index(self.folder)
        self.settings: dict = index["settings"]
        self.sources: list[str] = [source["spec"] for source in index["sources"]]
        self._shards = [shard for source in index["sources"] for shard in source["shards"]]
        self._folders = [os.path.join(self.folder, "shards", shard["name"]) for shard in self._shards]
        for path, shard in zip(self._folders, self._shards):
            check_sizes(path, file_sizes(shard))
        self.ranges: list[dict[Size, range]] = []
        self._number([len(source["shards"]) for source in index["sources"]])
        if not len(self):
            raise ValueError(f"{self.folder} holds no samples: all were skipped or filtered, see shards/*/skipped.jsonl")
        self.sizes = sorted({size for source in self.ranges for size in source})
        self.shape: tuple[int, int, int] = tuple(next(shard["shape"] for shard in self._shards if shard["shape"]))
        self.kinds = max(shard["kinds"] for shard in self._shards)
        self._several = np.array([shard["captions"] != count_samples(shard) for shard in self._shards])
        self._layouts: dict[str, tuple[int, str]] = {}
        self._files = Files()

    def _number(self, shards_of_source: list[int]) -> None:
        """Give every piece (one size of one shard) its place among the flat numbers."""
        pieces, total, shard = [], 0, 0
        for count in shards_of_source:
            own = [(tuple(group["size"]), number, place, group["count"])
                   for number in range(shard, shard + count)
                   for place, group in zip(_offsets(self._shards[number]), self._shards[number]["groups"]) if group["count"]]
            ranges: dict[Size, range] = {}
            for size, number, place, rows in sorted(own):
                pieces.append((total, number, place, size))
                ranges[size] = range(ranges[size].start if size in ranges else total, total + rows)
                total += rows
            self.ranges.append(ranges)
            shard += count
        self._total = total
        self._starts = np.array([piece[0] for piece in pieces], np.int64)       # of each piece: its first flat number,
        self._owners = np.array([piece[1] for piece in pieces], np.int64)       # its shard,
        self._places = np.array([piece[2] for piece in pieces], np.int64)       # its first number within the shard,
        self._piece_sizes = [piece[3] for piece in pieces]                      # its size

    def __len__(self) -> int:
        return self._total

    @property
    def digest(self) -> str:
        """Changes when any shard, source or setting does."""
        return hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest()[:16]

    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat numbers -> which piece each is in, and its row there."""
        samples = np.asarray(samples, np.int64)
        if len(samples) and not (0 <= samples.min() and samples.max() < len(self)):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of a cache of {len(self)}")
        pieces = np.searchsorted(self._starts, samples, side="right") - 1
        return pieces, samples - self._starts[pieces]

    def latents(self, samples: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """float16 [b, parts, c, h, w] of samples of one size; views: which view of each (default: the first)."""
        pieces, rows = self._find(samples)
        if len(sizes := {self._piece_sizes[piece] for piece in np.unique(pieces)}) != 1:
            raise ValueError(f"{len(rows)} samples of {len(sizes)} sizes: ask for one or more of one size")
        shape = (*self.shape[1:], *sizes.pop())
        size = 2 * int(np.prod(shape))
        places = rows * self.shape[0] + (0 if views is None else np.asarray(views))
        data = self._files.read(lambda piece: os.path.join(self._folders[self._owners[piece]], latents_name(shape[2:])),
                                pieces, HEADER + places * size, np.full(len(rows), size))
        return data.view("<f2").reshape(len(rows), *shape)

    def _read(self, name: str, shards: np.ndarray, places: np.ndarray, counts: np.ndarray, dtype: str) -> np.ndarray:
        """`counts` items from `places` on of the arrays `name` of some shards, end to end."""
        size = np.dtype(dtype).itemsize
        data = self._files.read(lambda shard: os.path.join(self._folders[shard], name), shards, HEADER + places * size,
                                counts * size)
        return data.view(dtype)

    def captions(self, sample: int) -> list[tuple[int, str]]:
        """All captions of a sample as (kind, text)."""
        pieces, rows = self._find(np.array([sample]))
        shard = self._owners[pieces]
        start, stop = self._read("first.npy", shard, self._places[pieces] + rows, np.array([2]), "<i8")
        before = min(int(start), 1)                             # the first caption of a shard starts where none ends
        ends = self._read("ends.npy", shard, np.array([start - before]), np.array([stop - start + before]), "<i8")
        ends = ends.tolist() if before else [0, *ends.tolist()]
        kinds = self._read("kinds.npy", shard, np.array([start]), np.array([stop - start]), "|u1").tolist()
        text = self._read("captions.npy", shard, np.array(ends[:1]), np.array([ends[-1] - ends[0]]), "|u1").tobytes()
        return [(kind, text[a - ends[0]:b - ends[0]].decode()) for kind, a, b in zip(kinds, ends, ends[1:])]

    def all_captions(self) -> Iterator[str]:
        """Every caption, shard by shard, with one shard's in memory."""
        for path, shard in zip(self._folders, self._shards):
            if shard["captions"]:
                yield from read_captions(Path(path))

    def check_tokens(self, fingerprint: str) -> tuple[int, str]:
        """(L, dtype) of a tokenizer's tokens; ValueError unless every shard has them."""
        if fingerprint not in self._layouts:
            full = [(_tokens_file(path, fingerprint, self.place), shard["captions"])
                    for path, shard in zip(self._folders, self._shards) if shard["captions"]]
            fix = f"the captions of {self.folder} are not encoded by this tokenizer; run prepare.py again with it"
            try:
                shape, dtype = read_header(full[0][0])
            except (OSError, ValueError) as error:
                raise ValueError(f"{full[0][0]} cannot be read ({error}): {fix}") from None
            for file, captions in full:
                check_sizes(os.path.dirname(file), {os.path.basename(file): HEADER + captions * shape[1] * dtype.itemsize}, fix)
            self._layouts[fingerprint] = shape[1], dtype.str
        return self._layouts[fingerprint]

    def check_weights(self, weights: Sequence[float]) -> None:
        """ValueError unless there is a weight for each kind of caption, none negative and not all zero."""
        if len(weights) < self.kinds:
            raise ValueError(f"{len(weights)} caption weights for {self.kinds} kinds of captions: give one for each")
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise ValueError(f"caption weights {', '.join(map(str, weights))}: use 0 or more, and not 0 for all")

    def tokens(self, samples: np.ndarray, fingerprint: str, choose: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """int64 [b, L]: the token ids of one caption of each sample, drawn by `choose` [b], uniform in [0, 1).

        A kind in proportion to weights[kind] among the kinds that the sample has, then evenly one of its captions of
        that kind; any of them, evenly, where all it has are of weight 0.
        """
        length, dtype = self.check_tokens(fingerprint)
        pieces, rows = self._find(samples)
        shards, captions = self._owners[pieces], self._places[pieces] + rows
        several = self._several[shards]
        if several.any():
            captions[several] = self._choose(shards[several], captions[several], np.asarray(choose)[several], weights)
        size = np.dtype(dtype).itemsize * length
        data = self._files.read(lambda shard: _tokens_file(self._folders[shard], fingerprint, self.place), shards,
                                HEADER + captions * size, np.full(len(rows), size)).view(dtype)
        return data.reshape(len(rows), length).astype(np.int64)

    def _choose(self, shards: np.ndarray, numbers: np.ndarray, choose: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Numbers of samples within their shards -> of one caption of each within its shard."""
        self.check_weights(weights)
        first, stop = self._read("first.npy", shards, numbers, np.full(len(numbers), 2), "<i8").reshape(-1, 2).T
        counts = stop - first
        kinds = self._read("kinds.npy", shards, first, counts, "|u1").astype(np.int64)      # of all captions, end to end
        sample = np.repeat(np.arange(len(numbers)), counts)
        alike = np.zeros((len(numbers), len(weights)))
        np.add.at(alike, (sample, kinds), 1)                                                # captions of each kind
        share = np.asarray(weights, np.float64)[kinds] / alike[sample, kinds]
        total = np.bincount(sample, share)
        share[(total == 0)[sample]] = 1.0
        table = np.zeros((len(numbers), counts.max()))                                      # [b, most captions]
        table[sample, np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)] = share
        table = np.cumsum(table, axis=1)
        return first + (table <= choose[:, None] * table[:, -1:]).sum(axis=1)


def _tokens_file(shard: str, fingerprint: str, place: Path | None) -> str:
    name = tokens_name(fingerprint)
    return os.path.join(shard, name) if place is None else os.path.join(place, f"{os.path.basename(shard)}-{name}")


def read_index(folder: Path, missing: dict | None = None) -> dict:
    """What index.json says; `missing`, if given, where there is none. ValueError, with the fix, where it is damaged or must be there."""
    file = Path(folder) / "index.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:                                  # asking first would not help: other processes come and go
        if missing is not None:
            return missing
        raise ValueError(f"{folder} is no finished cache (it has no index.json): make or finish it with prepare.py") from None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): run prepare.py again") from error


def _offsets(shard: dict) -> list[int]:
    """The number within the shard of each group's first sample."""
    counts = [group["count"] for group in shard["groups"]]
    return [sum(counts[:i]) for i in range(len(counts))]
