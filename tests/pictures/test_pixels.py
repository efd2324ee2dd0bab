"""Pictures as bytes and as numbers, and files of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.pictures.pixels import psnr, to_bytes, to_pixels, write_picture

EVERY = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)


def test_every_byte_comes_back_and_lies_in_minus_1_to_1():
    pixels = to_pixels(EVERY)
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1) and pixels[0, 0, 0, 1] == pytest.approx(2 / 255 - 1)
    assert (to_bytes(pixels) == EVERY).all() and (to_pixels(torch.from_numpy(EVERY)) == pixels).all()


def test_numbers_beyond_the_range_are_clipped_and_those_between_two_bytes_rounded():
    pixels = torch.tensor([-3.0, 9.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_bytes(pixels)[0, :, :, 0].tolist() == [[0, 255], [0, 1]]
    assert to_bytes(to_pixels(EVERY).bfloat16()).dtype == np.uint8


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "picture.png"
    write_picture(file, EVERY[0])
    assert (np.asarray(Image.open(file)) == EVERY[0]).all() and [path.name for path in file.parent.iterdir()] == ["picture.png"]
    monkeypatch.setattr("tinyldm.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_picture(file, 255 - EVERY[0])
    assert (np.asarray(Image.open(file)) == EVERY[0]).all()


def test_psnr_is_20_log10_of_255_over_the_error_and_100_db_for_equal_pictures():
    other = EVERY.copy()
    other[:, ::2] ^= 1                                         # half of all bytes are off by one
    found = psnr(np.concatenate([EVERY, other, other]), np.concatenate([EVERY, EVERY, other]))
    assert found == pytest.approx([100, 20 * np.log10(255) + 10 * np.log10(2), 100])


def test_a_picture_is_written_without_touching_the_files_beside_it(tmp_path):
    for name in ("sheet.tmp", "sheet", "sheet.v2.tmp"):
        (tmp_path / name).write_text("somebody's own")
    for name in ("sheet.png", "sheet.v2.png"):
        write_picture(tmp_path / name, EVERY[0])
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.tmp", "sheet", "sheet.v2.tmp", "sheet.png", "sheet.v2.png"}
    assert (tmp_path / "sheet.tmp").read_text() == "somebody's own"
