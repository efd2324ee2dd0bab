"""From what a person types behind --data to a list of shards, each read on its own.

Read are: `toyworld`; a folder of pictures with a .txt or .json caption of the same name beside each, or with a
metadata.jsonl or metadata.csv (Hugging Face's imagefolder); WebDataset shards (.tar, .tar.gz, .tgz), by path, folder,
glob or braces (`{000..045}`, `{a,b}`); .npz arrays. Each from a local path or any URL that fsspec opens.
Notable: a shard's name stays when others come or go, and its stamp changes with its contents, so that work which was
done for it can be found again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from fsspec import AbstractFileSystem

from tinyldm.data import readers
from tinyldm.data.readers import DUPLICATE, MISSING, UNREADABLE, UNSAFE_NAME, Entry, File, Sample, Skip
from tinyldm.data.remote import SourceLost, address, find_fs, is_local, open_file, verdict

TARS = (".tar", ".tar.gz", ".tgz")
TABLES = ("metadata.jsonl", "metadata.csv")
READ = ("what is read: toyworld, a folder of pictures with .txt or .json captions beside them or with a metadata.jsonl or "
        "metadata.csv, WebDataset shards (.tar, .tar.gz, .tgz), .npz arrays")
MOST = 100_000              # paths that braces may stand for
# What tells that a file has changed, the surest first: contents' hashes before times.
MARKS = ("blob_id", "ETag", "etag", "sha256", "md5Hash", "checksum", "mtime", "LastModified", "Last-Modified",
         "last_modified", "updated", "created")


class Source(NamedTuple):
    spec: str                       # without the weight
    weight: Fraction | None         # exactly as typed


@dataclass(frozen=True)
class Shard:
    name: str                       # unique over all sources, the same on every listing, a folder's name on any system
    url: str                        # for messages
    stamp: str                      # changes when the contents may have
    remote: bool
    read: Callable[[], Iterator[Sample | Skip]] = field(repr=False)


# ---- what was typed


def parse_sources(words: Sequence[str]) -> list[Source]:
    """Sources, each with its weight behind a last colon ("A:0.7", "B:0.3") or all without.

    What exists as typed is a path, colon and all. ValueError for weights that are not above 0 or not everywhere.
    """
    sources = []
    for word in words:
        spec, colon, number = word.rpartition(":")
        port = number.isdigit() and re.fullmatch(r"\w[\w+.-]*://([^/@]*@)?(\[[^]]*\]|[^/:]*)", spec)
        if os.path.exists(os.path.expanduser(word)) or port or not colon or not re.fullmatch(
                r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d\d?)?|[+-]?(nan|inf)", number, re.IGNORECASE | re.ASCII):
            sources.append(Source(word, None))
            continue
        if not spec:
            raise ValueError(f"--data {word}: a weight without a source; expected SOURCE:WEIGHT")
        if "n" in number.lower() or len(number) > 40 or (weight := Fraction(number)) <= 0:
            raise ValueError(f"--data {word}: a weight must be a number above 0; leave the source out to train without it")
        sources.append(Source(spec, weight))
    if any(not spec for spec, _ in sources):
        raise ValueError(f"--data '': {READ}")
    if len({source.weight is None for source in sources}) > 1:
        bare = next(source.spec for source in sources if source.weight is None)
        raise ValueError(f"--data {bare} has no weight, others have: give every source one (SOURCE:WEIGHT), or none")
    if twice := {spec for spec, _ in sources if [other for other, _ in sources].count(spec) > 1}:
        raise ValueError(f"--data {min(twice)} is named twice: name it once, with a larger weight")
    return sources


def braces(pattern: str) -> list[str]:
    """All that `{000..045}` (with its zeros) and `{a,b}` stand for, in order, several or nested too."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)       # the first that holds no other
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if abs(high - low) >= MOST:
            raise ValueError(f"--data {pattern}: {found[0]} stands for more than {MOST} paths")
        width = max(len(first), len(last)) if re.search(r"\{0\d|\.0\d", found[0]) else 0
        choices = [f"{n:0{width}d}" for n in range(low, high + 1)] or [f"{n:0{width}d}" for n in range(low, high - 1, -1)]
    else:
        choices = words.split(",")
    out: dict[str, None] = {}
    for choice in choices:
        out |= dict.fromkeys(braces(pattern[:found.start()] + choice + pattern[found.end():]))
        if len(out) > MOST:
            raise ValueError(f"--data {pattern} stands for more than {MOST} paths")
    return list(out)


# ---- shards


def list_shards(source: Source, *, resolution: int, scenes: int, seed: int, chunk: int = 2048) -> list[Shard]:
    """All shards of a source, in a fixed order.

    Raises ValueError, with what was looked for, where there is none; SourceLost where a URL cannot be asked.

    resolution, scenes, seed: of toyworld's pictures. chunk: pictures in a shard where the source has no shards itself.
    """
    spec = source.spec
    if spec == "toyworld":
        if scenes < 1:
            raise ValueError(f"--data toyworld: {scenes} scenes are none: draw at least 1")
        return [toyworld_shard(range(i, min(i + chunk, scenes)), resolution, seed) for i in range(0, scenes, chunk)]
    shards: list[Shard] = []
    paths = [spec] if os.path.exists(os.path.expanduser(spec)) else braces(spec)
    with explained(paths[0]):                       # some file systems connect at once
        find_fs(paths[0])[0].invalidate_cache()     # a listing from earlier in this process may be outdated
    for path in paths:
        with explained(path):
            shards += find(path, chunk)
    return list({shard.name: shard for shard in shards}.values())


