"""Counts the peak memory of a forward pass without gradients, on the meta device: of encoding and of decoding pictures."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyldm.planning.memory import NORMS, PRODUCTS


class AutocastOnMeta(TorchFunctionMode):
    """CUDA's autocast and fused attention, which the meta device does not have: matrix products run in `dtype`, norms in float32,
    and attention keeps no matrix of weights. dtype None: no autocast."""

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype and function in (*PRODUCTS, F.scaled_dot_product_attention):
            cast = lambda x: x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            args, kwargs = tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}
        if self.dtype and function in NORMS:
            args = (args[0].float(), *args[1:])
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **kwargs)


class LivePeak(TorchDispatchMode):
    """Adds up the storages that are alive, and remembers the largest sum."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self.users: Counter[int] = Counter()            # storage -> number of tensors that use it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in known and storage._cdata not in self.users:
                continue                                # a view of a weight, which was there before
            self.live += 0 if storage._cdata in self.users else storage.nbytes()
            self.users[storage._cdata] += 1
            weakref.finalize(x, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def release(self, storage: int, size: int) -> None:
        self.users[storage] -= 1
        if not self.users[storage]:
            del self.users[storage]
            self.live -= size


@torch.no_grad()
def peak_bytes(forward: Callable[[], object], dtype: torch.dtype = torch.bfloat16) -> int:
    """The largest sum of tensors that a forward pass on the meta device holds at a time, without weights that were there before."""
    with LivePeak() as memory, AutocastOnMeta(dtype):
        forward()
    return memory.peak
