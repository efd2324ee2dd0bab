"""Noise that is a function of seeds alone, never of the device, the batch size or the dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

Generators = Sequence[Generator] | None


def make_generators(seeds: Iterable[int]) -> list[Generator]:
    """One CPU generator per image: the same noise on every device, and at every batch size."""
    return [Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Standard normal noise [b, *shape], float32 on the CPU. Image i is drawn from generators[i] alone, because in one draw
    for the whole batch its noise would depend on b."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Noise of x's shape [b, ...], image i from generators[i], drawn as in `initial_noise` and then moved and cast."""
    if generators is None or len(generators) != len(x):
        count = "none" if generators is None else len(generators)
        raise ValueError(f"{len(x)} images need {len(x)} generators, got {count}: use make_generators(seeds)")
    return initial_noise(x.shape[1:], generators).to(x)


def slerp(a: Tensor, b: Tensor, fraction: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """From a (fraction 0) to b (1) along the great circle through them, over `dim` (Shoemake, 1985, "Animating rotation
    with quaternion curves"). Between two noises it stays noise of unit variance; a straight line would not.

    a, b and fraction broadcast. Where a and b are parallel, it is the straight line.
    """
    unit = lambda y: y / torch.linalg.vector_norm(y, dim=dim, keepdim=True).clamp(min=1e-12)
    cosine = (unit(a) * unit(b)).sum(dim, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    arc = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin().clamp(min=1e-12)
    return torch.where(cosine.abs() > 0.9999, torch.lerp(a, b, fraction.to(a)), arc)