def toyworld_shard(numbers: range, resolution: int, seed: int) -> Shard:
    return Shard(f"toyworld-{numbers.start:06d}", f"toyworld {numbers.start} to {numbers.stop - 1}",
                 f"toyworld-{numbers.start}-{numbers.stop}-{resolution}-{seed}", False,
                 partial(readers.read_toyworld, numbers, resolution, seed))


@contextmanager
def explained(spec: str) -> Iterator[None]:
    """Errors of file systems as ValueErrors that say what to do, and as SourceLost where a URL is out of reach."""
    try:
        yield
    except SourceLost:
        raise
    except Exception as error:              # each file system's libraries have errors of their own
        remote, kind = "://" in spec, verdict(error)
        garbled = remote and isinstance(error, (json.JSONDecodeError, UnicodeError))        # another page than was asked for
        if isinstance(error, ValueError) and kind is SourceLost and not garbled:
            text = " ".join(str(error).split())
            raise (error if text.startswith("--data") else ValueError(f"--data {spec}: {text[:300]}")) from error.__cause__
        if not remote and not isinstance(error, OSError):
            raise
        if kind is FileNotFoundError:
            raise ValueError(f"--data {spec}: there is no such file or folder; {READ}") from error
        if kind is PermissionError:
            what = getattr(error, "filename", None) or "it"
            how = "log in or set HF_TOKEN, and check its name" if spec.startswith("hf:") else "log in" if remote else (
                "change its permissions")
            raise ValueError(f"--data {spec}: no right to read {what}: {how}") from error
        known = remote and not isinstance(error, (NotImplementedError, ImportError))        # these stay, whatever the network
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise (SourceLost if known else ValueError)(
            f"--data {spec}: cannot be listed ({text}): check the path, and for a URL the network") from error


def find(spec: str, chunk: int) -> list[Shard]:
    """The shards at one path or URL, which may be a glob."""
    fs, path = find_fs(spec)
    magic = "*[" if spec.startswith("http") else "*?["          # there `?` begins a query
    if not set(magic) & set(path) or os.path.exists(path):
        return at_path(fs, fs.info(path), chunk)
    shards: list[Shard] = []
    for info in (followed(fs, info) for _, info in sorted(fs.glob(path, detail=True).items())):
        if info["type"] == "directory" or kind_of(info["name"]) in ("tar", "npz"):
            shards += at_path(fs, info, chunk)
    if not shards:
        raise ValueError(f"--data {spec}: no shard or folder matches; {READ}")
    return shards


def kind_of(path: str) -> str | None:
    name = without_query(path).lower()
    return "tar" if name.endswith(TARS) else next((end for end in ("npz", "parquet") if name.endswith(f".{end}")), None)


def without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith("http") else url


def at_path(fs: AbstractFileSystem, info: dict, chunk: int) -> list[Shard]:
    """The shards of a folder, or the one that a file is."""
    path, url = info["name"], address(fs, info["name"])
    if info["type"] == "directory":
        return in_folder(fs, path, chunk)
    kind = kind_of(path)
    if kind not in ("tar", "npz"):
        what = "parquet files are not read" if kind == "parquet" else "is not a file that is read"
        raise ValueError(f"--data {url}: {what}; {READ}")
    read = readers.read_tar if kind == "tar" else readers.read_npz
    return [Shard(shard_name(url), url, mark(info), not is_local(fs), partial(read, fs, path, info.get("size")))]


def shard_name(url: str, number: int | None = None) -> str:
    base = re.split(r"[/\\]", without_query(url).rstrip("/"))[-1].partition(".")[0]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", base)[:48] or "shard"
    counted = f"{stem}-{number:05d}" if number is not None else stem
    return f"{counted}-{digest(url)[:10]}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def mark(info: dict) -> str:
    """A file's size, and what else tells that it has changed."""
    return f"{info.get('size')}-{next((str(info[key]) for key in MARKS if info.get(key) is not None), '')}"


def followed(fs: AbstractFileSystem, info: dict) -> dict:
    """What a link leads to, which a listing does not tell."""
    try:
        return fs.info(info["name"]) if info.get("islink") else info
    except FileNotFoundError:
        return info | {"type": "broken link"}


# ---- folders


