"""Metric 'geneval': the folders of pictures that GenEval's own scorer reads (arXiv:2310.11513; djghosh13/geneval, README).

NNNNN/metadata.jsonl is the line of prompt NNNNN, NNNNN/samples/ has its four pictures. The scorer needs a detector (mmdet), which stays
outside: it runs on the folder that is printed. Picture j of prompt i has the seed `--seed` + 4 i + j.
"""

from __future__ import annotations

import json
from pathlib import Path

from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.evaluation.captions import Captions, of_file
from tinyldm.evaluation.generation import Job, draw_missing, drawn_folder, scale, scales
from tinyldm.files import write_file

COPIES = 4                      # pictures of a prompt


def check(evaluation: Evaluation) -> None:
    if evaluation.model is None:
        raise ValueError(f"{evaluation.source} is pictures: metric 'geneval' draws, name a model")
    words = evaluation.options["captions"] or []
    if len(words) != 1 or not words[0].endswith(".jsonl"):
        raise ValueError("metric 'geneval' draws GenEval's prompts: name its prompts/evaluation_metadata.jsonl with --captions")
    prompts(evaluation)


def prompts(evaluation: Evaluation) -> Captions:
    captions = of_file(Path(evaluation.options["captions"][0]))
    if not all("prompt" in row for row in captions.rows):
        raise ValueError(f'{captions.source} has lines without a "prompt": name GenEval\'s prompts/evaluation_metadata.jsonl')
    return captions


def measure(evaluation: Evaluation) -> Measurement:
    captions, evaluation.drawing = prompts(evaluation), True
    folders = [write_folder(evaluation, i, captions) for i in range(len(evaluation.guidance))]
    evaluation.leave_unless_first()
    return Measurement(
        [f"{len(captions.rows)} prompts, {COPIES} pictures each: score a folder with evaluation/evaluate_images.py of djghosh13/geneval"],
        {"model": str(evaluation.source), "captions": captions.source, "copies": COPIES, "seed": evaluation.seed,
         "results": [{"cfg": cfg, "folder": str(folder)} for cfg, folder in zip(scales(evaluation.guidance), folders)]}, folders)


def write_folder(evaluation: Evaluation, which: int, captions: Captions) -> Path:
    """The folder for one guidance scale. Pictures that are there already are kept. The lines are written each time: the scorer reads more
    of a line than its prompt, and what it asks of the same prompt may have changed since."""
    settings = evaluation.guidance[which]
    folder, jobs = drawn_folder(evaluation, settings, captions, "geneval"), []
    for i, row in enumerate(captions.rows):
        place = folder / f"{i:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        if evaluation.world.main:
            write_file(place / "metadata.jsonl", json.dumps(row))
        jobs += [Job(place / "samples" / f"{j:04d}.png", captions[i], evaluation.seed + COPIES * i + j) for j in range(COPIES)]
    draw_missing(evaluation, settings, jobs, f"geneval, cfg {scale(settings):g}")
    return folder
