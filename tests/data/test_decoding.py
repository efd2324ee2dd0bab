"""Decoding the bytes of a picture to an upright array of the right size."""

import struct
from concurrent.futures import ThreadPoolExecutor

import PIL
import numpy as np
import pytest
from archives import encode, grey, noise, smooth
from PIL import Image, ImageFile

from tinyldm.data import decoding
from tinyldm.data.decoding import Framing, decode, decode_with_sizes, make_buckets

SQUARE = Framing(16)


def psnr(a, b) -> float:
    return 10 * np.log10(255 ** 2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def test_buckets_hold_the_squares_tokens_in_both_orientations():
    buckets = make_buckets(256, 16, 2.0)
    units = [(h // 16, w // 16) for h, w in buckets]
    assert units[0] == (11, 23) and units[-1] == (23, 11) and (16, 16) in units and units == sorted(set(units))
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in buckets)
    assert all(0.96 * 256 <= h * w <= 256 for h, w in units) and {(w, h) for h, w in units} == set(units)
    assert all(h * (w + 1) > 256 for h, w in units if h <= 16), "the widest of each height"
    assert {h for h, w in units if h <= w} == {11, 12, 13, 14, 15, 16}


def test_buckets_end_at_the_one_nearest_to_the_longest_aspect():
    assert make_buckets(256, 16, 1.0) == ((256, 256),)
    assert make_buckets(256, 16, 1.90)[0] == (12 * 16, 21 * 16)     # the geometric mean of 1.75 and 2.09 is 1.913
    assert make_buckets(256, 16, 1.92)[0] == (11 * 16, 23 * 16)
    assert (16, 32) not in make_buckets(24, 8, 4.0) and (8, 72) in make_buckets(24, 8, 9.0)     # 8 of 9 units, 9 of 9


@pytest.mark.parametrize("resolution, unit, aspect, hint", [(250, 16, 2, "256"), (8, 16, 2, "16"), (256, 16, 0.5, "at least 1"),
                                                            (256, 0, 2, "multiple of 0")])
def test_impossible_buckets_are_refused_with_a_possible_resolution(resolution, unit, aspect, hint):
    with pytest.raises(ValueError, match=hint):
        make_buckets(resolution, unit, aspect)


@pytest.mark.parametrize("limits", [dict(resolution=0), dict(resolution=8, buckets=((8, 0),)), dict(resolution=8, min_side=-1),
                                    dict(resolution=8, max_aspect=0.5), dict(resolution=8, max_aspect=-2)])
def test_impossible_limits_are_refused_before_they_drop_every_picture(limits):
    with pytest.raises(ValueError, match="at least 1"):
        Framing(**limits)


@pytest.mark.parametrize("size, bucket", [((100, 100), (256, 256)), ((100, 180), (192, 336)), ((180, 100), (336, 192)),
                                          ((100, 900), (176, 368)), ((1000, 1064), (256, 256)), ((1000, 1066), (240, 272))])
def test_a_picture_goes_to_the_bucket_nearest_in_log_aspect(size, bucket):
    framing = Framing(256, make_buckets(256, 16, 2.0))              # the geometric mean of 1 and 272 / 240 is 1.065
    assert decode(noise(*size, 3), framing).shape == (*bucket, 3)


def test_an_exact_size_is_not_resampled_and_whole_pixels_are_cropped_from_the_middle():
    picture = noise(16, 16, 3)
    assert (decode(encode(picture), SQUARE) == picture).all()
    for height, width in ((16, 21), (21, 16), (16, 20), (30, 16)):
        picture = noise(height, width, 3)
        top, left = (height - 16) // 2, (width - 16) // 2
        assert (decode(encode(picture), SQUARE) == picture[top:top + 16, left:left + 16]).all()


def test_the_crop_has_its_centre_at_the_pictures_centre_to_a_fraction_of_a_pixel():
    for height, width in ((41, 64), (64, 41), (37, 101), (101, 37), (5, 8)):
        ramp = np.tile(np.linspace(0, 255, max(height, width)), (min(height, width), 1)).round()
        out = decode(grey(ramp if width > height else ramp.T), SQUARE).astype(float)
        assert abs(out.mean() - 127.5) < 1 and abs((out + out[::-1, ::-1]).mean() - 255) < 1
        side, long = min(height, width), max(height, width)
        assert abs(np.ptp(out) - 255 * (side - side / 16) / (long - 1)) < 0.05 * 255, "the crop contains the whole short side"


def test_a_resize_is_one_lanczos_pass_over_the_central_box():
    picture = noise(50, 83, 3)
    exact = Image.fromarray(picture).resize((16, 16), Image.LANCZOS, box=(16.5, 0, 66.5, 50))
    assert (decode(picture, SQUARE) == np.asarray(exact)).all() and (decode(encode(picture), SQUARE) == np.asarray(exact)).all()


def test_reducing_first_stays_close_to_the_exact_filter():
    picture = smooth(1024, 1024)
    exact = np.asarray(Image.fromarray(picture).resize((128, 128), Image.LANCZOS))
    assert 48 < psnr(decode(picture, Framing(128)), exact) < 100


# ---- upright

UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
           8: lambda a: np.rot90(a)}


def exif(orientation) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def late_exif(data: bytes) -> bytes:
    """The same PNG with its EXIF chunk behind the pixels."""
    at = data.index(b"eXIf") - 4
    size = 12 + struct.unpack(">I", data[at:at + 4])[0]
    return data[:at] + data[at + size:-12] + data[at:at + size] + data[-12:]


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow reads the orientation of all these files from 13.0 on")
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_turned_upright(orientation):
    stored = noise(24, 16, 3)
    expected = UPRIGHT[orientation](stored)
    framing = Framing(16, ((24, 16), (16, 24)))
    png = encode(stored, exif=exif(orientation))
    lossless = encode(stored, "WEBP", lossless=True, exif=exif(orientation))
    for data in (png, late_exif(png), lossless, encode(stored, "TIFF", exif=exif(orientation))):
        out = decode(data, framing)
        assert out.shape == expected.shape and (out == expected).all() and out.flags.c_contiguous
    expected = decode(np.ascontiguousarray(expected), Framing(16, ((24, 16),)))
    assert np.abs(decode(png, Framing(16, ((24, 16),))).astype(int) - expected).max() <= 1, "the bucket is for the upright one"
    stored = smooth(96, 64)
    expected = decode(np.ascontiguousarray(UPRIGHT[orientation](stored)), framing)
    assert np.abs(decode(encode(stored, exif=exif(orientation)), framing).astype(int) - expected).max() <= 1
    jpeg = decode(encode(stored, "JPEG", quality=100, subsampling=0, exif=exif(orientation)), framing)
    assert jpeg.shape == expected.shape and psnr(jpeg, expected) > 35


def test_orientation_in_xmp_counts_and_nonsense_is_ignored():
    stored = noise(16, 16, 3)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert (decode(encode(stored, "WEBP", lossless=True, xmp=xmp), SQUARE) == UPRIGHT[6](stored)).all()
    text = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\2a\0\0\0\0\0\0\0"          # the tag as a string
    for tags in (exif(9), exif(0), b"Exif\0\0nonsense", exif(6)[:14], text):
        assert (decode(encode(stored, exif=tags), SQUARE) == stored).all()


def test_a_jpeg_that_is_decoded_smaller_has_its_own_size():
    data = encode(np.zeros((600, 1600, 3), np.uint8), "JPEG", exif=exif(6))                     # turned by 90 degrees
    assert decode_with_sizes(data, Framing(32)).sizes() == [1600, 600, 27, 0, 32, 32]         # scaled to 85.3 x 32


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("shape", [(16, 21), (21, 16)])
def test_the_crop_is_where_the_result_lies_in_the_upright_picture_and_in_its_mirror_image(orientation, shape):
    stored = noise(*shape, 3)
    upright = UPRIGHT[orientation](stored)
    for form in ("PNG", "TIFF"):
        found = decode_with_sizes(encode(stored, form, exif=exif(orientation)), Framing(16))
        for mirrored, picture, whole in ((False, found.image, upright), (True, found.image[:, ::-1], upright[:, ::-1])):
            height, width, top, left, *size = found.sizes(mirrored)
            assert (height, width) == upright.shape[:2] and size == [16, 16]
            assert (picture == whole[top:top + 16, left:left + 16]).all()


# ---- draft

@pytest.fixture
def loads(monkeypatch):
    sizes, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or load(self))
    return sizes


