"""The twelve subjects of toyworld, each drawn by a few lines in unit coordinates.

A subject fills the box [-1, 1] x [-1, 1] (x right, y down) and stands on y = 1. The same drawing
serves every image size: only `Pen` converts to pixels. Shapes are few and of uniform colours,
because a small autoencoder has to reproduce them.
"""

from functools import lru_cache
from math import cos, pi, sin
from typing import Callable

import numpy as np
from PIL import ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Points = tuple[Point, ...]

INK, CREAM, BLUSH = (44, 36, 60), (255, 248, 234), (240, 120, 130)
BROWN, LEAF, GLASS, BEAK = (140, 94, 62), (86, 150, 70), (190, 226, 240), (240, 160, 50)


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """The colour `amount` (0..1) of the way from a to b."""
    return tuple(round(x + (y - x) * amount) for x, y in zip(a, b))


def curve(points: Points, steps: int = 6) -> np.ndarray:
    """Closed Catmull-Rom curve through the points: [n * steps, 2]."""
    p = np.array((points[-1], *points, *points[:2]))
    a, b, c, d = (p[i:len(points) + i, None] for i in range(4))          # [n, 1, 2] each; the segment is from b to c
    u = (np.arange(steps) / steps)[:, None]
    return (b + 0.5 * u * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))).reshape(-1, 2)


fixed_curve = lru_cache(maxsize=256)(curve)         # for the outlines of subjects, which are the same in every scene


class Pen:
    """Draws in unit coordinates: pixel = origin + scale * unit. A negative x scale mirrors the drawing.

    main is the subject's colour; dark, light and pale are its shades (pale for bellies and tips).
    """

    def __init__(self, draw: ImageDraw.ImageDraw, origin: Point, scale: Point, main: RGB = CREAM):
        self.draw, self.origin, self.scale = draw, origin, scale
        self.main, self.dark, self.light = main, mix(main, (0, 0, 0), 0.15), mix(main, CREAM, 0.45)
        # A cream belly would be invisible on a white subject, which gets a cool shade instead.
        self.pale = mix(main, CREAM, 0.88) if min(main) < 225 else (222, 226, 238)

    def _pixels(self, points) -> list[float]:
        return (np.asarray(points) * self.scale + self.origin).ravel().tolist()

    def poly(self, points, colour: RGB) -> None:
        self.draw.polygon(self._pixels(points), colour)

    def blob(self, points: Points, colour: RGB) -> None:
        """A smooth closed shape through points that are the same in every scene."""
        self.poly(fixed_curve(points), colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        (ox, oy), (sx, sy) = self.origin, self.scale
        x, y, rx, ry = ox + x * sx, oy + y * sy, abs(rx * sx), abs(ry * sy)
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), colour)

    def leaf(self, x: float, y: float, rx: float, ry: float, degrees: float, colour: RGB) -> None:
        """An ellipse turned by `degrees`, clockwise."""
        c, s = cos(degrees * pi / 180), sin(degrees * pi / 180)
        self.poly(_CIRCLE * (rx, ry) @ ((c, s), (-s, c)) + (x, y), colour)

    def line(self, points, width: float, colour: RGB) -> None:
        """A stroke with round ends; width in units."""
        for (x, y) in (points[0], points[-1]):
            self.oval(x, y, width / 2, width / 2, colour)
        self.draw.line(self._pixels(points), colour, max(1, round(width * self.scale[1])), "curve")

    def eyes(self, x: float, y: float, apart: float, r: float) -> None:
        for side in (-1, 1):
            self.oval(x + side * apart, y, r, r * 1.2, INK)
            self.oval(x + side * apart + r * 0.35, y - r * 0.4, r * 0.4, r * 0.4, CREAM)


_CIRCLE = np.array([(cos(a * pi / 14), sin(a * pi / 14)) for a in range(28)])     # [28, 2]


# ---- animals -------------------------------------------------------------------------------

