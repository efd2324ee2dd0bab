"""The plan of --objective contrastive: a CLIP, whose two towers are trained on pictures and captions, without latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tinyldm.config import Config
from tinyldm.models.clip import CLIP, CLIPConfig, CLIPFeatures
from tinyldm.objectives.contrastive import CONTRASTIVE, ROWS_AT_ONCE, Rows, clip_config, options_of
from tinyldm.planning.flops import count_flops
from tinyldm.planning.memory import empty, saved_bytes
from tinyldm.planning.peak import peak_bytes
from tinyldm.planning.phase import PlannedPhase


def plan_clip_phase(config: Config) -> tuple[CLIP, PlannedPhase]:
    """The CLIP on the meta device, and its training at the run's picture size. The vocabulary is taken to be as large as it may become."""
    side, batch, own = config.data.resolution, config.optimisation.batch_size, clip_config(config, config.text.vocab_size)
    with torch.device("meta"):
        clip = CLIP(own)
    pixels, ids = empty(1, 3, side, side), empty(1, own.text.context_length, dtype=torch.long)
    compare = partial(comparison, options_of(config)["loss"], own, batch)
    forward = {"net": lambda: clip.vision(pixels), "text": lambda: clip.text(ids), "pairs": compare(1)}
    flops = {part: 3 * count_flops(call) for part, call in forward.items()}
    saved, casts = saved_bytes(config, (clip, lambda: clip(pixels, ids)))
    micro = -(-batch // config.optimisation.grad_accum)
    again = (flops["net"] + flops["text"]) / 3 if micro < batch else 0.0        # features come first, then gradients of micro-batches
    numbers = 3 * side**2 + 2 * own.text.context_length         # token ids have 8 bytes
    return clip, PlannedPhase(f"CLIP, {side} px", config, batch, micro, {"clip": clip}, 0, flops, {"clip": saved[0]}, casts, {},
                              4 * numbers, repeated=again, compared=peak_bytes(learning(compare(min(batch, ROWS_AT_ONCE))), torch.float32))


def comparison(loss: str, config: CLIPConfig, size: int, rows: int) -> Callable[[], torch.Tensor]:
    """A function that computes the losses of some pairs of a batch of this size, each beside all of it."""
    whole = CLIPFeatures(*(empty(size, config.vision.projection_dim).requires_grad_() for _ in range(2)))
    some, same = slice(rows), empty(rows, size, dtype=torch.bool)
    bias = None if config.bias is None else empty(1)
    return lambda: CONTRASTIVE[loss].losses(Rows(whole.images[some], whole.texts[some], same), whole, empty(1), bias)


def learning(losses: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The same with its gradients, which peak_bytes() does not ask for by itself."""
    def call() -> None:
        with torch.enable_grad():
            losses().sum().backward()
    return call
