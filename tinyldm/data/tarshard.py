"""Members of a tar archive as one stream, never written to disk, from archives that may be cut, damaged or hostile.

Notable: Python's tarfile ends silently at a bad header or passes over it silently, reads extended headers of any length
into memory and, until 3.13, runs in circles on negative sizes. Here a header that does not parse is reported and the
next good one is found. Layouts: ustar, GNU (long names), pax; links, devices, folders and sparse files are passed over.
References: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LIMIT = 256 << 20           # bytes that a member may have to be read
EXTENDED = 1 << 20          # bytes that a long name or a pax header may have
SMALLEST = 20 * BLOCK       # what tar writes for an archive without members: zeros
ZEROS = bytes(BLOCK)
REGULAR, WITHOUT_DATA, EXTENSIONS = b"0\0007", b"123456", b"LxX"      # kinds of header, by their typeflag


class Member(NamedTuple):
    name: str               # bytes that are not UTF-8 stand as \\x..
    data: bytes | None      # None: more than LIMIT bytes


class Flaw(NamedTuple):
    cut: bool               # the archive ends before its end mark; otherwise there are wrong bytes in it
    detail: str
    name: str = ""          # of the member that it ends in, where that is known
    doubt: bool = False     # what was read last may be wrong too
    inside: bool = False    # cut within a member or a header, not between two


class Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    sparse: bool            # blocks of a GNU sparse map follow


def members(stream: BinaryIO) -> Iterator[Member | Flaw]:
    """Regular files in their order, and each place where the archive is cut or damaged.

    stream: read(n) returns fewer bytes only at the end; EOFError from it counts as a cut, other errors pass through.
    Raises ValueError where there is not one header in it.
    """
    found = lost = ended = False            # a header so far; no header where one was due; zeros since the last header
    extended: dict[str, bytes] = {}         # what the headers before this one say about the next file
    blocks, name = 0, ""
    try:
        while block := stream.read(BLOCK):
            blocks += 1
            if block == ZEROS[:len(block)]:         # the end, or the end of one of several archives in a row
                ended = True
                continue
            header = parse(block, extended)
            if header is None:
                if found and not lost and len(block) < BLOCK:
                    raise EOFError("the archive ends within a header")
                if not lost:
                    yield Flaw(False, f"no header at byte {stream.tell() - len(block)}")
                lost, extended = True, {}
                continue
            found, lost, ended = True, False, False
            padding = -header.size % BLOCK
            if header.kind in EXTENSIONS:
                extended |= extension(header.kind, take(stream, header.size))
                skip(stream, padding)
                continue
            if header.sparse:
                while take(stream, BLOCK)[504]:
                    pass
            if header.kind in REGULAR and "sparse" not in extended:
                name = header.name.decode("utf-8", "backslashreplace")
                yield Member(name, read(stream, header.size))
                name = ""
            else:
                skip(stream, header.size)
            skip(stream, padding)                   # after the yield: a member is whole without it
            extended = {}
    except EOFError as error:
        yield Flaw(True, str(error), name, inside=True)
        return
    if not found and (lost or not 0 < blocks * BLOCK <= SMALLEST):
        raise ValueError("not a tar archive")
    if not ended and not lost:
        yield Flaw(True, "the archive has no end mark")


def parse(block: bytes, extended: dict[str, bytes]) -> Header | None:
    """A header block, with what extended headers before it said. None where it is no header."""
    try:
        if number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        kind, name, size = block[156:157], block[:100].split(b"\0")[0], number(block[124:136])
        if kind in EXTENSIONS:
            return Header(kind, name, size, False) if size <= EXTENDED else None
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        if kind in WITHOUT_DATA:            # whatever the size field says
            size = 0
        elif "size" in extended:
            size = number(extended["size"], 10)
        return Header(kind, extended.get("path", name), size, kind == b"S" and bool(block[482]))
    except (ValueError, IndexError):
        return None


def number(field: bytes, base: int = 8) -> int:
    """A number in ASCII digits, or in binary behind a byte 0x80 (GNU, for files over 8 GB). ValueError for others."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ") or b"0"
    if not digits.isdigit():
        raise ValueError("no number")
    return int(digits, base)


def extension(kind: bytes, data: bytes) -> dict[str, bytes]:
    """What a long name (GNU) or a pax header says about the next file: its path, its size, that it is sparse."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0]}
    says: dict[str, bytes] = {}
    while data:                             # records "LENGTH KEY=VALUE\n"
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1:int(length) - 1].partition(b"=")
        says["sparse" if key.startswith(b"GNU.sparse") else key.decode("utf-8", "replace")] = value
        data = data[int(length):]
    return says


def take(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"the archive ends {size - len(data)} bytes before the end of a member")
    return data


def read(stream: BinaryIO, size: int) -> bytes | None:
    """A member's bytes; None, and past them, where they are too many to be a picture."""
    if size <= LIMIT:
        return take(stream, size)
    skip(stream, size)
    return None


def skip(stream: BinaryIO, size: int) -> None:
    while size:
        size -= len(take(stream, min(size, EXTENDED)))