def fox(p: Pen) -> None:
    p.blob(((0.05, 0.95), (0.5, 0.98), (0.88, 0.72), (1.0, 0.2), (0.86, -0.3), (0.62, 0.0), (0.46, 0.4),
            (0.1, 0.66)), p.dark)
    p.blob(((0.86, -0.32), (1.0, 0.16), (0.84, 0.2), (0.7, 0.1), (0.6, 0.04)), p.pale)
    p.blob(((-0.25, -0.1), (0.16, 0.3), (0.28, 0.8), (0.1, 1.0), (-0.6, 1.0), (-0.7, 0.8), (-0.6, 0.3)), p.main)
    p.oval(-0.25, 0.5, 0.2, 0.34, p.pale)
    for x in (-0.42, -0.08):
        p.oval(x, 0.94, 0.14, 0.09, INK)
    for s in (-1, 1):
        p.poly(((-0.25 + s * 0.57, -0.98), (-0.25 + s * 0.63, -0.98), (-0.25 + s * 0.66, -0.3),
                (-0.25 + s * 0.12, -0.52)), p.main)
        p.poly(((-0.25 + s * 0.55, -0.8), (-0.25 + s * 0.55, -0.45), (-0.25 + s * 0.28, -0.52)), INK)
    p.blob(((-0.25, 0.32), (-0.7, 0.1), (-0.98, -0.14), (-0.75, -0.5), (-0.25, -0.62), (0.25, -0.5), (0.48, -0.14),
            (0.2, 0.1)), p.main)
    for s in (-1, 1):
        p.blob(((-0.25, 0.3), (-0.25 + s * 0.42, 0.12), (-0.25 + s * 0.66, -0.1), (-0.25 + s * 0.3, -0.08)), p.pale)
    p.eyes(-0.25, -0.2, 0.27, 0.09)
    p.oval(-0.25, 0.24, 0.12, 0.09, INK)


def cat(p: Pen) -> None:
    p.line(((0.3, 0.88), (0.7, 0.86), (0.86, 0.6), (0.8, 0.3), (0.66, 0.1), (0.76, -0.12)), 0.2, p.dark)
    p.blob(((-0.1, -0.2), (0.35, 0.3), (0.5, 0.8), (0.3, 1.0), (-0.5, 1.0), (-0.62, 0.8), (-0.5, 0.3)), p.main)
    p.oval(-0.1, 0.62, 0.22, 0.3, p.pale)
    for s in (-1, 1):
        p.poly(((-0.1 + s * 0.5, -0.98), (-0.1 + s * 0.57, -0.98), (-0.1 + s * 0.62, -0.3),
                (-0.1 + s * 0.08, -0.62)), p.main)
        p.poly(((-0.1 + s * 0.49, -0.82), (-0.1 + s * 0.5, -0.5), (-0.1 + s * 0.24, -0.62)), BLUSH)
    p.oval(-0.1, -0.2, 0.64, 0.5, p.main)
    for x in (-0.28, -0.1, 0.08):
        p.line(((x, -0.64), (x, -0.48)), 0.09, p.dark)
    p.oval(-0.1, 0.06, 0.26, 0.18, p.pale)
    p.eyes(-0.1, -0.2, 0.3, 0.11)
    p.oval(-0.1, -0.02, 0.08, 0.06, BLUSH)


def bird(p: Pen) -> None:
    for x in (-0.12, 0.14):
        p.line(((x, 0.6), (x, 0.96), (x - 0.12, 0.96)), 0.09, BEAK)
    p.poly(((0.3, 0.25), (1.0, -0.3), (0.98, 0.12), (0.5, 0.6)), p.dark)
    p.poly(((-0.8, -0.48), (-1.0, -0.22), (-0.7, -0.14)), BEAK)
    p.blob(((-0.3, -0.86), (-0.74, -0.66), (-0.8, -0.2), (-0.7, 0.3), (-0.3, 0.68), (0.2, 0.7),
            (0.6, 0.4), (0.5, 0.1), (0.16, -0.2), (0.05, -0.62)), p.main)
    p.blob(((-0.78, 0.0), (-0.66, 0.36), (-0.3, 0.66), (0.05, 0.66), (-0.2, 0.3), (-0.5, 0.02)), p.pale)
    p.blob(((-0.1, -0.1), (-0.2, 0.2), (0.1, 0.46), (0.6, 0.36), (0.3, 0.1)), p.dark)
    p.oval(-0.48, -0.42, 0.11, 0.12, INK)
    p.oval(-0.52, -0.46, 0.045, 0.05, CREAM)


