"""Metrics of sets of pictures: fid, is, kid, cmmd, fd_dino, precision_recall, clip, stats. The sets are what a model draws at one
guidance scale or several, or pictures that are there already (picture_sets.py); the arithmetic is in statistics.py and distances.py.

A number depends on much besides the pictures: the tower and its weights, the resize, the number of pictures, the reference. All of it is
printed beside the number, and is in METRIC.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tinyldm.evaluation import distances, statistics
from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.evaluation.curve import Point, draw_curve
from tinyldm.evaluation.distances import Estimate, Frechet
from tinyldm.evaluation.picture_sets import (Batch, PictureSet, captions_of, features_of, pixel_size, reference, subjects, tower_of,
                                             weight_sources)
from tinyldm.evaluation.processes import merge_moments, together
from tinyldm.evaluation.statistics import FeatureSet, Moments
from tinyldm.evaluation.towers import TOWERS, OpenTower, features
from tinyldm.folders.load import load_text, load_tokenizer
from tinyldm.lookup import lookup
from tinyldm.pictures.pixels import write_picture
from tinyldm.text.base_tokenizer import BaseTokenizer

FEW = 10_000                        # pictures below which the bias of FID is pointed out
CMMD_KEPT = 30_000                  # rows of CMMD's sample: its embeddings are short
RESIZES = {"tensorflow1": "inception", "clean": "inception-clean", "pytorch": "inception-pytorch"}      # --fid-resize -> tower
Row = Mapping[str, Any]             # columns of a table: an Estimate, a Spread, a number, or None where there is none


class Spread(NamedTuple):
    mean: float
    std: float                      # over parts or subsets, which is no interval


class Comparison(NamedTuple):
    """What a metric compares."""

    tower: OpenTower
    pictures: PictureSet
    found: FeatureSet               # of the pictures
    real: FeatureSet                # of the reference


# ---------------------------------------------------------------- checks, before anything is drawn


def check(evaluation: Evaluation) -> None:
    """What all of these metrics ask for."""
    named = weight_sources(evaluation.options["weights"])
    for name in named:
        lookup({known.partition("-")[0]: None for known in TOWERS}, name, "tower of --weights")
    if evaluation.options["clip"] and "clip" in named:
        raise ValueError("--clip and --weights clip= name the same weights: leave one out")
    if (replicates := evaluation.options["replicates"]) < 2:
        raise ValueError(f"--replicates {replicates}: an interval needs two bootstrap replicates or more")
    if (size := evaluation.options["resolution"]) is not None and size < 1:
        raise ValueError(f"--resolution {size}: pictures have one pixel or more")
    lookup(RESIZES, evaluation.options["fid_resize"], "--fid-resize")
    if evaluation.model is None and evaluation.options["captions"]:
        raise ValueError("--captions is for a model that draws: pictures have their captions beside them")
    if evaluation.model is not None:
        captions_of(evaluation)             # what cannot be read is refused before anything is written


def check_reference(evaluation: Evaluation) -> None:
    check(evaluation)
    if not evaluation.options["reference"]:
        raise ValueError("no --reference: name real pictures (a folder, shards) or an .npz of their statistics")
    for word in evaluation.options["reference"]:
        if Path(word).suffix == ".npz" and not Path(word).exists():
            raise ValueError(f"--reference {word}: there is no such file")


# ---------------------------------------------------------------- metrics


def fid(evaluation: Evaluation) -> Measurement:
    return frechet(evaluation, "fid", "FID", inception(evaluation))


def fd_dino(evaluation: Evaluation) -> Measurement:
    return frechet(evaluation, "fd_dino", "FD-DINOv2", "dinov2")


def frechet(evaluation: Evaluation, name: str, label: str, tower: str) -> Measurement:
    made: dict[int, Frechet] = {}           # the root of the reference's covariance is taken once

    def of(compared: Comparison) -> Row:
        found, real = compared.found, compared.real
        distance = made.setdefault(id(real), Frechet(real.gaussian))
        rows = found.kept(label)
        value = distance.bootstrap(distance.to(found.gaussian), rows, found.count, evaluation.options["replicates"])
        infinity = distance.at_infinity(rows) if 4 <= found.count < FEW else None
        return {label: value, f"{label}-infinity": infinity}

    bias = f"{label} of few pictures is too high: compare it at equal numbers, or {label}-infinity"
    return compare(evaluation, name, tower, of, bias=bias)


def kid(evaluation: Evaluation) -> Measurement:
    def of(compared: Comparison) -> Row:
        found = distances.kid(compared.found.kept("KID"), compared.real.kept("KID"), replicates=evaluation.options["replicates"])
        return {"KID x 1000": Spread(1000 * found.of_subsets, 1000 * found.std), "subsets of": found.size,
                "of all x 1000": Estimate(1000 * found.all_pairs.value, tuple(1000 * end for end in found.all_pairs.interval))}

    return compare(evaluation, "kid", inception(evaluation), of)


def cmmd(evaluation: Evaluation) -> Measurement:
    def of(compared: Comparison) -> Row:
        return {"CMMD": distances.cmmd(compared.found.kept("CMMD"), compared.real.kept("CMMD"), evaluation.options["replicates"])}

    return compare(evaluation, "cmmd", "cmmd", of, kept=CMMD_KEPT)


def precision_recall(evaluation: Evaluation) -> Measurement:
    def of(compared: Comparison) -> Row:
        found = distances.precision_recall(compared.real.kept("precision"), compared.found.kept("precision"))
        return {name: distances.mean_estimate(values, evaluation.options["replicates"]) for name, values in found._asdict().items()}

    return compare(evaluation, "precision_recall", inception(evaluation), of)


def inception_score(evaluation: Evaluation) -> Measurement:
    def of(tower: OpenTower, pictures: PictureSet) -> tuple[int, Row]:
        found = features_of(evaluation, tower, pictures)
        return found.count, {"IS": Spread(*found.inception_score)}

    return tabulate(evaluation, "is", inception(evaluation), of)


def clip(evaluation: Evaluation) -> Measurement:
    """100 max(cos, 0) of a picture and its caption (arXiv:2104.08718, Eq. 1, with 100 for 2.5), by both towers of a CLIP."""
    tower = tower_of(evaluation, "clip")
    text, tokenizer = load_text(tower.source, evaluation.device), load_tokenizer(tower.source)

    def of(tower: OpenTower, pictures: PictureSet) -> tuple[int, Row]:
        own = together(evaluation.world, lambda: clip_scores(tower, text, tokenizer, pictures.batches(evaluation.world)))
        moments = merge_moments(own, evaluation.world)
        spread = moments.gaussian()
        half_width = distances.NORMAL * float(spread.cov[0, 0] / moments.count) ** 0.5
        value = float(spread.mean[0])
        return moments.count, {"CLIP score": Estimate(value, (value - half_width, value + half_width))}

    return tabulate(evaluation, "clip", "clip", of, captioned=True)


def clip_scores(tower: OpenTower, text: nn.Module, tokenizer: BaseTokenizer, batches: Iterable[Batch]) -> Moments:
    """Mean and variance of the scores of pictures with captions. text, tokenizer: of the same CLIP as the tower."""
    moments, device = Moments(1), next(tower.module.parameters()).device
    for images, captions in batches:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            words = text(torch.from_numpy(tokenizer.encode(captions)).to(device)).pooled
        moments.add(100 * torch.cosine_similarity(features(tower, images), words.float()).clamp(min=0).double().cpu().numpy()[:, None])
    return moments


def stats(evaluation: Evaluation) -> Measurement:
    """Write the statistics of pictures, to be a --reference."""
    tower, files = tower_of(evaluation, evaluation.options["tower"]), []
    lines, rows = [], []
    for pictures, found in [(pictures, features_of(evaluation, tower, pictures)) for pictures in subjects(evaluation)]:
        evaluation.leave_unless_first()
        files.append(evaluation.out / f"{tower.name}{'' if len(subjects(evaluation)) == 1 else '-' + pictures.label.replace(' ', '-')}.npz")
        statistics.save(files[-1], found)
        lines.append(f"{pictures.label}: {found.count:,} pictures, {len(found.gaussian.mean)} features of {tower.name}, resize "
                     f"{tower.row.resize}")
        rows.append(dict(pictures.facts) | {"count": found.count})
    return Measurement(lines, {**tower.settings, "results": rows}, files)


# ---------------------------------------------------------------- tables


def inception(evaluation: Evaluation) -> str:
    return RESIZES[evaluation.options["fid_resize"]]


def compare(evaluation: Evaluation, name: str, tower: str, of: Callable[[Comparison], Row], kept: int = statistics.KEPT,
            bias: str = "") -> Measurement:
    """A metric that compares every set with the reference."""
    facts: dict[str, Any] = {}

    def row(tower: OpenTower, pictures: PictureSet) -> tuple[int, Row]:
        real, found = reference(evaluation, tower, kept), features_of(evaluation, tower, pictures, kept)
        distances.check_dimensions(found.gaussian.mean[None], real.gaussian.mean[None])
        facts.update(reference=evaluation.options["reference"], reference_count=real.count, reference_pixels=real.facts.get("pixels"),
                     kept=kept, replicates=evaluation.options["replicates"])
        return found.count, of(Comparison(tower, pictures, found, real)) if evaluation.world.main else {}

    return tabulate(evaluation, name, tower, row, facts, bias)


def tabulate(evaluation: Evaluation, name: str, tower_name: str, of: Callable[[OpenTower, PictureSet], tuple[int, Row]],
             facts: Mapping[str, Any] | None = None, bias: str = "", captioned: bool = False) -> Measurement:
    """A metric of every set: `of` gives the number of pictures and the columns."""
    begun, tower = time.perf_counter(), tower_of(evaluation, tower_name)
    sets = subjects(evaluation, captioned)
    rows = [(pictures, *of(tower, pictures)) for pictures in sets]
    evaluation.leave_unless_first()
    evaluation.memo["columns", name] = [next(iter(columns.values())) for _, _, columns in rows]
    lines = [f"{evaluation.source}: tower {tower.name} ({tower.source}), resize {tower.row.resize} to {tower.size} px",
             *([reference_line(facts)] if facts else []), "", *table([(each.label, count, columns) for each, count, columns in rows])]
    if bias and any(count < FEW for _, count, _ in rows):
        lines += ["", bias]
    results = [dict(pictures.facts) | {"count": count, "values": {key: recorded(value) for key, value in columns.items()}}
               for pictures, count, columns in rows]
    return Measurement(lines, {**tower.settings, **(facts or {}), "resolution": pixel_size(evaluation),
                               "seconds": round(time.perf_counter() - begun, 1), "results": results}, curve(evaluation))


def reference_line(facts: Mapping[str, Any]) -> str:
    known, pixels = facts["reference_count"], facts["reference_pixels"]
    return (f"reference {' '.join(facts['reference'])}: {'an unknown number of' if known is None else f'{known:,}'} pictures"
            f"{'' if pixels is None else f', {pixels} px' if pixels.isdigit() else ', of their own sizes'}")


def table(rows: Sequence[tuple[str, int, Row]]) -> list[str]:
    """One line per set. Estimates have their 95 % interval behind them."""
    shown = [{"": Path(label).name, "pictures": f"{count:,}"} | {key: shown_value(value) for key, value in columns.items()}
             for label, count, columns in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    line = lambda row: "  ".join(row[key].ljust(width) if not key else row[key].rjust(width) for key, width in widths.items()).rstrip()
    return [line({key: key for key in widths}), *map(line, shown)]


def shown_value(value: Any) -> str:
    if isinstance(value, Estimate):
        return f"{value.value:.3f} ({value.interval[0]:.3f} to {value.interval[1]:.3f})"
    if isinstance(value, Spread):
        return f"{value.mean:.3f} +- {value.std:.3f}"
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def recorded(value: Any) -> Any:
    """For JSON."""
    return value._asdict() if isinstance(value, (Estimate, Spread)) else value


def curve(evaluation: Evaluation) -> list[Path]:
    """The picture of FID against CLIP score, as soon as both are known at two guidance scales or more."""
    fids, clips = (evaluation.memo.get(("columns", name)) for name in ("fid", "clip"))
    if not fids or not clips or len(fids) < 2:
        return []
    labels = [pictures.label for pictures in subjects(evaluation)]
    file = evaluation.out / "curve.png"
    points = [Point(clip.value, fid.value, label) for clip, fid, label in zip(clips, fids, labels)]
    write_picture(file, draw_curve(points, "CLIP score", "FID"))
    return [file]
