"""A cache of encoded pictures: latents, captions and token ids in plain .npy files, read by position.

    CACHE/settings.json        the settings that all shards were made with
    CACHE/index.json           written last; holds all that is needed to open the cache
    CACHE/shards/NAME/         one folder per shard of the source, which is complete or absent (`tinyldm.data.shard`)

No memory is used per sample, and few files are open at once: a cache of ten million samples in thousands of shards opens in
a second.

The autoencoder's scaling factor is applied before the latents are stored (by `to_latents`; the standard deviations are
multiplied by it too), so training reads standardised latents and never needs the factor. The factor itself is kept only as part
of the autoencoder's fingerprint in settings.json: a cache made with another factor is refused, as if the weights were others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tinyldm.data.positional import Files
from tinyldm.data.shard import (
    HEADER,
    SIZES,
    ShardWriter,
    Size,
    check_shard,
    check_sizes,
    count_samples,
    file_sizes,
    header,
    latents_name,
    pictures_name,
    read_captions,
    read_header,
    tokens_name,
)
from tinyldm.files import Claims, write_file

__all__ = ["Cache", "ShardWriter", "write_index", "write_tokens"]
CHUNK = 4096                # captions tokenized at once


def write_index(folder: Path, settings: dict, sources: list[dict]) -> None:
    """Write index.json from the finished shards. sources: [{"spec": ..., "shards": [names in order]}].

    ValueError: a shard is missing or incomplete, is named twice, or differs from the others in shape.
    """
    indexed: list[dict] = []
    shapes: dict[str, list] = {}
    for source in sources:
        shards = []
        for name in source["shards"]:
            if name in shapes:
                raise ValueError(f"shard {name} is named twice: give every shard a name of its own")
            shard = check_shard(folder / "shards" / name)
            shapes[name] = shard["shape"]
            shards.append(shard)
        indexed.append({"spec": source["spec"], "shards": shards})
    expected = next((shape for shape in shapes.values() if shape), None)
    for name, shape in shapes.items():
        if shape and shape != expected:                                 # a shard without samples has no shape
            raise ValueError(f"shard {name} holds latents of {shape} views, parts, channels; the shards before it, of {expected}: "
                             f"delete {folder / 'shards'} and run prepare.py again")
    content = {"settings": settings, "sources": indexed}
    write_file(folder / "index.json", json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_tokens(folder: Path, tokenizer, token_folder: Path | None = None) -> None:
    """Tokenize the captions of every shard of the cache that has no complete file of this tokenizer's token ids.

    token_folder: where the token ids are written, if not into the cache itself.
    """
    claims = Claims((token_folder or folder) / "claims")
    with claims.held("tokens"):
        _write_tokens([folder / "shards" / shard["name"] for source in read_index(folder)["sources"] for shard in source["shards"]],
                      tokenizer, token_folder)
    claims.close()


def _write_tokens(shards: list[Path], tokenizer, token_folder: Path | None) -> None:
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    for shard in shards:
        if not (ends := shard / "ends.npy").exists():
            continue                                                    # a shard without samples has no captions
        file = Path(_tokens_file(str(shard), tokenizer.fingerprint, token_folder))
        shape = ((ends.stat().st_size - HEADER) // 8, tokenizer.context_length)
        if not file.exists() or file.stat().st_size != HEADER + shape[0] * shape[1] * np.dtype(dtype).itemsize:
            captions = read_captions(shard)
            chunks = [captions[at:at + CHUNK] for at in range(0, len(captions), CHUNK)]
            rows = [tokenizer.encode(chunk).astype(dtype).tobytes() for chunk in chunks]
            write_file(file, b"".join([header(dtype, shape), *rows]))


class Cache:
    """A cache opened for reading, by any number of threads.

    Samples have flat numbers 0 .. len - 1: source by source, size by size, shard by shard, row by row.
    settings: what the cache was made with. sources: the specs of its sources. shape: (views, parts, channels). sizes: the
    (rows, columns) of the latents in it. ranges: for each source {size: range of flat numbers}. kinds: one more than the
    highest caption kind. has_sizes: whether the pictures' sizes are known. pictures: pixels per latent of the pictures, along each
    side, 0: there are none. token_folder: where the token ids are, if not in the
    cache itself.

    ValueError, with the fix: the cache is not finished, a file is missing or has the wrong size, or there are no samples.
    """

    def __init__(self, folder: Path, token_folder: Path | None = None):
        self.folder, self.token_folder = Path(folder), token_folder
        index = read_index(self.folder)
        self.settings: dict = index["settings"]
        self.sources: list[str] = [source["spec"] for source in index["sources"]]
        self._shards = [shard for source in index["sources"] for shard in source["shards"]]
        self._folders = [os.path.join(self.folder, "shards", shard["name"]) for shard in self._shards]
        for path, shard in zip(self._folders, self._shards):
            check_sizes(path, file_sizes(shard))
        self.ranges: list[dict[Size, range]] = []
        self._assign_numbers([len(source["shards"]) for source in index["sources"]])
        if not len(self):
            raise ValueError(f"{self.folder} holds no samples: all were skipped or filtered, see shards/*/skipped.jsonl")
        self.sizes = sorted({size for source in self.ranges for size in source})
        self.shape: tuple[int, int, int] = tuple(next(shard["shape"] for shard in self._shards if shard["shape"]))
        self.kinds = max(shard["kinds"] for shard in self._shards)
        self.has_sizes = all(shard.get("sizes") for shard in self._shards if shard["captions"])
        self.pictures = min((shard.get("pictures", 0) for shard in self._shards if shard["captions"]), default=0)
        self._has_choice = np.array([shard["captions"] != count_samples(shard) for shard in self._shards])     # several captions
        self._layouts: dict[str, tuple[int, str]] = {}
        self._files = Files()

    def _assign_numbers(self, shards_of_source: list[int]) -> None:
        """Give every piece (the samples of one size in one shard) a range of flat numbers. shards_of_source: shards in each."""
        pieces, total, first_shard = [], 0, 0
        for count in shards_of_source:
            found = [(tuple(group["size"]), shard, offset, group["count"])
                     for shard in range(first_shard, first_shard + count)
                     for offset, group in zip(_offsets(self._shards[shard]), self._shards[shard]["groups"]) if group["count"]]
            ranges: dict[Size, range] = {}
            for size, shard, offset, rows in sorted(found):
                pieces.append((total, shard, offset, size))
                ranges[size] = range(ranges[size].start if size in ranges else total, total + rows)
                total += rows
            self.ranges.append(ranges)
            first_shard += count
        self._total = total
        self._piece_starts = np.array([piece[0] for piece in pieces], np.int64)     # first flat number of each piece
        self._piece_shards = np.array([piece[1] for piece in pieces], np.int64)     # shard of each piece
        self._piece_offsets = np.array([piece[2] for piece in pieces], np.int64)    # its first sample's number in the shard
        self._piece_sizes = [piece[3] for piece in pieces]

    def __len__(self) -> int:
        return self._total

    @property
    def digest(self) -> str:
        """Changes when any shard, source or setting does."""
        return hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest()[:16]

    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat numbers -> the piece that holds each, and its row in that piece."""
        samples = np.asarray(samples, np.int64)
        if len(samples) and not (0 <= samples.min() and samples.max() < len(self)):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of a cache of {len(self)}")
        pieces = np.searchsorted(self._piece_starts, samples, side="right") - 1
        return pieces, samples - self._piece_starts[pieces]

    def latents(self, samples: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """float16 [b, parts, c, h, w] of samples that share one size. views: int [b], the view of each (default: the first)."""
        pieces, rows, size = self._find_one_size(samples)
        rows = rows * self.shape[0] + (0 if views is None else np.asarray(views))
        return self._read_rows(latents_name(size), pieces, rows, (*self.shape[1:], *size), "<f2")

    def read_pictures(self, samples: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """uint8 [b, k h, k w, 3], the pictures behind the latents of the same samples and views, k = `pictures`. ValueError, with the fix,
        where the cache has none."""
        if not self.pictures:
            raise ValueError(f"{self.folder} holds latents alone, and this objective compares them with the pictures: make it again with "
                             "--keep-pictures")
        pieces, rows, size = self._find_one_size(samples)
        found = self._read_rows(pictures_name(size), pieces, rows, (*(self.pictures * side for side in size), 3), "|u1")
        if views is not None:
            mirrored = np.asarray(views) == 1
            found[mirrored] = found[mirrored, :, ::-1]
        return found

    def _find_one_size(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, Size]:
        """As `_find`, and the size that all of them have."""
        pieces, rows = self._find(samples)
        if len(sizes := {self._piece_sizes[piece] for piece in np.unique(pieces)}) != 1:
            raise ValueError(f"{len(rows)} samples of {len(sizes)} sizes: ask for one or more of one size")
        return pieces, rows, sizes.pop()

    def _read_rows(self, name: str, pieces: np.ndarray, rows: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Row rows[i] of the array `name` in the shard of pieces[i], each of this shape."""
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        data = self._files.read(lambda piece: os.path.join(self._folders[self._piece_shards[piece]], name), pieces, HEADER + rows * size,
                                np.full(len(rows), size))
        return data.view(dtype).reshape(len(rows), *shape)

    def check_has_sizes(self) -> None:
        """ValueError, with the fix, where the pictures' sizes are not known."""
        if not self.has_sizes:
            raise ValueError(f"{self.folder} was made before the sizes of pictures were noted in caches, and this network is told them: "
                             f"delete {self.folder} and run prepare.py (or train.py, for a cache of its own) again")

    def picture_sizes(self, samples: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """int32 [b, 6]: height and width of each picture as it was found, top and left of the crop in the scaled picture, height and
        width of the crop, in pixels. views: as for `latents`. ValueError where they are not known."""
        self.check_has_sizes()
        pieces, rows = self._find(samples)
        rows = (self._piece_offsets[pieces] + rows) * self.shape[0] + (0 if views is None else np.asarray(views))
        counts = np.full(len(rows), SIZES)
        return self._read("sizes.npy", self._piece_shards[pieces], rows * SIZES, counts, "<i4").reshape(-1, SIZES)

    def _read(self, name: str, shards: np.ndarray, starts: np.ndarray, counts: np.ndarray, dtype: str) -> np.ndarray:
        """From the array `name` of shards[i], counts[i] items beginning with number starts[i]; concatenated over i."""
        size = np.dtype(dtype).itemsize
        data = self._files.read(lambda shard: os.path.join(self._folders[shard], name), shards, HEADER + starts * size,
                                counts * size)
        return data.view(dtype)

    def captions(self, sample: int) -> list[tuple[int, str]]:
        """All captions of a sample as (kind, text)."""
        pieces, rows = self._find(np.array([sample]))
        shard = self._piece_shards[pieces]
        start, stop = self._read("first.npy", shard, self._piece_offsets[pieces] + rows, np.array([2]), "<i8")
        before = min(int(start), 1)                             # a caption starts where the one before it ends; the first, at 0
        ends = self._read("ends.npy", shard, np.array([start - before]), np.array([stop - start + before]), "<i8")
        ends = ends.tolist() if before else [0, *ends.tolist()]
        kinds = self._read("kinds.npy", shard, np.array([start]), np.array([stop - start]), "|u1").tolist()
        text = self._read("captions.npy", shard, np.array(ends[:1]), np.array([ends[-1] - ends[0]]), "|u1").tobytes()
        return [(kind, text[a - ends[0]:b - ends[0]].decode()) for kind, a, b in zip(kinds, ends, ends[1:])]

    def all_captions(self) -> Iterator[str]:
        """Every caption, shard by shard; only one shard's captions are in memory at a time."""
        for path, shard in zip(self._folders, self._shards):
            if shard["captions"]:
                yield from read_captions(Path(path))

    def check_tokens(self, fingerprint: str) -> tuple[int, str]:
        """(L, dtype) of a tokenizer's tokens; ValueError unless every shard has them."""
        if fingerprint not in self._layouts:
            files = [(_tokens_file(path, fingerprint, self.token_folder), shard["captions"])
                     for path, shard in zip(self._folders, self._shards) if shard["captions"]]
            fix = f"the captions of {self.folder} are not encoded by this tokenizer; run prepare.py again with it"
            try:
                shape, dtype = read_header(files[0][0])
            except (OSError, ValueError) as error:
                raise ValueError(f"{files[0][0]} cannot be read ({error}): {fix}") from None
            for file, captions in files:
                check_sizes(os.path.dirname(file), {os.path.basename(file): HEADER + captions * shape[1] * dtype.itemsize}, fix)
            self._layouts[fingerprint] = shape[1], dtype.str
        return self._layouts[fingerprint]

    def check_weights(self, weights: Sequence[float]) -> None:
        """ValueError unless there is a weight for each kind of caption, none is negative, and not all are zero."""
        if len(weights) < self.kinds:
            raise ValueError(f"{len(weights)} caption weights for {self.kinds} kinds of captions: give one for each")
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise ValueError(f"caption weights {', '.join(map(str, weights))}: use 0 or more, and not 0 for all")

    def tokens(self, samples: np.ndarray, fingerprint: str, choose: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """int64 [b, L]: the token ids of one caption of each sample, from the tokenizer with this fingerprint.

        choose: [b], uniform in [0, 1); with the weights it determines which caption is drawn, the same for every tokenizer.
        First a kind is drawn, in proportion to weights[kind] among the kinds that the sample has, and then one of its captions
        of that kind, evenly. Where all kinds of a sample have weight 0, one of all its captions is drawn evenly.
        """
        length, dtype = self.check_tokens(fingerprint)
        pieces, rows = self._find(samples)
        shards, captions = self._piece_shards[pieces], self._piece_offsets[pieces] + rows
        has_choice = self._has_choice[shards]
        if has_choice.any():
            captions[has_choice] = self._choose(shards[has_choice], captions[has_choice], np.asarray(choose)[has_choice], weights)
        size = np.dtype(dtype).itemsize * length
        data = self._files.read(lambda shard: _tokens_file(self._folders[shard], fingerprint, self.token_folder), shards,
                                HEADER + captions * size, np.full(len(rows), size))
        return data.view(dtype).reshape(len(rows), length).astype(np.int64)

    def _choose(self, shards: np.ndarray, numbers: np.ndarray, choose: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Numbers of samples within their shards -> the number, within its shard, of the caption drawn for each sample."""
        self.check_weights(weights)
        first, stop = self._read("first.npy", shards, numbers, np.full(len(numbers), 2), "<i8").reshape(-1, 2).T
        counts = stop - first
        kinds = self._read("kinds.npy", shards, first, counts, "|u1").astype(np.int64)      # [captions of all samples]
        sample = np.repeat(np.arange(len(numbers)), counts)                                 # the sample of each caption
        same_kind = np.zeros((len(numbers), len(weights)))                                  # captions of each kind
        np.add.at(same_kind, (sample, kinds), 1)
        probability = np.asarray(weights, np.float64)[kinds] / same_kind[sample, kinds]     # not normalised
        total = np.bincount(sample, probability)
        probability[(total == 0)[sample]] = 1.0
        table = np.zeros((len(numbers), counts.max()))                                      # [b, most captions of a sample]
        table[sample, np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)] = probability
        table = np.cumsum(table, axis=1)
        return first + (table <= choose[:, None] * table[:, -1:]).sum(axis=1)


def _tokens_file(shard: str, fingerprint: str, token_folder: Path | None) -> str:
    name = tokens_name(fingerprint)
    if token_folder is None:
        return os.path.join(shard, name)
    return os.path.join(token_folder, f"{os.path.basename(shard)}-{name}")


def read_index(folder: Path, missing: dict | None = None) -> dict:
    """The contents of index.json, or `missing`, if given, where the file does not exist.

    ValueError, with the fix: the file is damaged, or it does not exist and `missing` is not given.
    """
    file = Path(folder) / "index.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:                       # no check in advance: another process may delete the file just after it
        if missing is not None:
            return missing
        raise ValueError(f"{folder} is no finished cache (it has no index.json): make or finish it with prepare.py") from None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): run prepare.py again") from error


def _offsets(shard: dict) -> list[int]:
    """For each group (the samples of one size), the number within the shard of its first sample."""
    counts = [group["count"] for group in shard["groups"]]
    return [sum(counts[:i]) for i in range(len(counts))]