def fish(p: Pen) -> None:
    p.blob(((0.4, 0.1), (0.96, -0.4), (0.9, 0.1), (0.96, 0.6)), p.dark)
    p.blob(((-0.3, -0.4), (0.05, -0.76), (0.4, -0.6), (0.4, -0.2)), p.dark)
    p.blob(((-0.2, 0.5), (0.2, 0.84), (0.36, 0.76), (0.25, 0.4)), p.dark)
    p.blob(((-0.98, 0.12), (-0.7, -0.32), (-0.2, -0.52), (0.35, -0.26), (0.62, 0.1), (0.35, 0.46),
            (-0.2, 0.72), (-0.7, 0.52)), p.main)
    p.blob(((-0.86, 0.36), (-0.5, 0.36), (0.0, 0.48), (0.3, 0.44), (-0.2, 0.7), (-0.66, 0.54)), p.pale)
    for x in (-0.12, 0.2):
        p.blob(((x, -0.34), (x + 0.12, 0.1), (x, 0.4), (x + 0.14, 0.4), (x + 0.24, 0.1), (x + 0.12, -0.34)), p.light)
    p.oval(-0.6, -0.02, 0.17, 0.17, CREAM)
    p.oval(-0.63, -0.02, 0.1, 0.11, INK)


# ---- plants --------------------------------------------------------------------------------


def tree(p: Pen) -> None:
    p.poly(((-0.14, 0.2), (-0.24, 1.0), (0.24, 1.0), (0.14, 0.2)), BROWN)
    for x, y, r in ((-0.5, 0.06, 0.4), (0.5, 0.06, 0.4), (0.0, 0.1, 0.44)):
        p.oval(x, y, r, r, p.dark)
    for x, y, r in ((-0.38, -0.2, 0.42), (0.38, -0.2, 0.42), (0.0, -0.52, 0.46), (0.0, -0.1, 0.36)):
        p.oval(x, y, r, r, p.main)
    for x, y in ((-0.16, -0.64), (-0.5, -0.26), (0.26, -0.3)):
        p.oval(x, y, 0.12, 0.1, p.light)


def flower(p: Pen) -> None:
    p.line(((0, 0.1), (0, 0.95)), 0.14, LEAF)
    p.leaf(-0.32, 0.7, 0.34, 0.14, 28, LEAF)
    p.leaf(0.32, 0.7, 0.34, 0.14, -28, LEAF)
    for i in range(6):
        a = i * 60
        p.leaf(0.44 * sin(a * pi / 180), -0.3 - 0.44 * cos(a * pi / 180), 0.25, 0.3, a, p.main if i % 2 else p.dark)
    warm = p.main[1] > 120 and p.main[2] < 60                       # a yellow centre would be invisible on yellow
    p.oval(0, -0.3, 0.25, 0.25, BROWN if warm else (255, 214, 80))
    p.eyes(0, -0.34, 0.1, 0.045)


def mushroom(p: Pen) -> None:
    p.blob(((-0.24, 0.1), (-0.34, 0.9), (0, 1.0), (0.34, 0.9), (0.24, 0.1)), CREAM)
    p.blob(((-0.9, 0.28), (0, 0.42), (0.9, 0.28), (0.5, 0.14), (-0.5, 0.14)), (226, 208, 188))
    p.blob(((-0.98, 0.2), (-0.82, -0.4), (-0.4, -0.8), (0, -0.88), (0.4, -0.8), (0.82, -0.4),
            (0.98, 0.2), (0.5, 0.28), (0, 0.3), (-0.5, 0.28)), p.main)
    for x, y, r in ((-0.05, -0.5, 0.2), (-0.58, -0.12, 0.16), (0.52, -0.22, 0.18), (0.06, 0.02, 0.13)):
        p.oval(x, y, r, r * 0.9, p.pale)
    p.eyes(0, 0.6, 0.12, 0.06)


