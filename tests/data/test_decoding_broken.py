"""Broken pictures, decompression bombs and pictures outside the limits: a reason, no warnings, and never half a picture."""

import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from archives import encode, noise, smooth
from PIL import Image, ImageFile

from tinyldm.data import decoding
from tinyldm.data.decoding import ENDINGS, Framing, Unusable, decode

SQUARE = Framing(16)


def reason(data, framing=SQUARE) -> tuple[str, bool]:
    with pytest.raises(Unusable) as caught:
        decode(data, framing)
    assert caught.value.reason in decoding.REASONS
    return caught.value.reason, caught.value.filtered


def header(width, height, colour_type=2, pixels=b"") -> bytes:
    """A PNG whose header claims a size for which it has no pixels."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    size = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def test_limits_drop_pictures_as_filtered_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    small, long = Framing(16, min_side=100), Framing(16, max_aspect=2.0)
    for size in ((99, 300), (300, 99), (99, 99)):
        assert reason(header(*size), small) == ("too small", True)
    for size in ((201, 100), (100, 201)):
        assert reason(header(*size), long) == ("too long", True)
        assert reason(np.zeros(size, np.uint8), long) == ("too long", True)
    assert reason(np.zeros((99, 300, 3), np.uint8), small) == ("too small", True)


def test_pictures_at_the_limits_are_kept():
    for size in ((100, 200), (200, 100)):
        assert decode(noise(*size), Framing(16, min_side=100, max_aspect=2.0)).shape == (16, 16, 3)
    assert decode(noise(1, 50), SQUARE).shape == (16, 16, 3)


def test_bombs_are_refused_by_their_header_without_a_warning(recwarn, monkeypatch, capfd):
    loaded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size) or load(self))
    for size in ((50000, 50000), (2 ** 31 - 1, 2 ** 31 - 1), (12000, 10000), (100_000_001, 1)):
        assert reason(header(*size)) == ("too many pixels", False)
    assert not loaded
    assert reason(header(10000, 9500), Framing(16, min_side=9600)) == ("too small", True)     # at this size Pillow itself warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert reason(header(40, 40)) == ("too many pixels", False)
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_exactly_the_greatest_number_of_pixels_passes(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 400)
    assert decode(encode(noise(20, 20)), SQUARE).shape == (16, 16, 3)
    assert reason(encode(noise(401, 1))) == ("too many pixels", False)


def test_pillows_other_warnings_are_silent_and_ours_and_others_are_not(recwarn):
    apng = encode(noise(16, 16, 3))
    frames = b"acTL" + bytes(8)
    broken = apng[:33] + struct.pack(">I", 8) + frames + struct.pack(">I", zlib.crc32(frames)) + apng[33:]
    assert decode(broken, SQUARE).shape == (16, 16, 3) and not recwarn.list
    warnings.warn("somebody else's")
    assert len(recwarn.list) == 1


FILES = {"JPEG": {"quality": 90}, "progressive": {"progressive": True}, "PNG": {}, "GIF": {}, "WEBP": {"quality": 80},
         "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {}, **{name: {} for name in ("AVIF", "JPEG2000") if name in ENDINGS}}


def broken_file(name) -> bytes:
    return encode(smooth(64, 48), "JPEG" if name == "progressive" else name, **FILES[name])


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_unusable_or_whole_but_never_half_grey(name):
    data, framing, refused = broken_file(name), Framing(48), set()
    whole = decode(data, framing)
    cuts = sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 12, len(data))})
    for cut in cuts:
        try:
            assert (decode(data[:cut], framing) == whole).all()
            assert cut > 0.9 * len(data)
        except Unusable as error:
            assert error.reason in ("truncated", "unreadable") and not error.filtered and error.detail
            refused.add(error.reason)
    assert "truncated" in refused or name in ("WEBP", "TIFF", "JPEG2000")


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_give_a_picture_of_the_right_shape_or_a_reason(name, recwarn):
    rng, good, results = np.random.default_rng(0), np.frombuffer(broken_file(name), np.uint8), set()
    for i in range(80):
        data = good.copy()
        at = rng.integers(0, len(data) if i % 2 else min(len(data), 200), 1 + i % 5)
        data[at] = rng.integers(0, 256, len(at))
        try:
            out = decode(data.tobytes(), Framing(32))
            assert out.shape == (32, 32, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
            results.add("picture")
        except Unusable as error:
            results.add(error.reason)
    assert "unreadable" in results and not recwarn.list
    assert ("picture" in results) == (name != "PNG"), "PNG has checksums"


@pytest.mark.parametrize("data", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n",
                                  encode(np.zeros((8, 8, 3), np.uint8), "TGA"), encode(np.zeros((16, 16, 3), np.uint8), "ICO"),
                                  encode(np.zeros((8, 8, 3), np.uint8), "EPS")])
def test_other_formats_and_no_format_are_unreadable(data):
    assert reason(data) == ("unreadable", False)


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, TypeError, zlib.error,
                                   OverflowError, MemoryError, KeyError, AssertionError, RuntimeError, NotImplementedError])
def test_whatever_pillow_raises_becomes_a_reason(error, monkeypatch):
    def fail(self):
        raise error("what\nhappened")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(Unusable, match=f"unreadable: {error.__name__} .*what") as caught:
        decode(encode(noise(16, 16)), SQUARE)
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_not_a_broken_picture(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt
    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(encode(noise(16, 16)), SQUARE)


def test_arrays_of_another_kind_are_unreadable():
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8),
                  np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4, 1), np.uint8)):
        assert reason(array) == ("unreadable", False)


def test_a_reason_can_be_pickled():
    for error in (Unusable("too small", "1 x 1", filtered=True), Unusable("unreadable")):
        twin = pickle.loads(pickle.dumps(error))
        assert vars(twin) == vars(error) and str(twin) == str(error)
    assert str(error) == "unreadable" and isinstance(error, ValueError)
