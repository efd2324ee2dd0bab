"""What the few-step objectives share: answers of a frozen teacher, steps along its curve, slowly moving targets, derivatives.

All of them are statements about one curve: the probability-flow ODE, which leads from x_t through ever cleaner x_s to one x0. With a
process x_t = alpha x0 + sigma eps and any prediction, the network's guess of x0,

    f(x_t, t) = to_x0(kind, x_t, net(x_t, t), level),

is already what consistency models want of their function: at sigma = 0 it is x_t / alpha, whatever the network answers, for predictions
of eps, v and flow. So no c_skip and c_out are needed (arXiv:2303.01469, Eq. 5; on the arc, v gives exactly those of its Appendix C with
sigma_data = 1). A prediction of x0 has no such boundary, and is refused where it is needed.

Times are [b] in [0, 1], Levels of them [b, 1, 1, 1]. Times at or below 0 are clean data, also on tables, whose first entry is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tinyldm.config import Config, ObjectiveConfig
from tinyldm.diffusion.prediction import Network, to_eps, to_target, to_x0
from tinyldm.diffusion.process import Discrete, Level, Process, input_scale
from tinyldm.device import autocast
from tinyldm.model import Model, architecture
from tinyldm.models.layers import Cond
from tinyldm.objectives.denoising import Denoising, DenoisingBatch, map_cond
from tinyldm.random_streams import Stream, generator

TEACHER, TARGET = "teacher", "target"           # names of networks


class Distillation(Denoising):
    """Base class of objectives that turn a model into one of few steps. Further random numbers of a batch are drawn by `further`; a
    teacher, where there is one, is networks["teacher"]; its guided answers need `guides`.

    A subclass defines losses(), and may define further()."""

    guides = True               # whether batches have the empty caption's condition
    boundary = True             # whether f(x, 0) = x has to follow from the prediction
    own_loss = True             # whether it has another loss than the diffusion loss, so that --loss and the like have no effect

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model | None = None):
        super().__init__(config, model, trained)
        self.option = own_options(type(self), config)
        self.networks = {} if teacher is None else {TEACHER: frozen(teacher.net)}
        self.told_teacher = teacher is not None and "guidance" in architecture(teacher.net).extras(teacher.net.config)
        self.usual_scale = 1.0 if teacher is None else float(teacher.defaults.get("cfg", 7.5))      # of the teacher's guidance
        if self.decay:
            self.networks, self.saved = self.networks | {TARGET: frozen(copy.deepcopy(model.net))}, (TARGET,)

    @property
    def guidance(self) -> float:
        """Scale of the teacher's guidance: the option `scale`, 0: as the teacher is drawn with."""
        return float(self.option["scale"] or self.usual_scale)

    @property
    def decay(self) -> float:
        """Of the averages of the student that are networks["target"], the option `ema`. 0: the student itself is the target, as always
        beside an adapter (LCM-LoRA, arXiv:2311.05556)."""
        return 0.0 if self.adapted else self.option.get("ema", 0.0)

    @classmethod
    def taught(cls, config: Config) -> bool:
        """Always, but for an objective with an option `distil` where that is false."""
        return bool(own_options(cls, config).get("distil", True))

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if cls.boundary and config.objective.prediction == "x0":
            raise ValueError(f"--objective {config.objective.name} needs a model that predicts eps, v or flow: a prediction of x0 does not "
                             "become the picture itself at the end of the curve")
        if cls.taught(config) and not config.finetune.kind:
            raise ValueError(f"--objective {config.objective.name} learns from a model that exists: --teacher with a run or a model folder")
        if cls.tells(config) and config.finetune.adapts:
            raise ValueError(f"--objective {config.objective.name} tells its network {', '.join(cls.tells(config))}, for which an adapter "
                             "has no weights: leave out --finetune lora")
        if config.run.resume == "no":                           # a run that was begun with them goes on
            cls.check_unused(config)
        if config.run.fsdp:
            raise ValueError(f"--objective {config.objective.name} calls other networks beside the sharded one: leave out --fsdp")
        if config.finetune.kind and config.finetune.trains_text:
            raise ValueError(f"--objective {config.objective.name} compares answers to the same condition: leave out --train-text")

    @classmethod
    def check_unused(cls, config: Config) -> None:
        """ValueError for settings of training that have no part in this objective."""
        plain, settings = ObjectiveConfig(), config.objective
        unused = [name for name in ("loss", "huber_c", "loss_weight", "min_snr_gamma", "p2_gamma", "input_perturbation")
                  if getattr(settings, name) != getattr(plain, name) and (cls.own_loss or name == "input_perturbation")]
        if unused:
            raise ValueError(f"--{unused[0].replace('_', '-')} is a setting of the diffusion loss, and --objective {settings.name} has "
                             "another one: leave it out; what it has of its own is set by --objective-options")
        if cls.own_loss and config.finetune.lora_dropout:
            raise ValueError(f"--objective {settings.name} compares answers of one network, which --lora-dropout would make different: "
                             "leave it out")

    def begin_phase(self, config: Config, model: Model) -> None:
        super().begin_phase(config, model)
        self.kind, self.adapted = config.objective.prediction, config.finetune.adapts

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        """More random numbers for a global batch of latents of this shape [b, c, h, w], on the CPU: by name, each [b, ...]."""
        return {}

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> DenoisingBatch:
        batch = super().draw(samples, generator, batch_size, part)
        drawn = self.further(generator, torch.Size((batch_size, *batch.x0.shape[1:])))
        return batch._replace(own={name: tensor[part] for name, tensor in drawn.items()} or None)

    def validation_batch(self, samples: Any, seed: int) -> DenoisingBatch:
        batch = super().validation_batch(samples, seed)
        return batch._replace(own=self.further(generator(Stream.VALIDATION_FURTHER, seed), batch.x0.shape) or None)

    def to_device(self, batch: DenoisingBatch, device: torch.device) -> DenoisingBatch:
        if not self.guides or self.text_trained:
            return super().to_device(batch, device)
        # Encoded together, so that the captions and the empty one have one length.
        moved = super().to_device(batch._replace(tokens=torch.cat([batch.tokens, self.empty[None]])), device)
        empty = map_cond(moved.cond, lambda value: value[-1:].expand(len(batch.tokens), *value.shape[1:]))
        return moved._replace(tokens=batch.tokens, cond=map_cond(moved.cond, lambda value: value[:-1]), empty=empty)

    def cond(self, batch: DenoisingBatch, **told: Tensor) -> Cond:
        """The condition of the captions. told: values [b] in Cond.extra, in place of the batch's. (Where text encoders are trained too, it
        is encoded anew, with gradients.)"""
        return told_cond(batch.cond or self.encode(batch.tokens, batch.x0.device), batch, told)

    def level(self, t: Tensor, x0: Tensor) -> Level:
        """The level at times t [b], as numbers of x0's dtype."""
        return Level(*(value.to(x0.dtype) for value in level_at(self.process(x0), t)))

    def f(self, net: Network, x: Tensor, at: Level, cond: Cond) -> Tensor:
        return guess(net, self.kind, x, at, cond)

    @torch.no_grad()
    def teach(self, x: Tensor, at: Level, batch: DenoisingBatch, scale: Tensor | float = 1.0) -> Tensor:
        """The teacher's guess of x0, guided by `scale` [b, 1, 1, 1]: (1 - scale) of the empty caption's + scale of the caption's. One
        that is told the scale (FLUX dev, guided.py) answers so by itself."""
        net = self.networks[TEACHER]
        if self.told_teacher:
            told = scale.flatten() if isinstance(scale, Tensor) else at.t.new_full(at.t.shape, scale)
            return self.f(net, x, at, self.cond(batch, guidance=told))
        cond = self.cond(batch)
        if isinstance(scale, float) and scale == 1:
            return self.f(net, x, at, cond)
        twice = Level(*(torch.cat([value, value]) for value in at))
        own, other = self.f(net, torch.cat([x, x]), twice, cond.cat(told_cond(batch.empty, batch, {}))).chunk(2)
        return other + scale * (own - other)

    def after_step(self, step: int) -> None:
        if TARGET in self.networks:
            move_average(self.networks[TARGET], self.model.net, self.decay)


