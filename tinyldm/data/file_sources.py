"""The sources that are files: what a path or a URL stands for, and its shards.

Read are: WebDataset shards (.tar, .tar.gz, .tgz) and .npz arrays, by path, folder, glob or braces (`{000..045}`, `{a,b}`);
folders of pictures, each with a .txt, .caption or .json of the same name, or with a metadata.jsonl or metadata.csv (Hugging Face's
imagefolder). All of them may be local or at any URL that fsspec opens. A new format of shard is a row of FORMATS.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem

from tinyldm.data import naming, readers
from tinyldm.data.moved import hash_entries
from tinyldm.data.naming import DUPLICATE, NO_PICTURE, composed
from tinyldm.data.outputs import NAME_IT, below, is_output, outputs, report_passed_over
from tinyldm.data.readers import MISSING, UNREADABLE, UNSAFE_NAME, Entry, File, Sample, Skip
from tinyldm.data.remote import SourceLost, address, classify, find_fs, is_local, open_file
from tinyldm.data.source_kind import ListOptions, NothingReadable, Shard, SourceKind
from tinyldm.files import sha256


class Format(NamedTuple):
    """A file format of shards."""

    endings: tuple[str, ...]
    read: Callable[[AbstractFileSystem, str, int | None], Iterator[Sample | Skip]]      # (file system, path, size in bytes)
    in_folders: bool                # whether naming a folder means the files of this format in it


FORMATS = (Format((".tar", ".tar.gz", ".tgz"), readers.read_tar, True), Format((".npz",), readers.read_npz, False))
TABLES = ("metadata.jsonl", "metadata.csv")
MAX_PATHS = 100_000         # that braces may expand to
# Keys of fsspec's file information that show whether a file has changed, the most reliable first: content hashes before times.
MARKS = ("blob_id", "ETag", "etag", "sha256", "md5Hash", "checksum", "mtime", "LastModified", "Last-Modified",
         "last_modified", "updated", "created")


def list_files(spec: str, options: ListOptions) -> list[Shard]:
    """The shards of a path or URL, in which braces and globs are expanded. SourceLost where a URL cannot be reached."""
    shards: list[Shard] = []
    paths = [spec] if os.path.exists(os.path.expanduser(spec)) else braces(spec)
    with explained(paths[0]):                       # some file systems connect when they are created
        find_fs(paths[0])[0].invalidate_cache()     # a listing from earlier in this process may be outdated
    for path in paths:
        with explained(path):
            shards += find(path, options.chunk)
    return shards


def braces(pattern: str) -> list[str]:
    """All paths that a pattern with `{000..045}` (zeros are kept) or `{a,b}` stands for, in order. Braces may be nested."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)       # the first braces without braces inside
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if abs(high - low) >= MAX_PATHS:
            raise ValueError(f"--data {pattern}: {found[0]} stands for more than {MAX_PATHS} paths")
        width = max(len(first), len(last)) if re.search(r"\{0\d|\.0\d", found[0]) else 0
        choices = [f"{n:0{width}d}" for n in range(low, high + 1)] or [f"{n:0{width}d}" for n in range(low, high - 1, -1)]
    else:
        choices = words.split(",")
    paths: dict[str, None] = {}             # an ordered set
    for choice in choices:
        paths |= dict.fromkeys(braces(pattern[:found.start()] + choice + pattern[found.end():]))
        if len(paths) > MAX_PATHS:
            raise ValueError(f"--data {pattern} stands for more than {MAX_PATHS} paths")
    return list(paths)


@contextmanager
def explained(spec: str) -> Iterator[None]:
    """Turn the errors of file systems into ValueErrors that say what to do, or into SourceLost where a URL cannot be reached."""
    try:
        yield
    except SourceLost:
        raise
    except Exception as error:              # every file system's libraries raise exceptions of their own
        remote, kind = "://" in spec, classify(error)
        garbled = remote and isinstance(error, (json.JSONDecodeError, UnicodeError))        # the server sent some other page
        if isinstance(error, ValueError) and kind is SourceLost and not garbled:
            text = " ".join(str(error).split())
            raise (error if text.startswith("--data") else ValueError(f"--data {spec}: {text[:300]}")) from error.__cause__
        if not remote and not isinstance(error, OSError):
            raise
        if kind is FileNotFoundError:
            raise NothingReadable(f"--data {spec}: there is no such file or folder") from error
        if kind is PermissionError:
            what = getattr(error, "filename", None) or "it"
            how = "log in or set HF_TOKEN, and check its name" if spec.startswith("hf:") else "log in" if remote else (
                "change its permissions")
            raise ValueError(f"--data {spec}: no right to read {what}: {how}") from error
        retry = remote and not isinstance(error, (NotImplementedError, ImportError))        # which do not depend on the network
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise (SourceLost if retry else ValueError)(
            f"--data {spec}: cannot be listed ({text}): check the path, and for a URL the network") from error


