"""Read captioned samples from shards: WebDataset tar archives, lists of picture files, .npz arrays.

Notable: a reader yields, even from a broken shard, only samples and Skips (which give the reason), or it raises one of two
errors about the shard as a whole. Pictures and captions are matched by name (`naming.py`), never by position.
"""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from fsspec import AbstractFileSystem

from tinyldm.data.naming import DUPLICATE, PICTURES, UNSAFE, Name, complete, composed, samples, split
from tinyldm.data.remote import SourceLost, address, open_file, reading
from tinyldm.data.tarshard import LIMIT, Flaw, Member, members

MISSING, UNSAFE_NAME = "picture file missing", "unsafe name"
CUT, NO_END, DAMAGED = "archive cut short", "archive has no end mark", "archive damaged"
UNREADABLE, TOO_LARGE = "unreadable", "too large"
NOT_UTF8, NO_JSON = "caption is not UTF-8", "json is not readable"
USUAL = ("prompt", "caption", "text")       # keys of captions beside or inside a .json, the one that wins first
MANY = 256                                  # members of one key that are held before they are sorted into samples
Held = tuple[Name, bytes | None]            # a member; without data, it is too large


class Sample(NamedTuple):
    """A picture and the fields among which its captions are."""

    key: str                        # unique within its shard; used in messages
    picture: bytes | np.ndarray     # the bytes of a picture file, or pixels uint8 [h, w, 3]
    fields: dict[str, object]       # "txt", "json" and NAME of a KEY.NAME.txt: the bytes of a file; of a metadata row: str or list[str]


class Skip(NamedTuple):
    """A sample that cannot be used, or something in a shard that is not a sample."""

    key: str
    reason: str                     # one of the constants above or in naming.py
    detail: str = ""


class Damaged(Exception):
    """Raised while reading a shard: the samples that it has yielded cannot be trusted either, so drop the whole shard."""


class File(NamedTuple):
    path: str
    size: int | None


class Entry(NamedTuple):
    """A sample in a listing: `picture` is a file that has not been read yet, and so may be values of `fields`."""

    key: str
    picture: File | None
    fields: dict[str, object]
    reason: str = ""                # the reason for a Skip, where the listing shows one
    stamp: str = ""                 # changes when one of the files does
    detail: str = ""                # of the reason


# ---- captions


def captions(sample: Sample, keys: Sequence[str] = ()) -> list[tuple[int, str]]:
    """The captions under each of `keys`, as (index into keys, caption), stripped of white space; empty ones are left out.

    The key "txt" is the caption file; any other key NAME is looked up in KEY.NAME.txt or the metadata row, then in the .json file,
    where its value is a string or a list of strings. Without keys, the captions of the first key among txt, prompt, caption and text
    that has any, as index 0. ValueError, whose message is the reason for a Skip: "caption is not UTF-8" or "json is not readable".
    """
    if keys:
        row = table(sample) if set(keys) - {"txt"} - plain(sample).keys() else sample.fields
        return [(index, text) for index, key in enumerate(keys)
                for text in texts((sample.fields if key == "txt" else row).get(key))]
    found = next(filter(None, (texts(sample.fields.get(key)) for key in ("txt", *USUAL))), None)
    if not found:
        row = table(sample)
        found = next(filter(None, (texts(row.get(key)) for key in USUAL)), [])
    return [(0, text) for text in found]


def table(sample: Sample) -> dict[str, object]:
    """A sample's fields together with those inside its .json file. ValueError where the .json file is not a JSON object."""
    content = sample.fields.get("json")
    if not isinstance(content, bytes):
        return sample.fields
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(NO_JSON) from None
    if not isinstance(row, dict):
        raise ValueError(NO_JSON)
    return row | plain(sample)


def plain(sample: Sample) -> dict[str, object]:
    """A sample's fields without the .json file."""
    return {name: value for name, value in sample.fields.items() if name != "json" or not isinstance(value, bytes)}


def texts(value: object) -> list[str]:
    """The captions in a field's value, which may have any type. ValueError where one of them is not valid Unicode."""
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8-sig")
        words = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        stripped = [word.strip() for word in words if isinstance(word, str)]
        for word in stripped:
            word.encode()           # raises for a lone surrogate, which JSON can spell and on which tokenizers crash
    except UnicodeError:
        raise ValueError(NOT_UTF8) from None
    return [word for word in stripped if word]


