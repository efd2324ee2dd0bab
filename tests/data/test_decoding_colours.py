"""The colours of decoded pictures: every mode of Pillow, transparency, 16-bit pixels, CMYK, embedded profiles."""

import io
import struct

import numpy as np
import pytest
from archives import encode, grey, noise, smooth
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags

from tinyldm.data import decoding
from tinyldm.data.decoding import Framing, decode

SQUARE = Framing(16)
D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def on_white(rgb, alpha) -> np.ndarray:
    alpha = np.asarray(alpha, float)[..., None] / 255
    return np.floor(rgb * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def icc(space: bytes, tags: dict[bytes, bytes], kind=b"mntr", pcs=b"XYZ ") -> bytes:
    """An ICC profile, version 2."""
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s28s12s", offset + len(body), b"lcms", 0x02100000, kind, space, pcs, bytes(12), b"acsp",
                       bytes(28), xyz(D50)[8:])
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(primaries, curve=None) -> bytes:
    tags = {b"wtpt": xyz(D50)}
    for name, primary in zip("rgb", primaries):
        tags |= {f"{name}XYZ".encode(): xyz(primary), f"{name}TRC".encode(): curve or gamma(2.2)}
    return icc(b"RGB ", tags)


def grey_profile() -> bytes:
    return icc(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": gamma(1.0)})


def ink_profile() -> bytes:
    """A CMYK profile with two levels per ink: white paper, and every ink halves the lightness and adds a tint."""
    line = bytes(range(256))
    table = bytes(v for n in range(16) for v in (255 >> bin(n).count("1"), 128 + 30 * (n & 1), 128 - 20 * (n >> 1 & 1)))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + line * 4 + table + line * 3
    return icc(b"CMYK", {b"wtpt": xyz(D50), b"A2B0": lut}, b"prtr", b"Lab ")


def as_cms(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def test_grey_one_bit_and_opaque_colours_are_kept():
    values, picture = noise(16, 16), noise(16, 16, 3)
    assert (decode(encode(values), SQUARE) == grey(values)).all()
    for form, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert (decode(encode(picture, form, **options), SQUARE) == picture).all(), form
    bits = Image.fromarray(values).convert("1")
    assert (decode(encode(bits), SQUARE) == grey(np.where(np.asarray(bits), 255, 0))).all()
    assert (decode(encode(bits, "TIFF"), SQUARE) == grey(np.where(np.asarray(bits), 255, 0))).all()


@pytest.mark.parametrize("form, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_transparency_becomes_white_in_proportion(form, options):
    picture = noise(16, 16, 4)
    assert (decode(encode(picture, form, **options), SQUARE) == on_white(picture[..., :3], picture[..., 3])).all()


def test_transparent_grey_palettes_and_colour_keys_become_white():
    values, alpha = noise(16, 16), noise(16, 16, seed=1)
    assert (decode(encode(np.stack((values, alpha), -1)), SQUARE) == on_white(grey(values), alpha)).all()
    assert (decode(encode(values, transparency=7), SQUARE) == grey(np.where(values == 7, 255, values))).all()
    colours = noise(256, 3)
    indexed = Image.fromarray(values, "L")
    indexed.putpalette(colours.tobytes())
    assert indexed.mode == "P" and (decode(encode(indexed), SQUARE) == colours[values]).all()
    levels = noise(256, seed=2)
    assert (decode(encode(indexed, transparency=levels.tobytes()), SQUARE) == on_white(colours[values], levels[values])).all()
    expected = np.where((values == 3)[..., None], 255, colours[values])
    for form in ("PNG", "GIF"):
        assert (decode(encode(indexed, form, transparency=3), SQUARE) == expected).all()
    picture = np.where((values < 99)[..., None], np.uint8([10, 20, 30]), noise(16, 16, 3))
    expected = np.where((picture == [10, 20, 30]).all(-1, keepdims=True), 255, picture)
    assert (decode(encode(picture, transparency=(10, 20, 30)), SQUARE) == expected).all()


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB"])
def test_every_other_mode_is_what_pillow_makes_of_it_on_white(mode):
    picture = Image.fromarray(noise(16, 16, 4))
    image = {"LA": lambda: picture.convert("LA"), "La": lambda: picture.convert("LA").convert("La"),
             "PA": lambda: Image.merge("PA", (picture.convert("RGB").quantize(9), picture.getchannel("A")))}.get(
                 mode, lambda: (picture if mode[-1] in "Aa" else picture.convert("RGB")).convert(mode))()
    if mode == "PA":
        image.putpalette(noise(27).tobytes())
    assert image.mode == mode
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), image.convert("LA").convert("RGBA")
                                                if mode == "La" else image.convert("RGBA")).convert("RGB"))
    opaque = decoding._opaque(image).convert("RGB")
    assert np.abs(np.asarray(opaque).astype(int) - expected).max() <= (1 if mode == "La" else 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "TIFF big-endian"])
