"""Large pictures through an autoencoder in overlapping tiles, with memory for one tile and the result.

    pixels = decode_tiled(vae.decode, z, vae.config.downscale)
    z = tiled(lambda tile: vae.encode(tile).mean, pixels, 1 / 8, tile=512, overlap=128)

A tiled decode is not *equal* to the plain one. AutoencoderKL's GroupNorms and its middle attention take their
statistics over the whole input, so every tile gets a slightly different tone. Blending spreads these differences
over the overlap, where they are too gentle to see, but does not remove them. Convolutions give exactly the same
result as long as they reach no further than MARGIN of the overlap. So where the layers that depend on the whole
picture come first and are cheap, as in TAESD, run those on the whole picture and tile the rest:

    pixels = decode_tiled(vae.decode_fine, vae.decode_coarse(z), vae.config.downscale)

(taef2 on four different photos: 0.004 8-bit steps from the plain decode on average, against 6 if all of it is tiled.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

PIXELS_AT_ONCE = 1024 * 1024   # pixels that a VAE decodes at once: several small pictures, one large one, or a part of a larger one
TILE, OVERLAP = 64, 16  # usual size of tiles, and by how much they overlap, in latents
MARGIN = 0.25       # the fraction of the overlap, next to a tile's edge, that is dropped because padding affects it


def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, factor: int, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Latents [b, c, h, w] of any size -> pixels [b, 3, h * factor, w * factor]. tile and overlap in latents.

    decode: latents -> pixels, factor times larger. ValueError unless 0 <= overlap < tile.
    """
    return tiled(decode, z, factor, tile, overlap)


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, scale: float, tile: int, overlap: int) -> Tensor:
    """function(x) for x [b, c, h, w], assembled from tiles: function is called on at most tile * tile of x at once.

    scale: the size of function's output relative to its input, on each side (8, or 1/8 for an encoder, where h, w, tile
    and overlap must be multiples of 8). Neighbouring tiles overlap by at least `overlap` rows or columns of x. All tiles
    have the same size, so that torch.compile compiles once; where they do not fit evenly, they overlap by more.
    """
    scale = Fraction(scale).limit_denominator(1024)
    _check(x, scale.denominator, tile, overlap)
    tops, lefts = (_starts(size, tile, overlap, scale.denominator) for size in x.shape[2:])
    if len(tops) == len(lefts) == 1:
        return function(x)
    height, width = (min(tile, size) for size in x.shape[2:])
    scaled = lambda lengths: [int(length * scale) for length in lengths]                 # in pixels of the output
    rows, columns = _weights(scaled(tops), int(height * scale)), _weights(scaled(lefts), int(width * scale))
    out = None
    for top, row in zip(tops, rows):
        for left, column in zip(lefts, columns):
            part = function(x[..., top:top + height, left:left + width])
            if part.shape[2:] != (len(row), len(column)):
                raise ValueError(f"function returned {tuple(part.shape[2:])} for an input of {(height, width)}: "
                                 f"scale={scale} is wrong")
            if out is None:
                precise = torch.promote_types(part.dtype, torch.float32)     # rounding of bfloat16 sums would be visible
                out = part.new_zeros(*part.shape[:2], *scaled(x.shape[2:]), dtype=precise)
            out_top, out_left = scaled([top, left])
            out[..., out_top:out_top + len(row), out_left:out_left + len(column)] += part * (row[:, None] * column).to(part.device)
    return out.to(part.dtype)


def _check(x: Tensor, unit: int, tile: int, overlap: int) -> None:
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} does not fit tiles of {tile}: use 0 <= overlap < tile, for instance {tile // 4}")
    for name, size in (("tile", tile), ("overlap", overlap), ("height", x.shape[2]), ("width", x.shape[3])):
        if size % unit:
            raise ValueError(f"{name} {size} is not a multiple of {unit}: use {(size // unit + 1) * unit}")


def _starts(size: int, tile: int, overlap: int, unit: int) -> list[int]:
    """The first row (or column) of each tile: multiples of unit, evenly spaced, the last tile flush with the end."""
    if size <= tile:
        return [0]
    steps = math.ceil((size - tile) / (tile - overlap))
    return [(size - tile) * i // steps // unit * unit for i in range(steps + 1)]


def _weights(starts: list[int], length: int) -> list[Tensor]:
    """Blending weights of the tiles along one side, [length] each. At every row (or column) they sum to 1."""
    windows = []
    for i, start in enumerate(starts):
        window = torch.ones(length)
        if i > 0:
            overlap = starts[i - 1] + length - start
            window[:overlap] = _ramp(overlap)
        if i + 1 < len(starts):
            overlap = start + length - starts[i + 1]
            window[length - overlap:] = torch.minimum(window[length - overlap:], _ramp(overlap).flip(0))
        windows.append(window)
    total = torch.zeros(starts[-1] + length)
    for start, window in zip(starts, windows):
        total[start:start + length] += window
    return [window / total[start:start + length] for start, window in zip(starts, windows)]


def _ramp(length: int) -> Tensor:
    """From 0 to 1 over an overlap, [length]: a raised cosine (smooth at both ends) between the two margins."""
    margin = int(MARGIN * length)
    fraction = (torch.arange(length) + 0.5 - margin) / max(length - 2 * margin, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * fraction.clamp(0, 1))
