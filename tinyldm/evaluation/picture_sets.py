"""Sets of pictures that metrics compare: files as they are found, pictures that a model draws, references; and their features.

A set is read once for every tower, in batches, and what metrics need is kept as a FeatureSet (statistics.py), which several metrics share.
Of several processes each computes the features of its part of the batches (processes.py).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyldm.config import DataConfig, make_config
from tinyldm.data.decoding import ENDINGS, Framing
from tinyldm.data.encoding import Recipe
from tinyldm.data.file_sources import FILES, find_format
from tinyldm.data.prepare import usable_pictures
from tinyldm.data.report import listed
from tinyldm.data.sources import find_kind
from tinyldm.evaluation import generation, statistics
from tinyldm.evaluation.base import Evaluation
from tinyldm.evaluation.captions import Captions, read_captions
from tinyldm.evaluation.processes import merge, together
from tinyldm.evaluation.progress import progress
from tinyldm.evaluation.statistics import FeatureSet, Gatherer
from tinyldm.evaluation.towers import OpenTower, open_tower, outputs
from tinyldm.models.inception import InceptionFeatures
from tinyldm.pipeline import picture_size
from tinyldm.training.distributed import World
from tinyldm.training.run_folder import find_clip

ALL = 10**12                        # a count that no set reaches
Batch = tuple[np.ndarray, list[str]]                        # uint8 [b, h, w, 3], and their captions ("": none)
Batches = Callable[[World], Iterator[Batch]]                # those of this process


class PictureSet(NamedTuple):
    """Pictures that can be read any number of times."""

    label: str                      # "cfg 3", or where the pictures are
    batches: Batches
    facts: dict[str, Any]           # for the metric's record


@dataclass(frozen=True)
class AsFound(Framing):
    """Pictures keep their sizes."""

    resolution: int = 1

    def size(self, height: float, width: float) -> tuple[int, int]:
        return round(height), round(width)


def is_pictures(word: str) -> bool:
    """Whether a word names pictures rather than a model: a shard, a kind of source, or a folder that holds pictures or shards and no
    part of a run."""
    path = Path(word)
    if find_kind(word) is not FILES or path.is_file() and find_format(word):
        return True
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "log.jsonl", "model_index.json", "model")):
        return False
    endings = {ending for names in ENDINGS.values() for ending in names}
    return any(file.suffix.lower().lstrip(".") in endings or find_format(file.name) for file in path.rglob("*"))


def read_pictures(words: Sequence[str], count: int, size: int | None, batch_size: int, seed: int,
                  captioned: bool = False) -> Iterator[Batch]:
    """The pictures of data sources in batches of one size each. size: pixels per side of the square they are cropped to; None: they
    keep their own sizes. captioned: pictures without a caption are left out."""
    data = make_config(data=list(words), seed=seed, **({} if size is None else {"resolution": size}))
    framing, plain = AsFound() if size is None else Framing(size), DataConfig()
    recipe = Recipe(framing, (), plain.min_caption, plain.max_caption, captioned)
    faults: Counter = Counter()
    waiting: dict[tuple[int, ...], list] = {}
    for item in usable_pictures(recipe, data, count, faults):
        same = waiting.setdefault(item.image.shape, [])
        same.append(item)
        if len(same) == batch_size or sum(map(len, waiting.values())) > 8 * batch_size:     # of many sizes, or memory would fill
            yield batch_of(waiting.pop(item.image.shape))
    for items in waiting.values():
        yield batch_of(items)
    if faults := +faults:
        print(f"{' '.join(words)}: left out as unusable: {listed(faults)}", flush=True)


def divided(batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """This process's part of batches that all of them read. (All decode them: which pictures are usable shows only then.)"""
    return islice(batches, world.rank, None, world.size)


def batch_of(items: Sequence) -> Batch:
    return np.stack([item.image for item in items]), [item.captions[0][1] if item.captions else "" for item in items]


# ---------------------------------------------------------------- what is measured, and what it is compared with


def pixel_size(evaluation: Evaluation) -> int | None:
    """The size to which references are cropped, in pixels: as typed, else that of the model's pictures; None: files stay as they are."""
    if evaluation.options["resolution"] is not None or evaluation.model is None:
        return evaluation.options["resolution"]
    return min(picture_size(evaluation.model))


def captions_of(evaluation: Evaluation) -> Captions:
    """ValueError where no captions are named and none are known."""
    words = evaluation.options["captions"] or evaluation.model.defaults.get("data")
    if not words:
        raise ValueError("no captions to draw from: name a file of them or a data set with --captions")
    words = [words] if isinstance(words, str) else words
    return share(evaluation, "captions", lambda: read_captions(words, evaluation.count, evaluation.seed))


def share(evaluation: Evaluation, key: Any, make: Callable[[], Any]) -> Any:
    """What metrics share: made once."""
    if key not in evaluation.memo:
        evaluation.memo[key] = make()
    return evaluation.memo[key]


