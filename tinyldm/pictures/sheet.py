"""Puts many pictures into one: a plain grid, and a grid with lines of text under each picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
INK, RED = (44, 36, 60), (200, 40, 50)
LINE, LINES = 13, 2                     # height in pixels, and number, of the lines of text below a picture
LONGEST = 1000                          # characters of a caption that are looked at
ELLIPSIS = "…"


def tile(images: np.ndarray, columns: int = 0, gap: int = 2) -> np.ndarray:
    """uint8 [n, h, w, 3] -> one picture with all of them, row by row on white. columns: 0 means about the square root of n."""
    n, h, w, _ = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(n))), n)
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def captioned(images: Sequence[np.ndarray], captions: Sequence[Sequence[tuple[str, RGB]]], columns: int = 6,
              side: int = 192) -> Image.Image:
    """A grid of pictures, uint8 [h, w, 3] each, enlarged to `side` pixels without smoothing, with lines of (text, colour) below: the
    first two, each cut with an ellipsis where it is wider than the picture."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 36)), "white")
    for i, (image, lines) in enumerate(zip(images, captions)):
        cell = Image.new("RGB", (side + 8, side + 36), "white")             # on its own, so that no text can leave it
        cell.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (4, 4))
        pen = ImageDraw.Draw(cell)
        for j, (text, colour) in enumerate(lines[:LINES]):
            pen.text((4, side + 5 + LINE * j), drawable(cut(one_line(text), side)), fill=colour, font=font())
        sheet.paste(cell, (i % columns * (side + 8), i // columns * (side + 36)))
    return sheet


def two_lines(caption: str, side: int = 192) -> list[tuple[str, RGB]]:
    """A caption as two lines for `captioned` with the same side, broken between words where it has some."""
    text = one_line(caption)
    first = text[:fitting(text, side)]
    if len(first) < len(text) and " " in first and text[len(first)] != " ":
        first = first[:first.rindex(" ")]
    return [(first, INK), (text[len(first):].strip(), INK)]


def one_line(text: str) -> str:
    """The beginning of a text as one line, without control characters; a lone surrogate becomes a question mark."""
    words = " ".join(text[:LONGEST].encode("utf-8", "replace").decode().split())
    return "".join(letter for letter in words if letter.isprintable())


def cut(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits into this width, in pixels, with an ellipsis."""
    if fitting(text, width) == len(text):
        return text
    return text[:fitting(text, width - measure(ELLIPSIS))].rstrip() + ELLIPSIS


def fitting(text: str, width: float) -> int:
    """The number of characters at the beginning of a text that fit into this width, in pixels."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle]) <= width else (low, middle - 1)
    return low


def measure(text: str) -> float:
    """The width of a text in pixels."""
    return font().getlength(drawable(text))


def drawable(text: str) -> str:
    """The text as the font takes it. Characters that it lacks are drawn as boxes; only Pillow's bitmap font refuses them."""
    return text if isinstance(font(), ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


@cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is a bitmap where Pillow was built without FreeType."""
    return ImageFont.load_default()
