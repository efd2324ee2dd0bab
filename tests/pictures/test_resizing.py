"""The named resizes against Pillow, against the rules of the packages that they are named after, and against hand calculations."""

from itertools import combinations

import numpy as np
import pytest
import torch
from photos import photos
from PIL import Image

from tinyldm.pictures.resizing import RESIZES

BICUBIC = Image.Resampling.BICUBIC
SIZES = [(80, 64), (64, 97), (256, 256), (31, 200)]            # width, height


@pytest.mark.parametrize("name", RESIZES)
def test_every_resize_gives_float32_in_0_to_255_and_does_not_mix_pictures(name):
    images = photos(3, 80, 64)
    before, size = images.copy(), 48
    found = RESIZES[name](images, size)
    assert found.dtype == torch.float32 and found.shape == ((3, 3, 64, 80) if name == "tensorflow1" else (3, 3, size, size))
    assert 0 <= found.min() and found.max() <= 255 and (images == before).all()
    torch.testing.assert_close(found[1:2], RESIZES[name](images[1:2], size), rtol=0, atol=1e-4)
    assert RESIZES[name](images[::2, :, ::-1], size).shape[0] == 2                  # arrays that are not contiguous


@pytest.mark.parametrize("name", [name for name in RESIZES if name != "tensorflow1"])
def test_a_picture_of_the_size_wanted_is_not_changed(name):
    images = photos(2, 48, 48)
    assert (RESIZES[name](images, 48) == torch.from_numpy(images).permute(0, 3, 1, 2)).all()


@pytest.mark.parametrize("width, height", SIZES)
def test_clean_resizes_each_channel_in_float_and_does_not_round(width, height):
    images = photos(2, width, height)
    found = RESIZES["clean"](images, 99)
    for image, resized in zip(images, found):
        for channel in range(3):
            expected = np.asarray(Image.fromarray(image[..., channel].astype(np.float32)).resize((99, 99), BICUBIC)).clip(0, 255)
            assert (resized[channel].numpy() == expected).all()
    assert (found != found.round()).any()


def test_clean_cuts_what_bicubic_overshoots():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[:, :, 4:] = 255
    found = RESIZES["clean"](images, 16)
    assert found.min() == 0 and found.max() == 255 and torch.unique(found).numel() > 2


def test_pytorch_is_bilinear_with_half_pixel_centres_and_takes_no_averages():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[:, :, :] = np.array([0, 40, 80, 200], np.uint8)[:, None]
    assert RESIZES["pytorch"](images, 8)[0, 0, 0].tolist() == [0, 10, 30, 50, 70, 110, 170, 200]     # at (i + 0.5) / 2 - 0.5
    assert RESIZES["pytorch"](photos(1, 64, 64), 4).shape == (1, 3, 4, 4)
    images = np.zeros((1, 12, 12, 3), np.uint8)
    images[:, 1::3, 1::3] = 255
    assert (RESIZES["pytorch"](images, 4) == 255).all()                             # every third pixel, wherever the others are


@pytest.mark.parametrize("width, height", SIZES)
def test_bicubic_is_pillow_s_of_the_whole_picture(width, height):
    images = photos(2, width, height)
    expected = np.stack([np.asarray(Image.fromarray(image).resize((56, 56), BICUBIC)) for image in images])
    assert (RESIZES["bicubic"](images, 56).numpy().transpose(0, 2, 3, 1) == expected).all()


@pytest.mark.parametrize("width, height, resized, corner", [
    (80, 64, (70, 56), (7, 0)), (64, 97, (56, 84), (0, 14)), (56, 57, (56, 57), (0, 0)), (59, 56, (59, 56), (2, 0)),
    (57, 56, (57, 56), (0, 0)), (31, 200, (56, 361), (0, 152)),
])
def test_bicubic_crop_resizes_the_short_side_and_rounds_as_torchvision_does(width, height, resized, corner):
    """The long side is cut to a whole number; the corner is rounded, and from the middle to the even number: 0.5 to 0, 1.5 to 2."""
    images = photos(2, width, height)
    left, top = corner
    expected = [np.asarray(Image.fromarray(image).resize(resized, BICUBIC))[top:top + 56, left:left + 56] for image in images]
    assert (RESIZES["bicubic_crop"](images, 56).numpy().transpose(0, 2, 3, 1) == np.stack(expected)).all()


@pytest.mark.parametrize("width, height, left, top", [(80, 64, 8, 0), (64, 97, 0, 16), (57, 56, 0, 0)])
def test_crop_bicubic_crops_first_and_resizes_then(width, height, left, top):
    images, side = photos(2, width, height), min(width, height)
    expected = [np.asarray(Image.fromarray(image[top:top + side, left:left + side]).resize((48, 48), BICUBIC)) for image in images]
    assert (RESIZES["crop_bicubic"](images, 48).numpy().transpose(0, 2, 3, 1) == np.stack(expected)).all()


def test_the_rules_differ_by_more_than_rounding():
    """Otherwise a swapped row of the table would not be seen."""
    images = photos(2, 80, 64)
    found = [resize(images, 56) for name, resize in RESIZES.items() if name != "tensorflow1"]
    assert all((one - two).abs().max() > 0.4 for one, two in combinations(found, 2))


def test_clean_and_pytorch_are_clean_fid_s():
    """Skipped where the package is missing: nothing here needs it."""
    theirs = pytest.importorskip("cleanfid.resize")
    images = photos(2, 80, 64)
    for name, mode in (("clean", "clean"), ("pytorch", "legacy_pytorch")):
        expected = np.stack([theirs.build_resizer(mode)(image) for image in images]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(RESIZES[name](images, 299).numpy(), expected, rtol=0, atol=1e-4)
