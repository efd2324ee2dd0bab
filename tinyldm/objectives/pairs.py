"""Pairs of noise and the latents that a model draws from it, in files of one batch each. Pair i's noise is that of seed i alone, so it is
not stored; latents are in half precision, as those of a cache are.

    FOLDER/000000.safetensors ...    x0 float16 [b, c, h, w], tokens int64 [b, n], sizes float32 [b, 6] where the network is told them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.files import write_file


class Pairs:
    """`count` pairs or more, in files of batch_size."""

    def __init__(self, folder: Path, count: int, batch_size: int):
        self.folder, self.batch_size, self.files = folder, batch_size, -(-count // batch_size)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def missing(self) -> list[int]:
        """The numbers of the files that are not there yet."""
        return [number for number in range(self.files) if not self.file(number).exists()]

    def seeds(self, number: int) -> range:
        """The numbers of the pairs in a file."""
        return range(number * self.batch_size, (number + 1) * self.batch_size)

    def write(self, number: int, x0: Tensor, **others: Tensor) -> None:
        self.folder.mkdir(exist_ok=True)
        write_file(self.file(number), save({"x0": x0.half().cpu(), **others}))

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of some pairs, and their noise `eps`: by name, float32 where it is a number, [b, ...]."""
        found = [self._read(i) for i in numbers]
        both = {name: torch.cat([pair[name] for pair in found]) for name in found[0]}
        return {**both, "x0": both["x0"].float(), "eps": initial_noise(both["x0"].shape[1:], make_generators(numbers))}

    def _read(self, i: int) -> dict[str, Tensor]:
        number, row = divmod(i, self.batch_size)
        with safe_open(self.file(number), "pt") as file:
            return {name: file.get_slice(name)[row:row + 1] for name in file.keys()}