def in_folder(fs: AbstractFileSystem, root: str, chunk: int) -> list[Shard]:
    """A folder's shards: its metadata's rows or its pictures, in chunks, or else the tar archives in it."""
    url = address(fs, root)
    fs.ls(root)                             # find() is silent about a folder that cannot be read
    found = fs.find(root, detail=True, **({"on_error": "raise"} if is_local(fs) else {}))
    files = {path[len(root):].lstrip("/"): followed(fs, info) for path, info in sorted(found.items())}
    files = {name: info for name, info in files.items() if info["type"] == "file" and not readers.HIDDEN.match(name)}
    kinds = {readers.split(name)[1] for name in files}
    tars = [info for name, info in files.items() if kind_of(name) == "tar"]
    tables = [name for name in files if posixpath.basename(name) in TABLES]
    if tables and ("picture" in kinds or not tars):
        folders = one_each(tables, url)
        entries = [entry for name in tables for entry in from_table(fs, url, name, files)]
        entries += beside({name: info for name, info in files.items() if not below(name, folders)})
    elif "picture" in kinds and not (tars and not kinds & {"txt", "json"}):         # beside shards, a logo
        if tars:
            raise ValueError(f"--data {url} holds pictures and tar shards: name the one or the other, such as {url}/*.tar")
        entries = beside(files)
    elif tars:
        return [shard for info in tars for shard in at_path(fs, info, chunk)]
    else:
        what = "parquet files, which are not read" if any(kind_of(name) == "parquet" for name in files) else (
            f"{len(files)} files, but no picture and no shard")
        raise ValueError(f"--data {url} holds {what}; {READ}")
    return [Shard(shard_name(url, number), f"{url} [{number * chunk}:{number * chunk + len(part)}]",
                  digest("\n".join(entry.stamp for entry in part)), not is_local(fs), partial(readers.read_files, fs, part))
            for number, part in enumerate(entries[i:i + chunk] for i in range(0, len(entries), chunk))]


def one_each(tables: list[str], url: str) -> set[str]:
    """The folders that hold a metadata file. ValueError for one that holds two: its pictures would be read twice."""
    folders: set[str] = set()
    for folder in map(posixpath.dirname, tables):
        if folder in folders:
            where = posixpath.join(url, folder).rstrip("/")
            raise ValueError(f"--data {where} holds {' and '.join(TABLES)}, so its pictures come twice: delete one")
        folders.add(folder)
    return folders


def below(name: str, folders: set[str]) -> bool:
    """Whether a file is in one of the folders, or in one below."""
    while name and name not in folders:
        name = posixpath.dirname(name)
    return name in folders


def beside(files: dict[str, dict]) -> list[Entry]:
    """A folder's pictures, each with the caption files of its name. Names with two of a kind are ambiguous."""
    stems: dict[str, list[tuple[str, str]]] = {}            # [(kind, name), ...]
    for name in files:
        stem, kind = readers.split(name)
        if kind:
            stems.setdefault(stem, []).append((kind, name))
    entries = []
    for name in files:
        stem, kind = readers.split(name)
        if kind == "picture":
            parts = {kind: File(files[name]["name"], files[name].get("size")) for kind, name in stems[stem]}
            reason = DUPLICATE if len(parts) < len(stems[stem]) else ""
            stamp = " ".join(f"{name} {mark(files[name])}" for _, name in stems[stem])
            entries.append(Entry(name, parts.pop("picture"), dict(parts), reason, stamp))
    return entries


def from_table(fs: AbstractFileSystem, url: str, table: str, files: dict[str, dict]) -> list[Entry]:
    """The rows of a metadata file, each with the picture that its file_name names."""
    folder = posixpath.dirname(table)
    entries, named = [], 0
    for number, row in enumerate(rows(fs, files[table]), 1):
        name = row.get("file_name") if row else None
        key = f"{table}:{number} {name or ''}".strip()
        named += name is not None
        if not isinstance(name, str) or not name:
            entries.append(Entry(key, None, {}, UNREADABLE, key))
            continue
        info = files.get(posixpath.normpath(posixpath.join(folder, name.replace("\\", "/"))))
        reason = UNSAFE_NAME if readers.UNSAFE.match(name) else "" if info else MISSING
        picture = None if reason else File(info["name"], info.get("size"))
        entries.append(Entry(key, picture, row, reason, f"{key} {reason or mark(info)} {json.dumps(row)}"))
    if not named:
        raise ValueError(f"--data {url}/{table} has no column file_name: name the pictures in one, relative to {url}/{folder}")
    return entries


def rows(fs: AbstractFileSystem, info: dict) -> Iterator[dict | None]:
    """The rows of a .jsonl or .csv file; None for one that cannot be read. Bytes that are not UTF-8 become surrogates."""
    with io.TextIOWrapper(open_file(fs, info["name"], info.get("size")), "utf-8-sig", "surrogateescape", newline="") as lines:
        if info["name"].endswith(".jsonl"):
            for line in filter(str.strip, lines):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else None
            return
        csv.field_size_limit(2 ** 31 - 1)
        table, heads = csv.reader(lines), None
        while True:
            try:
                cells = next(table, None)
            except csv.Error:
                yield None
                continue
            if cells is None:
                return
            if heads is None:
                heads = cells
            elif cells:                     # a stray quote makes one row of many: then the number of cells is off
                yield dict(zip(heads, cells)) if len(cells) == len(heads) else None
