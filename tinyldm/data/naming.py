"""What the names of files say: which of them make up a sample, which is its picture, and which its caption.

Two conventions are read, in archives and in folders. A name may simply have dots in it (`photo 3.5.jpg`, `photo 3.5.txt`), or, as in
WebDataset, everything after the first dot is an extension (`000.jpg`, `000.seg.png`, `000.txt`). Names alone do not tell which one is
meant, so all files that share the part before their extensions are looked at together (`samples`). docs/data.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar
from unicodedata import normalize

from tinyldm.data.decoding import ENDINGS

T = TypeVar("T")

# Endings of caption files, the one that wins first: kohya's scripts write .caption, its captioning tools also .cap, taggers .tags.
TEXTS = ("txt", "text", "caption", "cap", "tags")
UNREAD = ("heic heif hif jxl jxr bpg psd psb xcf kra ora svg svgz eps tga dds exr hdr ico icns cur pcx dib qoi sgi ras xbm xpm wmf emf "
          "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f 3fr iiq dcr kdc mrw jp2 j2k j2c jpc jpf jpx avif avifs").split()
KINDS = (dict.fromkeys(UNREAD, "unread") | {ending: "picture" for endings in ENDINGS.values() for ending in endings}
         | dict.fromkeys(TEXTS, "txt") | {"json": "json"})
PICTURES, CAPTIONS = {"picture", "unread"}, {"txt", "json"}
# A .jpg beside its .avif is the picture: formats that are read, but seldom used, yield to these.
COMMON = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAIN = ("image", "img", "picture", "photo", "rgb")          # of the pictures with an extension before the last, these come first
# What may come before the last extension: `seg` or `mask.0`, but the 5 in `photo 3.5.jpg` is part of the name.
FIRST, FURTHER = re.compile(r"[A-Za-z_]"), re.compile(r"[A-Za-z0-9_-]+")
UNSAFE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|\Z)", re.DOTALL)      # leads out of its folder
HIDDEN = re.compile(r"(.*/)?\.[^/]", re.DOTALL)

NO_PICTURE, DUPLICATE, NOT_READ = "no picture", "duplicate key", "picture format not read"


class Name(NamedTuple):
    """A file name of a kind that matters, in its parts: `000.seg.png` is the picture `seg` of `000`."""

    path: str
    key: str
    part: str               # extensions before the last, "" for most files
    kind: str               # "picture", "unread" (a picture in another format), "txt" or "json"
    rank: int               # of several files of one kind, the one with the lowest rank counts

    @property
    def stem(self) -> str:
        return f"{self.key}.{self.part}" if self.part else self.key

    @property
    def unread(self) -> str:
        """The reason why this is no picture that is read, "" for other files."""
        return f"{NOT_READ} (.{self.path.rpartition('.')[2].lower()})" if self.kind == "unread" else ""


@dataclass(frozen=True)
class Group(Generic[T]):
    """The files of one sample, each with the value that belongs to it."""

    key: str
    pictures: list[tuple[Name, T]]              # one, except with a reason
    fields: dict[str, list[tuple[Name, T]]]     # one file each, except with a reason
    reason: str                                 # why it is no sample; "" for a sample
    detail: str = ""

    def files(self) -> list[tuple[Name, T]]:
        return [file for files in (self.pictures, *self.fields.values()) for file in files]


def split(path: str) -> Name | None:
    """A file's name in its parts; None for hidden files and for those of other kinds, which are ignored."""
    folder, slash, base = path.rpartition("/")
    stem, _, ending = base.rpartition(".")
    kind = KINDS.get(ending.lower())
    if kind is None or HIDDEN.match(path):
        return None
    parts = stem.split(".")
    doubled = kind in CAPTIONS and len(parts) > 1 and KINDS.get(parts[-1].lower()) in PICTURES       # a.jpg.txt
    parts = parts[:-1] if doubled else parts
    own = own_parts(parts)
    rank = TEXTS.index(ending.lower()) if kind == "txt" else int(kind == "picture" and ending.lower() not in COMMON)
    return Name(path, folder + slash + ".".join(parts[:own]), ".".join(parts[own:]), kind, rank + len(TEXTS) * bool(doubled))


