"""Grids of pictures."""

import numpy as np
import pytest
from PIL import ImageFont

from tinyldm.pictures import sheet
from tinyldm.pictures.sheet import ELLIPSIS, INK, captioned, cut, measure, tile, two_lines


def test_tiles_lie_row_by_row_on_white():
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = tile(images, columns=2, gap=2)
    assert sheet.shape == (10, 14, 3)
    assert (sheet[:4, :6] == 10).all() and (sheet[:4, 8:] == 20).all() and (sheet[6:, :6] == 30).all()
    assert (sheet[4:6] == 255).all() and (sheet[6:, 8:] == 255).all()


def test_a_captioned_sheet_has_a_cell_and_some_ink_per_picture():
    images = [np.full((8, 8, 3), 200, np.uint8)] * 3
    sheet = np.asarray(captioned(images, [two_lines("a red fox on the left, on sand", 64)] * 3, columns=2, side=64))
    assert sheet.shape == (2 * (64 + 36), 2 * (64 + 8), 3)
    below = sheet[70:100, :72]
    assert (below.max(axis=2) < 150).any() and (sheet[104:168, 76:] == 255).all()


CAPTIONS = {                                                    # no caption's text may leave its cell
    "many words": "the first woman to be appointed to the position of chief executive officer of a large company in the country " * 4,
    "one word": "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerk" * 5,
    "no spaces": "一只红色的狐狸坐在草地上看着远处的群山" * 9,           # and not in the font
    "right to left": "עברית ועוד עברית " * 20,
    "line breaks": "one\ntwo\r\nthree\u2028four\n\n\nfive " * 6,
    "marks on marks": "Z\u0338\u0321\u0356" * 40 + "̂" * 300,
    "control characters": "\x00\x1b[31m\u200b\u202e" * 20 + "fox " * 50,
    "a lone surrogate": "\ud800 fox" * 30,
    "endless": "x" * 1_000_000,
}


def with_caption(text, side):
    """A sheet of 3 x 3 pictures in whose middle is this caption; all others have none."""
    images = [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(9)]
    return np.asarray(captioned(images, [two_lines(text if i == 4 else "", side) for i in range(9)], columns=3, side=side))


@pytest.mark.parametrize("side", [64, 192])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_long_caption_changes_no_pixel_outside_the_two_lines_below_its_picture(kind, side):
    without, found = with_caption("", side), with_caption(CAPTIONS[kind], side)
    assert found.shape == without.shape
    rows, columns = np.nonzero((without != found).any(axis=2))
    top, left = side + 36, side + 8                             # of the middle's cell
    assert len(rows) > 50 and rows.min() >= top + side + 4 and rows.max() < 2 * top
    assert columns.min() >= left and columns.max() < 2 * left
    ink = columns[(found[rows, columns] < 120).all(axis=1)]
    assert left + 4 <= ink.min() and ink.max() < left + 4 + side + 1            # in full colour not even in the margins


def test_lines_that_are_given_are_cut_too_and_more_than_two_left_out():
    images = [np.full((8, 8, 3), 20, np.uint8)] * 2
    lines = [("read: purple mushroom, under the stars " * 3, INK)] * 5
    found, without = (np.asarray(captioned(images, [shown, []], side=96)) for shown in (lines, []))
    assert (found[:, 104:] == without[:, 104:]).all() and (found[96 + 5:, :104] != 255).any()
    assert (found == np.asarray(captioned(images, [lines[:2], []], side=96))).all()


@pytest.mark.parametrize("caption, lines", [
    ("a red fox", ["a red fox", ""]),
    ("one two three four five six seven eight nine ten eleven", None),
    ("", ["", ""]), ("  a \n red\tfox ", ["a red fox", ""]),
])
def test_a_caption_that_fits_is_shown_whole_and_breaks_between_words(caption, lines):
    found = [text for text, _ in two_lines(caption)]
    assert found == lines if lines else " ".join(found) == caption and all(map(str.isalpha, "".join(found).replace(" ", "")))
    assert all(measure(text) <= 192 for text in found)


def test_a_cut_line_is_as_long_as_fits_with_its_ellipsis():
    text = "the position of chief executive officer of a large company"
    for width in range(20, 250, 7):
        found = cut(text, width)
        kept = found.removesuffix(ELLIPSIS)
        assert text.startswith(kept) and measure(found) <= width
        assert found.endswith(ELLIPSIS) and measure(text[:len(kept) + 2] + ELLIPSIS) > width - 1 or found == text
    assert cut(text, 1000) == text and cut("", 5) == ""


def test_a_pillow_without_freetype_draws_question_marks(monkeypatch):
    """Its bitmap font knows Latin-1 alone."""
    monkeypatch.setattr(sheet, "font", lambda font=ImageFont.load_default_imagefont(): font)
    assert (with_caption(CAPTIONS["no spaces"], 64) != with_caption("", 64)).any()
