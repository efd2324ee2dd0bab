"""A model's text encoders, each with its tokenizer, and the rule that joins their outputs into the network's condition.

    token ids [b, L1 + L2 ...]  ->  one Encoded per encoder  ->  join  ->  Cond

With CLIP alone, as in Stable Diffusion 1 and 2, it is a list of one. A text encoder is any module with `config.context_length`,
`module(ids [b, n]) -> (hidden [b, n, d], pooled [b, p])` and `module.ends(ids) -> [b]`, the position of each caption's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.device import in_parts, upload
from tinyldm.lookup import lookup
from tinyldm.models.layers import Cond
from tinyldm.text.prompt_weights import plain, token_weights
from tinyldm.text.tokenizer import Tokenizer

# The captions that a text encoder takes at once. More would not be faster, and CLIP ViT-L/14's needs 2.2 MB for each: all captions of
# a step together might need more memory than a micro-batch of the network.
CAPTIONS_AT_ONCE = 256


class TextEncoder(NamedTuple):
    module: nn.Module
    tokenizer: Tokenizer


class Encoded(NamedTuple):
    """The features that one text encoder gives for a batch of captions."""

    context: Tensor             # [b, n, d], one vector per token
    mask: Tensor | None         # [b, n], True up to each caption's end; None: padding is attended to
    pooled: Tensor              # [b, p], one vector per caption


class TextWidths(NamedTuple):
    """Widths of text features: of one encoder's, or of the joined ones that the network gets."""

    context: int
    pooled: int


class Join(NamedTuple):
    """A rule that joins the outputs of several text encoders."""

    conds: Callable[[Sequence[Encoded]], Cond]
    widths: Callable[[Sequence[TextWidths]], TextWidths]        # widths of each encoder -> widths that the network gets
    calls: Sequence[Mapping[str, Any]] = ()     # keyword arguments for each encoder, such as CLIP's skip_last; (): none


JOINS: dict[str, Join] = {"single": Join(lambda outputs: Cond(*outputs[0]), lambda widths: widths[0])}


class TextEncoders:
    """The text encoders of a model. `names` are those of its parts: "text", then "text_2" and so on."""

    def __init__(self, encoders: Iterable[TextEncoder], join: str = "single"):
        """ValueError for an unknown rule, and for a tokenizer with ids that its text encoder has no embedding for."""
        self.encoders, self.join = list(encoders), join
        for module, tokenizer in self.encoders:
            rows, highest = getattr(module.config, "vocab_size", None), len(tokenizer) - 1
            if rows is not None and highest >= rows:
                added = f" ('{tokenizer.added[highest].content}')" if highest in tokenizer.added else ""
                raise ValueError(f"the tokenizer has ids up to {highest}{added}, but the text encoder has embeddings only up to "
                                 f"{rows - 1}: take both from the same model")
        lookup(JOINS, join, "rule to join text encoders")

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {part_name(i): encoder.module for i, encoder in enumerate(self.encoders)}

    @property
    def tokenizers(self) -> list[Tokenizer]:
        return [encoder.tokenizer for encoder in self.encoders]

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        return JOINS[self.join].calls or [{}] * len(self.encoders)

    def widths(self, encoders: Sequence[TextWidths]) -> TextWidths:
        """Widths of each encoder's features -> widths of the joined features that the network gets."""
        return JOINS[self.join].widths(encoders)

    def train(self, mode: bool = True) -> None:
        for module in self.modules.values():
            module.train(mode)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids int64 [b, L1 + L2 ...], the rows of all tokenizers side by side."""
        return torch.cat([torch.from_numpy(tokenizer.encode(list(captions))) for tokenizer in self.tokenizers], dim=1)

    def truncated(self, caption: str) -> str:
        """The end of a caption that is cut off by every encoder; "" where at least one encoder reads the whole caption."""
        return min((tokenizer.cut(caption) for tokenizer in self.tokenizers), key=len)

    def encode_ids(self, ids: Tensor, device: torch.device, mask_padding: bool = False, trim: bool = False) -> Cond:
        """Token ids [b, L1 + L2 ...] on the CPU -> Cond on the device. Equal captions are encoded once.

        mask_padding: the network attends to a caption only up to its end token. trim: shorten all rows to about the longest
        caption, which is possible only with mask_padding (CLIP's attention is causal, so the features stay the same). The length
        is a multiple of 16, so that few shapes are compiled, and the same for all encoders, because a rule may concatenate their
        features.
        """
        distinct, inverse = ids.unique(dim=0, return_inverse=True)
        lengths = [tokenizer.context_length for tokenizer in self.tokenizers]
        pairs = [(encoder.module, own) for encoder, own in zip(self.encoders, distinct.split(lengths, dim=1))]
        length = None
        if mask_padding and trim:
            longest = max(int(module.ends(own).max()) for module, own in pairs) + 1
            length = -(-longest // 16) * 16
        outputs = [encode(module, own[:, :length], inverse, device, mask_padding, call)
                   for (module, own), call in zip(pairs, self.calls)]
        return JOINS[self.join].conds(outputs)

    def encode(self, prompts: Sequence[str], device: torch.device, mask_padding: bool = False, weighted: bool = False) -> Cond:
        """Prompts -> Cond on the device. mask_padding: as in training.

        weighted: prompts contain weights, as in "a (red:1.4) fox". A token's features are multiplied by its weight; nothing else
        changes, not even `pooled`. (This is AUTOMATIC1111's "No norm". Its "Original" then scales all features by one number to
        restore their mean, which can be close to 0.)
        """
        if not weighted:
            return self.encode_ids(self.tokenize(prompts), device, mask_padding)
        distinct, inverse = self.tokenize([plain(prompt) for prompt in prompts]).unique(dim=0, return_inverse=True)
        outputs, lengths = [], [tokenizer.context_length for tokenizer in self.tokenizers]
        for (module, tokenizer), own, call in zip(self.encoders, distinct.split(lengths, dim=1), self.calls):
            output = encode(module, own, inverse, device, mask_padding, call)
            weights = torch.tensor([token_weights(tokenizer, prompt) for prompt in prompts])        # [b, n]
            weights = upload(weights.to(output.context.dtype), device)
            outputs.append(output._replace(context=output.context * weights[..., None]))
        return JOINS[self.join].conds(outputs)


def part_name(i: int) -> str:
    """The part name of a model's i-th text encoder, counted from 0: text, text_2 and so on."""
    return "text" if i == 0 else f"text_{i + 1}"


def encode(module: nn.Module, distinct: Tensor, inverse: Tensor, device: torch.device, mask_padding: bool,
           call: Mapping[str, Any]) -> Encoded:
    """Features of every sample. distinct: token ids of the k different captions [k, n]; inverse: each sample's index in it [b].
    call: further arguments of the encoder."""
    mask = None
    if mask_padding:
        mask = torch.arange(distinct.shape[1]) <= module.ends(distinct)[:, None]            # [k, n]
        mask = upload(mask[inverse], device)
    parts = [*in_parts(partial(module, **call), upload(distinct, device), CAPTIONS_AT_ONCE)]
    hidden, pooled = torch.cat([part.hidden for part in parts]), torch.cat([part.pooled for part in parts])
    inverse = upload(inverse, device)
    # index_select, because the backward pass of hidden[inverse] adds in the order of the threads, and is slower on a CPU.
    return Encoded(hidden.index_select(0, inverse), mask, pooled.index_select(0, inverse))
