"""The only stage of a run with --objective contrastive: a CLIP is trained on pictures and captions, by all processes.

Checkpoints hold it as clip/, a folder that transformers' CLIPModel opens, and with it evaluate.py --metric clip, or, of the text tower
alone, --text-weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyldm.config import Config, change
from tinyldm.config.check import split_weights
from tinyldm.data.loader import own_part
from tinyldm.lookup import lookup
from tinyldm.models.clip import CLIP
from tinyldm.objectives import OBJECTIVES
from tinyldm.objectives.contrastive import ContrastiveBatch, Samples, clip_config, normalised
from tinyldm.random_streams import Stream, seed_sequence
from tinyldm.text.tokenizer import Tokenizer, open_tokenizer
from tinyldm.training.captioned_pictures import CaptionedPictures, captioned_pictures
from tinyldm.training.context import RunContext
from tinyldm.training.retrieval import Recall, Retrieval
from tinyldm.training.stage import Phase, Stage, Train
from tinyldm.training.trained import TrainedCLIP
from tinyldm.training.vae_pictures import forget_pictures, hold_out


class ContrastiveStage(Stage):
    name, title, stream = "step", "CLIP", Stream.PAIRS
    reported = True

    def __init__(self, config: Config, context: RunContext, data: CaptionedPictures, last: Path | None = None):
        """last: the checkpoint to continue from."""
        torch.manual_seed(config.run.seed + 1)
        self.config, self.context, self.world, self.settings = config, context, context.world, config.optimisation
        self.phases, self.val_every, self.images = [change(config, stages={})], config.run.val_every, data.images
        self.kept, self.held_out = hold_out(len(data.images), config.run.val_samples)
        if len(self.kept) < self.settings.batch_size:
            raise ValueError(f"{len(self.kept):,} pictures to train on are fewer than --batch-size {self.settings.batch_size}")
        texts = [text for found in data.captions for _, text in found]
        length = config.text.fields.get("context_length", 77)
        self.tokenizer = open_tokenizer(last / "clip") if last else Tokenizer.train(texts, config.text.vocab_size, length)
        tokens = torch.from_numpy(self.tokenizer.encode(texts).astype(np.int32))            # [number of captions, n]
        self.captions = Captions(data.captions, tokens, [*split_weights(config.data.caption_key).values()] or [1.0])
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        self.clip = CLIP(clip_config(config, len(self.tokenizer), **ids)).to(context.device)
        self.objective = lookup(OBJECTIVES, config.objective.name, "objective")(config, self.clip, ("clip",))
        self.objective.sum = self.world.sum
        self.trained = TrainedCLIP(self.clip, self.tokenizer)
        self.validation: Retrieval | None = None

    def begin_phase(self, index: int) -> Phase:
        world, size, seed = self.world, self.settings.batch_size, self.config.run.seed
        part = own_part(size, world.rank, world.size)
        count = min(-(-self.settings.grad_accum // world.size), size // world.size)
        if len(self.held_out):
            tokens = self.captions.tokens_of(self.held_out, np.zeros(len(self.held_out)))
            batch = ContrastiveBatch(normalised(np.array(self.images[self.held_out])), tokens, torch.arange(len(self.held_out)))
            self.validation = Retrieval(batch, -(-size // (world.size * count)), self.context.device, self.config.run.dtype, self.clip,
                                        self.objective.loss, self.objective.to_device)
        return Phase(self.config, lambda step: self.samples(seed, step, part), part, {"clip": self.clip}, count, self.validation)

    def samples(self, seed: int, step: int, part: slice) -> Samples:
        """The pictures of a batch are all different, and each has one of its captions."""
        rng = np.random.default_rng(seed_sequence(self.stream, seed, step))
        chosen = self.kept[rng.choice(len(self.kept), self.settings.batch_size, replace=False)][part]
        drawn = rng.random(self.settings.batch_size)[part]
        return Samples(np.stack([self.images[i] for i in chosen]), self.captions.tokens_of(chosen, drawn))

    def state(self) -> dict[str, Any]:
        return {"pictures": [len(self.images), len(self.held_out)]}

    def check_resume(self, state: dict[str, Any]) -> None:
        if state["pictures"] != self.state()["pictures"]:
            raise ValueError(f"the run began with {state['pictures'][0]:,} pictures, and now has {len(self.images):,}: some would be both "
                             "trained on and validated on; keep --vae-pictures and the data")

    def result(self) -> str:
        """What the last validation found, for people; "" where there was none."""
        found: Recall | None = self.validation and self.validation.found
        return "" if found is None else (
            f"R@1 of {len(self.held_out)} held-out pictures: caption to picture {found.text_to_image:.1%}, picture to caption "
            f"{found.image_to_text:.1%} (by chance {found.chance:.1%})")


class Captions:
    """The token ids of the captions of all pictures."""

    def __init__(self, found: list[list[tuple[int, str]]], tokens: torch.Tensor, weights: list[float]):
        """found: of every picture, (index into weights, caption). tokens: of all of them, one after the other."""
        self.tokens, self.starts = tokens, np.cumsum([0, *map(len, found)])
        # A picture's captions by their weights: those of one key share the weight of it.
        self.shares = [np.cumsum([weights[key] / sum(key == other for other, _ in own) for key, _ in own]) for own in found]

    def tokens_of(self, chosen: np.ndarray, drawn: np.ndarray) -> torch.Tensor:
        """One caption of each chosen picture -> [b, n]. drawn: a number in [0, 1) for each, which decides between captions."""
        pick = [int(np.searchsorted(self.shares[i], x * self.shares[i][-1], side="right")) for i, x in zip(chosen, drawn)]
        return self.tokens[torch.from_numpy(self.starts[chosen]) + torch.tensor(pick)].long()


def train_clip(config: Config, context: RunContext, last: Path | None, train: Train) -> None:
    """The whole run. last: the checkpoint to continue from."""
    stage = ContrastiveStage(config, context, captioned_pictures(config, context), last)
    train(stage, context, last)
    if context.world.main:
        print(stage.result() or "nothing was held out: R@1 was not measured")
        forget_pictures(context.folder)
