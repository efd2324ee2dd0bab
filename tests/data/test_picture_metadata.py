"""Metadata that Pillow stumbles over costs no picture: the pixels are read, and the profile and the orientation still count."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from archives import encode, noise
from PIL import Image, ImageCms, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from tinyldm.data.decoding import ENDINGS, Framing, Unusable, decode
from tinyldm.data.picture_metadata import inflate, without_metadata

SQUARE = Framing(16)
PICTURE = noise(16, 16, 3)
PNG = encode(PICTURE)
BIG = b"x" * ((1 << 20) + 1)                    # compressed, it has a thousandth of this size


def chunk(name: bytes, body: bytes, seal: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ seal)


def with_chunk(name: bytes, body: bytes, late=False, seal=0) -> bytes:
    """The PNG with a chunk before or behind its pixels. seal: what the checksum is changed by."""
    at = len(PNG) - 12 if late else 33
    return PNG[:at] + chunk(name, body, seal) + PNG[at:]


def profile() -> bytes:
    """sRGB with red and green exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    return data[:red] + b"gXYZ" + data[red + 4:green] + b"rXYZ" + data[green + 4:]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = orientation, "a description"
    return tags.tobytes()


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind"])
@pytest.mark.parametrize("name, body", [
    (b"zTXt", b"workflow\0\0" + zlib.compress(BIG)), (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(BIG)),
    (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)), (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(BIG)),
    (b"iCCP", b"name\0\0" + zlib.compress(bytes(20 << 20))), (b"iCCP", b"name\0\7" + zlib.compress(b"x")), (b"iCCP", b""),
    (b"zTXt", b"a\0\7"), (b"gAMA", b""), (b"cHRM", b"x"), (b"pHYs", b"x"), (b"sRGB", b""), (b"acTL", b""), (b"fcTL", b"x" * 26)])
def test_chunks_that_do_not_concern_the_pixels_never_cost_a_png(name, body, late):
    assert (decode(with_chunk(name, body, late), SQUARE) == PICTURE).all()


def test_many_texts_of_more_than_pillows_memory_for_texts_are_passed_over():
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(65))
    assert (decode(PNG[:33] + texts + PNG[33:], SQUARE) == PICTURE).all()


def test_text_that_pillow_itself_writes_and_then_refuses_is_passed_over():
    info = PngInfo()                                            # Pillow #8363
    info.add_text("parameters", "y" * len(BIG), zip=True)
    info.add_itxt("prompt", "ü" * len(BIG), zip=True)
    data = encode(PICTURE, pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()
    assert (decode(data, SQUARE) == PICTURE).all()


def test_a_damaged_checksum_of_metadata_costs_nothing_and_one_of_a_palette_the_picture():
    assert (decode(with_chunk(b"tEXt", b"a\0b", seal=1), SQUARE) == PICTURE).all()
    assert (decode(with_chunk(b"eXIf", exif(3)[6:], seal=1), SQUARE) == PICTURE).all()
    with pytest.raises(Unusable):
        decode(with_chunk(b"PLTE", b"abc", seal=1), SQUARE)


def test_a_large_profile_still_changes_the_colours():
    red, large = np.full((16, 16, 3), (255, 0, 0), np.uint8), profile()
    large = struct.pack(">I", 3 << 20) + large[4:] + bytes((3 << 20) - len(large))
    assert (decode(encode(red, icc_profile=large), SQUARE) == (0, 255, 0)).all()
    assert (decode(encode(red, icc_profile=profile()), SQUARE) == (0, 255, 0)).all()
    assert inflate(zlib.compress(bytes(100)), 99) is None and inflate(zlib.compress(bytes(100)), 100) == bytes(100)


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind"])
def test_the_orientation_is_found_in_each_chunk_that_can_hold_it(late):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    raw = b"\nexif\n%8d\n%s\n" % (len(exif(3)), exif(3).hex().encode())
    for name, body in ((b"eXIf", exif(3)[6:]), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
                       (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
                       (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)), (b"tEXt", b"Raw profile type exif\0" + raw)):
        assert (decode(with_chunk(name, body, late), SQUARE) == PICTURE[::-1, ::-1]).all(), name


def test_a_png_without_superfluous_chunks_is_not_copied_and_a_damaged_one_is_left_as_it_is():
    assert without_metadata(PNG)[0] is PNG and without_metadata(b"\xff\xd8\xff" + PNG)[0][3:] == PNG
    for cut in range(len(PNG)):
        assert without_metadata(PNG[:cut]) == (PNG[:cut], None)
    assert without_metadata(with_chunk(b"tEXt", b"a\0b")) == (PNG, None)


def test_no_limit_of_pillow_is_changed_for_others_and_bombs_of_pixels_are_still_refused():
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    large = with_chunk(b"zTXt", b"a\0\0" + zlib.compress(BIG))
    with ThreadPoolExecutor(4) as pool:
        assert all((out == PICTURE).all() for out in pool.map(lambda data: decode(data, SQUARE), [large] * 40))
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)
    bomb = PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)) + large[33:]
    with pytest.raises(Unusable, match="too many pixels"):
        decode(bomb, SQUARE)


@pytest.mark.skipif("AVIF" not in ENDINGS, reason="this Pillow was built without AVIF")
def test_broken_exif_in_an_avif_costs_nothing_and_its_orientation_is_kept():
    for orientation, expected in ((1, PICTURE), (3, PICTURE[::-1, ::-1])):
        data = encode(PICTURE, "AVIF", quality=100, subsampling="4:4:4", exif=exif(orientation))
        whole = decode(data, SQUARE)
        assert np.abs(whole.astype(int) - expected).max() <= 8
        at = data.index(b"MM\0*")
        assert (decode(data[:at] + b"XXXX" + data[at + 4:], SQUARE) == whole).all()


@pytest.mark.parametrize("kind, value", [(2, "a text"), (3, 7), (12, 1.5)])
def test_a_tiff_whose_xmp_has_another_type_is_read(kind, value):
    from PIL import TiffImagePlugin
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = kind, value
    assert (decode(encode(PICTURE, "TIFF", tiffinfo=tags), SQUARE) == PICTURE).all()


@pytest.mark.parametrize("form, options", [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("GIF", {}),
                                           *([("AVIF", {})] if "AVIF" in ENDINGS else [])])
@pytest.mark.parametrize("what", ["icc_profile", "xmp", "exif", "comment"])
def test_megabytes_of_metadata_in_other_formats_leave_the_pixels_alone(form, options, what):
    large = noise(60_000 if form == "JPEG" and what != "icc_profile" else 2 << 20).tobytes()
    tags = Image.Exif()
    tags[0x010E] = "d" * min(len(large), 60_000)
    value = {"exif": tags.tobytes(), "comment": b"c" * 60_000}.get(what, large)
    plain = decode(encode(PICTURE, form, **options), SQUARE)
    assert (decode(encode(PICTURE, form, **options, **{what: value}), SQUARE) == plain).all()
