"""Read the members of a tar archive from a stream, without writing to disk; archives may be truncated, damaged or hostile.

Notable: Python's tarfile silently ends at a bad header or skips it, reads extended headers of any length into memory and,
before Python 3.13, loops forever on negative sizes. Here a header that does not parse is reported, and reading goes on at the
next valid one. Layouts: ustar, GNU (long names), pax; links, devices, folders and sparse files are skipped.
References: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LIMIT = 256 << 20           # bytes: larger members are not read
EXTENDED = 1 << 20          # bytes: a longer long name or pax header is taken for damage
SMALLEST = 20 * BLOCK       # size of the archive without members that tar writes: all zeros
ZEROS = bytes(BLOCK)
REGULAR, WITHOUT_DATA, EXTENSIONS = b"0\0007", b"123456", b"LxX"      # typeflags of each kind of header


class Member(NamedTuple):
    name: str               # bytes that are not UTF-8 are written as \\x..
    data: bytes | None      # None: the member has more than LIMIT bytes


class Flaw(NamedTuple):
    """A point at which an archive is truncated or damaged."""

    truncated: bool         # the archive ends before its end mark; False: it contains wrong bytes
    detail: str
    name: str = ""          # name of the member within which the archive ends, where known
    doubtful: bool = False  # the data that were read just before may be wrong, too
    inside: bool = False    # truncated within a member or a header, not between two members


class Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    sparse: bool            # blocks with a GNU sparse map follow the header


def members(stream: BinaryIO) -> Iterator[Member | Flaw]:
    """The regular files in order, and each point at which the archive is truncated or damaged.

    stream: read(n) returns fewer bytes only at the end. An EOFError from it counts as truncation; other errors pass through.
    Raises ValueError where the stream does not contain a single header.
    """
    found = False                           # there has been a valid header
    lost = False                            # the last header was invalid, and no valid one has been found since
    ended = False                           # there has been a block of zeros since the last header
    extended: dict[str, bytes] = {}         # fields of the next file from extended headers
    blocks, name = 0, ""
    try:
        while block := stream.read(BLOCK):
            blocks += 1
            if block == ZEROS[:len(block)]:         # the end of the archive, or of one of several concatenated archives
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
                extended |= extension(header.kind, read_exactly(stream, header.size))
                skip(stream, padding)
                continue
            if header.sparse:
                while read_exactly(stream, BLOCK)[504]:
                    pass
            if header.kind in REGULAR and "sparse" not in extended:
                name = header.name.decode("utf-8", "backslashreplace")
                yield Member(name, read_member(stream, header.size))
                name = ""
            else:
                skip(stream, header.size)
            skip(stream, padding)                   # after the yield: the member is complete even if its padding is missing
            extended = {}
    except EOFError as error:
        yield Flaw(True, str(error), name, inside=True)
        return
    if not found and (lost or not 0 < blocks * BLOCK <= SMALLEST):
        raise ValueError("not a tar archive")
    if not ended and not lost:
        yield Flaw(True, "the archive has no end mark")


def parse(block: bytes, extended: dict[str, bytes]) -> Header | None:
    """Parse a header block, given the fields from the extended headers before it. None where it is not a header."""
    try:
        if number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        kind, name, size = block[156:157], block[:100].split(b"\0")[0], number(block[124:136])
        if kind in EXTENSIONS:
            return Header(kind, name, size, False) if size <= EXTENDED else None
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        if kind in WITHOUT_DATA:            # no data follow, even where the size field is not 0
            size = 0
        elif "size" in extended:
            size = number(extended["size"], 10)
        return Header(kind, extended.get("path", name), size, kind == b"S" and bool(block[482]))
    except (ValueError, IndexError):
        return None


def number(field: bytes, base: int = 8) -> int:
    """A number in ASCII digits, or in binary after a byte 0x80 (GNU, for files over 8 GB). ValueError for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ") or b"0"
    if not digits.isdigit():
        raise ValueError("not a number")
    return int(digits, base)


def extension(kind: bytes, data: bytes) -> dict[str, bytes]:
    """The fields of the next file in a GNU long name or a pax header, such as its path, its size, or that it is sparse."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0]}
    fields: dict[str, bytes] = {}
    while data:                             # records of the form "LENGTH KEY=VALUE\n"
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1:int(length) - 1].partition(b"=")
        fields["sparse" if key.startswith(b"GNU.sparse") else key.decode("utf-8", "replace")] = value
        data = data[int(length):]
    return fields


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """The next `size` bytes; EOFError where the stream has fewer."""
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"the archive ends {size - len(data)} bytes before the end of a member")
    return data


def read_member(stream: BinaryIO, size: int) -> bytes | None:
    """The data of a member; None where it is larger than LIMIT, after skipping it."""
    if size <= LIMIT:
        return read_exactly(stream, size)
    skip(stream, size)
    return None


def skip(stream: BinaryIO, size: int) -> None:
    while size:
        size -= len(read_exactly(stream, min(size, EXTENDED)))