@pytest.mark.parametrize("size, turn, framing, decoded", [
    ((1024, 768), 1, Framing(64), (256, 192)),                       # 1/6 would be enough, and the next larger scale is 1/4
    ((1024, 768), 1, Framing(192), (512, 384)),                      # at 1/2 it has exactly twice the target size
    ((1024, 768), 1, Framing(193), (1024, 768)),
    ((1024, 1024), 1, Framing(64), (128, 128)),
    ((1600, 600), 1, Framing(256, ((96, 256),)), (800, 300)),        # covering 256 x 96 scales 1600 x 600 by 1 / 6.25
    ((1600, 600), 1, Framing(256, ((256, 96),)), (1600, 600)),       # the crop is 225 of the 1600 columns
    ((1600, 600), 6, Framing(256, ((256, 96),)), (800, 300)),        # the same picture turned by 90 degrees
    ((1600, 600), 6, Framing(256, ((96, 256),)), (1600, 600)),
])
def test_a_large_jpeg_is_decoded_smaller_but_to_twice_the_target_at_least(size, turn, framing, decoded, loads):
    out = decode(encode(np.zeros((size[1], size[0], 3), np.uint8), "JPEG", exif=exif(turn)), framing)
    assert loads[0] == decoded and out.shape[:2] == framing.size(1, 1)


