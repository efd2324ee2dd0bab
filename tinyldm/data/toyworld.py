"""toyworld: captioned scenes drawn by the library itself, for training without a download.

A scene is one subject of one colour in front of one background, in one of three sizes and three
positions: 12 x 8 x 5 x 3 x 3 = 4,320 combinations, each with endless small variations. Scene i is
a pure function of (i, seed, split), so the set is infinite, needs no files, and any rank or
restart sees the same pictures. A tenth of the (colour, subject) pairs is never trained on:
`split="held_out"` tests whether a model combines colours and subjects that it knows in new ways.

    python -m tinyldm.data.toyworld --out sheet.png        # a captioned contact sheet
"""

import argparse
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from tinyldm.data.toyworld_backdrops import BACKGROUNDS, sky
from tinyldm.data.toyworld_shapes import INK, RGB, SUBJECTS, Pen, Point, mix
from tinyldm.pictures.sheet import captioned, two_lines

COLOURS: dict[str, RGB] = {
    "red": (222, 48, 52), "orange": (245, 136, 32), "yellow": (252, 208, 44), "green": (36, 146, 78),
    "blue": (48, 104, 222), "purple": (136, 72, 190), "pink": (250, 142, 186), "white": (252, 252, 252)}
SIZES: dict[str, float] = {"small": 0.38, "medium": 0.52, "large": 0.66}       # fraction of the picture's width
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
POSITIONS: dict[str, float] = {"left": 0.27, "middle": 0.5, "right": 0.73}     # x of the centre

# Each subject occurs at most once and each colour at most twice, so that every word is well trained.
HELD_OUT: frozenset[tuple[str, str]] = frozenset({
    ("purple", "fox"), ("green", "cat"), ("yellow", "bird"), ("white", "fish"), ("blue", "tree"),
    ("green", "flower"), ("orange", "house"), ("purple", "car"), ("red", "boat"), ("blue", "star")})

# The prompts of the sample grids of a training run.
PROMPTS = ("a red fox", "a small blue cat on the left, in the snow", "a large yellow star under the stars",
           "a green car on sand", "a purple flower on grass", "a white boat at sea", "a pink bird", "an orange tree")

_ALL = tuple((colour, subject) for colour in COLOURS for subject in SUBJECTS)
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "all": _ALL,
    "train": tuple(pair for pair in _ALL if pair not in HELD_OUT),
    "held_out": tuple(pair for pair in _ALL if pair in HELD_OUT)}


@dataclass(frozen=True)
class Scene:
    subject: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "middle"
    seed: int = 0               # of the variations: exact position and size, clouds, and the wording of the caption


class Sample(NamedTuple):
    image: np.ndarray           # uint8 [size, size, 3]
    caption: str
    scene: Scene


