"""Decode the bytes of an untrusted picture file to an upright sRGB array of the right size, or raise the reason why not.

Training's pictures and sample.py's --init-image and --mask all come through here.

Notable: decompression bombs and pictures outside the user's limits are rejected by their header alone, before any pixel is
decoded. Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (libjpeg scales in the DCT domain), but never below twice the
target size, so that the resampling filter still removes aliases. Crop and resize are one pass over a box with fractional edges.
Colours are converted to sRGB where an embedded profile specifies another colour space. The result does not depend on the number
of threads.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL import Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  without these, Pillow would import all of its plugins

from tinyldm.data.picture_metadata import without_metadata

# The formats that are read, by Pillow's name, with the endings of their files. Only formats that are recognised by their first bytes
# and decoded by compiled code, without another program; a file's contents, not its name, decide how it is decoded.
ENDINGS = {"JPEG": ("jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "mpo"), "PNG": ("png", "apng"), "WEBP": ("webp",), "GIF": ("gif",),
           "BMP": ("bmp",), "TIFF": ("tif", "tiff"), "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm")}
if features.check("jpg_2000"):
    ENDINGS["JPEG2000"] = ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx")
if "avif" in features.modules and features.check("avif"):                   # since Pillow 11.3
    from PIL import AvifImagePlugin  # noqa: F401

    ENDINGS["AVIF"] = ("avif", "avifs")
FORMATS = tuple(ENDINGS)
MAX_PIXELS = 100_000_000
FILTER = Image.Resampling.LANCZOS
REASONS = ("unreadable", "truncated", "too many pixels", "too small", "too long")
UNREADABLE, TRUNCATED, TOO_MANY_PIXELS, TOO_SMALL, TOO_LONG = REASONS

_ORIENTATION = 0x0112
_WITH_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
_SIDEWAYS = (5, 6, 7, 8)                                    # orientations with width and height exchanged
_PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class Unusable(ValueError):
    """A picture that cannot be used. reason: one of REASONS; filtered: outside the user's own limits, but not broken."""

    def __init__(self, reason: str, detail: str = "", filtered: bool = False):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.filtered = reason, detail, filtered


@dataclass(frozen=True)
class Framing:
    """The size that pictures are brought to, and the limits outside which they are dropped."""

    resolution: int                                   # side of the square in pixels
    buckets: tuple[tuple[int, int], ...] = ()         # target sizes (height, width) in pixels; empty: only the square
    min_side: int = 0                                 # shortest side in pixels that is accepted
    max_aspect: float = 0.0                           # largest long side / short side that is accepted; 0: any

    def __post_init__(self):
        if self.resolution < 1 or any(side < 1 for bucket in self.buckets for side in bucket):
            raise ValueError(f"pictures of {self.resolution} pixels, buckets {self.buckets}: every side must be at least 1")
        if self.min_side < 0 or 0 != self.max_aspect < 1:
            raise ValueError(f"limits on pictures: min_side {self.min_side} must not be negative, and max_aspect "
                             f"{self.max_aspect} must be at least 1 (long side / short side), or 0 for any")

    def size(self, height: float, width: float) -> tuple[int, int]:
        """Target (height, width) in pixels of an upright picture: the bucket nearest in log(height / width), or the square."""
        aspect = math.log(height / width)
        return min(self.buckets or ((self.resolution, self.resolution),),
                   key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect))


def make_buckets(resolution: int, unit: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) in pixels, multiples of `unit`, with about as many units as the square, sorted.

    For every height up to the square's, this takes the largest width with no more units than the square, and the same size
    turned by 90 degrees; sizes with less than 90 % of the square's units are left out. The longest size is the one nearest to
    max_aspect (long side / short side) in log(aspect). ValueError where resolution is no multiple of unit.
    """
    if unit < 1 or resolution < unit or resolution % unit:
        raise ValueError(f"buckets for {resolution} pixels: not a multiple of {unit}; "
                         f"use {max(1, round(resolution / max(unit, 1))) * unit}")
    if max_aspect < 1:
        raise ValueError(f"buckets up to the aspect {max_aspect}: long side / short side is at least 1")
    side = resolution // unit
    wide = [(h, side * side // h) for h in range(1, side + 1)]
    wide = [(h, w) for h, w in wide if 10 * h * w >= 9 * side * side]
    longest = min((w / h for h, w in wide), key=lambda aspect: abs(math.log(aspect / max_aspect)))
    kept = [(h, w) for h, w in wide if w / h <= longest]
    return tuple(sorted({(a * unit, b * unit) for h, w in kept for a, b in ((h, w), (w, h))}))


def workers() -> int:
    """The number of decoding threads: one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Decoded(NamedTuple):
    """A picture that was scaled and cropped, and where it comes from. All numbers of pixels are those of the upright picture."""

    image: np.ndarray           # uint8 [h, w, 3]
    found: tuple[int, int]      # height and width of the picture as it was found
    cut: tuple[int, int, int]   # what was cut off at the top, left and right, in pixels of the scaled picture, rounded

    def sizes(self, mirrored: bool = False) -> list[int]:
        """The six numbers of Cond.extra["sizes"]: height and width as found, top and left of the crop, height and width of the crop."""
        top, left, right = self.cut
        return [*self.found, top, right if mirrored else left, *self.image.shape[:2]]