def test_only_jpegs_of_grey_and_colour_are_shrunk_while_decoding(loads):
    rgb = Image.fromarray(noise(128, 128, 3))
    several = encode(rgb, "MPO", save_all=True, append_images=[rgb])
    for data, decoded in ((encode(noise(128, 128), "JPEG"), 32), (encode(rgb, "JPEG", progressive=True), 32), (several, 32),
                          (encode(rgb, "PNG"), 128), (encode(rgb.convert("CMYK"), "JPEG"), 128)):
        loads.clear()
        assert decode(data, SQUARE).shape == (16, 16, 3) and loads[0] == (decoded, decoded)


@pytest.mark.parametrize("height, width, turn", [(768, 1024, 1), (1023, 769, 1), (769, 1023, 6), (771, 1029, 3), (999, 999, 1)])
def test_a_drafted_picture_is_close_to_the_undrafted_one_to_a_fraction_of_a_pixel(height, width, turn, monkeypatch):
    data = encode(smooth(1200, 1200)[:height, :width], "JPEG", quality=95, exif=exif(turn))
    drafted = decode(data, Framing(96))
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    whole = decode(data, Framing(96))
    assert not (drafted == whole).all() and psnr(drafted, whole) > 46


# ---- arrays, threads

def test_arrays_are_treated_like_files_and_not_modified():
    picture = noise(16, 16, 3)
    out = decode(picture, SQUARE)
    assert (out == picture).all() and out.flags.c_contiguous and out.flags.writeable
    out[:] = 0
    assert picture.any() and (decode(picture[:, ::-1], SQUARE) == picture[:, ::-1]).all()
    values = noise(40, 60)
    assert (decode(values, SQUARE) == decode(encode(values), SQUARE)).all() and decode(values, SQUARE).shape == (16, 16, 3)


def test_four_threads_give_the_same_pictures_as_one():
    from PIL import ImageCms
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile = profile[:red] + b"gXYZ" + profile[red + 4:green] + b"rXYZ" + profile[green + 4:]
    files = [encode(smooth(160, 128, seed=i), form, exif=exif(1 + i), icc_profile=profile)
             for i in range(8) for form in ("JPEG", "PNG", "WEBP")] * 2
    decoding._transform.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda data: decode(data, SQUARE), files))
    assert all((a == decode(data, SQUARE)).all() for a, data in zip(several, files))
