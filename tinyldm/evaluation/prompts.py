"""Metric 'prompts': does the picture show what the caption names? For models trained on toyworld.

Half of the captions name pairs of colour and subject that training saw, half the pairs that it never did. A small network
that learned from drawn scenes (recogniser.py) reads subject, colour and background from each picture. Its own errors are
measured beside the model's: on drawn scenes, and on drawn scenes that went through the model's VAE, which is the best that
the model can reach. prompts.json holds every reading, failures.png shows pictures that were read as something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tinyldm.data.toyworld import BACKGROUNDS, PAIRS, SUBJECTS, Scene, sample
from tinyldm.data.toyworld_source import all_toyworld
from tinyldm.evaluation.base import Drawn, Evaluation, Measurement
from tinyldm.evaluation.recogniser import UNCLEAR, WORDS, Reading, Recogniser, get_recogniser, score
from tinyldm.model import Model
from tinyldm.pictures.pixels import to_bytes, to_pixels
from tinyldm.pictures.sheet import INK, RED, captioned
from tinyldm.pipeline import picture_size

SPLITS = {"train": "trained pairs", "held_out": "held-out pairs"}
SHOWN = 18                                  # failures of each split on the sheet


class Request(NamedTuple):
    """A caption, and the scene that a picture of it should show."""

    prompt: str
    scene: Scene


class Answer(NamedTuple):
    """What the model drew for a request, and what the recogniser read from it."""

    split: str
    request: Request
    image: np.ndarray           # uint8 [h, w, 3]
    reading: Reading

    @property
    def right(self) -> bool:
        return all(getattr(self.request.scene, name) == getattr(self.reading, name) for name in WORDS)


def check(evaluation: Evaluation) -> None:
    data = evaluation.model.defaults.get("data", ["something else"])
    if not all_toyworld(data):
        raise ValueError(f"{evaluation.source} was trained on {', '.join(data)}: metric 'prompts' reads toyworld's pictures only; "
                         "use a run trained with --data toyworld")


def measure(evaluation: Evaluation) -> Measurement:
    recogniser = get_recogniser(evaluation.device)
    own = recogniser_scores(evaluation, recogniser)
    asked = half_of_each(evaluation.count, evaluation.seed)
    drawn = evaluation.draw([request.prompt for _, request in asked])
    answers = read_answers(asked, drawn.images, recogniser)
    scores = scores_of(answers)

    sheet = evaluation.out / "failures.png"
    failures = {split: [it for it in answers if it.split == split and not it.right] for split in SPLITS}
    if shown := failures["train"][:SHOWN] + failures["held_out"][:SHOWN]:
        failure_sheet(shown).save(sheet)
    else:
        sheet.unlink(missing_ok=True)
    return Measurement(
        lines=[headline(evaluation, drawn), "", table(own | {SPLITS[split]: row for split, row in scores.items()})],
        record=evaluation.facts(drawn.seconds) | {
            "recogniser": {name.strip(): row for name, row in own.items()},
            "scores": scores,
            "pictures": [{"prompt": it.request.prompt, "seed": evaluation.seed + i, "split": it.split, "right": it.right,
                          **it.reading._asdict()} for i, it in enumerate(answers)]},
        files=[sheet] if shown else [])


def half_of_each(count: int, seed: int) -> list[tuple[str, Request]]:
    """`count` requests with their splits, half of each split."""
    return [(split, request) for split, n in (("train", count - count // 2), ("held_out", count // 2))
            for request in make_requests(n, split, seed)]


def read_answers(asked: Sequence[tuple[str, Request]], images: np.ndarray, recogniser: Recogniser) -> list[Answer]:
    return [Answer(*pair, image, reading) for pair, image, reading in zip(asked, images, recogniser.read(images), strict=True)]


def scores_of(answers: Sequence[Answer]) -> dict[str, dict]:
    """Split -> recogniser.score of its answers."""
    return {split: score([it.request.scene for it in answers if it.split == split],
                         [it.reading for it in answers if it.split == split]) for split in SPLITS}


def make_requests(count: int, split: str, seed: int = 0, subjects: Collection[str] = SUBJECTS) -> list[Request]:
    """`count` captions over the shuffled pairs of a split and these subjects; each round over all pairs shifts the backgrounds by one.

    So n captions cover n pairs, and 5 n captions cover them with every background. Worded as toyworld's captions are.
    """
    rng = Random(f"{seed}/{split}/prompts")
    asked = [pair for pair in PAIRS[split] if pair[1] in subjects]
    pairs, backgrounds = rng.sample(asked, len(asked)), rng.sample(list(BACKGROUNDS), len(BACKGROUNDS))
    requests = []
    for i in range(count):
        turn, index = divmod(i, len(pairs))
        colour, subject = pairs[index]
        background = backgrounds[(turn + index) % len(backgrounds)]
        phrase = rng.choice(BACKGROUNDS[background].phrases)
        article = "an" if colour == "orange" else "a"
        requests.append(Request(f"{article} {colour} {subject} {phrase}", Scene(subject, colour, background)))
    return requests


def recogniser_scores(evaluation: Evaluation, recogniser: Recogniser) -> dict[str, dict]:
    """The recogniser on scenes that it has not seen, as drawn and as the model's VAE reconstructs them."""
    model = evaluation.model
    size = model.defaults.get("resolution") or min(picture_size(model))
    unseen = [sample(i, size, seed=2**32, split="all") for i in range(1000)]
    images, scenes = np.stack([it.image for it in unseen]), [it.scene for it in unseen]
    rebuilt = reconstruct(model, images, evaluation.device, evaluation.batch_size)
    return {"drawn scenes": score(scenes, recogniser.read(images)), "  after the VAE": score(scenes, recogniser.read(rebuilt))}


@torch.no_grad()
def reconstruct(model: Model, images: np.ndarray, device: torch.device, batch_size: int) -> np.ndarray:
    """Pictures, encoded and decoded by the model's VAE: uint8 [n, h, w, 3] -> the same."""
    with model.at_work("vae"):
        return np.concatenate([to_bytes(model.vae.decode(model.vae.encode(to_pixels(images[i : i + batch_size]).to(device)).mean))
                               for i in range(0, len(images), batch_size)])


def headline(evaluation: Evaluation, drawn: Drawn) -> str:
    how = evaluation.settings
    return (f"{evaluation.source}: {how.sampler}, {how.steps} steps, cfg {how.cfg:g}; "
            f"{len(drawn.images)} pictures in {drawn.seconds:.0f} s")


def table(rows: Mapping[str, dict]) -> str:
    """Shares in per cent, one line per set of pictures, with the 95 % interval of the last column."""
    lines = [f"{'correct, %':16}{'pictures':>9}" + "".join(f"{name:>12}" for name in (*WORDS, "all")) + "   95 % interval"]
    for name, row in rows.items():
        low, high = row["all"]["interval"]
        shares = "".join(f"{row[column]['share'] * 100:12.1f}" for column in (*WORDS, "all"))
        lines.append(f"{name:16}{row['all']['count']:>9}{shares}{low * 100:10.1f} to {high * 100:.1f}")
    return "\n".join(lines)


def failure_sheet(failures: Sequence[Answer], columns: int = 6, side: int = 192) -> Image.Image:
    """The pictures in a grid, each with its prompt and, in red, what was read instead (?: unclear)."""
    lines = [[(request.prompt, INK), (f"read: {read.colour} {read.subject}, {read.background}".replace(UNCLEAR, "?"), RED)]
             for _, request, _, read in failures]
    return captioned([it.image for it in failures], lines, columns, side)