def test_sixteen_bits_are_scaled_by_their_range_and_not_clipped(form):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(">u2" if "big" in form else "<u2")
    values[0, :3] = 0, 65535, 256
    image = Image.frombytes("I;16B" if "big" in form else "I;16", (16, 16), values.tobytes())
    assert (decode(encode(image, form.split()[0]), SQUARE) == grey(np.floor(values / 257 + 0.5))).all()


def test_rarer_formats_keep_their_colours_their_depth_and_their_transparency():
    picture, values = noise(16, 16, 4), np.random.default_rng(0).integers(0, 65536, (16, 16)).astype("<u2")
    deep = Image.frombytes("I;16", (16, 16), values.tobytes())
    for form in [name for name in ("PPM", "JPEG2000") if name in decoding.ENDINGS]:
        assert (decode(encode(picture[..., :3], form), SQUARE) == picture[..., :3]).all(), form
        assert (decode(encode(deep, form), SQUARE) == grey(np.floor(values / 257 + 0.5))).all(), form
    unit = (values / 65535).astype("<f4")
    pfm = b"Pf\n16 16\n-1.0\n" + unit[::-1].tobytes()             # rows from the bottom up
    assert (decode(pfm, SQUARE) == grey(np.floor(values / 257 + 0.5))).all()
    if "JPEG2000" in decoding.ENDINGS:
        assert (decode(encode(picture, "JPEG2000"), SQUARE) == on_white(picture[..., :3], picture[..., 3])).all()
    if "AVIF" in decoding.ENDINGS:
        flat = np.full((16, 16, 4), (200, 30, 30, 0), np.uint8)
        flat[:8, :, 3] = 255
        out = decode(encode(flat, "AVIF", quality=100, subsampling="4:4:4"), SQUARE).astype(int)
        assert np.abs(out[:7] - (200, 30, 30)).max() <= 3 and np.abs(out[9:] - 255).max() <= 3


def test_wide_integers_and_floats_are_scaled_alike_and_a_unit_range_is_recognised():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16))
    assert (decode(encode(values.astype(np.int32), "TIFF"), SQUARE) == grey(np.floor(values / 257 + 0.5))).all()
    assert (decode(encode(values.astype(np.float32), "TIFF"), SQUARE) == grey(np.floor(values / 257 + 0.5))).all()
    assert (decode(encode((values / 65535).astype(np.float32), "TIFF"), SQUARE) == grey(np.floor(values / 257 + 0.5))).all()
    odd = np.float32([[np.nan, np.inf, -np.inf, -5, 70000, 65535, 0, 257]]).repeat(8, 0)
    assert decode(encode(odd, "TIFF"), Framing(8))[0, :, 0].tolist() == [0, 255, 0, 0, 255, 255, 0, 1]
    unit = np.float32([[np.nan, 0.5, 1.0, -np.inf]]).repeat(4, 0)
    assert decode(encode(unit, "TIFF"), Framing(4))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_a_transparent_level_of_sixteen_bits_becomes_white():
    values = np.uint16([[0, 1000, 30000, 65535]] * 4)
    assert decode(encode(values, transparency=1000), Framing(4))[0, :, 0].tolist() == [0, 255, 117, 255]


def flat_jpeg(inks, transform=None) -> bytes:
    data = bytearray(encode(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100))
    if transform is not None:
        data[data.index(b"Adobe") + 11] = transform
    return bytes(data)


def test_cmyk_and_ycck_jpegs_have_their_colours_the_right_way_round():
    for inks in ((0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (20, 200, 120, 60)):
        expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
        assert np.abs(decode(flat_jpeg(inks), SQUARE) - np.array(expected)).max() <= 2
    luma, red, black = 90, 30, 40                                  # YCCK, stored inverted: C = Y + 1.402 Cr, and so on
    inks = (255 - luma, 127, 127 - red, black)
    expected = [(255 - luma) - 1.402 * red, (255 - luma) + 0.714 * red, 255 - luma]
    assert np.abs(decode(flat_jpeg(inks, 2), SQUARE) - np.array(expected) * (255 - black) / 255).max() <= 3


def test_inks_are_resized_as_what_is_seen():
    stripes = np.zeros((64, 64, 4), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 3] = 255, 255              # cyan beside black: red is 0 in both
    image = Image.frombytes("CMYK", (64, 64), stripes.tobytes())
    assert decode(encode(image, "TIFF"), SQUARE)[..., 0].max() == 0
    assert decode(encode(image, "JPEG", quality=100), SQUARE)[..., 0].max() <= 3


def test_srgb_under_any_name_leaves_pixels_untouched():
    picture = noise(16, 16, 3)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode(encode(picture, icc_profile=own), SQUARE) == picture).all()
    ramp = np.linspace(0, 1, 14)                                    # its curve as a table so coarse that levels differ
    curve = (np.where(ramp > 0.04045, ((ramp + 0.055) / 1.055) ** 2.4, ramp / 12.92) * 65535).round().astype(">u2")
    table = rgb_profile(SRGB, b"curv" + struct.pack(">II", 0, 14) + curve.tobytes())
    assert 0 < np.abs(as_cms(Image.fromarray(picture), table).astype(int) - picture).max() <= 2
    assert (decode(encode(picture, icc_profile=table), SQUARE) == picture).all()


