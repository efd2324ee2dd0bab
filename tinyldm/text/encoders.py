"""A model's text encoders, each with its tokenizer, and the rule that joins their outputs into the network's condition.

    token ids [b, L1 + L2 ...]  ->  one Encoded per encoder  ->  join  ->  Cond

With CLIP alone, as in Stable Diffusion 1 and 2, it is a list of one. A text encoder is any module with `config.context_length`,
`module(ids [b, n]) -> (hidden [b, n, d], pooled [b, p])` and `module.ends(ids) -> [b]`, the position of each caption's end. One that
is not causal says `takes_mask = True`: where the padding is masked, it is called with `mask` [b, n] too, True up to that end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.device import in_parts, upload
from tinyldm.lookup import lookup
from tinyldm.models.layers import Cond
from tinyldm.text.absent import AbsentText, AbsentTokenizer
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.prompt_weights import plain, token_weights

# The captions of CLIP's length that a text encoder takes at once. More would not be faster, and CLIP ViT-L/14's needs 2.2 MB for each:
# all captions of a step together might need more memory than a micro-batch of the network. Of longer ones it takes fewer.
CAPTIONS_AT_ONCE, CLIP_LENGTH = 256, 77


AtWork = Callable[[str], AbstractContextManager]        # part name -> context in which that part is on the device


class TextEncoder(NamedTuple):
    module: nn.Module
    tokenizer: BaseTokenizer | AbsentTokenizer


class Truncated(NamedTuple):
    """The end of a caption that a text encoder does not read."""

    part: str           # name of the text encoder
    tokens: int         # that it reads
    cut: str


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


def join_sdxl(outputs: Sequence[Encoded]) -> Cond:
    """Stable Diffusion XL (arXiv:2307.01952, Sec. 2.1): CLIP-L's and bigG's features side by side, and bigG's pooled one."""
    first, second = outputs
    return Cond(torch.cat([first.context, second.context], dim=-1), first.mask, second.pooled)


def join_sd3(outputs: Sequence[Encoded]) -> Cond:
    """Stable Diffusion 3 (arXiv:2403.03206, Fig. 2): CLIP-L's and bigG's features side by side, filled up with zeros to the width of
    T5's, and T5's behind them; both pooled features side by side."""
    first, second, t5 = outputs
    clip = torch.cat([first.context, second.context], dim=-1)                               # [b, n, d1 + d2]
    clip = F.pad(clip, (0, t5.context.shape[-1] - clip.shape[-1]))
    mask = None if first.mask is None else torch.cat([first.mask, t5.mask], dim=1)
    return Cond(torch.cat([clip, t5.context.to(clip)], dim=1), mask, torch.cat([first.pooled, second.pooled], dim=-1))