def own_options(kind: type[Denoising], config: Config) -> dict[str, Any]:
    """The options of an objective: its defaults, and what --objective-options says."""
    return {**kind.options, **config.objective.options}


def frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def told_cond(cond: Cond, batch: DenoisingBatch, told: dict[str, Tensor]) -> Cond:
    return Cond(cond.context, cond.mask, cond.pooled, {**(batch.extra or {}), **told})


def level_at(process: Process, t: Tensor) -> Level:
    """The level at times t [b]; clean data at and below 0."""
    now, clean = process(t.clamp(min=0)), (t <= 0).view(-1, 1, 1, 1)
    return Level(now.t, now.alpha.masked_fill(clean, 1.0), now.sigma.masked_fill(clean, 0.0))


def guess(net: Network, kind: str, x: Tensor, at: Level, cond: Any) -> Tensor:
    """f(x, t): the network's guess of x0 for x [b, c, h, w], in x's dtype."""
    return to_x0(kind, x, net(x / input_scale(at), at.t, cond).to(x.dtype), at)


def both(kind: str, x: Tensor, out: Tensor, at: Level) -> tuple[Tensor, Tensor]:
    """(x0, eps) that an output of this kind implies, without dividing by sigma: its target p x0 + q eps and x = alpha x0 + sigma eps are
    two equations. Their determinants are in prediction.py."""
    one, none = torch.ones_like(at.alpha), torch.zeros_like(at.alpha)
    p, q = to_target(kind, one, none, at), to_target(kind, none, one, at)
    out = out[:, : x.shape[1]]
    determinant = at.alpha * q - at.sigma * p
    return (q * x - at.sigma * out) / determinant, (at.alpha * out - p * x) / determinant


