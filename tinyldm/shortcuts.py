"""Shorter calls of a network: from step to step its deeper blocks answer nearly the same, and most calls can reuse what they answered.

    shortcut = find_shortcut({"deep_cache": 3}, model.net)
    denoise = shortcut.wrap(denoise, model.net, levels)

A shortcut is a tap (models.layers.runner): it stands between a network and its blocks while the network is called, so networks know
nothing of it. Every denoiser has a tap of its own, because what one condition was answered is of no use to another. The picture changes
a little: docs/speed.md has the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinyldm.diffusion.guidance import Denoised, Denoiser
from tinyldm.diffusion.process import Level
from tinyldm.lookup import lookup
from tinyldm.model import repeated_blocks
from tinyldm.models.dit import DiT
from tinyldm.models.flux import DoubleBlock, Flux
from tinyldm.models.mmdit import JointBlock, MMDiT
from tinyldm.models.unet import UNet

TWO_STREAMS = (JointBlock, DoubleBlock)         # blocks that take image and text apart and answer both; others answer one tensor


class ShortTap(Protocol):
    """A tap that runs all blocks of a call of the network, or not."""

    full: bool                                  # of the call that goes on, or of the last one

    def begin(self, fresh: bool, step: int, steps: int) -> None:
        """A call begins, in step 0 to steps - 1 of the sampler. fresh: there was none in this step nor in the one before."""

    def __call__(self, run: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
        """What the network is answered where it calls a block."""


class FirstBlockCache:
    """First-block cache (chengzeyi/ParaAttention; FirstBlockCache in diffusers), for transformers: where the first block adds nearly the
    same to the image tokens as in the last full call, the others are taken to add what they added then, and are not run.

    threshold: nearly is mean |change| < threshold * mean |what it added|. 0: never. Calls in the last step and fresh ones are
    full."""

    def __init__(self, net: nn.Module, threshold: float):
        blocks = repeated_blocks(net)
        self.first, self.last, self.threshold = blocks[0], blocks[-1], threshold
        self.full = True
        self.added: Tensor | None = None        # by the first block in the last full call [b, n, width]
        self.rest: Tensor | None = None         # by all others there

    def begin(self, fresh: bool, step: int, steps: int) -> None:
        self.full, self.forced = True, fresh or step >= steps - 1

    def __call__(self, run: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
        image, *text = inputs[:2] if isinstance(block, TWO_STREAMS) else inputs[:1]
        if not self.full:
            if block is self.last:              # where text and image are one sequence, the image is its end
                before, image = image.tensor_split([image.shape[1] - self.rest.shape[1]], dim=1)
                image = torch.cat([before, image + self.rest], dim=1)
            return (image, *text) if text else image
        answer = run(block, *inputs)
        after = answer[0] if text else answer
        if block is self.first:
            self.compare(after - image)
            self.after_first = after
        elif block is self.last and self.added is not None:     # without the first block (--skip-layers) every call is full
            self.rest = after[:, -self.added.shape[1] :] - self.after_first
        return answer

    def compare(self, added: Tensor) -> None:
        """Decide whether the call is full. (Not a number, as of networks whose blocks add nothing yet, is no small change.)"""
        similar = not self.forced and self.rest is not None and (
            (added - self.added).abs().mean() / self.added.abs().mean() < self.threshold)
        self.full = not similar
        if self.full:
            self.added = added


class DeepCache:
    """DeepCache (arXiv:2312.00858, Sec. 3.2), for U-Nets: in every `every`-th call the whole network is run, in the others only its last
    block, between the first and the last convolution. It takes the feature map from below that it took in the last full call.

    This is the branch of the paper with the least work, its default. Here the first fifth of the steps is full too: these decide what the
    picture becomes, and without them the error is that of leaving the same steps out (docs/speed.md)."""

    begun = 1 / 5

    def __init__(self, net: UNet, every: int):
        level = net.up[-1]
        self.entry, self.kept = level.resnets[-1], {*level.resnets[-1:], *level.attentions[-1:]}
        self.channels, self.every = net.conv_in.out_channels, every         # channels of the skip connection from the first convolution
        self.full, self.age = True, 0                                       # calls since the last full one, that one too
        self.deep: Tensor | None = None

    def begin(self, fresh: bool, step: int, steps: int) -> None:
        self.full = fresh or self.age >= self.every or step < self.begun * steps
        self.age = 1 if self.full else self.age + 1

    def __call__(self, run: Callable[..., Any], block: nn.Module, x: Tensor, *inputs: Any) -> Any:
        if not self.full and block not in self.kept:
            return x[:, : self.channels]                # any numbers: nobody looks at them
        if block is self.entry:
            deep, skip = x.tensor_split([x.shape[1] - self.channels], dim=1)
            if self.full:
                self.deep = deep
            else:
                x = torch.cat([self.deep, skip], dim=1)
        return run(block, x, *inputs)


class Kind(NamedTuple):
    """A row of the table of shortcuts."""

    tap: Callable[[nn.Module, float], ShortTap]         # network, value of the flag -> tap
    networks: tuple[type[nn.Module], ...]               # that it can be used with
    which: str                                          # these in words
    label: str                                          # in the settings of a picture
    short: str                                          # what a short call does, in words


# By the name of the flag (cli.add_drawing_flags), with _ for -.
SHORTCUTS: dict[str, Kind] = {
    "first_block_cache": Kind(FirstBlockCache, (DiT, MMDiT, Flux), "transformers", "First block cache", "ended after the first block"),
    "deep_cache": Kind(DeepCache, (UNet,), "U-Nets", "DeepCache", "ran the outermost block only"),
}


class Shortcut:
    """One shortcut, a setting of drawing. It counts the calls of all networks that are wrapped with it."""

    def __init__(self, name: str, value: float, net: nn.Module):
        """ValueError for networks that it is not for."""
        self.kind, self.name, self.value = lookup(SHORTCUTS, name, "shortcut"), name, value
        if not isinstance(net, self.kind.networks):
            raise ValueError(f"--{name.replace('_', '-')} is for {self.kind.which}: leave it out with this model, whose network is a "
                             f"{type(net).__name__}")
        self.calls = self.short = 0

    def wrap(self, denoise: Denoiser, net: nn.Module, levels: Sequence[Level]) -> Denoiser:
        """A denoiser that calls `net`, with short calls. levels: of the sampler. A level between two of them counts as the
        second, so that samplers with several calls per step have short ones too. ValueError for a compiled network."""
        if net._compiled_call_impl is not None:
            raise ValueError(f"--{self.name.replace('_', '-')} chooses in each call which blocks to run, and a compiled network runs all "
                             "of them: compile its blocks instead (model.compile_blocks)")
        tap, before = self.kind.tap(net, self.value), -2

        def shortened(x: Tensor, level: Level) -> Tensor | Denoised:
            nonlocal before
            step = sum(other.sigma > level.sigma for other in levels)
            tap.begin(abs(step - before) > 1, step, len(levels) - 1)
            before, outer, net.tap = step, getattr(net, "tap", None), tap
            try:
                return denoise(x, level)
            finally:
                net.tap = outer
                self.calls, self.short = self.calls + 1, self.short + (not tap.full)
        return shortened

    def __str__(self) -> str:
        return f"{self.value:g}"

    def summary(self) -> str:
        return f"{self.kind.label} {self}: {self.short} of {self.calls} calls of the network {self.kind.short}"


def find_shortcut(values: Mapping[str, float | None], net: nn.Module) -> Shortcut | None:
    """The shortcut of the values that are not None, by names in SHORTCUTS. ValueError for two, and for one that the network has no use
    for."""
    found = [Shortcut(name, value, net) for name, value in values.items() if value is not None]
    if len(found) > 1:
        raise ValueError(f"--{found[0].name} and --{found[1].name} exclude each other: leave one out".replace("_", "-"))
    return found[0] if found else None