def caption_keys(sample: Sample) -> list[str]:
    """The keys under which `captions` would find strings, sorted. Never raises: a .json that cannot be read has no keys."""
    try:
        row = table(sample)
    except ValueError:
        row = plain(sample)
    keys = {key for key, value in row.items() if key != "txt" and key and key.isprintable()
            and (isinstance(value, (str, bytes)) or isinstance(value, list) and any(isinstance(word, str) for word in value))}
    return sorted(keys | {"txt"} & set(sample.fields))          # the key txt means the .txt file, not a field of the .json


# ---- tar


def read_tar(fs: AbstractFileSystem, path: str, size: int | None) -> Iterator[Sample | Skip]:
    """Samples of a WebDataset shard (.tar or .tar.gz): consecutive members with the same key make up a sample.

    Raises ValueError where the file is not a tar archive, SourceLost where it cannot be read, and Damaged where its compressed
    data turn out to be corrupted, which may show only in the checksum at the end.
    """
    with reading(fs, path, size) as file:
        stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        try:
            yield from pair(unpacked(stream))
        except Damaged as error:
            raise Damaged(f"{address(fs, path)}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{address(fs, path)} is {error}") from None


def unpacked(stream: BinaryIO) -> Iterator[Member | Flaw]:
    """The members and flaws of an archive. For gzip, distinguishes truncated data, trailing bytes, and corruption (Damaged)."""
    corrupt = False
    try:
        for part in members(stream):
            if isinstance(part, Flaw) and isinstance(stream, gzip.GzipFile):
                corrupt |= not part.truncated
                if corrupt and part.inside:     # the checksum was never reached, and the data are not a valid tar
                    raise Damaged(f"the compressed data are damaged, and {part.detail}")
                part = part._replace(doubtful=part.inside)  # the last bytes may be corrupt without any header showing it
            yield part
    except (zlib.error, gzip.BadGzipFile) as error:
        if not str(error).startswith("Not a gzipped file"):
            raise Damaged(f"the compressed data are damaged ({error})") from None
        yield Flaw(False, "bytes that are no gzip data follow")         # all data before these bytes passed their checksum


def pair(parts: Iterable[Member | Flaw]) -> Iterator[Sample | Skip]:
    """Sort members into samples. Those with one key make up a sample where they follow each other."""
    group: list[Held] = []                      # members that are not in a sample yet
    last, seen = None, set()                    # the name of the last member; the keys of all samples
    for part in itertools.chain(parts, [None]):
        name = split(part.name) if part else None
        if isinstance(part, Flaw):
            yield Skip(part.name or (last.stem if last else ""), CUT if part.inside else NO_END if part.truncated else DAMAGED, part.detail)
            if part.doubtful or name and last and composed(name.key) == composed(last.key):     # the samples in progress are incomplete
                seen |= {found.key for found in samples(group)}
                group = []
        elif part and UNSAFE.match(part.name):
            yield Skip(part.name, UNSAFE_NAME)
        elif name or not part:
            done, group = divide(group, name)
            yield from finish(done, seen)
            group += [(name, part.data)] if part else []
            last = name


def divide(group: list[Held], name: Name | None) -> tuple[list[Held], list[Held]]:
    """The members that need not be held any longer when one with this name follows, and the others.

    Held are those with the same key, and with one that the name begins with: 000, while 000.0.png follows. Memory does not grow with
    the archive, even where all names begin alike: shot.a.jpg and its caption are complete when shot.b.jpg follows.
    """
    if not group or not name:
        return group, []
    last, key = group[-1][0], composed(name.key) + "."
    if name.stem == last.stem:
        return [], group
    over = last.stem if last.part and complete({held.kind for held, _ in group if held.stem == last.stem}) else None
    waits = [key.startswith(composed(held.key) + ".") and held.stem != over for held, _ in group]
    done, group = [held for held, wait in zip(group, waits) if not wait], [held for held, wait in zip(group, waits) if wait]
    if len(group) >= MANY:
        more, group = relieve(group)
        done += more
    return (done, group) if len(group) < MANY else (done + group, [])


def relieve(group: list[Held]) -> tuple[list[Held], list[Held]]:
    """Divide the many members of one key as `samples` does: the further pictures that are samples of their own, and the main picture
    with its captions, which stays, so that whatever follows is still its own. Companions such as masks are no part of either."""
    found = [sample for sample in samples(group) if sample.pictures]
    main = {name.path for sample in found for name, _ in sample.pictures if sample.key == name.key}
    done = [file for sample in found if not main.intersection(name.path for name, _ in sample.pictures) for file in sample.files()]
    gone = {name.stem for name, _ in done}
    return done, [(name, data) for name, data in group if name.stem not in gone and (name.path in main or name.kind not in PICTURES)]