def scene(index: int, seed: int = 0, split: str = "train", without: str = "") -> Scene:
    """Scene number `index` (any int) of a split: "train", "held_out" or "all". without: a subject that no scene shows; "": all are
    shown."""
    if split not in PAIRS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(PAIRS)}")
    rng = Random(f"{seed}/{split}/{index}")
    colour, subject = rng.choice([pair for pair in PAIRS[split] if pair[1] != without])
    size = rng.choice(("small", "medium", "medium", "large"))
    position = rng.choice(("left", "middle", "middle", "right"))
    return Scene(subject, colour, rng.choice(tuple(BACKGROUNDS)), size, position, rng.getrandbits(32))


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB image of size x size pixels, drawn larger and box-filtered down."""
    rng = Random(f"{scene.seed}/draw")
    over = 3 if size <= 128 else 2
    side = size * over
    backdrop = BACKGROUNDS[scene.background]
    canvas = sky(scene.background, side).copy()
    page = Pen(ImageDraw.Draw(canvas), (0, 0), (side, side))
    backdrop.back(page, rng)

    half = SIZES[scene.size] / 2 * rng.uniform(0.95, 1.05)
    x = POSITIONS[scene.position] + rng.uniform(-0.02, 0.02)
    x = min(max(x, half + 0.02), 0.98 - half)                    # keeps the whole subject inside the picture
    feet = 0.84 + 0.06 * (half - 0.25) + rng.uniform(-0.02, 0.02)
    page.oval(x, feet, half * 0.85, half * 0.16, backdrop.shadow)
    stamp(canvas, scene, (x * side, (feet - half) * side), (half * side, half * side), 0.009 * side)
    backdrop.front(page, rng)
    return canvas.reduce(over)


def stamp(canvas: Image.Image, scene: Scene, centre: Point, scale: Point, outline: float) -> None:
    """Put the subject on the canvas with a dark outline; centre, scale and outline in pixels."""
    d = max(1, round(outline))
    margin = round(1.1 * scale[1]) + 2 * d                       # room for the outline: offset() wraps around
    layer = Image.new("RGBA", (2 * margin, 2 * margin))
    main = COLOURS[scene.colour]
    SUBJECTS[scene.subject](Pen(ImageDraw.Draw(layer), (margin, margin), scale, main))
    shape = wide = layer.getchannel("A")
    # The outline is the silhouette shifted a little in all directions. It separates a white subject from snow.
    for dx, dy in ((d, 0), (0, d)):
        moved = ImageChops.lighter(ImageChops.offset(wide, dx, dy), ImageChops.offset(wide, -dx, -dy))
        wide = ImageChops.lighter(wide, moved)
    corner = round(centre[0]) - margin, round(centre[1]) - margin
    canvas.paste(mix(main, INK, 0.62), corner, wide)
    canvas.paste(layer, corner, shape)


def caption(scene: Scene) -> str:
    """One of many wordings, chosen by the scene's seed; at most 13 words.

    Colour and subject are always named; size, position and background only sometimes.
    """
    rng = Random(f"{scene.seed}/words")
    kind = rng.choices(("plain", "tags", "sentence"), (0.11, 0.13, 0.76))[0]
    noun = f"{scene.colour} {scene.subject}"
    article = "an " if scene.colour == "orange" else "a "
    if kind == "plain":                                          # "a red fox", the form of most users' prompts
        return article + noun
    if rng.random() < (0.1 if scene.size == "medium" else 0.7):
        noun, article = f"{rng.choice(SIZE_WORDS[scene.size])} {noun}", "a "
    place = where = ""
    if rng.random() < 0.95:
        place = scene.background if kind == "tags" else rng.choice(BACKGROUNDS[scene.background].phrases)
    if rng.random() < (0.1 if scene.position == "middle" else 0.65):
        where = ("in the " if scene.position == "middle" else "on the ") + scene.position
    if kind == "tags":                                           # "red fox, grass"
        return ", ".join(part for part in (noun, place, where) if part)
    opening = rng.choice(("", "", "", "", "a picture of ", "a drawing of "))
    tail = ", ".join(part for part in rng.choice(((place, where), (where, place))) if part)
    return f"{opening}{article}{noun} {tail}".rstrip()


def sample(index: int, size: int = 64, seed: int = 0, split: str = "train", without: str = "") -> Sample:
    """Scene number `index` with its picture and caption: a pure function of the arguments, which are those of `scene`."""
    it = scene(index, seed, split, without)
    return Sample(np.array(draw(it, size)), caption(it), it)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a captioned contact sheet of toyworld.")
    parser.add_argument("--out", default="sheet.png")
    parser.add_argument("--size", type=int, default=64, help="pixels of one picture")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=PAIRS, default="train")
    args = parser.parse_args()
    samples = [sample(i, args.size, args.seed, args.split) for i in range(args.count)]
    captioned([it.image for it in samples], [two_lines(it.caption) for it in samples]).save(args.out)


if __name__ == "__main__":
    main()
