"""Noise that depends on seeds alone: never on the device, the batch or the dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

Generators = Sequence[Generator] | None


def make_generators(seeds: Iterable[int]) -> list[Generator]:
    """One CPU generator per image: the same noise on every device, and at every batch size."""
    return [Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Standard normal noise [b, *shape], float32 on the CPU, image i from generators[i] alone: one draw for the whole batch
    would give it a noise that depends on b."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Noise like x [b, ...], image i from generators[i]; drawn as in `initial_noise`, then moved and cast."""
    if generators is None or len(generators) != len(x):
        count = "none" if generators is None else len(generators)
        raise ValueError(f"{len(x)} images need {len(x)} generators, got {count}: use make_generators(seeds)")
    return initial_noise(x.shape[1:], generators).to(x)