def everywhere(at: Level, x: Tensor) -> Level:
    """A level of Python floats as one of tensors, for each sample of x."""
    return Level(x.new_full((len(x),), at.t), *(x.new_full((len(x), 1, 1, 1), value) for value in at[1:]))


def with_times(model: Model, count: int) -> Model:
    """The model with `count` times in its scheduler config, of which sampler lcm takes some: those that the student learns. A flow has
    all of them, and published configs mean 50 where they do not say it."""
    if not isinstance(model.process, Discrete) or count == model.scheduler.get("original_inference_steps", 50):
        return model
    return replace(model, scheduler=model.scheduler | {"original_inference_steps": count})


def ddim(x: Tensor, x0: Tensor, now: Level, nxt: Level) -> Tensor:
    """One step with x0 and eps held fixed (arXiv:2010.02502, Eq. 12), where every sample has its own two levels. now.sigma > 0."""
    return nxt.alpha * x0 + nxt.sigma * to_eps(x, x0, now)


def heun(denoise: Callable[[Tensor, Level], Tensor], x: Tensor, now: Level, nxt: Level) -> Tensor:
    """One step of Heun's method in y = x / (alpha + sigma), u = sigma / (alpha + sigma), where dy / du = eps - x0, as in samplers.heun;
    Euler's for samples that come to sigma = 0."""
    x0 = denoise(x, now)
    guessed = ddim(x, x0, now, nxt)
    x0_nxt = denoise(guessed, nxt)
    slope, slope_nxt = to_eps(x, x0, now) - x0, to_eps(guessed, x0_nxt, nxt._replace(sigma=nxt.sigma.clamp(min=1e-12))) - x0_nxt
    (y, u), (scale, u_nxt) = ((x / (now.alpha + now.sigma), now.sigma / (now.alpha + now.sigma)),
                              (nxt.alpha + nxt.sigma, nxt.sigma / (nxt.alpha + nxt.sigma)))
    return torch.where(nxt.sigma > 0, scale * (y + (u_nxt - u) * (slope + slope_nxt) / 2), guessed)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(r^2 + c^2) - c, [b], of the root mean square r of each sample's error (arXiv:2310.14189, Eq. 7, divided by the root of the
    number of dimensions, so that c does not depend on it). c = 0: r itself, whose gradient at an error of 0 is 0."""
    square = error.square().flatten(1).mean(1)
    return (square + max(c, 1e-8) ** 2).sqrt() - c


@torch.no_grad()
def move_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) net, of all parameters."""
    torch._foreach_lerp_([*average.parameters()], [p.detach() for p in net.parameters()], 1 - decay)


def single(cond: Cond) -> Cond:
    """The condition in float32, as `derivative` computes."""
    exact = lambda value: value.float() if value is not None and value.dtype in (torch.bfloat16, torch.float16) else value
    return Cond(exact(cond.context), exact(cond.mask), exact(cond.pooled), {name: exact(value) for name, value in cond.extra.items()})


class DenseNorms(TorchFunctionMode):
    """Inside, GroupNorm is computed of contiguous tensors: its forward mode refuses those in channels-last (torch 2.13)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def derivative(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(function(inputs), its derivative along the tangents), in forward mode: about two forward passes, and no gradients.

    PyTorch's fused kernels of attention have no forward mode, so attention is computed by plain products inside. In float32, outside of
    autocast: differences of bfloat16 would be noise (arXiv:2410.11081, Appendix G)."""
    with sdpa_kernel(SDPBackend.MATH), autocast(inputs[0].device, "fp32"), DenseNorms():
        return torch.func.jvp(function, inputs, tangents)