def find(spec: str, chunk: int) -> list[Shard]:
    """The shards at one path or URL, which may be a glob."""
    fs, path = find_fs(spec)
    magic = "*[" if spec.startswith("http") else "*?["          # in an http URL, `?` begins a query
    if not set(magic) & set(path) or os.path.exists(path):
        return at_path(fs, fs.info(path), chunk)
    shards: list[Shard] = []
    own = []                                # folders that this library wrote
    for name, info in sorted(fs.glob(path, detail=True).items()):
        if info["type"] == "directory" and is_output(map(posixpath.basename, fs.ls(name, detail=False))):
            own.append(name)
        elif info["type"] == "directory" or find_format(name):
            shards += at_path(fs, info, chunk)
    if not shards:
        raise NothingReadable(f"--data {spec}: no shard or folder matches" + (f"; {own[0]} {NAME_IT}" if own else ""))
    report_passed_over(spec, own)
    return shards


def find_format(path: str) -> Format | None:
    """The format of a file, by its ending; None for a file that is not a shard."""
    name = without_query(path).lower()
    return next((row for row in FORMATS if name.endswith(row.endings)), None)


def is_parquet(path: str) -> bool:
    return without_query(path).lower().endswith(".parquet")


def without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith("http") else url


def at_path(fs: AbstractFileSystem, info: dict, chunk: int) -> list[Shard]:
    """The shards in a folder, or the one shard that a file is."""
    path, url = info["name"], address(fs, info["name"])
    if info["type"] == "directory":
        return in_folder(fs, path, chunk)
    found = find_format(path)
    if found is None:
        problem = "parquet files are not read" if is_parquet(path) else "is not a file that is read"
        raise NothingReadable(f"--data {url}: {problem}")
    return [Shard(shard_name(url), url, mark(info), not is_local(fs), partial(found.read, fs, path, info.get("size")),
                  partial(sha256, Path(path)) if is_local(fs) else None)]


def shard_name(url: str, number: int | None = None) -> str:
    """A readable name that is unique because of a hash of the URL. number: of the chunk, where a folder has several shards."""
    base = re.split(r"[/\\]", without_query(url).rstrip("/"))[-1].partition(".")[0]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", base)[:48] or "shard"
    counted = f"{stem}-{number:05d}" if number is not None else stem
    return f"{counted}-{digest(url)[:10]}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def mark(info: dict) -> str:
    """A file's size together with the most reliable sign of change in its information, such as a hash or a time."""
    return f"{info.get('size')}-{next((str(info[key]) for key in MARKS if info.get(key) is not None), '')}"


# ---- folders


def in_folder(fs: AbstractFileSystem, root: str, chunk: int) -> list[Shard]:
    """A folder's shards: the rows of its metadata files or its pictures, in chunks, or else the shard files in it."""
    url = address(fs, root)
    fs.ls(root)                             # raises for a folder that may not be read, which find() would silently skip
    found = fs.find(root, detail=True, **({"on_error": "raise"} if is_local(fs) else {}))
    listed = {path[len(root):].lstrip("/"): info for path, info in sorted(found.items())}
    own = outputs(listed)                   # runs and drawn pictures inside the folder are no data, unless a table names them
    listed = {name: info for name, info in listed.items() if info["type"] == "file" and not naming.HIDDEN.match(name)}
    files = {name: info for name, info in listed.items() if not below(name, own)} if own else listed
    kinds = {found.kind for name in files if (found := naming.split(name))}
    if files:                               # else the error below says it
        report_passed_over(url, own)
    tars = [info for name, info in files.items() if (row := find_format(name)) and row.in_folders]
    tables = [name for name in files if posixpath.basename(name) in TABLES]
    if tables and ("picture" in kinds or not tars):
        folders, forms = one_each(tables, url), by_form(listed)
        entries = [entry for name in tables for entry in from_table(fs, url, name, listed, forms)]
        entries += beside({name: info for name, info in files.items() if not below(name, folders)})
    elif "picture" in kinds and not (tars and not kinds & {"txt", "json"}):         # pictures without captions beside shards: a logo
        if tars:
            raise ValueError(f"--data {url} holds pictures and tar shards: name the one or the other, such as {url}/*.tar")
        entries = beside(files)
    elif tars:
        return [shard for info in tars for shard in at_path(fs, info, chunk)]
    else:
        others = sorted({found.unread for name in files if (found := naming.split(name)) and found.unread})
        contents = "parquet files, which are not read" if any(map(is_parquet, files)) else (
            f"{len(files)} files, but no picture and no shard" + (f": {', '.join(others)}: convert them" if others else ""))
        raise NothingReadable(f"--data {url} holds {contents}" + (f"; {min(own)} {NAME_IT}" if own else ""))
    return [Shard(shard_name(url, number), f"{url} [{number * chunk}:{number * chunk + len(part)}]",
                  digest("\n".join(entry.stamp for entry in part)), not is_local(fs), partial(readers.read_files, fs, part),
                  partial(hash_entries, part) if is_local(fs) else None)
            for number, part in enumerate(entries[i:i + chunk] for i in range(0, len(entries), chunk))]