# ---- things --------------------------------------------------------------------------------

def house(p: Pen) -> None:
    p.poly(((0.36, -0.75), (0.58, -0.75), (0.58, -0.2), (0.36, -0.3)), BROWN)
    p.poly(((-0.72, -0.1), (0.72, -0.1), (0.72, 1.0), (-0.72, 1.0)), p.main)
    p.poly(((0, -0.95), (-1.0, 0.02), (1.0, 0.02)), mix(p.main, INK, 0.38))
    p.poly(((-0.18, 1.0), (-0.18, 0.42), (0.18, 0.42), (0.18, 1.0)), BROWN)
    for x in (-0.45, 0.45):
        p.poly(((x - 0.17, 0.2), (x + 0.17, 0.2), (x + 0.17, 0.54), (x - 0.17, 0.54)), (255, 232, 150))
    p.oval(0, -0.34, 0.15, 0.15, (255, 232, 150))


def car(p: Pen) -> None:
    p.blob(((-0.6, 0.25), (-0.4, -0.34), (-0.1, -0.46), (0.3, -0.44), (0.56, -0.2), (0.72, 0.25)), p.main)
    p.blob(((-0.44, 0.14), (-0.32, -0.22), (-0.04, -0.3), (-0.04, 0.14)), GLASS)
    p.blob(((0.08, 0.14), (0.08, -0.3), (0.34, -0.26), (0.54, 0.14)), GLASS)
    p.blob(((-0.98, 0.62), (-0.94, 0.3), (-0.6, 0.14), (0.0, 0.12), (0.7, 0.12), (0.98, 0.34), (0.96, 0.72),
            (0.0, 0.78), (-0.9, 0.76)), p.main)
    p.line(((-0.86, 0.66), (0.88, 0.66)), 0.12, p.dark)
    p.oval(-0.86, 0.42, 0.1, 0.1, (255, 240, 170))
    for x in (-0.52, 0.52):
        p.oval(x, 0.72, 0.27, 0.27, INK)
        p.oval(x, 0.72, 0.12, 0.12, (214, 218, 226))


def boat(p: Pen) -> None:
    p.line(((0, -0.9), (0, 0.5)), 0.1, BROWN)
    p.poly(((0.1, -0.9), (0.1, 0.3), (0.86, 0.3)), p.main)
    p.poly(((-0.1, -0.7), (-0.1, 0.3), (-0.66, 0.3)), p.pale)
    p.blob(((-1.0, 0.42), (-0.5, 0.46), (0.5, 0.46), (1.0, 0.42), (0.78, 0.84), (0.5, 1.0), (-0.5, 1.0),
            (-0.78, 0.84)), p.main)
    p.line(((-0.8, 0.6), (0.8, 0.6)), 0.12, p.pale)


def star(p: Pen) -> None:
    turns = [(i * pi / 5, (1.04, 0.52)[i % 2]) for i in range(10)]
    p.poly([(r * sin(a), 0.06 - r * cos(a)) for a, r in turns], p.main)
    p.eyes(0, 0.0, 0.18, 0.09)
    for s in (-1, 1):
        p.oval(s * 0.32, 0.16, 0.09, 0.06, BLUSH)
    p.line(((-0.1, 0.18), (0, 0.24), (0.1, 0.18)), 0.06, INK)


def heart(p: Pen) -> None:
    p.blob(((0, -0.5), (0.24, -0.8), (0.6, -0.86), (0.94, -0.56), (0.92, -0.1), (0.6, 0.38), (0, 0.94),
            (-0.6, 0.38), (-0.92, -0.1), (-0.94, -0.56), (-0.6, -0.86), (-0.24, -0.8)), p.main)
    p.leaf(-0.56, -0.48, 0.24, 0.13, -40, p.light)
    p.eyes(0, -0.12, 0.26, 0.09)
    p.line(((-0.12, 0.08), (0, 0.16), (0.12, 0.08)), 0.07, INK)


SUBJECTS: dict[str, Callable[[Pen], None]] = {f.__name__: f for f in (
    fox, cat, bird, fish, tree, flower, mushroom, house, car, boat, star, heart)}