def finish(group: list[Held], seen: set[str]) -> Iterator[Sample | Skip]:
    """The samples among members; `seen` grows by their keys. A member without data was too large."""
    for found in samples(group):
        reason = DUPLICATE if found.key in seen else found.reason
        reason = reason or (TOO_LARGE if any(data is None for _, data in found.files()) else "")
        seen.add(found.key)
        if reason:
            yield Skip(found.key, reason, found.detail)
        else:
            yield Sample(found.key, found.pictures[0][1], {field: files[0][1] for field, files in found.fields.items()})


# ---- files, arrays


def read_files(fs: AbstractFileSystem, entries: Sequence[Entry]) -> Iterator[Sample | Skip]:
    """Samples whose pictures, and captions in some cases, are single files."""
    for entry in entries:
        files = [entry.picture, *entry.fields.values()]
        reason = entry.reason or (
            TOO_LARGE if any(isinstance(file, File) and (file.size or 0) > LIMIT for file in files) else "")
        if reason:
            yield Skip(entry.key, reason, entry.detail)
            continue
        try:
            picture, *values = (read_file(fs, file) if isinstance(file, File) else file for file in files)
        except SourceLost:
            raise
        except FileNotFoundError as error:
            yield Skip(entry.key, MISSING, str(error))
        except (OSError, ValueError) as error:                          # ValueError: a name that is invalid in the file system
            yield Skip(entry.key, UNREADABLE, str(error))
        else:
            yield Sample(entry.key, picture, dict(zip(entry.fields, values)))


def read_file(fs: AbstractFileSystem, file: File) -> bytes:
    with open_file(fs, file.path, file.size) as stream:
        return stream.read()


def read_npz(fs: AbstractFileSystem, path: str, size: int | None) -> Iterator[Sample]:
    """Samples of `images` uint8 [n, h, w, 3] (or [n, h, w]) with `captions`, or with `labels` and optionally `class_names`.

    Raises ValueError, with the fix, where the arrays are not of this form, and SourceLost where the file cannot be read.
    """
    name = address(fs, path)
    with reading(fs, path, size) as file:
        try:
            with np.load(file, allow_pickle=False) as content:
                arrays = {key: content[key] for key in ("images", "captions", "labels", "class_names") if key in content}
        except Exception as error:          # zipfile, zlib and numpy each have their own exceptions
            if isinstance(error, OSError) and not isinstance(error, ValueError) and error.errno != errno.EINVAL:
                raise                       # EINVAL comes from a damaged file whose offsets are negative, not from the disk
            hint = ("; save strings as np.array(captions, dtype=str), not as objects" if "allow_pickle" in str(error) else "")
            raise ValueError(f"{name} is not a readable .npz file ({error}){hint}") from None
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] != 3:
        what = "has no images" if images is None else f"has images of {images.dtype} {list(images.shape)}"
        raise ValueError(f"{name} {what}: save images as uint8 [n, height, width, 3], or [n, height, width] for grey")
    try:
        texts = words(arrays, len(images))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for number, (image, text) in enumerate(zip(images, texts)):
        yield Sample(f"{number:06d}", image if image.ndim == 3 else np.stack([image] * 3, -1), {"text": text})


def words(arrays: dict[str, np.ndarray], count: int) -> list[Any]:
    """The caption or captions of each picture in an .npz file."""
    key = "captions" if "captions" in arrays else "labels"
    if key not in arrays:
        raise ValueError("there are neither captions (strings) nor labels (integers) with the images: save one of them")
    arrays = {name: np.char.decode(array, "utf-8", "surrogateescape") if array.dtype.kind == "S" else array
              for name, array in arrays.items()}
    values = arrays[key]
    if len(values.shape) == 0 or len(values) != count:
        raise ValueError(f"{key} has the shape {list(values.shape)}: save one of them for each of the {count} images")
    if key == "captions":
        if values.dtype.kind != "U" or values.ndim > 2:
            raise ValueError(f"captions are {values.dtype} {list(values.shape)}: save np.array(captions, dtype=str)")
        return values.tolist()
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(f"labels are {values.dtype} {list(values.shape)}: save integers [n]")
    if "class_names" not in arrays:
        return [f"class {label}" for label in values.tolist()]
    names = [str(name) for name in arrays["class_names"].tolist()]
    if count and not 0 <= values.min() <= values.max() < len(names):
        raise ValueError(f"labels go from {values.min()} to {values.max()}, but there are {len(names)} class_names")
    return [f"a photo of {'an' if names[label][:1].lower() in set('aeiou') else 'a'} {names[label]}" for label in values]