def own_parts(parts: Sequence[str]) -> int:
    """How many of the parts of a name, split at its dots, are its key. The others are extensions. In one pass, since a name in a
    foreign archive may have half a million dots."""
    own = len(parts)
    for i in range(len(parts) - 1, 0, -1):
        if not FURTHER.fullmatch(parts[i]):
            break
        own = i if FIRST.match(parts[i]) else own
    return own


def composed(key: str) -> str:
    """A key in Unicode's composed form: Macs write names decomposed (e and an accent), other systems as they were typed."""
    return normalize("NFC", key)


def complete(kinds: Set[str]) -> bool:
    """Whether files of these kinds, with one name up to the last extension, are a picture with its own caption."""
    return bool(PICTURES & kinds and CAPTIONS & kinds)


def samples(files: Iterable[tuple[Name, T]]) -> Iterator[Group[T]]:
    """Sort files into samples. Keys that differ only in their Unicode form are one, unless files with them clash."""
    keys: dict[str, dict[str, list[tuple[Name, T]]]] = {}
    for file in files:
        keys.setdefault(composed(file[0].key), {}).setdefault(file[0].key, []).append(file)
    for exact in keys.values():
        places = [{(name.part, name.kind) for name, _ in group} for group in exact.values()]
        clash = sum(map(len, places)) > len(set().union(*places))
        for group in exact.values() if clash else [[file for group in exact.values() for file in group]]:
            yield from of_one_key(group)


def of_one_key(files: Sequence[tuple[Name, T]]) -> Iterator[Group[T]]:
    """The samples among files with one key: the key itself, if it has a picture, and each further picture with its own caption."""
    parts: dict[str, dict[str, list[tuple[Name, T]]]] = {}
    for file in files:
        parts.setdefault(file[0].part, {}).setdefault(file[0].kind, []).append(file)
    for kinds in parts.values():
        for kind, found in kinds.items():
            best = min(name.rank for name, _ in found)
            kinds[kind] = [file for file in found if file[0].rank == best]
    alone = [part for part, kinds in parts.items() if part and complete(kinds.keys())]
    main = next((part for kind in ("picture", "unread") for part in ("", *MAIN)
                 if kind in parts.get(part, {}) and part not in alone), None)
    pictures = [name.path for name, _ in files if name.kind in PICTURES]
    for part in parts if main is None else alone:
        yield grouped(parts[part], parts[part], [] if part else pictures)
    if main is not None:
        named = {part: kinds for part, kinds in parts.items() if part and part not in alone}
        texts = {part: kinds["txt"] for part, kinds in named.items() if "txt" in kinds and part not in CAPTIONS}
        jsons = [kinds["json"] for kinds in named.values() if "json" in kinds]
        plain = parts.get("", {})
        only = {"json": jsons[0]} if len(jsons) == 1 and not texts and "txt" not in plain else {}
        found = grouped(parts[main], only | texts | plain)
        yield replace(found, key=found.pictures[0][0].key)


def grouped(pictures: dict[str, list[tuple[Name, T]]], fields: dict[str, list[tuple[Name, T]]], others: Sequence[str] = ()) -> Group[T]:
    """The group of a picture and its captions, {kind or name: files}. others: pictures that are not the picture of these captions."""
    found = pictures.get("picture") or pictures.get("unread") or []
    lists = [found, *(files for field, files in fields.items() if field not in PICTURES)]
    first = next(name for files in lists for name, _ in files)
    twice = [name.path for files in lists for name, _ in files if len(files) > 1]
    reason, detail = found[0][0].unread if found else NO_PICTURE, ""
    if twice:
        reason, detail = DUPLICATE, f"only one of these can count: {', '.join(twice[:4])}"
    elif others and not found:
        detail = f"its picture would be {first.key}.* or {first.key}.{MAIN[0]}.*, not {', '.join(others[:3])}"
    return Group(first.stem, found, {field: files for field, files in fields.items() if field not in PICTURES}, reason, detail)