SDXL_FEATURES = {"skip_last": 1, "norm": False}         # of CLIP: the last layer but one, not normalised
JOINS: dict[str, Join] = {
    "single": Join(lambda outputs: Cond(*outputs[0]), lambda widths: widths[0]),
    "sdxl": Join(join_sdxl, lambda widths: TextWidths(widths[0].context + widths[1].context, widths[1].pooled), [SDXL_FEATURES] * 2),
    "sd3": Join(join_sd3, lambda widths: TextWidths(widths[2].context, widths[0].pooled + widths[1].pooled), [SDXL_FEATURES] * 2 + [{}]),
    # FLUX: T5's features, and CLIP's pooled one.
    "flux": Join(lambda outputs: Cond(outputs[1].context, outputs[1].mask, outputs[0].pooled),
                 lambda widths: TextWidths(widths[1].context, widths[0].pooled), [{}] * 2),
}


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
        if (calls := lookup(JOINS, join, "rule to join text encoders").calls) and len(calls) != len(self.encoders):
            raise ValueError(f"the rule '{join}' joins {len(calls)} text encoders, and the model has {len(self.encoders)}")

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Part name -> text encoder: text, text_2 ..., without those that are left out."""
        return {part_name(i): encoder.module for i, encoder in enumerate(self.encoders) if not isinstance(encoder.module, AbsentText)}

    @property
    def tokenizers(self) -> list[BaseTokenizer | AbsentTokenizer]:
        return [encoder.tokenizer for encoder in self.encoders]

    def with_tokenizers(self, tokenizers: Mapping[str, BaseTokenizer]) -> TextEncoders:
        """The same encoders with other tokenizers, by part name, whose ids need not all be in the encoder's table: the rows of further
        ids come from elsewhere while a token is trained (adapters/embedding.py)."""
        changed = copy.copy(self)
        changed.encoders = [TextEncoder(module, tokenizers.get(part_name(i), own)) for i, (module, own) in enumerate(self.encoders)]
        return changed

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

    def truncated(self, caption: str) -> list[Truncated]:
        """What is cut off by each text encoder that does not read the whole caption."""
        found = ((part_name(i), tokenizer.context_length, tokenizer.cut(caption)) for i, tokenizer in enumerate(self.tokenizers))
        return [Truncated(*one) for one in found if one[2]]

    def encode_ids(self, ids: Tensor, device: torch.device, mask_padding: bool = False, trim: bool = False,
                   at_work: AtWork = lambda part: nullcontext()) -> Cond:
        """Token ids [b, L1 + L2 ...] on the CPU -> Cond on the device. Equal captions are encoded once. at_work: see Model.

        mask_padding: the network attends to a caption only up to its end token. trim: shorten all rows to about the longest
        caption, which is possible only with mask_padding (CLIP's attention is causal, and T5's is masked, so the features stay the
        same). The length is a multiple of 16, so that few shapes are compiled, and the same for all encoders, because a rule may
        concatenate their features.
        """
        distinct, inverse = ids.unique(dim=0, return_inverse=True)
        rows, length = self.split(distinct), None
        if mask_padding and trim:
            longest = max(int(module.ends(own).max()) for (module, _), own in zip(self.encoders, rows)) + 1
            length = -(-longest // 16) * 16
        return JOINS[self.join].conds(self._encode([own[:, :length] for own in rows], inverse, device, mask_padding, at_work))

    def encode(self, prompts: Sequence[str], device: torch.device, mask_padding: bool = False, weighted: bool = False,
               at_work: AtWork = lambda part: nullcontext()) -> Cond:
        """Prompts -> Cond on the device. mask_padding: as in training. at_work: see Model.

        weighted: prompts contain weights, as in "a (red:1.4) fox". A token's features are multiplied by its weight; nothing else
        changes, not even `pooled`. (This is AUTOMATIC1111's "No norm". Its "Original" then scales all features by one number to
        restore their mean, which can be close to 0.)
        """
        captions = [plain(prompt) for prompt in prompts] if weighted else prompts
        distinct, inverse = self.tokenize(captions).unique(dim=0, return_inverse=True)
        outputs = self._encode(self.split(distinct), inverse, device, mask_padding, at_work)
        if weighted:
            outputs = [self._weigh(output, tokenizer, prompts) for output, tokenizer in zip(outputs, self.tokenizers)]
        return JOINS[self.join].conds(outputs)

    def split(self, ids: Tensor) -> Sequence[Tensor]:
        """Token ids [b, L1 + L2 ...] -> [b, L1], [b, L2] ..., those of each encoder."""
        return ids.split([tokenizer.context_length for tokenizer in self.tokenizers], dim=1)

    def _encode(self, rows: Sequence[Tensor], inverse: Tensor, device: torch.device, mask_padding: bool,
                at_work: AtWork = lambda part: nullcontext()) -> list[Encoded]:
        outputs = []
        for i, ((module, _), own, call) in enumerate(zip(self.encoders, rows, self.calls)):
            with at_work(part_name(i)):
                outputs.append(encode(module, own, inverse, device, mask_padding, call))
        return outputs

    @staticmethod
    def _weigh(output: Encoded, tokenizer: BaseTokenizer | AbsentTokenizer, prompts: Sequence[str]) -> Encoded:
        if isinstance(tokenizer, AbsentTokenizer):
            return output
        weights = torch.tensor([token_weights(tokenizer, prompt) for prompt in prompts])        # [b, n]
        weights = upload(weights.to(output.context.dtype), output.context.device)
        return output._replace(context=output.context * weights[..., None])


def part_name(i: int) -> str:
    """The part name of a model's i-th text encoder, counted from 0: text, text_2 and so on."""
    return "text" if i == 0 else f"text_{i + 1}"


def encode(module: nn.Module, distinct: Tensor, inverse: Tensor, device: torch.device, mask_padding: bool,
           call: Mapping[str, Any]) -> Encoded:
    """Features of every sample. distinct: token ids of the k different captions [k, n]; inverse: each sample's index in it [b].
    call: further arguments of the encoder."""
    def features(ids: Tensor) -> Any:
        masked = {"mask": up_to_end(module, ids)} if mask_padding and getattr(module, "takes_mask", False) else {}
        return module(ids, **call, **masked)

    at_once = max(1, CAPTIONS_AT_ONCE * CLIP_LENGTH // max(CLIP_LENGTH, distinct.shape[1]))
    parts = [*in_parts(features, upload(distinct, device), at_once)]
    hidden, pooled = torch.cat([part.hidden for part in parts]), torch.cat([part.pooled for part in parts])
    mask = upload(up_to_end(module, distinct)[inverse], device) if mask_padding else None
    inverse = upload(inverse, device)
    # index_select, because the backward pass of hidden[inverse] adds in the order of the threads, and is slower on a CPU.
    return Encoded(hidden.index_select(0, inverse), mask, pooled.index_select(0, inverse))


def up_to_end(module: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [k, n] -> [k, n], True up to each caption's end."""
    return torch.arange(ids.shape[1], device=ids.device) <= module.ends(ids)[:, None]
