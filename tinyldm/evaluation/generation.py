"""Pictures that a model draws for evaluation, as files: any number of them, drawn by any number of processes, resumed after a kill.

Picture i is drawn from caption i and seed `--seed` + i and lies in OUT/pictures/SETTINGS/ as 000000i.png. SETTINGS ends in a digest of all
that decides the pictures, weights included, so that files of other settings are never taken for these. What is there already is not
drawn again. Under torchrun each process draws its share, and then waits for the files of all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tinyldm.device import autocast
from tinyldm.evaluation.base import Evaluation, switches
from tinyldm.evaluation.captions import Captions
from tinyldm.evaluation.progress import progress
from tinyldm.files import make_output_folder, write_file
from tinyldm.model import Model
from tinyldm.pictures.pixels import write_picture
from tinyldm.pipeline import DrawSettings, draw, picture_size
from tinyldm.training.distributed import World

POLL = 1.0                  # seconds between looks at what the other processes have drawn


class Job(NamedTuple):
    """A picture to draw."""

    file: Path
    prompt: str
    seed: int


def settings_of(evaluation: Evaluation, settings: DrawSettings, captions: Captions) -> dict[str, Any]:
    """Everything that decides what the pictures look like."""
    width, height = picture_size(evaluation.model)
    depends_on_batch = settings.shortcut and settings.shortcut.name == "first_block_cache"     # it decides for a batch as a whole
    return {"model": str(evaluation.source), "weights": fingerprint(evaluation.model), "step": evaluation.model.defaults.get("step"),
            **{name: getattr(settings, name) for name in ("cfg", "told", "steps", "sampler", "schedule")},
            **{name: getattr(evaluation, name) for name in ("seed", "dtype", "no_ema")}, "width": width, "height": height,
            "captions": captions.source, "captions_digest": captions.digest,
            **switches(settings), **({"autoguidance": fingerprint(settings.worse)} if settings.worse else {}),
            **({"batch_size": evaluation.batch_size} if depends_on_batch else {})}


def fingerprint(model: Model) -> str:
    """A digest of the first and last numbers of every weight: enough to tell two steps of a training apart, and the rows that
    --embedding adds, without reading gigabytes."""
    digest = hashlib.sha256()
    for module in model.modules.values():
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            digest.update(name.encode() + torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def drawn_folder(evaluation: Evaluation, settings: DrawSettings, captions: Captions, kind: str = "pictures") -> Path:
    """The folder for pictures of these settings, OUT/KIND/SETTINGS, with settings.json in it."""
    facts = settings_of(evaluation, settings, captions)
    text = json.dumps(facts, sort_keys=True, indent=1, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    folder = evaluation.out / kind / f"{settings.sampler}-{settings.steps}-cfg-{scale(settings):g}-{digest}"
    make_output_folder(folder)
    if evaluation.world.main:
        write_file(folder / "settings.json", text + "\n")
    return folder


def scale(settings: DrawSettings) -> float:
    """The guidance scale as --cfg names it: that which the network is told, where there is one (FLUX dev)."""
    return scales([settings])[0]


def scales(several: Sequence[DrawSettings]) -> list[float]:
    """The guidance scales as --cfg names them: those that the network is told, where it is told any (then 1 is one of them too)."""
    told = any(settings.told != 1 for settings in several)
    return [settings.told if told else settings.cfg for settings in several]


def generate(evaluation: Evaluation, captions: Captions) -> list[Path]:
    """Draw `evaluation.count` pictures at every guidance scale -> the folders."""
    evaluation.drawing = True                                   # stays so after an error: the others wait for files
    folders = [drawn_folder(evaluation, settings, captions) for settings in evaluation.guidance]
    for folder, settings in zip(folders, evaluation.guidance):
        jobs = [Job(folder / f"{i:07d}.png", captions[i], evaluation.seed + i) for i in range(evaluation.count)]
        draw_missing(evaluation, settings, jobs, f"cfg {scale(settings):g}")
    return folders


def draw_missing(evaluation: Evaluation, settings: DrawSettings, jobs: Sequence[Job], label: str) -> None:
    """Draw this process's share of the pictures that have no file yet, and wait for the others'."""
    evaluation.drawing = True
    mine = [job for job in jobs[evaluation.world.rank::evaluation.world.size] if not job.file.exists()]
    with progress(len(mine), label, shown=bool(mine)) as bar:
        with autocast(evaluation.device, evaluation.dtype):
            for start in range(0, len(mine), evaluation.batch_size):
                batch = mine[start:start + evaluation.batch_size]
                images = draw(evaluation.model, [job.prompt for job in batch], [job.seed for job in batch], settings)
                for job, image in zip(batch, images):
                    write_picture(job.file, image)
                bar.update(len(batch))
    if evaluation.world.size > 1:
        wait_for(lambda: all(job.file.exists() for job in jobs))
    evaluation.drawing = False


def wait_for(finished: Callable[[], bool]) -> None:
    """Other processes end this one through torchrun where they fail."""
    while not finished():
        time.sleep(POLL)


def read_drawn(folder: Path, captions: Captions, count: int, batch_size: int, world: World) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The pictures of a folder in batches, uint8 [b, h, w, 3], with their captions; of several processes, each one's part."""
    for start in range(0, count, batch_size)[world.rank::world.size]:
        numbers = range(start, min(start + batch_size, count))
        yield np.stack([pixels(folder / f"{i:07d}.png") for i in numbers]), [captions[i] for i in numbers]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
