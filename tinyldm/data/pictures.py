"""Captioned pictures from wherever they are, cropped square and held in memory as bytes.

Sources: `toyworld`; a folder of pictures with a .txt caption beside each; WebDataset tar or tar.gz shards
(a path or a glob; consecutive members share a key, `txt` is the caption).
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyldm.data import toyworld

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


class Pictures(NamedTuple):
    images: np.ndarray        # uint8 [n, size, size, 3]
    captions: list[str]
    skipped: int = 0          # unreadable pictures and pictures without a caption


def check_source(source: str) -> None:
    """ValueError for what cannot be read, before anything else is prepared for it."""
    if "://" in source:
        raise ValueError(f"--data {source}: only local folders and shards can be read yet; download it and pass the path")


def load_pictures(source: str, size: int, scenes: int, seed: int = 0) -> Pictures:
    """All pictures of a source at size x size. scenes, seed: how many to draw, and which (toyworld only).

    ValueError where the source holds no captioned picture, with what was looked for.
    """
    if source == "toyworld":
        samples = [toyworld.sample(i, size, seed) for i in range(scenes)]
        return Pictures(np.stack([s.image for s in samples]), [s.caption for s in samples])
    check_source(source)
    pairs = read_folder(Path(source)) if os.path.isdir(source) else read_shards(source)
    images, captions, skipped = [], [], 0
    for data, caption in pairs:
        try:
            if not caption.strip():
                raise ValueError("empty caption")
            images.append(square(Image.open(io.BytesIO(data)), size))
            captions.append(caption.strip())
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
            skipped += 1
    if not images:
        raise ValueError(f"--data {source}: no readable captioned picture in it ({skipped} skipped); expected pictures "
                         "with a .txt caption of the same name beside each, in a folder or in tar shards")
    return Pictures(np.stack(images), captions, skipped)


def square(image: Image.Image, size: int) -> np.ndarray:
    """Upright, on white where transparent, the centre square at size x size -> uint8 [size, size, 3]."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))


def read_folder(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Pictures below a folder, in name order, each with the text of its .txt ("" where there is none)."""
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in PICTURES:
            text = file.with_suffix(".txt")
            yield file.read_bytes(), text.read_text("utf-8", errors="replace") if text.exists() else ""


def read_shards(pattern: str) -> Iterator[tuple[bytes, str]]:
    """Samples of all shards that match, in name order. Members are read, never extracted to disk."""
    shards = sorted(glob.glob(os.path.expanduser(pattern)))
    if not shards:
        raise ValueError(f"--data {pattern}: no such folder or file, nor a pattern that matches one; or use --data toyworld")
    for shard in shards:
        try:
            with tarfile.open(shard, "r|*") as tar:
                yield from read_samples(tar)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"--data {shard}: not a readable tar shard ({error})") from None


def read_samples(tar: tarfile.TarFile) -> Iterator[tuple[bytes, str]]:
    key, picture, caption = None, None, ""
    for member in tar:
        if not member.isfile():
            continue
        stem, suffix = os.path.splitext(member.name)
        if stem != key:
            if picture is not None:
                yield picture, caption
            key, picture, caption = stem, None, ""
        if suffix.lower() in PICTURES:
            picture = tar.extractfile(member).read()
        elif suffix == ".txt":
            caption = tar.extractfile(member).read().decode("utf-8", errors="replace")
    if picture is not None:
        yield picture, caption
