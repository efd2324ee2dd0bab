"""A model's text encoders, each with its tokenizer, and the rule that joins their answers into what the network sees.

    token ids [b, L1 + L2 ...]  ->  one Encoded per encoder  ->  join  ->  Cond

CLIP alone, as in Stable Diffusion 1 and 2, is the list of one. A text encoder is any module with `config.context_length`,
`module(ids [b, n]) -> (hidden [b, n, d], pooled [b, p])` and `module.ends(ids) -> [b]`, the position of each caption's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.lookup import lookup
from tinyldm.models.layers import Cond
from tinyldm.text.prompt_weights import plain, token_weights
from tinyldm.text.tokenizer import Tokenizer


class TextEncoder(NamedTuple):
    module: nn.Module
    tokenizer: Tokenizer


class Encoded(NamedTuple):
    """What one text encoder makes of a batch of captions."""

    context: Tensor             # [b, n, d], one vector per token
    mask: Tensor | None         # [b, n], True up to each caption's end; None: padding is attended to
    pooled: Tensor              # [b, p], one vector per caption


class TextWidths(NamedTuple):
    """Widths of the features that reach the network."""

    context: int
    pooled: int


class Join(NamedTuple):
    """A rule that joins the answers of several text encoders."""

    conds: Callable[[Sequence[Encoded]], Cond]
    widths: Callable[[Sequence[TextWidths]], TextWidths]        # of the encoders -> of what reaches the network


JOINS: dict[str, Join] = {"single": Join(lambda answers: Cond(*answers[0]), lambda widths: widths[0])}


class TextEncoders:
    """The text encoders of a model. `names` are those of its parts: "text", then "text_2" and so on."""

    def __init__(self, encoders: Iterable[TextEncoder], join: str = "single"):
        self.encoders, self.join = list(encoders), join
        lookup(JOINS, join, "rule to join text encoders")

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {part_name(i): encoder.module for i, encoder in enumerate(self.encoders)}

    @property
    def tokenizers(self) -> list[Tokenizer]:
        return [encoder.tokenizer for encoder in self.encoders]

    def widths(self, encoders: Sequence[TextWidths]) -> TextWidths:
        """Of every encoder's features -> of what reaches the network."""
        return JOINS[self.join].widths(encoders)

    def train(self, mode: bool = True) -> None:
        for module in self.modules.values():
            module.train(mode)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids int64 [b, L1 + L2 ...], the rows of all tokenizers side by side."""
        return torch.cat([torch.from_numpy(tokenizer.encode(list(captions))) for tokenizer in self.tokenizers], dim=1)

    def truncated(self, caption: str) -> str:
        """The end of a caption that no encoder reads; "" where at least one reads all of it."""
        return min((tokenizer.cut(caption) for tokenizer in self.tokenizers), key=len)

    def encode_ids(self, ids: Tensor, device: torch.device, mask_padding: bool = False, trim: bool = False) -> Cond:
        """Token ids [b, L1 + L2 ...] on the CPU -> Cond on the device. Equal captions are encoded once.

        mask_padding: the network attends to a caption up to its end token. Only then may `trim` shorten all rows to about the
        longest caption (CLIP's attention is causal, so the result stays): to a multiple of 16, so that few shapes are compiled,
        and to the same for all encoders, because a rule may lay their features side by side.
        """
        distinct, inverse = ids.unique(dim=0, return_inverse=True)
        lengths = [tokenizer.context_length for tokenizer in self.tokenizers]
        pairs = [(encoder.module, own) for encoder, own in zip(self.encoders, distinct.split(lengths, dim=1))]
        length = None
        if mask_padding and trim:
            longest = max(int(module.ends(own).max()) for module, own in pairs) + 1
            length = -(-longest // 16) * 16
        answers = [encode(module, own[:, :length], inverse, device, mask_padding) for module, own in pairs]
        return JOINS[self.join].conds(answers)

    def encode(self, prompts: Sequence[str], device: torch.device, mask_padding: bool = False, weighted: bool = False) -> Cond:
        """Prompts -> Cond on the device. mask_padding: as in training.

        weighted: prompts hold weights, as in "a (red:1.4) fox". A token's features are multiplied by its weight, nothing else
        changes, `pooled` neither. (AUTOMATIC1111's "No norm". Its "Original" then scales all features by one number to restore
        their mean, which may be anywhere near 0.)
        """
        if not weighted:
            return self.encode_ids(self.tokenize(prompts), device, mask_padding)
        distinct, inverse = self.tokenize([plain(prompt) for prompt in prompts]).unique(dim=0, return_inverse=True)
        answers, lengths = [], [tokenizer.context_length for tokenizer in self.tokenizers]
        for (module, tokenizer), own in zip(self.encoders, distinct.split(lengths, dim=1)):
            answer = encode(module, own, inverse, device, mask_padding)
            weights = torch.tensor([token_weights(tokenizer, prompt) for prompt in prompts]).to(answer.context)     # [b, n]
            answers.append(answer._replace(context=answer.context * weights[..., None]))
        return JOINS[self.join].conds(answers)


def part_name(i: int) -> str:
    """The name of a model's text encoder number i (from 0) among its parts."""
    return "text" if i == 0 else f"text_{i + 1}"


def encode(module: nn.Module, distinct: Tensor, inverse: Tensor, device: torch.device, mask_padding: bool) -> Encoded:
    """Distinct captions' ids [k, n], and which of them each sample has [b] -> features of every sample."""
    mask = None
    if mask_padding:
        mask = torch.arange(distinct.shape[1]) <= module.ends(distinct)[:, None]            # [k, n]
        mask = mask[inverse].to(device, non_blocking=True)
    features, inverse = module(distinct.to(device, non_blocking=True)), inverse.to(device, non_blocking=True)
    return Encoded(features.hidden[inverse], mask, features.pooled[inverse])
