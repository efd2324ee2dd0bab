"""Metric 'reconstruction': what does an autoencoder lose of pictures? Of --vae MODEL, on the pictures of --data.

Every picture is encoded to the mean of its posterior, decoded, rounded to bytes and compared with the original. Means come with
95 % intervals; reconstruction.json holds the figures of every picture, worst.png shows the pictures of lowest PSNR.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.special import stdtrit

from tinyldm.config import make_config
from tinyldm.data.encoding import Item, make_recipe
from tinyldm.data.prepare import usable_pictures
from tinyldm.data.sources import list_shards, parse_sources
from tinyldm.data.report import listed
from tinyldm.device import in_parts
from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.evaluation.progress import progress
from tinyldm.folders.lpips import load_lpips, open_lpips
from tinyldm.models.lpips import LPIPS
from tinyldm.models.tiling import PIXELS_AT_ONCE
from tinyldm.models.vae import check_size
from tinyldm.pictures.pixels import CONTRAST, SSIM_WINDOW, difference, psnr, ssim, to_pixels, write_picture
from tinyldm.pictures.sheet import INK, RED, captioned
from tinyldm.training.vae_validation import reconstruct

PUBLISHED = 256                     # picture size, in pixels, of most published comparisons
SHOWN = 12                          # pictures on the sheet of the worst
SMALLEST_SHOWN = 192                # pixels per side on that sheet


class Figure(NamedTuple):
    """A figure of every picture."""

    label: str
    places: int                     # digits after the point
    larger_is_better: bool


FIGURES = {"psnr": Figure("PSNR, dB", 2, True), "ssim": Figure("SSIM", 4, True), "lpips": Figure("LPIPS", 4, False)}


class Pair(NamedTuple):
    """A picture, what the autoencoder makes of it, and the figures of that by name."""

    item: Item
    decoded: np.ndarray             # uint8 [h, w, 3]
    figures: dict[str, float]


def check(evaluation: Evaluation) -> None:
    check_data(evaluation)
    size, smallest = resolution(evaluation), SSIM_WINDOW
    if sources := evaluation.options["vae_lpips"]:
        with torch.device("meta"):
            smallest = max(smallest, LPIPS(open_lpips(sources)[0]).smallest)
    if size < smallest:
        raise ValueError(f"--resolution {size}: pictures are compared from {smallest} px on")
    check_size(torch.empty(1, 3, size, size, device="meta"), evaluation.vae.config.downscale)


def check_data(evaluation: Evaluation) -> None:
    if not evaluation.options["data"]:
        raise ValueError("--vae needs pictures: name them with --data, as for train.py")
    config = make_config(data=evaluation.options["data"], seed=evaluation.seed)
    for source in parse_sources(config.data.sources):           # what is not there is refused before anything is written
        list_shards(source, resolution=config.data.resolution, scenes=config.data.scenes, seed=config.run.seed)


def resolution(evaluation: Evaluation) -> int:
    """The picture size to measure at: as typed, else that of the autoencoder's training, 256 at most."""
    typed, trained = evaluation.options["resolution"], evaluation.vae.config.sample_size
    return min(PUBLISHED, *np.atleast_1d(trained).tolist()) if typed is None else typed


def measure(evaluation: Evaluation) -> Measurement:
    begun, faults, sources = time.perf_counter(), Counter(), evaluation.options["vae_lpips"]
    lpips = load_lpips(*sources, device=evaluation.device) if sources else None
    rows, worst, enlarged = [], [], 0
    for items in batches(evaluation, resolution(evaluation), evaluation.count, faults):
        decoded = reconstructed(evaluation, np.stack([item.image for item in items]))
        pairs = [*map(Pair, items, decoded, figures(evaluation, items, decoded, lpips))]
        rows += [{"key": pair.item.key} | pair.figures for pair in pairs]
        worst = sorted([*worst, *pairs], key=lambda pair: pair.figures["psnr"])[:SHOWN]
        enlarged += sum(min(item.sizes[0][:2]) < resolution(evaluation) for item in items)      # of height and width as found
    if len(rows) < 2:
        raise ValueError(f"--data {' '.join(evaluation.options['data'])} has one usable picture: intervals need two or more")
    means = {name: summary([row[name] for row in rows]) for name in FIGURES if name in rows[0]}
    sheet, seconds = evaluation.out / "worst.png", time.perf_counter() - begun
    write_picture(sheet, np.asarray(worst_sheet(worst)))
    return Measurement(
        lines=[headline(evaluation, len(rows), seconds), *notes(evaluation, len(rows), enlarged, faults), "", table(means)],
        record={"vae": str(evaluation.source), "data": evaluation.options["data"], "resolution": resolution(evaluation),
                "count": len(rows), "seed": evaluation.seed, "dtype": evaluation.dtype, "lpips": sources, "seconds": round(seconds, 1),
                "left_out": dict(+faults), "enlarged": enlarged, "means": means, "pictures": rows},
        files=[sheet])


