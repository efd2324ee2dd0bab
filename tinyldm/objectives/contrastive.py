"""Contrastive training of a picture tower and a text tower: CLIP's loss (arXiv:2103.00020, Fig. 3) or SigLIP's (arXiv:2303.15343, Eq. 1).

Each picture is compared with all captions of the global batch, so no sample has a loss of its own. The batch may still be cut into
micro-batches and divided among processes, and the gradient is that of the whole: the features of all samples are computed without
gradient, then the gradient of the loss with respect to the features, and with that each micro-batch runs backward through the towers
(GradCache, arXiv:2101.06983). It costs a second forward pass; a process with a single micro-batch saves it.

Two pictures of a batch may have the same caption. Then each fits both captions, and that is what the losses demand: CLIP's target is
divided evenly among equal captions (arXiv:2204.03610, Eq. 3), SigLIP's is positive for all of them. In a batch of different captions
these are the published losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyldm.config import Config
from tinyldm.lookup import build_dataclass, check_counts, lookup
from tinyldm.models.clip import CLIP, CLIPConfig, CLIPFeatures
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.vit import ViTConfig
from tinyldm.objectives.base import Networks, Objective, Turn
from tinyldm.vendor_loaders.clip_model import MEAN, STD

ROWS_AT_ONCE = 1024                     # pictures that are compared with the whole batch at once: of 32,768 that takes 800 MB


class ContrastiveBatch(NamedTuple):
    pixels: Tensor          # [b, 3, h, w], normalised as CLIP's
    tokens: Tensor          # [b, n] token ids
    index: Tensor           # [b] positions in the global batch, one after the other, always on the CPU


class Samples(NamedTuple):
    images: Any             # uint8 [b, h, w, 3]
    tokens: Tensor          # [b, n]


# ---------------------------------------------------------------- the losses


class Rows(NamedTuple):
    """Some pairs of a batch of N, beside all of them."""

    images: Tensor          # [r, d], of length 1
    texts: Tensor           # [r, d], of length 1
    same: Tensor            # bool [r, N]: whether the captions are equal; a pair's own one is


def clip_losses(rows: Rows, whole: CLIPFeatures, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Cross-entropy over captions and over pictures, [r]. scale: exp of the log-temperature."""
    target = F.normalize(rows.same.to(whole.images.dtype), p=1, dim=1)
    logits = (scale * rows.images @ whole.texts.mT, scale * rows.texts @ whole.images.mT)
    return sum(F.cross_entropy(each, target, reduction="none") for each in logits) / 2


