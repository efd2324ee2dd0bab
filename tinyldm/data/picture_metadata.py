"""Take out of the bytes of a picture file the metadata at which Pillow gives up although the pixels are fine.

Pillow refuses a whole PNG when a compressed text or colour profile in it has more than 1 MiB (Pillow #2445, #5610, #8363), or when
any chunk that does not concern the pixels is damaged; the limits are global variables, and raising them would also change them for
other users of Pillow in the process. Here the bytes of such a chunk are left out before Pillow sees them, so no limit changes.
Reference: PNG specification, third edition, 5 (chunk layout) and 11.3 (ancillary chunks).
"""

from __future__ import annotations

import re
import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 16 << 20      # bytes of a colour profile; a JPEG cannot hold more either
MAX_TEXT = 1 << 20          # bytes of a text that may hold an orientation: Pillow's own limit
# Text chunks in which Pillow looks for the orientation: XMP, and Exif as ImageMagick writes it.
ORIENTED = re.compile(rb"(XML:com\.adobe\.xmp|Raw profile type exif|exif)\0")
# In AVIF, the entry of Exif data in the list of items. libavif refuses the picture when the data are broken, and the orientation of
# an AVIF is not in them, but in boxes of their own (ISO/IEC 23008-12, 6.5.10 and 6.5.12).
AVIF_EXIF = re.compile(rb"(infe.{8}(?:.{2})?)Exif", re.DOTALL)


def without_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """A picture file without metadata that is not needed, and the colour profile that was taken out of it, if there was one."""
    if data.startswith(PNG):
        return clean_png(data)
    if data[4:8] == b"ftyp":
        data = AVIF_EXIF.sub(rb"\1free", data)
    return data, None


def clean_png(data: bytes) -> tuple[bytes, bytes | None]:
    """The chunks that decide the pixels and the orientation, and the profile. From a damaged chunk header on, nothing is left out."""
    kept, begin, at, profile = [], 0, len(PNG), None
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if not name.isalpha() or end > len(data):
            break
        body = slice(at + 8, end - 4)
        if name == b"iCCP":
            profile = profile or inflate(data[body].partition(b"\0")[2][1:], MAX_PROFILE)
        # Names of critical chunks begin with a capital. Without the chunks of an animation, its default image is read.
        if not (name[:1].isupper() or name == b"tRNS" or oriented(name, data[body])
                and zlib.crc32(data[at + 4:end - 4]) == int.from_bytes(data[end - 4:end], "big")):
            kept.append(data[begin:at])
            begin = end
        at = end
    return b"".join([*kept, data[begin:]]) if kept else data, profile


def oriented(name: bytes, body: bytes) -> bool:
    """Whether an ancillary chunk may hold the orientation, in a size that Pillow reads."""
    if name == b"eXIf":
        return True
    if name not in (b"tEXt", b"zTXt", b"iTXt") or len(body) > MAX_TEXT or not ORIENTED.match(body):
        return False
    rest = body.partition(b"\0")[2]
    if name == b"zTXt":
        return inflate(rest[1:], MAX_TEXT) is not None
    return name == b"tEXt" or rest[:1] == b"\0" or inflate(rest[2:].split(b"\0", 2)[-1], MAX_TEXT) is not None


def inflate(data: bytes, limit: int) -> bytes | None:
    """Compressed bytes -> at most `limit` bytes; None where they are more, or damaged."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, limit)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail else out
