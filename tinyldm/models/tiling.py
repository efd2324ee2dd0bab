"""Large pictures through an autoencoder in overlapping tiles: memory for one tile and the result.

    pixels = decode_tiled(vae.decode, z, vae.config.downscale)
    z = tiled(lambda tile: vae.encode(tile).mean, pixels, 1 / 8, tile=512, overlap=128)

A tiled decode is not *equal* to the plain one. AutoencoderKL's GroupNorms and its middle attention
take their statistics over the whole input, so every tile gets a slightly different tone; the blend spreads these
steps over the overlap, where they are too gentle to see, and does not remove them. Convolutions alone agree
exactly as long as they look no further than MARGIN of the overlap. So where the layers that look at the whole
picture come first and are small, as in TAESD, run them whole and tile the rest:

    pixels = decode_tiled(vae.decode_fine, vae.decode_coarse(z), vae.config.downscale)

(taef2 on four unlike photos: 0.004 8-bit steps from the plain decode on average, against 6 with whole tiles.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

MARGIN = 0.25       # the part of the overlap, next to a tile's edge, that is dropped: padding made it up


def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, factor: int, tile: int = 64, overlap: int = 16) -> Tensor:
    """Latents [b, c, h, w] of any size -> pixels [b, 3, h * factor, w * factor]. tile and overlap in latents.

    decode: latents -> pixels, factor times larger. ValueError unless 0 <= overlap < tile.
    """
    return tiled(decode, z, factor, tile, overlap)


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, scale: float, tile: int, overlap: int) -> Tensor:
    """function(x) for x [b, c, h, w], put together from tiles: function gets at most tile * tile of x at once.

    scale: how many times larger than its input function's output is on each side (8, or 1/8 for an encoder: then
    h, w, tile and overlap are multiples of 8). Neighbours share at least `overlap` rows or columns of x.
    Tiles all have one size (compiled functions like that), so they share more where that does not fit evenly.
    """
    scale = Fraction(scale).limit_denominator(1024)
    _check(x, scale.denominator, tile, overlap)
    tops, lefts = (_starts(size, tile, overlap, scale.denominator) for size in x.shape[2:])
    if len(tops) == len(lefts) == 1:
        return function(x)
    height, width = (min(tile, size) for size in x.shape[2:])
    grow = lambda lengths: [int(length * scale) for length in lengths]
    rows, columns = _weights(grow(tops), int(height * scale)), _weights(grow(lefts), int(width * scale))    # of the output
    out = None
    for top, row in zip(tops, rows):
        for left, column in zip(lefts, columns):
            part = function(x[..., top:top + height, left:left + width])
            if part.shape[2:] != (len(row), len(column)):
                raise ValueError(f"function made {tuple(part.shape[2:])} of {(height, width)}: scale={scale} is wrong")
            if out is None:
                precise = torch.promote_types(part.dtype, torch.float32)     # bfloat16 sums would show as a pattern
                out = part.new_zeros(*part.shape[:2], *grow(x.shape[2:]), dtype=precise)
            above, before = grow([top, left])
            out[..., above:above + len(row), before:before + len(column)] += part * (row[:, None] * column).to(part.device)
    return out.to(part.dtype)


def _check(x: Tensor, unit: int, tile: int, overlap: int) -> None:
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} does not fit tiles of {tile}: use 0 <= overlap < tile, for instance {tile // 4}")
    for name, size in (("tile", tile), ("overlap", overlap), ("height", x.shape[2]), ("width", x.shape[3])):
        if size % unit:
            raise ValueError(f"{name} {size} is not a multiple of {unit}: use {(size // unit + 1) * unit}")


def _starts(size: int, tile: int, overlap: int, unit: int) -> list[int]:
    """Where the tiles along one side begin: multiples of unit, evenly spread, the last flush with the end."""
    if size <= tile:
        return [0]
    steps = math.ceil((size - tile) / (tile - overlap))
    return [(size - tile) * i // steps // unit * unit for i in range(steps + 1)]


def _weights(starts: list[int], length: int) -> list[Tensor]:
    """How much each tile counts along one side, [length] each; at every place the weights sum to 1."""
    windows = []
    for i, start in enumerate(starts):
        window = torch.ones(length)
        if i > 0:
            shared = starts[i - 1] + length - start
            window[:shared] = _ramp(shared)
        if i + 1 < len(starts):
            shared = start + length - starts[i + 1]
            window[length - shared:] = torch.minimum(window[length - shared:], _ramp(shared).flip(0))
        windows.append(window)
    total = torch.zeros(starts[-1] + length)
    for start, window in zip(starts, windows):
        total[start:start + length] += window
    return [window / total[start:start + length] for start, window in zip(starts, windows)]


def _ramp(length: int) -> Tensor:
    """0 to 1 over an overlap: a raised cosine (no kink at either end) between the two margins."""
    margin = int(MARGIN * length)
    place = (torch.arange(length) + 0.5 - margin) / max(length - 2 * margin, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * place.clamp(0, 1))