def decode(data: bytes | np.ndarray, framing: Framing) -> np.ndarray:
    """The bytes of a picture in one of FORMATS, or uint8 [h, w, 3] or [h, w] in sRGB -> uint8 [h, w, 3].

    The result is upright, in sRGB, on white where the picture is transparent, and of the first of several frames. It is scaled
    to cover framing.size and cropped around the centre; a picture of exactly this size is not resampled. Raises Unusable.
    """
    return decode_with_sizes(data, framing).image


def decode_with_sizes(data: bytes | np.ndarray, framing: Framing) -> Decoded:
    """As `decode`, with the numbers that tell where the result was cut from."""
    if isinstance(data, np.ndarray):
        image, turn, profile = _from_array(data, framing), 1, None
        extent = full = image.size
    else:
        with _reasons():
            image, extent, full, turn = _load(data, framing)
            profile = image.info.get("icc_profile")
            image = _opaque(image)
        if image.mode == "CMYK":                            # averages of inks are not averages of colours: convert, then resize
            image, profile = _to_srgb(image, profile), None
    image = _frame(image, extent, turn, framing)
    image = _to_srgb(image, profile)                        # after the resize, which leaves fewer pixels to convert
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return Decoded(pixels, full if turn in _SIDEWAYS else full[::-1], _cut(full, image.size, turn))


def decode_mask(data: bytes, framing: Framing) -> np.ndarray:
    """The bytes of a picture that is a mask -> uint8 [h, w], scaled and cropped as `decode` does. Raises Unusable.

    Of a picture with an alpha channel that is not opaque everywhere, the alpha channel is the mask, whatever the colours (as in
    AUTOMATIC1111's create_binary_mask); of any other it is the luminance. The values are numbers, not colours: no profile is applied.
    """
    with _reasons():
        image, extent, _, turn = _load(data, framing)
        image = _alpha(image) or _opaque(image)
    return np.array(_frame(image.convert("RGB").convert("L"), extent, turn, framing))


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a picture's bytes, upright. Raises Unusable."""
    with _reasons():
        image = _open(data, Framing(1))
        image.load()                                        # turns a TIFF upright, and finds the orientation at the end of a PNG
        return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever Pillow raises on broken files, which can be nearly any exception, into Unusable."""
    try:
        yield
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:
        raise Unusable(UNREADABLE, "not a picture in a format that is read") from None
    except Exception as error:
        text = " ".join(f"{type(error).__name__} {error}".split())
        raise Unusable(TRUNCATED if "truncated" in text.lower() else UNREADABLE, text[:200]) from None


def _from_array(data: np.ndarray, framing: Framing) -> Image.Image:
    if data.dtype != np.uint8 or data.shape[2:] not in ((), (3,)) or data.ndim < 2 or not data.size:
        raise Unusable(UNREADABLE, f"an array {list(data.shape)} of {data.dtype}, expected uint8 [h, w, 3] or [h, w]")
    _check(data.shape[1::-1], framing)
    return Image.fromarray(data)


def _open(data: bytes, framing: Framing) -> Image.Image:
    """The picture in the bytes of a file, within the limits; its pixels are not decoded yet."""
    if _PILLOWS_WARNINGS not in warnings.filters:           # catch_warnings is not thread-safe
        warnings.filterwarnings("ignore", module=r"PIL\.")
    data, profile = without_metadata(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check(image.size, framing)
    if profile:
        image.info["icc_profile"] = profile
    if not isinstance(image.info.get("xmp", b""), bytes):   # a TIFF may declare XMP as text or numbers, on which load() fails
        del image.info["xmp"]
    return image


def _load(data: bytes, framing: Framing) -> tuple[Image.Image, tuple[float, float], tuple[int, int], int]:
    """The decoded picture as stored, the (width, height) that the picture covers in its pixels, its own width and height, and its
    orientation (EXIF, 1..8)."""
    image, drafted = _open(data, framing), None
    full = image.size
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        width, height = _target(image.size, _orientation(image), framing)
        drafted = image.draft("RGB", (2 * width, 2 * height))
    image.load()
    # A JPEG that is decoded smaller covers a fraction of its last column and row. The orientation is read again, after load(),
    # because a PNG may store EXIF behind the pixels.
    return image, drafted[1][2:] if drafted else image.size, full if drafted else image.size, _orientation(image)


def _check(size: tuple[int, int], framing: Framing) -> None:
    """Raise Unusable for a (width, height) outside the limits, which do not depend on the orientation."""
    short, long = sorted(size)
    if short < 1:
        raise Unusable(UNREADABLE, "no pixels")
    if short * long > MAX_PIXELS:
        raise Unusable(TOO_MANY_PIXELS, f"{size[0]} x {size[1]}, at most {MAX_PIXELS:,} are read")
    if short < framing.min_side:
        raise Unusable(TOO_SMALL, f"{size[0]} x {size[1]}, the limit is {framing.min_side}", filtered=True)
    if framing.max_aspect and long > framing.max_aspect * short:
        raise Unusable(TOO_LONG, f"{size[0]} x {size[1]}, the limit is {framing.max_aspect:g} : 1", filtered=True)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1..8) that is still to be applied; 1 where there is none."""
    if _WITH_ORIENTATION.isdisjoint(image.info):            # true of TIFFs as well, which Pillow turns upright in load()
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:                                       # a picture with broken EXIF data is still usable
        return 1