def siglip_losses(rows: Rows, whole: CLIPFeatures, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss of every pair of picture and caption, summed over captions, [r]."""
    logits = scale * rows.images @ whole.texts.mT + bias
    return -F.logsigmoid(torch.where(rows.same, logits, -logits)).sum(1)


class Loss(NamedTuple):
    losses: Callable[[Rows, CLIPFeatures, Tensor, Tensor | None], Tensor]
    log_scale: float                    # initial values, as published
    bias: float | None


CONTRASTIVE: dict[str, Loss] = {"clip": Loss(clip_losses, math.log(1 / 0.07), None), "siglip": Loss(siglip_losses, math.log(10), -10.0)}


def whole_losses(loss: str, features: CLIPFeatures, tokens: Tensor, log_scale: Tensor, bias: Tensor | None,
                 rows: slice = slice(None)) -> Tensor:
    """The losses of some pairs of a batch, each beside all of it: features [N, d], tokens [N, n] -> [number of rows]."""
    captions = tokens.unique(dim=0, return_inverse=True)[1]                     # [N], a number for each caption
    same = captions[rows, None] == captions
    return CONTRASTIVE[loss].losses(Rows(features.images[rows], features.texts[rows], same), features, log_scale.exp(), bias)


# ---------------------------------------------------------------- the objective


class Compared(NamedTuple):
    """What came of comparing this process's samples with all: of the mean loss over the global batch."""

    losses: Tensor          # [b]
    images: Tensor          # [b, d], its gradient with respect to the features
    texts: Tensor           # [b, d]
    log_scale: Tensor       # its gradient with respect to the temperature
    bias: Tensor | None = None      # and to the bias, where there is one


class Contrastive(Objective):
    options = {"loss": "clip", "embed": 128, "patch": 8, "width": 128, "layers": 4, "heads": 4}         # of the picture tower but for loss
    on_pictures, compares = True, True

    def __init__(self, config: Config, clip: CLIP, trained: tuple[str, ...]):
        """trained: ("clip",)."""
        self.clip, self.size, self.loss = clip, config.optimisation.batch_size, options_of(config)["loss"]
        self.turns = (Turn("contrastive", trained, betas=(0.9, 0.98)),)
        self.sum: Callable[[Sequence[Tensor]], None] = lambda tensors: None     # over processes, in place; the stage sets it
        self.known: Compared | None = None                                      # of this step, where it has several micro-batches
        self.first = 0                                                          # the position of known's first sample in the batch

    @classmethod
    def check(cls, config: Config) -> None:
        clip_config(config, config.text.vocab_size)

    def draw(self, samples: Samples, generator: torch.Generator, batch_size: int, part: slice) -> ContrastiveBatch:
        return ContrastiveBatch(normalised(samples.images), samples.tokens, torch.arange(part.start, part.stop))

    def to_device(self, batch: ContrastiveBatch, device: torch.device) -> ContrastiveBatch:
        return super().to_device(batch._replace(index=None), device)._replace(index=batch.index)

    def collect(self, turn: Turn, networks: Networks, micro_batches: Sequence[ContrastiveBatch]) -> None:
        self.known = None
        if len(micro_batches) > 1:
            with torch.no_grad():
                found = [networks["clip"](micro.pixels, micro.tokens) for micro in micro_batches]
            self.first = int(micro_batches[0].index[0])
            self.known = self.compare(CLIPFeatures(*map(torch.cat, zip(*found))), torch.cat([micro.tokens for micro in micro_batches]),
                                      self.first)

    def losses(self, turn: Turn, networks: Networks, batch: ContrastiveBatch, progress: float) -> Tensor:
        """Their values are those of the whole batch; so is the gradient of their sum over all micro-batches and processes."""
        made = networks["clip"](batch.pixels, batch.tokens)
        first, found = int(batch.index[0]), self.known
        if found is None:
            found, own = self.compare(CLIPFeatures(*(each.detach() for each in made)), batch.tokens, first), slice(None)
        else:
            own = slice(first - self.first, first - self.first + len(batch.index))
        # The trainer divides the sum of losses by the size. All samples have a part in the temperature's gradient, and each has its own
        # features: linear in both, this has the gradients that compare() found.
        linear = self.size * (found.images[own] * made.images + found.texts[own] * made.texts).sum(1)
        linear = linear + found.log_scale * self.clip.log_scale
        if self.clip.bias is not None:
            linear = linear + found.bias * self.clip.bias
        return found.losses[own] + (linear - linear.detach())

    def compare(self, features: CLIPFeatures, tokens: Tensor, first: int) -> Compared:
        """This process's features [b, d] and tokens [b, n], with those of all processes. first: the position of its first sample in the
        global batch."""
        own = slice(first, first + len(tokens))
        whole = [each.new_zeros(self.size, each.shape[1]) for each in (*features, tokens)]
        for everywhere, here in zip(whole, (*features, tokens)):
            everywhere[own] = here
        self.sum(whole[:2]), self.sum(whole[2:])                                # the other processes have zeros in these rows
        leaves = [tensor.detach().requires_grad_() for tensor in (*whole[:2], self.clip.log_scale, self.clip.bias) if tensor is not None]
        images, texts, log_scale, *bias = leaves
        losses = []
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            for start in range(own.start, own.stop, ROWS_AT_ONCE):
                some = whole_losses(self.loss, CLIPFeatures(images, texts), whole[2], log_scale, bias[0] if bias else None,
                                    slice(start, min(start + ROWS_AT_ONCE, own.stop)))
                (some.sum() / self.size).backward()
                losses.append(some.detach())
        gradients = [leaf.grad for leaf in leaves]
        self.sum(gradients)
        return Compared(torch.cat(losses), gradients[0][own], gradients[1][own], *gradients[2:])

    def after_step(self, step: int) -> None:
        self.clip.limit_scale()

    def start_over(self) -> None:
        self.known = None

    def log_row(self) -> dict[str, Any]:
        return {"scale": float(self.clip.log_scale.detach().exp())}


def normalised(images: Any) -> Tensor:
    """uint8 [b, h, w, 3] -> [b, 3, h, w], as CLIP's picture tower takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


# ---------------------------------------------------------------- the settings


def options_of(config: Config) -> dict[str, Any]:
    """--objective-options, with defaults. ValueError for an unknown loss, and for sizes below 1."""
    found = {**Contrastive.options, **config.objective.options}
    lookup(CONTRASTIVE, found["loss"], "contrastive loss (--objective-options loss=)")
    try:
        check_counts(SimpleNamespace(**found), "embed", "patch", "width", "layers", "heads")
    except ValueError as error:
        raise ValueError(f"--objective-options {error}") from None
    return found


def clip_config(config: Config, vocab_size: int, **ids: int) -> CLIPConfig:
    """The config of the towers: the picture tower from --objective-options, the text tower from --text. ValueError for what cannot work.

    ids: bos_token_id and eos_token_id, where they are known."""
    options = options_of(config)
    loss, size, patch = CONTRASTIVE[options["loss"]], config.data.resolution, options["patch"]
    if size % patch:
        raise ValueError(f"--resolution {size} is not a multiple of the patch size {patch} (--objective-options patch=)")
    if options["width"] % options["heads"]:
        raise ValueError(f"--objective-options width={options['width']} is not divisible by heads={options['heads']}")
    vision = ViTConfig(size, patch, options["width"], options["layers"], options["heads"], 4 * options["width"], "gelu",
                       projection_dim=options["embed"])
    text = build_dataclass(CLIPTextConfig, {"activation": "gelu", "projection_dim": options["embed"], **config.text.fields, **ids,
                                            "vocab_size": vocab_size}, "--text")
    return CLIPConfig(vision, text, loss.log_scale, loss.bias)
