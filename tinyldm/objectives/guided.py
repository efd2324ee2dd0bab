"""Guidance distillation: the guided answer, for which classifier-free guidance calls the network twice, in one call.

    net(x_t, t, caption, w)  ->  (1 - w) teacher(x_t, t, "") + w teacher(x_t, t, caption)                  (arXiv:2210.03142, Eq. 4)

as guesses of x0, at scales w of guidance.cfg (the paper's w is that minus 1), drawn evenly from 1 to `scale`, by default twice the
teacher's. The network is told w beside the time, through a matrix that starts at 0 (TimeEmbedding); from then on sample.py --cfg is that
number. Squared errors are weighed by max(SNR, 1), as in progressive.py, on x_t of real pictures.
"""

from __future__ import annotations


import torch
from torch import Tensor

from tinyldm.config import Config
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch
from tinyldm.objectives.progressive import truncated_snr
from tinyldm.objectives.teacher import Distillation, own_options


class Guided(Distillation):
    boundary = False
    options = dict(scale=0.0)

    @classmethod
    def tells(cls, config: Config) -> tuple[str, ...]:
        return ("guidance",)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if not (scale := own_options(cls, config)["scale"]) == 0 and not scale > 1:
            raise ValueError(f"guided option scale={scale}: the largest scale to learn, above 1 (0: twice the teacher's)")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        return {"scale": torch.rand(shape[0], generator=random)}

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        scale = 1 + ((self.option["scale"] or 2 * max(self.usual_scale, 1.0)) - 1) * batch.own["scale"]        # [b]
        now = self.level(batch.t.clamp(min=1e-4), batch.x0)
        x = now.alpha * batch.x0 + now.sigma * batch.eps
        target = self.teach(x, now, batch, scale.view(-1, 1, 1, 1))
        error = self.f(networks["net"], x, now, self.cond(batch, guidance=scale)) - target
        # Both guesses are of one x_t, so that their errors in x0 and in eps are sigma / alpha apart: the larger counts.
        losses = (truncated_snr(now) * error.square()).flatten(1).mean(1)
        return batch.weighted(losses)
