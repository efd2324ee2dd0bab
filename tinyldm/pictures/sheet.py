"""Puts many pictures into one: a plain grid, and a grid with lines of text under each picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
INK, RED = (44, 36, 60), (200, 40, 50)


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
    """A grid of pictures, uint8 [h, w, 3] each, enlarged to `side` pixels without smoothing, with lines of (text, colour) below."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 36)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = i % columns * (side + 8) + 4, i // columns * (side + 36) + 4
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for j, (text, colour) in enumerate(lines):
            pen.text((x, y + side + 1 + 13 * j), text, fill=colour)
    return sheet


def two_lines(caption: str, words: int = 6) -> list[tuple[str, RGB]]:
    """A caption as two lines for `captioned`, broken after this number of words."""
    parts = caption.split()
    return [(" ".join(parts[:words]), INK), (" ".join(parts[words:]), INK)]
