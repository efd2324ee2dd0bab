"""A curve of two metrics as a picture, one labelled point for each guidance scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tinyldm.pictures.sheet import INK, font

WIDTH, HEIGHT, SCALE = 480, 360, 2              # in units; a unit is SCALE pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 20, 44       # margins in units
GRID, LINE = (225, 225, 230), (40, 90, 200)


class Point(NamedTuple):
    x: float
    y: float
    label: str


def draw_curve(points: Sequence[Point], x_label: str, y_label: str) -> np.ndarray:
    """uint8 [720, 960, 3], the points joined in their order."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white").resize((WIDTH * SCALE, HEIGHT * SCALE))
    pen = ImageDraw.Draw(image)
    letters = font().font_variant(size=11 * SCALE) if hasattr(font(), "font_variant") else font()
    xs, ys = ticks([point.x for point in points]), ticks([point.y for point in points])
    across = lambda x: SCALE * (LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT))
    down = lambda y: SCALE * (HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM))
    write = lambda x, y, text, anchor: pen.text((x, y), text, fill=INK, font=letters, anchor=anchor)
    for x in xs:
        pen.line([(across(x), down(ys[0])), (across(x), down(ys[-1]))], fill=GRID)
        write(across(x), down(ys[0]) + 5 * SCALE, f"{x:g}", "mt")
    for y in ys:
        pen.line([(across(xs[0]), down(y)), (across(xs[-1]), down(y))], fill=GRID)
        write(across(xs[0]) - 5 * SCALE, down(y), f"{y:g}", "rm")
    write(across((xs[0] + xs[-1]) / 2), SCALE * (HEIGHT - 6), x_label, "ms")
    write(SCALE * 6, SCALE * 4, y_label, "lt")
    places = [(across(point.x), down(point.y)) for point in points]
    for start, end in pairwise(places):
        pen.line([start, end], fill=LINE, width=2 * SCALE)
    for (x, y), point in zip(places, points):
        pen.ellipse([x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE], fill=LINE)
        last = x > SCALE * (WIDTH - 80)                         # a label must not leave the picture
        pen.text((x + (-8 if last else 8) * SCALE, y - 6 * SCALE), point.label, fill=INK, font=letters, anchor="rs" if last else "ls",
                 stroke_width=2 * SCALE, stroke_fill="white")
    return np.asarray(image)


def ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers, evenly spaced, that include all values between the first and the last."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= spread / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    last += first == last
    return [round(i * step, 12) for i in range(first, last + 1)]