@pytest.mark.parametrize("primaries", [ADOBE, (SRGB[1], SRGB[0], SRGB[2])], ids=["Adobe RGB", "red and green swapped"])
def test_a_profile_changes_pixels_as_imagecms_says(primaries):
    picture, profile = noise(16, 16, 3), rgb_profile(primaries)
    expected = as_cms(Image.fromarray(picture), profile)
    assert np.abs(expected.astype(int) - picture).mean() > 5
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert (decode(encode(picture, form, icc_profile=profile, **options), SQUARE) == expected).all(), form
    jpeg = encode(smooth(48, 48), "JPEG", quality=95, icc_profile=profile)
    resized = Image.open(io.BytesIO(jpeg)).resize((16, 16), Image.LANCZOS)
    assert (decode(jpeg, SQUARE) == as_cms(resized, profile)).all()
    swapped = decode(encode(np.full((16, 16, 3), (200, 30, 30), np.uint8), icc_profile=profile), SQUARE)[0, 0]
    assert primaries is ADOBE or swapped[1] > swapped[0] + 100


def test_profiles_of_grey_and_of_inks_are_used_too():
    values = noise(16, 16)
    profile = grey_profile()
    expected = as_cms(Image.fromarray(values), profile)
    assert np.abs(expected.astype(int) - grey(values)).mean() > 20
    assert (decode(encode(values, icc_profile=profile), SQUARE) == expected).all()
    image = Image.frombytes("CMYK", (16, 16), noise(16, 16, 4).tobytes())
    data = encode(image, "TIFF", icc_profile=ink_profile())
    assert (decode(data, SQUARE) == as_cms(image, ink_profile())).all()
    assert np.abs(decode(data, SQUARE).astype(int) - np.asarray(image.convert("RGB"))).mean() > 10


@pytest.mark.parametrize("profile", [b"no profile", rgb_profile(ADOBE)[:200], grey_profile(), ink_profile()],
                         ids=["text", "cut", "for grey", "for inks"])
def test_a_broken_or_mismatching_profile_is_ignored(profile):
    picture = noise(16, 16, 3)
    assert (decode(encode(picture, icc_profile=profile), SQUARE) == picture).all()
    image = Image.frombytes("CMYK", (16, 16), noise(16, 16, 4).tobytes())
    numbers = TiffImagePlugin.ImageFileDirectory_v2()
    numbers.tagtype[34675], numbers[34675] = TiffTags.SHORT, (1, 2, 3)
    assert (decode(encode(picture, "TIFF", tiffinfo=numbers), SQUARE) == picture).all()
    inks_too = decode(encode(image, "TIFF", icc_profile=rgb_profile(ADOBE)), SQUARE)
    assert (inks_too == np.asarray(image.convert("RGB"))).all()


def test_a_build_without_littlecms_ignores_profiles(monkeypatch):
    picture = noise(16, 16, 3)
    decoding._transform.cache_clear()
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *_: (_ for _ in ()).throw(ImportError("no littlecms")))
    assert (decode(encode(picture, icc_profile=rgb_profile(ADOBE)), SQUARE) == picture).all()
    decoding._transform.cache_clear()


def test_transforms_are_made_once_per_profile_and_mode_and_not_kept_for_ever(monkeypatch):
    made, build = [], ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: made.append(args) or build(*args))
    decoding._transform.cache_clear()
    for _ in range(3):
        decode(encode(noise(16, 16, 3), icc_profile=rgb_profile(ADOBE)), SQUARE)
    assert len(made) == 1
    decode(encode(noise(16, 16), icc_profile=rgb_profile(ADOBE)), SQUARE)
    assert len(made) == 2 and decoding._transform.cache_info().maxsize <= 64


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(decode(data, SQUARE).astype(int) - [255, 0, 0]).max() <= 3
