"""Grids of pictures."""

import numpy as np

from tinyldm.pictures.sheet import captioned, tile, two_lines


def test_tiles_lie_row_by_row_on_white():
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = tile(images, columns=2, gap=2)
    assert sheet.shape == (10, 14, 3)
    assert (sheet[:4, :6] == 10).all() and (sheet[:4, 8:] == 20).all() and (sheet[6:, :6] == 30).all()
    assert (sheet[4:6] == 255).all() and (sheet[6:, 8:] == 255).all()


def test_a_captioned_sheet_has_a_cell_and_some_ink_per_picture():
    images = [np.full((8, 8, 3), 200, np.uint8)] * 3
    sheet = np.asarray(captioned(images, [two_lines("a red fox on the left, on sand")] * 3, columns=2, side=64))
    assert sheet.shape == (2 * (64 + 36), 2 * (64 + 8), 3)
    below = sheet[70:100, :72]
    assert (below.max(axis=2) < 150).any() and (sheet[104:168, 76:] == 255).all()


def test_long_captions_break_after_six_words():
    assert [text for text, _ in two_lines("one two three four five six seven")] == ["one two three four five six", "seven"]
