"""The loss on samples that training never sees, with fixed noise at fixed times: only the weights make a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyldm.data.cache import Cache
from tinyldm.diffusion.loss import make_noise
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.meter import Meter
from tinyldm.training.run import generator


class Validation:
    """losses: (x0, eps, t, mixed, tokens) of a micro-batch -> its weighted losses [b], as in training.

    Times lie evenly in [0, 1), so `t_bins` compares levels that training draws seldom, too; captions are never dropped.
    """

    def __init__(self, data: Cache, held_out: np.ndarray, fingerprint: str, seed: int, micro_batch: int, device: torch.device,
                 losses: Callable[..., Tensor]):
        n = len(held_out)
        self.losses, self.micro_batch, self.device = losses, micro_batch, device
        if not n:
            self.whole = None
            return
        x0 = torch.from_numpy(data.latents(held_out)[:, 0]).float()
        eps = make_noise(x0.shape, generator(seed, 4)).eps
        t = (torch.randperm(n, generator=generator(seed, 5)) + 0.5) / n
        tokens = data.tokens(held_out, fingerprint, np.zeros(n), [1.0] * data.kinds)
        self.whole = (x0, eps, t, eps, torch.from_numpy(tokens))

    def both(self, ema: EMA | PowerEMA) -> dict[str, Any]:
        """For a row of the log: the loss of the weights as they are, val_raw, of the averaged ones, val_ema, and its val_bins."""
        raw = self()
        with ema.applied():
            averaged = self()
        return {"val_raw": raw["loss"], "val_ema": averaged["loss"], "val_bins": averaged["t_bins"]}

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """{"loss", "t_bins"}; nothing where no sample is held out."""
        if self.whole is None:
            return {}
        meter = Meter(self.device)
        for *micro, tokens in zip(*(part.split(self.micro_batch) for part in self.whole)):
            micro = [part.to(self.device) for part in micro]
            meter.add(self.losses(*micro, tokens), 1 / len(self.whole[0]), micro[2])
        meter.keep(0.0)
        row = meter.row()
        return {name: row[name] for name in ("loss", "t_bins")}
