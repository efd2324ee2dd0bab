"""Metric 'seams': how far can tiles be seen in large pictures, which are decoded tile by tile? Of --vae MODEL, on the pictures of --data.

Some pictures are enlarged until they take 2 x 2 tiles, of the size that drawing has, and decoded in tiles and whole, in float32. The
differences, in 8-bit steps, are averaged where tiles overlap (`border`) and elsewhere. `apart` is the absolute difference. `step` is
by how much the difference changes from one pixel to the next, which is what an eye sees where two tiles of different tones meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.evaluation.reconstruction import batches, check_data
from tinyldm.models.tiling import OVERLAP, TILE, decode_tiled
from tinyldm.pictures.pixels import to_pixels

PICTURES = 4                            # at most: each is decoded twice at 0.8 megapixels where downscale is 8
SIDE = 2 * TILE - OVERLAP               # latents per side of which two tiles overlap exactly as they should


def check(evaluation: Evaluation) -> None:
    check_data(evaluation)


def measure(evaluation: Evaluation) -> Measurement:
    size, faults, rows = SIDE * evaluation.vae.config.downscale, Counter(), []
    for items in batches(evaluation, size, min(evaluation.count, PICTURES), faults):
        for item in items:
            rows.append({"key": item.key} | seams(evaluation.vae, to_pixels(item.image[None]).to(evaluation.device)))
    means = {kind: {place: sum(row[kind][place] for row in rows) / len(rows) for place in ("border", "elsewhere")}
             for kind in ("apart", "step")}
    return Measurement(
        lines=[f"{evaluation.source}: {len(rows)} pictures of {size} x {size} px, decoded in 2 x 2 tiles and whole; in 8-bit steps", "",
               table(means)],
        record={"vae": str(evaluation.source), "data": evaluation.options["data"], "size": size, "tile": TILE, "overlap": OVERLAP,
                "seed": evaluation.seed, "left_out": dict(+faults), "means": means, "pictures": rows})


@torch.no_grad()
def seams(vae: nn.Module, pixels: Tensor) -> dict[str, dict[str, float]]:
    """What `measure` averages, of one picture: pixels [1, 3, h, h] in [-1, 1], of SIDE latents per side."""
    z, f = vae.encode(pixels).mean, vae.config.downscale
    tiled, whole = decode_tiled(vae.decode_fine, vae.decode_coarse(z), f), vae.decode(z)
    apart = 127.5 * (tiled.clamp(-1, 1) - whole.clamp(-1, 1))
    inside = torch.zeros(SIDE * f, dtype=torch.bool, device=z.device)
    inside[(SIDE - TILE) * f:TILE * f] = True
    border = inside[:, None] | inside                                       # [h, w], where more than one tile lies
    down, right = apart.diff(dim=2), apart.diff(dim=3)
    return {"apart": split((apart, border)), "step": split((down, border[1:]), (right, border[:, 1:]))}


def split(*parts: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The mean absolute value of pairs of values [1, 3, h, w] and places [h, w]: in these places, and elsewhere."""
    mean = lambda parts: float(torch.cat([values[..., places].flatten() for values, places in parts]).abs().mean())
    return {"border": mean(parts), "elsewhere": mean([(values, ~places) for values, places in parts])}


def table(means: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':36}{'where tiles overlap':>20}{'elsewhere':>12}"]
    for kind, label in {"apart": "apart from the whole decode", "step": "... changing from pixel to pixel by"}.items():
        lines.append(f"{label:36}{means[kind]['border']:20.3f}{means[kind]['elsewhere']:12.3f}")
    return "\n".join(lines)
