"""What train.py measures every --eval-every steps, with averaged weights, of a few pictures: to compare the steps of a run, not runs.

Metrics in the table below say what is drawn and what is read from it. Those with a reference are given the run's own held-out samples:
their captions are drawn from, and their latents, decoded, are the real pictures. So an FID here leaves out what the autoencoder loses, and
it is of too few pictures to be compared with any other. (Where the autoencoder is trained along, the real pictures are those in the cache.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tinyldm.config import Config
from tinyldm.data.toyworld_source import all_toyworld
from tinyldm.device import autocast
from tinyldm.evaluation.base import Evaluation
from tinyldm.evaluation.distances import Frechet
from tinyldm.evaluation.picture_metrics import clip_scores
from tinyldm.evaluation.picture_sets import PictureSet, gather, weight_sources
from tinyldm.evaluation.prompts import half_of_each, read_answers, scores_of
from tinyldm.evaluation.recogniser import get_recogniser
from tinyldm.evaluation.towers import GET_INCEPTION, OpenTower, open_tower
from tinyldm.folders.load import load_text, load_tokenizer
from tinyldm.lookup import lookup
from tinyldm.pictures.pixels import to_bytes
from tinyldm.pipeline import decode, draw_settings
from tinyldm.training.context import RunContext
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.log import Log
from tinyldm.training.run_folder import find_clip
from tinyldm.training.second_stage import LatentStage, evaluating

AT_ONCE = 50                            # pictures that are drawn, or decoded, at once


class WhileTraining:
    """The evaluations of a run: `log` is called every --eval-every steps, by all processes. All draw, because a sharded network needs
    all of them; the main one measures."""

    def __init__(self, config: Config, context: RunContext):
        self.context, self.count, self.seed, self.dtype = context, config.run.eval_num, config.run.seed, config.run.dtype
        self.metrics = {name: EVALUATED[name] for name in metric_names(config)}
        self.sources = {name: find_clip(source) or source for name, source in weight_sources(config.run.eval_weights).items()}
        self.memo: dict[Any, Any] = {}

    def log(self, stage: LatentStage, ema: EMA | PowerEMA, log: Log, step: int) -> None:
        """Measure, and write a row of the log, with entries eval_METRIC."""
        if row := self.row(stage, ema):
            log.write(stage=stage.name, step=step, **row)

    def row(self, stage: LatentStage, ema: EMA | PowerEMA) -> dict[str, float]:
        """The entries of a log row, eval_METRIC; {} in processes that do not measure."""
        model, found = stage.model, {}
        with ema.applied(), evaluating(model.net, *model.text.modules.values(), *stage.trained.modules.values()):
            evaluation = Evaluation(model, self.context.folder, draw_settings(model), self.context.device, self.context.folder, self.count,
                                    self.seed, AT_ONCE, self.dtype)
            for name, metric in self.metrics.items():
                images = evaluation.draw(metric.prompts(self, stage)).images
                if self.context.world.main:
                    found |= {f"eval_{key}": value for key, value in metric.measure(self, stage, images).items()}
        return found

    def tower(self, name: str, source: str) -> OpenTower:
        """The tower of this name, with the weights that --eval-weights names as `source`."""
        return self.once(("tower", name), lambda: open_tower(name, self.sources.get(source), self.context.device))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


class Evaluated(NamedTuple):
    """A row of EVALUATED."""

    prompts: Callable[[WhileTraining, LatentStage], list[str]]          # what is drawn
    measure: Callable[[WhileTraining, LatentStage, np.ndarray], Mapping[str, float]]       # its pictures, uint8 [n, h, w, 3] -> numbers
    check: Callable[[Config], None] = lambda config: None               # ValueError for a run that cannot be measured so


# ---------------------------------------------------------------- toyworld's prompts


def ask(run: WhileTraining, stage: LatentStage) -> list[str]:
    return [request.prompt for _, request in half_of_each(run.count, run.seed)]


def prompts(run: WhileTraining, stage: LatentStage, images: np.ndarray) -> dict[str, float]:
    """Fractions of pictures on which all is right: of pairs that were trained on, and of others."""
    recogniser = run.once("recogniser", lambda: get_recogniser(run.context.device))
    found = scores_of(read_answers(half_of_each(run.count, run.seed), images, recogniser))
    return {"prompts": found["train"]["all"]["share"], "prompts_held_out": found["held_out"]["all"]["share"]}


def check_prompts(config: Config) -> None:
    if not all_toyworld(config.data.sources):
        raise ValueError("--eval-metric prompts reads toyworld's pictures only: use fid or clip, with --eval-weights")


# ---------------------------------------------------------------- held-out samples


def captions(run: WhileTraining, stage: LatentStage) -> list[str]:
    """Those of the held-out samples, from the first one on again after the last."""
    loader = stage.loader
    found = [loader.cache.captions(int(i))[0][1] for i in loader.held_out]
    return [found[i % len(found)] for i in range(run.count)]


def fid(run: WhileTraining, stage: LatentStage, images: np.ndarray) -> dict[str, float]:
    tower = run.tower("inception", "inception")
    made = gather(tower, in_batches("drawn", images))
    size = images.shape[1:3]                                    # of another phase there are other held-out pictures
    real = run.once(("held out", size), lambda: Frechet(gather(tower, in_batches("held out", held_out(run, stage))).gaussian))
    return {"fid": real.to(made.gaussian)}


def clip(run: WhileTraining, stage: LatentStage, images: np.ndarray) -> dict[str, float]:
    tower = run.tower("clip", "clip")
    text, tokenizer = run.once("clip text", lambda: (load_text(tower.source, run.context.device), load_tokenizer(tower.source)))
    asked = captions(run, stage)
    batches = [(images[i:i + AT_ONCE], asked[i:i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
    return {"clip": float(clip_scores(tower, text, tokenizer, batches).gaussian().mean[0])}


@torch.no_grad()
def held_out(run: WhileTraining, stage: LatentStage) -> np.ndarray:
    """The held-out pictures, uint8 [n, h, w, 3]: as their latents are decoded, or themselves where the autoencoder is trained along."""
    samples = stage.loader.held_out_batch()
    if "vae" in stage.trained.modules:                          # the latents are those of the autoencoder with which the run began
        return samples.pictures().movedim(1, 3).numpy()
    latents = samples.latents.to(run.context.device)
    with stage.model.at_work("vae"), autocast(run.context.device, run.dtype):
        return np.concatenate([to_bytes(decode(stage.model.vae, part)) for part in latents.split(AT_ONCE)])


def in_batches(label: str, images: np.ndarray) -> PictureSet:
    return PictureSet(label, lambda world: ((images[i:i + AT_ONCE], []) for i in range(0, len(images), AT_ONCE)), {})


def check_fid(config: Config) -> None:
    check_held_out(config)
    if "inception" not in weight_sources(config.run.eval_weights):
        raise ValueError(f"--eval-metric fid needs weights: {GET_INCEPTION} as --eval-weights inception=FILE")


def check_held_out(config: Config) -> None:
    if config.run.val_samples < 2:
        raise ValueError("--eval-metric fid and clip compare with held-out samples: use --val-samples 128, for example")


EVALUATED: dict[str, Evaluated] = {
    "prompts": Evaluated(ask, prompts, check_prompts),
    "fid": Evaluated(captions, fid, check_fid),
    "clip": Evaluated(captions, clip, check_held_out),
}


def metric_names(config: Config) -> list[str]:
    """Those of --eval-metric; by default what the data allow."""
    typed = config.run.eval_metric or ("prompts" if all_toyworld(config.data.sources) else "fid")
    if not (names := [name for name in typed.split(",") if name]):
        raise ValueError(f"--eval-metric {typed} names no metric: known: {', '.join(EVALUATED)}")
    return list(dict.fromkeys(names))


def check_evaluation(config: Config) -> Config:
    """The configuration as it is. ValueError, before the run begins, for evaluations that cannot work."""
    for name in metric_names(config):
        row = lookup(EVALUATED, name, "--eval-metric")
        if config.run.eval_every:
            row.check(config)
    for name, source in weight_sources(config.run.eval_weights).items():
        lookup(dict.fromkeys(("inception", "clip")), name, "tower of --eval-weights")
        if name == "inception" and not Path(source).exists():
            raise ValueError(f"--eval-weights inception={source} does not exist: {GET_INCEPTION}")
    return config
