"""--init-image and --mask of sample.py: every kind of picture file is decoded as training decodes it, and a mask keeps its values."""

from types import SimpleNamespace

import numpy as np
import pytest
from archives import encode, grey, noise
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import sample
from tinyldm.data.decoding import Framing, decode

SIDE = 16
PICTURE = encode(noise(SIDE, SIDE, 3))
RAMP = np.tile(np.linspace(0, 65535, SIDE).round().astype(np.uint16), (SIDE, 1))     # a soft mask, from keep to draw
SOFT = (RAMP / 257).round().astype(np.uint8)


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    return profile[:red] + b"gXYZ" + profile[red + 4:green] + b"rXYZ" + profile[green + 4:]


@pytest.fixture
def canvas(tmp_path, monkeypatch):
    """A function that opens the bytes of a picture, and of a mask, as open_canvas does for a model of 16 x 16 pixels."""
    monkeypatch.setattr(sample, "picture_size", lambda model: (SIDE, SIDE))
    monkeypatch.setattr(sample, "check_size", lambda *_: None)

    def open_canvas(picture, mask=None):
        words = ["a fox", "--init-image", str(tmp_path / "picture")]
        (tmp_path / "picture").write_bytes(picture)
        if mask is not None:
            (tmp_path / "mask").write_bytes(mask)
            words += ["--mask", str(tmp_path / "mask")]
        return sample.open_canvas(sample.parse(words), SimpleNamespace(divisor=4))

    return open_canvas


def shown(canvas) -> np.ndarray:
    """The canvas's picture as uint8 [h, w, 3]."""
    return ((canvas.pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)


def test_the_hidden_colours_of_a_transparent_picture_do_not_show(canvas):
    picture = np.dstack([np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8), np.full((SIDE, SIDE), 255, np.uint8)])
    picture[:, :8, 3], picture[:, 8, 3] = 0, 51                # transparent, and a column of a fifth of red over white
    out = shown(canvas(encode(picture)))
    assert (out[:, :8] == 255).all() and (out[:, 8] == (255, 204, 204)).all() and (out[:, 9:] == (255, 0, 0)).all()
    indexed = Image.fromarray(np.full((SIDE, SIDE), 3, np.uint8), "P")
    indexed.putpalette(noise(256, 3).tobytes())
    assert (shown(canvas(encode(indexed, "GIF", transparency=3))) == 255).all()


def test_grey_of_16_bits_and_floats_are_neither_white_nor_black(canvas):
    assert (shown(canvas(encode(RAMP))) == grey(SOFT)).all()
    assert (shown(canvas(encode(RAMP, "TIFF"))) == grey(SOFT)).all()
    assert (shown(canvas(encode((RAMP / 65535).astype(np.float32), "TIFF"))) == grey(SOFT)).all()


def test_inks_profiles_and_orientations_are_those_of_training(canvas):
    swapped = swapped_profile()
    assert (shown(canvas(encode(np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8), icc_profile=swapped)))[0, 0] == (0, 255, 0)).all()
    cyan = encode(Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0)), "TIFF")
    assert (shown(canvas(cyan)) == (0, 255, 255)).all()
    tags = Image.Exif()
    tags[0x0112] = 6
    picture = noise(2 * SIDE, SIDE, 3)
    out = shown(canvas(encode(picture, exif=tags.tobytes())))   # stored upright and 16 wide, shown lying and 32 wide
    assert out.shape == (SIDE, 2 * SIDE, 3) and (out == np.rot90(picture, -1)).all()
    photo = encode(noise(300, 500, 3), "JPEG", icc_profile=swapped, exif=tags.tobytes())
    assert (shown(canvas(photo)) == decode(photo, Framing(SIDE, ((28, SIDE),)))).all()


def test_a_picture_with_megabytes_of_compressed_text_is_opened(canvas):
    text = PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    picture = noise(SIDE, SIDE, 3)
    assert (shown(canvas(encode(picture, pnginfo=text))) == picture).all()


@pytest.mark.parametrize("mask", [encode(RAMP), encode(RAMP, "TIFF"), encode((RAMP / 65535).astype(np.float32), "TIFF"), encode(SOFT),
                                  encode(grey(SOFT)), encode(np.dstack([SOFT, np.full_like(SOFT, 255)])),
                                  encode(np.dstack([grey(SOFT), np.full_like(SOFT, 255)]))],
                         ids=["16 bits", "TIFF", "float", "8 bits", "colour", "opaque grey", "opaque colour"])
def test_a_soft_mask_keeps_its_values(canvas, mask):
    out = canvas(PICTURE, mask).mask
    assert tuple(out.shape) == (1, 1, SIDE, SIDE) and out.min() == 0 and out.max() == 1
    assert np.abs(out[0, 0].numpy() - RAMP / 65535).max() < 1 / 500


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 30)])
def test_a_mask_may_be_drawn_in_the_alpha_channel_of_a_picture_of_any_colour(canvas, colour):
    drawn = np.dstack([np.full((SIDE, SIDE, 3), colour, np.uint8), SOFT])
    for mask in (encode(drawn), encode(drawn, "WEBP", lossless=True, exact=True), encode(drawn, "TIFF")):
        assert (canvas(PICTURE, mask).mask[0, 0].numpy() == SOFT.astype(np.float32) / 255).all()
    indexed = Image.fromarray(np.tile(np.arange(SIDE, dtype=np.uint8) % 2, (SIDE, 1)), "P")
    indexed.putpalette(bytes(colour) * 2)
    assert (canvas(PICTURE, encode(indexed, transparency=0)).mask[0, 0, 0].numpy() == np.arange(SIDE) % 2).all()


def test_no_profile_changes_the_values_of_a_mask(canvas):
    colours = np.dstack([SOFT, SOFT * 0, SOFT * 0])
    mask = encode(colours, icc_profile=swapped_profile())
    assert (decode(mask, Framing(SIDE))[..., 1] == SOFT).all()
    assert (canvas(PICTURE, mask).mask[0, 0].numpy() * 255 == np.asarray(Image.fromarray(colours).convert("L"))).all()


def test_a_mask_is_cropped_and_turned_like_its_picture(canvas):
    tags = Image.Exif()
    tags[0x0112] = 3
    out = canvas(PICTURE, encode(SOFT, exif=tags.tobytes())).mask[0, 0].numpy()
    assert (out == SOFT[::-1, ::-1].astype(np.float32) / 255).all()
    wide = np.zeros((64, 98), np.uint8)
    wide[:, 40:58] = 255
    start = canvas(encode(grey(wide)), encode(wide))
    assert (np.abs(shown(start)[..., 0] / 255 - start.mask[0, 0].numpy()) < 1 / 250).all() and start.mask.shape[-1] == 24


def test_masks_without_a_place_to_draw_and_files_that_are_no_pictures_are_refused(canvas):
    for empty in (encode(SOFT * 0), encode(np.dstack([grey(SOFT), SOFT * 0]))):
        with pytest.raises(ValueError, match="has no white in it, or is transparent everywhere: nothing would be drawn"):
            canvas(PICTURE, empty)
    for picture, mask in ((b"text", None), (PICTURE, b"text"), (PICTURE[:200], None)):
        with pytest.raises(ValueError, match=r"/(picture|mask): it is not a picture that can be read \((unreadable|truncated)"):
            canvas(picture, mask)