def _target(extent: tuple[float, float], turn: int, framing: Framing) -> tuple[int, int]:
    """Target (width, height) in the coordinates of the stored picture, which may be turned by 90 degrees."""
    if turn in _SIDEWAYS:
        return framing.size(extent[0], extent[1])
    height, width = framing.size(extent[1], extent[0])
    return width, height


def _opaque(image: Image.Image) -> Image.Image:
    """A picture of any mode -> L, RGB or CMYK, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image)
    if image.has_transparency_data:
        mode = "L" if image.mode in ("L", "LA", "La") else "RGB"
        image = image.convert("LA" if mode == "L" else "RGBA")
        flat = Image.new(mode, image.size, "white")
        flat.paste(image.convert(mode), mask=image.getchannel("A"))
        return flat
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or more bits in 0..65535, or floats in 0..65535 or 0..1 -> L. (Pillow's own conversion clips at 255.)"""
    values = np.clip(np.nan_to_num(np.asarray(image).astype(np.float32)), 0, 65535)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    values *= 255 if image.mode == "F" and values.max() <= 1 else 255 / 65535
    return Image.fromarray((values + 0.5).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel; None where there is none, or where it is opaque everywhere."""
    if not image.has_transparency_data or image.mode == "F" or image.mode.startswith("I"):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _frame(image: Image.Image, extent: tuple[float, float], turn: int, framing: Framing) -> Image.Image:
    """Scale and crop a stored picture to the framing's size, and turn it upright."""
    image = _cover(image, extent, _target(extent, turn, framing))
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _cover(image: Image.Image, extent: tuple[float, float], target: tuple[int, int]) -> Image.Image:
    """Scale the top left `extent` of the image to cover the target and crop it around the centre. All sizes: (width, height)."""
    box = _box(extent, target)
    if (box[2] - box[0], box[3] - box[1]) == target:
        return image if image.size == target else image.crop(box)
    return image.resize(target, FILTER, box=box, reducing_gap=3.0)


def _box(extent: tuple[float, float], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part of a picture that is scaled to the target."""
    (width, height), (w, h) = extent, target
    if width * h > height * w:
        width = height * w / h
    else:
        height = width * h / w
    left, top = (extent[0] - width) / 2, (extent[1] - height) / 2
    if (width, height) == (w, h):                           # no scaling: crop whole pixels, an odd one on the right or below
        left, top = int(left), int(top)
        width, height = w, h
    return left, top, left + width, top + height


def _cut(stored: tuple[int, int], upright: tuple[int, int], turn: int) -> tuple[int, int, int]:
    """What is cut off an upright picture at its top, left and right, in pixels after scaling. stored: (width, height) of the stored
    picture; upright: of the result."""
    target = upright[::-1] if turn in _SIDEWAYS else upright
    left, top, right, bottom = _box(stored, target)
    margins = np.array([[0, top, 0], [left, 0, stored[0] - right], [0, stored[1] - bottom, 0]]) * (target[0] / (right - left))
    margins = Image.fromarray(np.round(margins).astype(np.int32))               # a picture of its own, which is turned as the other was
    margins = np.asarray(margins.transpose(_TURNS[turn]) if turn in _TURNS else margins)
    return int(margins[0, 1]), int(margins[1, 0]), int(margins[1, 2])


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB or CMYK, with its embedded ICC profile if it has one -> L or RGB in sRGB."""
    transform = _transform(profile, image.mode) if isinstance(profile, bytes) else None      # in a broken TIFF it may be numbers
    if transform is not None:
        return transform.apply(image)
    return image.convert("RGB") if image.mode == "CMYK" else image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str):
    """The transform from a profile to sRGB, or None where it changes no colour (measured on a grid of colours) or is impossible."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        levels = np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * len(mode))
        probe = Image.merge(mode, [Image.fromarray(channel.reshape(1, -1)) for channel in levels])
        change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
        return transform if np.abs(change).max() > 2 else None
    except Exception:                                       # a broken profile, one for other channels, or Pillow without littlecms
        return None