def subjects(evaluation: Evaluation, captioned: bool = False) -> list[PictureSet]:
    """What is measured: of a model one set for every guidance scale, which is drawn here; else the pictures. captioned: pictures without
    captions are left out."""
    if evaluation.model is None:
        words, size = [str(evaluation.source)], pixel_size(evaluation)
        read = lambda world: divided(read_pictures(words, evaluation.count, size, evaluation.batch_size, evaluation.seed, captioned), world)
        return [PictureSet(words[0], read, {"pictures": words[0], "resolution": size or "as found"})]
    captions = captions_of(evaluation)
    folders = share(evaluation, "drawn", lambda: generation.generate(evaluation, captions))
    return [PictureSet(f"cfg {scale:.15g}",
                       lambda world, folder=folder: generation.read_drawn(folder, captions, evaluation.count, evaluation.batch_size, world),
                       generation.settings_of(evaluation, settings, captions))
            for folder, settings, scale in zip(folders, evaluation.guidance, generation.scales(evaluation.guidance))]


def reference(evaluation: Evaluation, tower: OpenTower, kept: int) -> FeatureSet:
    """The features of --reference: an .npz of statistics of this tower where one is named, else those of the pictures that are."""
    files = [word for word in evaluation.options["reference"] if statistics.is_statistics(word)]
    words = [word for word in evaluation.options["reference"] if word not in files]
    chosen = next((file for file in files if statistics.tower_of(file) == tower.name), None if words else files[0])
    if chosen is None:
        size = pixel_size(evaluation)
        read = lambda world: divided(read_pictures(words, ALL, size, evaluation.batch_size, evaluation.seed), world)
        source = PictureSet(" ".join(words), read, {"reference": " ".join(words), "resolution": size or "as found"})
        return features_of(evaluation, tower, source, kept)
    return share(evaluation, ("statistics", chosen, tower.name), lambda: statistics.load(chosen, tower.name, tower.row.resize))


# ---------------------------------------------------------------- features


def tower_of(evaluation: Evaluation, name: str) -> OpenTower:
    """A tower with the weights that --weights names for it. ValueError, with how to get them, where there are none."""
    sources = sources_of(evaluation)
    opened = lambda: open_tower(name, sources.get(name.partition("-")[0]), evaluation.device)
    return share(evaluation, ("tower", name), lambda: together(evaluation.world, opened))


def sources_of(evaluation: Evaluation) -> dict[str, str | Path]:
    """Where the towers' weights are, by the first words of their names. Of a run that trained a CLIP it is that of its newest
    checkpoint."""
    named = evaluation.options["clip"]
    found = weight_sources(evaluation.options["weights"]) | ({"clip": named} if named else {})
    return {name: find_clip(source) or source for name, source in found.items()}


def weight_sources(words: Sequence[str]) -> dict[str, str]:
    """["inception=a.pth", ...] -> {tower: source}. ValueError for words of another form."""
    found = dict(word.partition("=")[::2] for word in words)
    if bad := [word for word, source in found.items() if not source]:
        raise ValueError(f"--weights {bad[0]}: expected TOWER=SOURCE, as in inception=pt_inception-2015-12-05-6726825d.pth")
    return found


def features_of(evaluation: Evaluation, tower: OpenTower, pictures: PictureSet, kept: int = statistics.KEPT) -> FeatureSet:
    """The features of a set, made once. ValueError where there are fewer than two pictures."""
    key = ("features", tower.name, json.dumps(pictures.facts, sort_keys=True, default=str), kept)
    return share(evaluation, key, lambda: gather(tower, pictures, kept, evaluation.world))


def gather(tower: OpenTower, pictures: PictureSet, kept: int = statistics.KEPT, world: World = World()) -> FeatureSet:
    """The features of a set, of which each of several processes computes its part."""
    own = together(world, lambda: gather_part(tower, pictures, kept, world))
    return merge(own, world).finish(source=pictures.label, pixels=str(pictures.facts.get("resolution", pictures.facts.get("width"))))


def gather_part(tower: OpenTower, pictures: PictureSet, kept: int, world: World) -> Gatherer:
    gatherer = Gatherer(tower.name, tower.row.resize, kept)
    with progress(None, f"{tower.name} of {pictures.label}") as bar:
        for images, _ in pictures.batches(world):
            found = outputs(tower, images)
            rows, logits = (found.pool, found.logits) if isinstance(found, InceptionFeatures) else (found, None)
            gatherer.add(rows.cpu().numpy(), keys_of(images), None if logits is None else logits.cpu().numpy())
            bar.update(len(images))
    return gatherer


def keys_of(images: np.ndarray) -> np.ndarray:
    """A hash of every picture's pixels: uint8 [b, h, w, 3] -> uint64 [b]."""
    return np.array([int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest(), "little") for image in images],
                    np.uint64)
