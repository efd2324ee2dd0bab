"""Reflow: a flow is trained again on pairs of noise and the picture that it draws from that noise, and its curves become straighter.

A flow learns the mean of eps - x0 over all pairs that pass through x_t. With x0 and eps drawn apart, many cross at x_t, and the curve bends
from the mean of them towards one. With eps and the x0^ that the teacher's own curve leads to,

    E | u(x_t, t) - (eps - x0^) |^2,    x_t = (1 - t) x0^ + t eps                                     (arXiv:2209.03003, Alg. 1)

curves do not cross, so the paths between the same ends come closer to lines, each time (Theorem 3.7), and one Euler step comes closer to
many. The paper calls a flow 1-rectified, and the result of one run 2-rectified: give that run as the --teacher of the next.

    distil=true    t = 1 alone: one step of the student goes where the teacher's `steps` go. Straight curves are its best teachers
                   (Sec. 2.2; arXiv:2309.06380)
    scale          the teacher's guidance in the pairs, 0: its own. The student draws guided pictures without guidance
    steps          the teacher's, 0: its own

The pairs have the captions of the data. They are drawn before the training, by all processes together, and stored in RUN/pairs-SIZE
(pairs.py); those that are there are not drawn again. A teacher whose own sampler adds noise on the way draws them with dpmpp_2m. A pair
has its caption always: --caption-dropout has no part in it.

Times are drawn in the form of a U by default, exp(4 t) + exp(4 (1 - t)): between the ends x_t shows both, and at one end the other has to
be told from it alone (arXiv:2405.20320, Sec. 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.config import Config
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.process import Flow, at_size
from tinyldm.diffusion.samplers import final, find_sampler
from tinyldm.model import Model
from tinyldm.objectives.denoising import DenoisingBatch, extra_conditions, process_of
from tinyldm.objectives.pairs import Pairs
from tinyldm.objectives.teacher import Distillation, everywhere, own_options
from tinyldm.vendor_loaders.scheduler import sampling

CURVES = ("ddim", "euler", "heun", "lms", "dpmpp_2m", "unipc", "pndm")          # samplers that follow the curve


class Reflow(Distillation):
    options = dict(pairs=10_000, steps=0, scale=0.0, distil=False)
    own_loss = False

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model):
        super().__init__(config, model, trained, teacher)
        usual = teacher.defaults
        self.sampling = sampling(teacher.scheduler, usual.get("sampler"), usual.get("schedule"))
        if self.sampling.sampler not in CURVES:                 # it adds noise on the way, and leads from one noise to many pictures
            self.sampling = sampling(teacher.scheduler, "dpmpp_2m", usual.get("schedule"))
        self.steps = self.option["steps"] or usual.get("steps", 50)

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="u_shaped", sampler="euler", steps=1 if own_options(cls, config)["distil"] else 4, cfg=1.0)

    @classmethod
    def taught(cls, config: Config) -> bool:
        return True                                             # its option distil is another one

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.objective.prediction != "flow" or not isinstance(at_size(process_of(config.objective)), Flow):
            raise ValueError("reflow straightens a flow, and this model has another process: make it one with --objective diff2flow")
        if config.data.buckets:
            raise ValueError("--objective reflow draws pictures of one size: leave out --buckets")
        if (option := own_options(cls, config))["pairs"] < 1 or option["steps"] < 0:
            raise ValueError(f"reflow options pairs={option['pairs']} steps={option['steps']}: use at least one pair, and steps of at "
                             "least 0 (0: the teacher's)")

    def begin_phase(self, config: Config, model: Model) -> None:
        super().begin_phase(config, model)
        self.pairs, self.batch_size, self.side = None, config.optimisation.batch_size, config.data.resolution

    def prepare(self, context: Any, batches: Callable[[], Callable[[int], Any]]) -> None:
        """Draw the pairs that are missing."""
        pairs, world = Pairs(context.folder / f"pairs-{self.side}", self.option["pairs"], self.batch_size), context.world
        missing = pairs.missing()
        world.barrier()                                             # all have looked before one draws
        if own := missing[world.rank::world.size]:
            print(f"the teacher draws {len(missing) * self.batch_size:,} pairs in {self.steps} steps each")
            batch = batches()
            for number in tqdm(own, unit=" batches", dynamic_ncols=True, disable=None):
                context.check()                                     # raises Interrupted after a signal
                samples = batch(number)
                told = {} if samples.sizes is None else {"sizes": samples.sizes}
                pairs.write(number, self.pictures(samples, pairs.seeds(number), context.device), tokens=samples.tokens, **told)
        world.barrier()
        self.pairs = pairs

    @torch.no_grad()
    def pictures(self, samples: Any, seeds: range, device: torch.device) -> Tensor:
        """What the teacher draws with the captions of some samples from these seeds: latents [b, c, h, w]."""
        noise, chosen = initial_noise(samples.latents.shape[1:], make_generators(seeds)), self.sampling
        told = extra_conditions(self.model.net, samples)
        batch = self.to_device(DenoisingBatch(samples.latents, noise, torch.zeros(len(noise)), None, samples.tokens, told), device)
        levels = grid(self.process(batch.x0), self.steps, chosen.schedule, **chosen.grid)
        denoise = lambda x, at: self.teach(x, everywhere(at, x), batch, self.guidance)
        x = batch.eps * (levels[0].sigma if chosen.start_at_sigma else 1.0)
        return final(find_sampler(chosen.sampler)(denoise, x, levels, generators=make_generators(seeds), **chosen.options))

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> DenoisingBatch:
        """Pairs and their captions, in place of the samples'. (While a run tries its memory, there are none yet.)"""
        batch = super().draw(samples, generator, batch_size, part)
        if self.option["distil"]:
            batch = batch._replace(t=torch.ones_like(batch.t))
        numbers = torch.randint(self.option["pairs"], (batch_size,), generator=generator)[part].tolist()
        if self.pairs is None:
            return batch
        found = self.pairs.read(numbers)
        told = extra_conditions(self.model.net, SimpleNamespace(latents=found["x0"], sizes=found.get("sizes")))
        return batch._replace(x0=found["x0"], eps=found["eps"], mixed=None, tokens=found["tokens"], extra=told, weights=None)

    def validation_batch(self, samples: Any, seed: int) -> None:
        """None: held-out pictures have no noise of their own."""
