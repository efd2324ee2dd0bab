"""Stands for a text encoder that is left out, to save memory, and for its tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class AbsentConfig(NamedTuple):
    width: int                      # of the features that it stands for
    tokens: int                     # per caption
    context_length: int = 0         # it reads nothing


class Zeros(NamedTuple):
    hidden: Tensor      # [b, tokens, width]
    pooled: Tensor      # [b, width]


class AbsentText(nn.Module):
    """Zeros in place of features, as in diffusers. A network that was trained with text encoders dropped at random can do without
    one (arXiv:2403.03206, Sec. 5.3.3)."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.config = AbsentConfig(width, tokens)

    def forward(self, ids: Tensor) -> Zeros:
        tokens, width = self.config.tokens, self.config.width
        return Zeros(torch.zeros(len(ids), tokens, width, device=ids.device), torch.zeros(len(ids), width, device=ids.device))

    def ends(self, ids: Tensor) -> Tensor:
        return torch.full((len(ids),), self.config.tokens - 1, device=ids.device)


class AbsentTokenizer:
    """The tokenizer of a text encoder that is left out: captions have no tokens."""

    context_length, fingerprint, added = 0, "", {}

    def __len__(self) -> int:
        return 0

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), 0), dtype=np.int64)

    def cut(self, text: str) -> str:
        return ""
