"""The backgrounds of toyworld: a sky, a ground, and one or two details at random positions.

Coordinates are [0, 1] x [0, 1] over the whole picture, y down, horizon near y = 0.6. `back` is
drawn behind the subject and `front` in front of it (the sea hides the keel of a boat). Colours are
pale or dark, never one of the eight colours of subjects, so that a subject's colour stands out.
"""

from functools import lru_cache
from random import Random
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

from tinyldm.data.toyworld_shapes import RGB, Pen, curve


class Backdrop(NamedTuple):
    sky: tuple[RGB, RGB]                        # top, horizon
    shadow: RGB                                 # of the subject on the ground
    back: Callable[[Pen, Random], None]
    front: Callable[[Pen, Random], None]
    phrases: tuple[str, ...]                    # the background's names in captions


@lru_cache(maxsize=64)
def sky(name: str, side: int) -> Image.Image:
    """The gradient from top to horizon, side x side pixels. The image is cached, so copy it before drawing on it."""
    top, low = (np.array(c, float) for c in BACKGROUNDS[name].sky)
    u = np.clip(np.arange(side) / (0.65 * side), 0, 1)[:, None]
    rows = np.rint(top + (low - top) * u).astype(np.uint8)               # [side, 3]
    return Image.fromarray(np.repeat(rows[:, None], side, 1))


def hill(p: Pen, rng: Random, y: float, colour: RGB) -> None:
    """Fill the picture below a gentle slope near height y."""
    a, b, c = (y + rng.uniform(-0.03, 0.03) for _ in range(3))
    p.poly(curve(((-0.3, a), (0.2, b), (0.7, c), (1.3, a), (1.4, 1.5), (-0.4, 1.5))), colour)


def cloud(p: Pen, x: float, y: float, r: float, colour: RGB) -> None:
    p.oval(x, y, r, r * 0.7, colour)
    p.oval(x - r, y + r * 0.3, r * 0.8, r * 0.4, colour)
    p.oval(x + r, y + r * 0.3, r * 0.9, r * 0.4, colour)


def nothing(p: Pen, rng: Random) -> None:
    pass


def sand(p: Pen, rng: Random) -> None:
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.22)
    p.oval(x, y, 0.085, 0.085, (255, 244, 206))
    hill(p, rng, 0.60, (240, 214, 168))
    hill(p, rng, 0.70, (230, 198, 146))


def grass(p: Pen, rng: Random) -> None:
    for x in (rng.uniform(0.05, 0.4), rng.uniform(0.6, 0.95)):
        cloud(p, x, rng.uniform(0.1, 0.28), rng.uniform(0.06, 0.09), (252, 254, 255))
    hill(p, rng, 0.60, (190, 222, 138))
    hill(p, rng, 0.68, (166, 208, 112))


def tufts(p: Pen, rng: Random) -> None:
    for _ in range(4):
        x, y = rng.random(), rng.uniform(0.9, 0.97)
        p.poly(((x - 0.03, y - 0.05), (x, y), (x + 0.005, y - 0.075), (x + 0.01, y), (x + 0.04, y - 0.05),
                (x + 0.015, y + 0.02), (x - 0.015, y + 0.02)), (126, 176, 84))


def snow(p: Pen, rng: Random) -> None:
    hill(p, rng, 0.58, (214, 226, 240))
    for x in (rng.uniform(0.0, 0.3), rng.uniform(0.7, 1.0)):
        for k in range(3):
            w, y = 0.05 + 0.018 * k, 0.47 + 0.055 * k
            p.poly(((x, y - 0.09), (x - w, y + 0.05), (x + w, y + 0.05)), (128, 160, 176))
        p.poly(((x, 0.38), (x - 0.026, 0.45), (x + 0.026, 0.45)), (244, 249, 253))
    hill(p, rng, 0.68, (232, 240, 249))
    for _ in range(9):
        p.oval(rng.random(), rng.uniform(0.03, 0.6), 0.012, 0.012, (252, 254, 255))


MOON = ((0.035, -0.066), (-0.035, -0.062), (-0.07, 0.0), (-0.035, 0.062), (0.04, 0.062), (0.0, 0.034),
        (-0.018, -0.004), (-0.002, -0.042))


def night(p: Pen, rng: Random) -> None:
    for _ in range(8):
        r = rng.choice((0.009, 0.012))
        p.oval(rng.random(), rng.uniform(0.03, 0.5), r, r, (255, 246, 214))
    x, y = rng.choice((rng.uniform(0.08, 0.25), rng.uniform(0.75, 0.92))), rng.uniform(0.12, 0.2)
    p.poly(curve(MOON) + (x, y), (250, 236, 190))
    hill(p, rng, 0.60, (42, 48, 98))
    hill(p, rng, 0.70, (32, 38, 80))


def sea(p: Pen, rng: Random) -> None:
    cloud(p, rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.26), rng.uniform(0.06, 0.09), (255, 250, 244))
    p.poly(((0, 0.58), (1, 0.58), (1, 1), (0, 1)), (140, 214, 214))
    wave(p, rng, 0.69, (112, 200, 204))


def wave(p: Pen, rng: Random, y: float = 0.815, colour: RGB = (84, 184, 194)) -> None:
    """A scalloped crest at height y, with foam; fills the picture below it."""
    x = rng.uniform(-0.4, -0.2)
    for lift, tone in ((0.0, (222, 244, 242)), (0.018, colour)):
        crest = [(x + i * 0.1, y + lift + (0.03 if i % 2 else 0.0)) for i in range(17)]
        p.poly(curve((*crest, (1.4, 1.4), (-0.4, 1.4)), 4), tone)


BACKGROUNDS: dict[str, Backdrop] = {
    "sand": Backdrop(((168, 218, 226), (250, 242, 222)), (206, 170, 116), sand, nothing,
                     ("on sand", "on the sand")),
    "grass": Backdrop(((140, 204, 242), (226, 244, 250)), (132, 178, 88), grass, tufts,
                      ("on grass", "on the grass")),
    "snow": Backdrop(((166, 188, 220), (216, 226, 240)), (190, 206, 228), snow, nothing,
                     ("in the snow", "in snow")),
    "night": Backdrop(((18, 20, 58), (70, 64, 130)), (22, 26, 58), night, nothing,
                      ("at night", "under the stars")),
    "sea": Backdrop(((255, 206, 184), (255, 240, 218)), (90, 180, 190), sea, wave,
                    ("at sea", "on the sea")),
}
