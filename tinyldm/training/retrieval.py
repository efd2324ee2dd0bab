"""How well a CLIP finds the caption of a held-out picture among all of theirs, and the picture of a caption: recall at 1.

Of several pictures with the same caption any is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.device import autocast
from tinyldm.models.clip import CLIP, CLIPFeatures
from tinyldm.objectives import split
from tinyldm.objectives.contrastive import ContrastiveBatch, whole_losses
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.validation import Validation, equal_parts


class Recall(NamedTuple):
    text_to_image: float                # fraction of captions whose nearest picture has that caption
    image_to_text: float                # fraction of pictures whose nearest caption is theirs
    chance: float                       # both, of a CLIP that knows nothing


def recall(features: CLIPFeatures, tokens: Tensor) -> Recall:
    """features [n, d], tokens [n, m]: the token ids of the captions, by which equal ones are known. Each caption is asked for once for
    every picture that it belongs to."""
    captions = tokens.unique(dim=0, return_inverse=True)[1]
    same = captions[:, None] == captions
    cosines = features.images @ features.texts.mT
    hit = lambda nearest: float(same[torch.arange(len(same), device=same.device), nearest].double().mean())
    return Recall(hit(cosines.argmax(0)), hit(cosines.argmax(1)), float(same.double().mean()))


class Retrieval(Validation):
    """loss: a name in CONTRASTIVE. Other arguments as for Validation; the losses of all held-out samples are those of one batch."""

    def __init__(self, batch: ContrastiveBatch, micro_batch: int, device: torch.device, dtype: str, clip: CLIP, loss: str,
                 to_device: Callable[[NamedTuple, torch.device], NamedTuple]):
        super().__init__(batch, micro_batch, device, lambda micro, progress: torch.zeros(len(micro.pixels)), to_device)
        self.clip, self.dtype, self.loss, self.found = clip, dtype, loss, None

    def measure(self, ema: EMA | PowerEMA, progress: float = 0.0) -> dict[str, Any]:
        """Entries of a log row: val_raw, the loss of the raw weights, and val_ema, that of the averages, of which val_text_to_image and
        val_image_to_text are the recalls, too."""
        raw = self(progress)["loss"]
        with ema.applied():
            averaged = self(progress)
        self.found = averaged["recall"]
        return {"val_raw": raw, "val_ema": averaged["loss"], "val_text_to_image": self.found.text_to_image,
                "val_image_to_text": self.found.image_to_text}

    @torch.no_grad()
    def __call__(self, progress: float = 0.0) -> dict[str, Any]:
        """{"loss": mean loss, "recall": Recall}, of the current weights."""
        parts, tokens = [], self.batch.tokens.to(self.device)
        for micro in split(self.batch, equal_parts(len(self.batch.pixels), self.micro_batch)):
            micro = self.to_device(micro, self.device)
            with autocast(self.device, self.dtype):
                parts.append(self.clip(micro.pixels, micro.tokens))
        features = CLIPFeatures(*map(torch.cat, zip(*parts)))
        losses = whole_losses(self.loss, features, tokens, self.clip.log_scale, self.clip.bias)
        return {"loss": float(losses.mean()), "recall": recall(features, tokens)}