def one_each(tables: list[str], url: str) -> set[str]:
    """The folders with a metadata file. ValueError for a folder with two, whose pictures would be read twice."""
    folders: set[str] = set()
    for folder in map(posixpath.dirname, tables):
        if folder in folders:
            where = posixpath.join(url, folder).rstrip("/")
            raise ValueError(f"--data {where} holds {' and '.join(TABLES)}, so its pictures would be read twice: delete one")
        folders.add(folder)
    return folders


def beside(files: dict[str, dict]) -> list[Entry]:
    """A folder's pictures, each with the caption files of the same name. Two files of one kind and name are skipped as ambiguous.

    What is no sample in another way comes last: the chunks of the samples, and their stamps, do not depend on it.
    """
    entries, others = [], []
    for group in naming.samples((found, name) for name in files if (found := naming.split(name))):
        stamp = " ".join(f"{name} {mark(files[name])}" for name in sorted(name for _, name in group.files()))
        fields = {field: as_file(files[found[0][1]]) for field, found in group.fields.items()}
        rows = [Entry(name, as_file(files[name]), fields, group.reason, stamp, group.detail) for _, name in group.pictures]
        if group.reason == NO_PICTURE and group.detail:
            rows = [Entry(group.files()[0][1], None, {}, NO_PICTURE, stamp, group.detail)]
        (entries if group.reason in ("", DUPLICATE) else others).extend(rows)
    return sorted(entries, key=lambda entry: entry.key) + sorted(others, key=lambda entry: entry.key)


def as_file(info: dict) -> File:
    return File(info["name"], info.get("size"))


def by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """File names by their composed form."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(composed(name), []).append(name)
    return forms


def from_table(fs: AbstractFileSystem, url: str, table: str, files: dict[str, dict], forms: dict[str, list[str]]) -> list[Entry]:
    """The rows of a metadata file, each with the picture named in its column file_name. forms: the names of `files`, by_form."""
    folder, entries, named = posixpath.dirname(table), [], 0
    for number, row in enumerate(rows(fs, files[table]), 1):
        name = row.get("file_name") if row else None
        key = f"{table}:{number} {name or ''}".strip()
        named += name is not None
        if not isinstance(name, str) or not name:
            entries.append(Entry(key, None, {}, UNREADABLE, key))
            continue
        path = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
        found = [path] if path in files else forms.get(composed(path), [])
        reason = (UNSAFE_NAME if naming.UNSAFE.match(name) else MISSING if not found else DUPLICATE if len(found) > 1
                  else parsed.unread if (parsed := naming.split(found[0])) else "")
        picture = None if reason else as_file(files[found[0]])
        entries.append(Entry(key, picture, row, reason, f"{key} {reason or mark(files[found[0]])} {json.dumps(row)}"))
    if not named:
        raise ValueError(f"--data {url}/{table} has no column file_name: name the pictures in one, relative to {url}/{folder}")
    return entries


def rows(fs: AbstractFileSystem, info: dict) -> Iterator[dict | None]:
    """The rows of a .jsonl or .csv file; None for a row that cannot be read. Bytes that are not UTF-8 become surrogates."""
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
            elif cells:                     # a stray quote joins several rows into one, whose number of cells is then wrong
                yield dict(zip(heads, cells)) if len(cells) == len(heads) else None


FILES = SourceKind("a folder of pictures with .txt, .caption or .json captions beside them or with a metadata.jsonl or metadata.csv, "
                   "WebDataset shards (.tar, .tar.gz, .tgz), .npz arrays", lambda spec: True, list_files)
