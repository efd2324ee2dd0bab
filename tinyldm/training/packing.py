"""Many small tensors as few large ones: groups of them, flat copies, and checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def buckets(tensors: Iterable[Tensor], most: int) -> list[list[Tensor]]:
    """Group tensors of the same dtype and device, in their order, up to `most` bytes; a larger tensor is a group of its own."""
    full: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, held = filling.get(kind, ([], 0))
        if bucket and held + size > most:
            full.append(bucket)
            bucket, held = [], 0
        filling[kind] = (bucket + [tensor], held + size)
    return full + [bucket for bucket, _ in filling.values()]


def pack(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Tensors of one dtype, copied into a flat one of this or another dtype, and the parts of it with their shapes."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    parts = slices(flat, tensors)
    torch._foreach_copy_(parts, tensors)
    return flat, parts


def slices(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a flat tensor, with the shapes of these tensors. The rest of it is left over."""
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view(tensor.shape) for part, tensor in zip(flat[:sum(sizes)].split(sizes), tensors)]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target. torch._foreach_copy_ refuses empty lists."""
    if targets:
        torch._foreach_copy_(targets, sources)


def checksum(tensors: Sequence[Tensor]) -> int:
    """48 bits, which a float64 holds, of a hash of the tensors' bits. Each tensor is summed up on its device, its bits read as integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(kinds[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    numbers = torch.stack(sums).tolist() if sums else []
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:6], "big")          # Python 3.10 has no default
