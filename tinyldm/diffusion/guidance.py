"""Guidance: from a network to a denoiser, and from a denoiser to a better one.

A denoiser is `denoise(x, level) -> x0`, its best guess of the clean image behind x. Samplers know nothing else about a
model. Guidance takes a denoiser and returns one, so that several can be stacked. `cond` is passed on to the network as
it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_output, to_x0
from tinyldm.diffusion.process import Level, input_scale
from tinyldm.lookup import lookup


class Denoised(NamedTuple):
    """A guess of x0, together with the variance that the network has learned, as `ddpm` takes them."""

    x0: Tensor  # [b, c, h, w]
    variance: Tensor  # [b, c, h, w], -1 for the posterior's beta_tilde, 1 for beta; [b, 0, h, w] where none was learned


Denoiser = Callable[[Tensor, Level], Tensor]
VarianceDenoiser = Callable[[Tensor, Level], Denoised]  # the functions below also take one of these, and then return one
Mix = Callable[[Tensor, Tensor, Tensor, Level], Tensor]  # (conditional x0, unconditional x0, x, level) -> guided x0 [b, c, h, w]


def denoiser(net: Network, cond: Any, prediction: str) -> Denoiser:
    """`net(x, t, cond)` as a function of (x, level). The output is cast to x's dtype, float32 even when the network runs
    in bfloat16: samplers take differences that half precision would lose. The channels of a learned variance are dropped.
    """
    denoise = denoiser_with_variance(net, cond, prediction)
    return lambda x, level: denoise(x, level).x0


def denoiser_with_variance(net: Network, cond: Any, prediction: str) -> VarianceDenoiser:
    """The same, for `ddpm`: a network that has learned its variance outputs twice x's channels, of which the second half
    are the variance (arXiv:2102.09672, Section 3.1). All other samplers take a `denoiser`."""
    lookup(PREDICTIONS, prediction, "prediction")

    def denoise(x: Tensor, level: Level) -> Denoised:
        out = net(x / input_scale(level), x.new_full((x.shape[0],), level.t), cond).to(x.dtype)  # [b, c or 2c, h, w]
        return Denoised(to_x0(prediction, x, out, level), out[:, x.shape[1] :])

    return denoise


def tell_elapsed(net: Network, levels: Sequence[Level]) -> Network:
    """The network, told in each step how far it goes along the flow, to the next level: the answer of a mean flow is the mean velocity on
    that way (arXiv:2505.13447, Eq. 12). cond: has `extra`, a mapping."""
    times = torch.tensor([level.t for level in levels])
    ways = torch.tensor([*(now.sigma - nxt.sigma for now, nxt in pairwise(levels)), 0.0])

    def told(x: Tensor, t: Tensor, cond: Any, **options: Any) -> Tensor:
        nearest = (times.to(t)[None] - t[:, None]).abs().argmin(1)                      # t is a level's, but perhaps rounded
        return net(x, t, replace(cond, extra={**cond.extra, "elapsed": ways.to(t)[nearest]}), **options)
    return told


def change_x0(denoise: Denoiser, change: Callable[[Tensor, Tensor, Level], Tensor]) -> Denoiser:
    """The denoiser whose guess is change(x0, x, level). A learned variance is passed on unchanged."""

    def changed(x: Tensor, level: Level) -> Tensor | Denoised:
        guess = denoise(x, level)
        if isinstance(guess, Denoised):
            return guess._replace(x0=change(guess.x0, x, level))
        return change(guess, x, level)

    return changed


def cfg(denoise_both: Denoiser, scale: float, rescale: float = 0.0, prediction: str = "x0", mix: Mix | None = None) -> Denoiser:
    """Classifier-free guidance: (1 + w) conditional - w unconditional, w = scale - 1 (arXiv:2207.12598, Eq. 6).

    `denoise_both` is a denoiser over the doubled batch: its condition holds the b conditional entries first, then the b
    unconditional (or negative) ones, so that one call of the network serves both. The paper's formula is for eps. At fixed
    x, x0 is linear in eps, v and the flow velocity, and the weights sum to 1, so the same formula holds for all of them.
    A learned variance is not guided: it is that of the conditional half.

    rescale in [0, 1] is the fraction by which the standard deviation of each guided sample is restored to that of its
    conditional one (arXiv:2305.08891, Eqs. 15-16). Unlike guidance, the result depends on what is rescaled. Published code
    rescales the network's output, so pass its `prediction`. Only at alpha = 0 do x0 and v give the same result.

    mix: another rule than that formula, made by one of MIXES.

    scale = 1 is the conditional model to the last bit, at twice the cost: use the plain denoiser there.
    """
    lookup(PREDICTIONS, prediction, "prediction")
    mix = mix or linear(scale, prediction, None)

    def guide(both: Tensor, x: Tensor, level: Level) -> Tensor:  # both: [2b, c, h, w]
        conditional, unconditional = both.chunk(2)
        guided = mix(conditional, unconditional, x, level)
        if not rescale:
            return guided
        out, conditional_out = (to_output(prediction, x, x0, level) for x0 in (guided, conditional))
        spread = lambda y: y.std((1, 2, 3), keepdim=True)
        ratio = torch.where(spread(out) > 0, spread(conditional_out) / spread(out), 1)              # cfg_zero's first output is 0
        return to_x0(prediction, x, out * (1 + rescale * (ratio - 1)), level)

    def denoise(x: Tensor, level: Level) -> Tensor | Denoised:
        both = denoise_both(torch.cat([x, x]), level)
        if isinstance(both, Denoised):
            return Denoised(guide(both.x0, x, level), both.variance[: len(x)])
        return guide(both, x, level)

    return denoise


def linear(scale: float, prediction: str, first: Level | None) -> Mix:
    """Classifier-free guidance as it is: see `cfg`."""
    return lambda conditional, unconditional, x, level: conditional + (scale - 1) * (conditional - unconditional)


def projected(scale: float, prediction: str, first: Level | None, momentum: float = -0.5, cap: float = 15 / 256, eta: float = 0.0) -> Mix:
    """Adaptive projected guidance (arXiv:2410.02416, Alg. 1), against the glaring colours of large scales. Of the difference, as x0, only
    the part at right angles to the conditional x0 counts, and `eta` of the other, which mostly adds contrast. Earlier differences count
    too, by powers of `momentum`, and its root mean square is at most `cap`: the paper's 15, the norm for SDXL's 4x128x128 numbers."""
    average: Tensor | float = 0.0

    def mix(conditional: Tensor, unconditional: Tensor, x: Tensor, level: Level) -> Tensor:
        nonlocal average
        norm = lambda y: torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)  # [b, 1, 1, 1]
        average = conditional - unconditional + momentum * average
        change = average * (cap * math.sqrt(x[0].numel()) / norm(average)).clamp(max=1)
        unit = conditional / norm(conditional)
        return conditional + (scale - 1) * (change - (1 - eta) * (change * unit).sum((1, 2, 3), keepdim=True) * unit)

    return mix


def zero_star(scale: float, prediction: str, first: Level | None) -> Mix:
    """CFG-Zero* for flows (arXiv:2503.18886, Alg. 1): the unconditional velocity is scaled to be as near as it can to the conditional one,
    before the two are mixed, and in the first step, where a network knows least, the velocity is 0."""
    if prediction != "flow":
        raise ValueError(f"guidance cfg_zero is for networks that predict the velocity of a flow, not {prediction}: use cfg or apg")

    def mix(conditional: Tensor, unconditional: Tensor, x: Tensor, level: Level) -> Tensor:
        if first is not None and level.t == first.t:
            return to_x0(prediction, x, torch.zeros_like(x), level)
        c, u = (to_output(prediction, x, x0, level) for x0 in (conditional, unconditional))
        dot = lambda a, b: (a * b).sum((1, 2, 3), keepdim=True)  # [b, 1, 1, 1]
        near = dot(c, u) / dot(u, u).clamp(min=1e-8) * u
        return to_x0(prediction, x, c + (scale - 1) * (c - near), level)

    return mix


# Rules for what to make of the conditional and the unconditional guess: (scale, prediction, first level of the grid) -> mix.
MIXES: dict[str, Callable[[float, str, Level | None], Mix]] = {"cfg": linear, "apg": projected, "cfg_zero": zero_star}


def beside(first: Denoiser, second: Denoiser) -> Denoiser:
    """The `denoise_both` of cfg from two denoisers, one for each half of the batch. With those of a model and of a worse one, such as an
    earlier checkpoint, under the same condition it is autoguidance (arXiv:2406.02507, Eq. 3 with w = scale)."""

    def denoise(x: Tensor, level: Level) -> Tensor | Denoised:
        halves = [each(part, level) for each, part in zip((first, second), x.chunk(2))]
        return Denoised(*map(torch.cat, zip(*halves))) if isinstance(halves[0], Denoised) else torch.cat(halves)

    return denoise


def interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guidance where low < sigma / alpha <= high (arXiv:2404.07724, Eq. 5). Elsewhere only `plain`, the conditional
    denoiser, is called, at half the cost. On any curve these are the paper's sigmas; pure noise is at infinity."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        noise = level.sigma / level.alpha if level.alpha else math.inf
        return (guided if low < noise <= high else plain)(x, level)

    return denoise


class SkipLayers(NamedTuple):
    """Skip-layer guidance, with the numbers published for Stable Diffusion 3.5 medium."""

    layers: tuple[int, ...] = (7, 8, 9)     # of the network, which the bad guess is made without
    scale: float = 2.8
    start: float = 0.01                     # active in the steps i of n with start < i / n < stop
    stop: float = 0.2


def skip_layers(denoise: Denoiser, skipped: Denoiser, settings: SkipLayers, levels: Sequence[Level], copies: int = 1) -> Denoiser:
    """Guidance away from what the network draws without some of its layers: x0 + scale (conditional - skipped), in early steps
    (StableDiffusion3Pipeline of diffusers).

    skipped: the conditional denoiser without those layers. levels: the grid. Samplers that call the denoiser between two levels of
    the grid are guided there where they are in that step. copies: 2 where `denoise` is the `denoise_both` of cfg. The same is then
    added to both halves, and cfg, whose weights sum to 1, adds it once to what it mixes: so its conditional half need not be
    computed again."""
    steps = len(levels) - 1
    active = [i for i in range(steps) if settings.start * steps < i < settings.stop * steps]
    low, high = (levels[active[-1] + 1].sigma, levels[active[0]].sigma) if active else (0.0, 0.0)

    def push(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        if not low < level.sigma <= high:
            return x0
        b = len(x) // copies
        bad = skipped(x[:b], level)
        return x0 + settings.scale * (x0[:b] - (bad.x0 if isinstance(bad, Denoised) else bad)).repeat(copies, 1, 1, 1)

    return change_x0(denoise, push)


def dynamic_threshold(denoise: Denoiser, quantile: float = 0.995, bound: float = 1.0) -> Denoiser:
    """Clip each x0 to s, the `quantile` of its absolute values, and scale it down to `bound`, wherever s > bound
    (arXiv:2205.11487, Section 2.3). The default bound is for pixels in [-1, 1]. Latents have no fixed range: only the
    caller knows a bound for them."""

    def clip(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        s = x0.abs().flatten(1).quantile(quantile, 1).clamp(min=bound).view(-1, 1, 1, 1)
        return x0.clamp(-s, s) * (bound / s)

    return change_x0(denoise, clip)


def classifier_guidance(denoise: Denoiser, log_p: Denoiser, scale: float = 1.0) -> Denoiser:
    """Steer with log_p(x, level) = log p(y | x_t), [b], of a classifier that was trained on noisy images (arXiv:2105.05233,
    Eq. 14): eps - scale sigma grad log p, written as x0 + scale sigma^2 / alpha grad log p. scale = 1 is Bayes' rule. Pure
    noise (alpha = 0) carries no information about y, so x0 is left unchanged there."""

    def steer(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        if level.alpha == 0:
            return x0
        with torch.inference_mode(False), torch.enable_grad():
            noisy = x.clone().requires_grad_()
            gradient = torch.autograd.grad(log_p(noisy, level).sum(), noisy)[0]
        return x0 + scale * level.sigma**2 / level.alpha * gradient

    return change_x0(denoise, steer)


def inpaint(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Draw only where mask is 1. Elsewhere x0 is `known` at every level, whatever the network predicts.

    known: clean latents [1 or b, c, h, w]; mask: [1 or b, 1, h, w] in [0, 1]. Start from `known`, noised to the first
    level. In every step the network sees the known part at the right noise level, as in arXiv:2201.09865, Eq. 8, and
    needs no training for it. The sampler's own step moves the known part of x along with the rest.
    """
    return change_x0(denoise, lambda x0, x, level: torch.lerp(known, x0, mask))
