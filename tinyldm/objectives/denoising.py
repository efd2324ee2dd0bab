"""The diffusion loss: a network learns to separate x0 and eps in noisy latents, at random noise levels.

The mathematics is in diffusion/loss.py; this file has its settings, its random numbers, and the captions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.config import Config, ObjectiveConfig
from tinyldm.device import autocast, upload
from tinyldm.diffusion.loss import T_SAMPLERS, make_noise, make_weight, sample_losses, sample_t
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.process import PROCESSES, Process, at_size, make_process
from tinyldm.lookup import lookup
from tinyldm.model import NETWORKS, Model, architecture, network_config
from tinyldm.models.layers import Cond
from tinyldm.objectives.base import Networks, Objective, Turn
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import CAPTIONS_AT_ONCE


# What training tells a network besides the caption, by its name in Cond.extra: samples of the data -> [b, ...].
EXTRAS: dict[str, Callable[[Any], Tensor]] = {
    "sizes": lambda samples: samples.sizes,
    # Real pictures are what a network should draw without guidance (kohya-ss/sd-scripts, docs/flux_train_network.md).
    "guidance": lambda samples: torch.ones(len(samples.latents)),
    "elapsed": lambda samples: torch.zeros(len(samples.latents)),       # what it predicts without any is the velocity (mean_flow.py)
}


class DenoisingBatch(NamedTuple):
    x0: Tensor          # [b, c, h, w], standardised latents
    eps: Tensor         # [b, c, h, w], the noise in the target
    t: Tensor           # [b] in [0, 1)
    mixed: Tensor | None        # [b, c, h, w], eps and a perturbation; None: there is no perturbation
    tokens: Tensor      # [b, n] token ids of all text encoders, always on the CPU
    extra: Mapping[str, Tensor] | None = None       # of Cond, [b, ...]; None: the network is told nothing but the caption
    cond: Cond | None = None    # the encoded captions, on the device; None where text encoders are trained: see to_device
    weights: Tensor | None = None       # [b], factors of the losses; None: all are 1
    pictures: Tensor | None = None      # uint8 [b, 3, H, W], behind x0; None: the objective does not look at them
    autoencoder: Mapping[str, Tensor] | None = None     # of an AutoencoderBatch, where the autoencoder is trained along
    dropout: Tensor | None = None       # [b], seeds of an adapter's dropout, on the CPU; None: there is none
    own: Mapping[str, Tensor] | None = None         # what a subclass of Denoising draws in addition, by name, each [b, ...]
    empty: Cond | None = None   # the empty caption's condition for each sample, on the device; None: nobody needs it

    @property
    def noise(self) -> Tensor:
        """[b, c, h, w], the noise in x_t."""
        return self.eps if self.mixed is None else self.mixed

    def weighted(self, losses: Tensor) -> Tensor:
        """The losses [b] by the samples' factors."""
        return losses if self.weights is None else self.weights * losses