def batches(evaluation: Evaluation, size: int, count: int, faults: Counter) -> Iterator[list[Item]]:
    """About `count` pictures of size x size pixels, of which those of one batch are in memory. Those that cannot be used are counted in
    `faults`, by reason."""
    config = make_config(data=evaluation.options["data"], resolution=size, seed=evaluation.seed)
    pictures = usable_pictures(make_recipe(config.data, captioned=False), config, count, faults)
    with progress(count) as bar:
        while items := [*islice(pictures, evaluation.batch_size)]:
            yield items
            bar.update(len(items))


def reconstructed(evaluation: Evaluation, images: np.ndarray) -> np.ndarray:
    """Pictures from the means of their posteriors: uint8 [n, h, w, 3] -> the same."""
    at_once = max(1, PIXELS_AT_ONCE // images[0, ..., 0].size)
    decoded, z = reconstruct(evaluation.vae, images, evaluation.device, evaluation.dtype, at_once)
    if not z.isfinite().all():
        raise ValueError(f"the latents of {evaluation.source} are not finite numbers: its weights are damaged, or it needs --dtype fp32")
    return decoded


# ---------------------------------------------------------------- figures


@torch.no_grad()
def figures(evaluation: Evaluation, items: Sequence[Item], decoded: np.ndarray, lpips: LPIPS | None) -> list[dict[str, float]]:
    """The figures of every picture by name. decoded: uint8 [n, h, w, 3]."""
    images = np.stack([item.image for item in items])
    columns = {"psnr": psnr(decoded, images), "ssim": ssim(decoded, images)}
    if lpips:
        at_once = max(1, PIXELS_AT_ONCE // images[0, ..., 0].size)
        pixels = [to_pixels(each).to(evaluation.device) for each in (decoded, images)]
        columns["lpips"] = torch.cat([*in_parts(lambda part: lpips(*part.unbind(1)), torch.stack(pixels, 1), at_once)]).cpu().numpy()
    return [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean of two or more values with its 95 % interval (Student's t), and the extremes."""
    x = np.array(values)
    mean, half_width = float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / len(x) ** 0.5)
    return {"mean": mean, "interval": [mean - half_width, mean + half_width], "lowest": float(x.min()), "highest": float(x.max())}


# ---------------------------------------------------------------- what people read


def headline(evaluation: Evaluation, count: int, seconds: float) -> str:
    config, size = evaluation.vae.config, resolution(evaluation)
    return (f"{evaluation.source}: {type(evaluation.vae).__name__}, {config.latent_channels} latent channels at 1/{config.downscale}; "
            f"{count:,} pictures of {size} x {size} px from {', '.join(evaluation.options['data'])} in {seconds:.0f} s")


def notes(evaluation: Evaluation, count: int, enlarged: int, faults: Counter) -> list[str]:
    """What the reader of the figures should know."""
    said = []
    if faults := +faults:
        said.append(f"left out as unusable: {listed(faults)}")
    if enlarged:
        said.append(f"{enlarged:,} of {count:,} pictures are smaller and were enlarged, which makes them easy: see --resolution")
    if not evaluation.options["vae_lpips"]:
        said.append("without LPIPS: --vae-lpips names its weights")
    return said


def table(means: Mapping[str, dict]) -> str:
    lines = [f"{'':10}{'mean':>10}   {'95 % interval':20}{'worst':>10}{'best':>10}"]
    for name, row in means.items():
        label, places, larger_is_better = FIGURES[name]
        low, high = (f"{value:.{places}f}" for value in row["interval"])
        worst, best = (row["lowest"], row["highest"]) if larger_is_better else (row["highest"], row["lowest"])
        lines.append(f"{label:10}{row['mean']:10.{places}f}   {f'{low} to {high}':20}{worst:10.{places}f}{best:10.{places}f}")
    return "\n".join(lines)


def worst_sheet(worst: Sequence[Pair]) -> Image.Image:
    """Original, reconstruction and difference of each picture, enlarged by a whole number, two pictures in a row."""
    images, lines = [], []
    for item, decoded, found in worst:
        images += [item.image, decoded, difference(decoded, item.image)]
        said = [f"{FIGURES[name].label.replace(', dB', '')} {value:.{FIGURES[name].places}f}" for name, value in found.items()]
        lines += [[(item.key, INK)], [(said[0], RED), ("  ".join(said[1:]), RED)], [(f"difference x {CONTRAST}", INK)]]
    side = len(images[0])
    return captioned(images, lines, columns=6, side=side * max(1, -(-SMALLEST_SHOWN // side)))