class Denoising(Objective):
    """Eq. 14 of arXiv:2006.11239 and its variants. Text encoders that are not frozen are trained with the network."""

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...]):
        """trained: the names of the model's parts that are trained, such as ("net", "text")."""
        self.turns = (Turn("denoising", trained),)
        self.text_trained = any(part in trained for part in model.text.modules)
        # Guidance compares the network's answers with and without the caption. "Without" means the *encoded* empty string, not
        # zeros, because sampling encodes the empty negative prompt: the network has to be trained on what it is asked for.
        self.empty = model.text.tokenize([""])[0]                       # [n]
        self.known: dict[bytes, Cond] = {}                              # token ids of a caption -> its condition [1, ...], see remember()
        self.begin_phase(config, model)

    @classmethod
    def check(cls, config: Config) -> None:
        """The prediction tells x0 at the noisiest level, and the loss can be computed there."""
        settings, process, pixel = config.objective, process_of(config.objective), torch.zeros(1, 1, 1, 1)
        lookup(T_SAMPLERS, settings.times, "--times")
        to_x0(settings.prediction, pixel, pixel, process(torch.ones(1)))        # eps-prediction has no x0 at pure noise
        answer = torch.zeros(1, 1 + settings.learned_variance, 1, 1)
        sample_losses(lambda *inputs: answer, pixel, pixel, torch.ones(1), None, process, **loss_settings(settings, process))
        row = lookup(NETWORKS, config.network.name, "network")
        for name in row.extras(network_config(config.network.name, config.network.settings)):
            lookup(EXTRAS, name, f"condition that training can tell a {config.network.name}")

    def begin_phase(self, config: Config, model: Model) -> None:
        self.settings, self.model, self.dtype = config.objective, model, config.run.dtype
        self.loss_settings, self.dropout = loss_settings(config.objective, model.process), config.finetune.lora_dropout

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> DenoisingBatch:
        """Noise, times and dropped captions, in this order, from one stream for the whole global batch."""
        settings, x0 = self.settings, samples.latents
        noise = make_noise((batch_size, *x0.shape[1:]), generator, settings.noise_offset, settings.input_perturbation)
        t = sample_t(settings.times, batch_size, generator, settings.times_mean, settings.times_scale, self.process(x0),
                     settings.stratified_times)
        dropped = torch.rand(batch_size, generator=generator) < settings.caption_dropout
        tokens = torch.where(dropped[part, None], self.empty, samples.tokens)               # [b, n]
        mixed = None if noise.mixed is noise.eps else noise.mixed[part]      # None: equal numbers are copied to the device once
        seeds = torch.randint(2**62, (batch_size,), generator=generator)[part] if self.dropout else None
        return DenoisingBatch(x0, noise.eps[part], t[part], mixed, tokens, extra_conditions(self.model.net, samples),
                              weights=samples.weights, dropout=seeds)

    def process(self, x0: Tensor) -> Process:
        """The process for pictures of this size: x0 [b, c, h, w]."""
        return at_size(self.model.process, x0.shape[2] * x0.shape[3] // architecture(self.model.net).divisor(self.model.net.config) ** 2)

    def to_device(self, batch: DenoisingBatch, device: torch.device) -> DenoisingBatch:
        """Moves all but the token ids, which encode_ids needs on the CPU to find equal captions. Frozen text encoders encode the
        captions here, at once for all micro-batches. Those that are trained do it in `losses`, with gradients."""
        moved = super().to_device(batch._replace(tokens=None, dropout=None), device)._replace(tokens=batch.tokens, dropout=batch.dropout)
        if self.text_trained:
            return moved
        with torch.no_grad(), autocast(device, self.dtype):
            return moved._replace(cond=self.encode(batch.tokens, device))

    def encode(self, tokens: Tensor, device: torch.device) -> Cond:
        """Token ids [b, n] -> their condition, on the device."""
        if self.model.placement is None:
            return self.model.text.encode_ids(tokens, device, self.settings.mask_padding, trim=True)
        self.remember(tokens, device)
        first, *others = (self.known[row.tobytes()] for row in tokens.numpy())
        return map_cond(first.cat(*others), lambda tensor: upload(tensor, device))

    @torch.no_grad()
    def remember(self, tokens: Tensor, device: torch.device) -> None:
        """Encode the captions with these token ids [b, n], and keep the result in the host's memory: for text encoders that are on the
        device only while they work."""
        new = [row for row in tokens.unique(dim=0) if row.numpy().tobytes() not in self.known]
        for part in torch.stack(new).split(CAPTIONS_AT_ONCE) if new else ():
            with autocast(device, self.dtype):
                cond = self.model.text.encode_ids(part, device, self.settings.mask_padding, at_work=self.model.at_work)
            conds = map_cond(cond, Tensor.cpu).tensor_split(len(part))
            self.known |= zip((row.tobytes() for row in part.numpy()), conds)

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        if batch.dropout is not None:
            torch.manual_seed(int(batch.dropout[0]))            # so that a resumed run drops the same
        cond = replace(batch.cond or self.encode(batch.tokens, batch.x0.device), extra=batch.extra or {})
        losses = sample_losses(networks["net"], batch.x0, batch.eps, batch.t, cond, self.process(batch.x0), mixed=batch.mixed,
                               **self.loss_settings)
        return batch.weighted(losses)

    def validation_batch(self, samples: Any, seed: int) -> DenoisingBatch:
        """Times are evenly spaced in [0, 1), so that rare noise levels are measured as well; no caption is dropped."""
        x0, n = samples.latents, len(samples.latents)
        eps = make_noise(x0.shape, generator(Stream.VALIDATION_NOISE, seed)).eps
        t = (torch.randperm(n, generator=generator(Stream.VALIDATION_TIMES, seed)) + 0.5) / n
        return DenoisingBatch(x0, eps, t, None, samples.tokens, extra_conditions(self.model.net, samples), weights=samples.weights)


def map_cond(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    """A condition of captions alone with all of its tensors changed."""
    return Cond(*(value if value is None else change(value) for value in (cond.context, cond.mask, cond.pooled)))


def extra_conditions(net: nn.Module, samples: Any) -> dict[str, Tensor] | None:
    """What the network is told of samples besides their captions, by name; None: nothing."""
    return {name: EXTRAS[name](samples) for name in architecture(net).extras(net.config)} or None


def loss_settings(settings: ObjectiveConfig, process: Process) -> dict[str, Any]:
    """Keyword arguments of sample_losses: prediction, weight, loss, huber_c. ValueError for weights that do not fit the process."""
    name = "min_snr" if settings.min_snr_gamma and settings.loss_weight == "none" else settings.loss_weight
    gamma = settings.p2_gamma if name == "p2" else settings.min_snr_gamma or None
    return dict(prediction=settings.prediction, weight=make_weight(name, settings.prediction, gamma, process), loss=settings.loss,
                huber_c=settings.huber_c)


def process_of(settings: ObjectiveConfig) -> Process:
    """The noise process that the settings describe. ValueError where they do not fit."""
    return make_process(settings.process, **process_options(settings))


def process_options(settings: ObjectiveConfig) -> dict[str, Any]:
    """Keyword arguments of make_process: --shift and --zero-terminal-snr where the process has them, and --process-options."""
    takes: Mapping[str, Any] = inspect.signature(lookup(PROCESSES, settings.process, "process")).parameters
    if settings.zero_terminal_snr and "zero_snr" not in takes:
        raise ValueError(f"--zero-terminal-snr is for tables of betas, not for {settings.process}: leave it out (flow always ends in "
                         "pure noise)")
    if settings.process == "betas" and not settings.process_options.get("betas"):
        raise ValueError("--process betas needs the betas, from the cleanest level to the noisiest: --process-options "
                         "betas=0.0001,0.0002,...")
    named = {"shift": settings.shift, "zero_snr": settings.zero_terminal_snr}
    return {name: value for name, value in named.items() if name in takes} | settings.process_options
