"""How much memory training takes on a GPU, counted on the meta device: shapes without values, on any machine.

What is kept between the forward and the backward pass is an estimate (see Kept). A GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tinyldm.config import Config
from tinyldm.model import muon_matrices, repeated_blocks
from tinyldm.models.layers import Cond

RESERVE = 1.5e9        # estimate: CUDA context, workspaces, fragmentation
PARTITIONER = 1.07     # torch.compile (2.13) keeps this much more than Kept counts: traced, for the DiT and the U-Net
EAGER = 1.6            # estimate: and this much more again without it, when every cast and norm keeps its own tensors


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Saves(torch.autograd.Function):
    """Stands for an operation of which only its output's shape and what it keeps for the backward pass matter."""

    @staticmethod
    def forward(ctx, out: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return out


class Kept(TorchFunctionMode):
    """Watches forward passes on the meta device for the tensors they would keep for the backward pass on a GPU.

    That device has neither autocast nor fused attention, so both are acted out: products run in `dtype`, a
    tensor is cast once; attention keeps q, k, v, its output and a number per query; a norm keeps its input.
    Pointwise operations keep outputs of products only, the rest is recomputed, about as torch.compile does.
    """

    products, norms = (F.linear, F.conv2d), (F.group_norm, F.layer_norm, F.rms_norm)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.running = dtype, None
        self.casts, self.made = {}, {}                    # tensor -> cast; storage -> a tensor, which keeps it alive
        self.kept: dict[int, Tensor] = {}                 # storage -> a tensor of it
        self.inside: list[dict[int, Tensor]] = []         # the same for each checkpointed block
        self.place = self.kept
        self.weights: set[int] = set()                    # storages of parameters

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.running, kwargs = function, kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args[:3])                                    # [b, heads, n, d]
            out = empty(q.shape[0], q.shape[2], *v.shape[1::2], dtype=v.dtype).transpose(1, 2)
            return Saves.apply(out, q, k, v, out, empty(*q.shape[:3]))
        if function in self.norms:
            with torch.no_grad():
                out = function(args[0].float(), *args[1:], **kwargs)
            return Saves.apply(out, args[0])
        if function in self.products:
            out = function(*map(self.cast, args), **{key: self.cast(x) for key, x in kwargs.items()})
            self.made[storage(out)] = out
            return out
        return function(*args, **kwargs)

    def cast(self, x):
        self.weights |= {storage(x)} if isinstance(x, nn.Parameter) else set()
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if x not in self.casts:
            self.casts[x] = x.to(self.dtype)
        return self.casts[x]

    def pack(self, x: Tensor) -> Tensor:
        if self.running in (*self.products, *self.norms, F.scaled_dot_product_attention) or storage(x) in self.made:
            self.place[storage(x)] = x
        return x

    def enter(self, block: nn.Module, inputs: tuple) -> None:
        """A checkpointed block begins: its inputs are kept, of what it keeps itself there is one block's at a time."""
        conds = [x.context for x in inputs if isinstance(x, Cond)]
        self.kept |= {storage(x): x for x in (*tree_leaves(inputs), *conds) if isinstance(x, Tensor)}
        self.place = {}
        self.inside.append(self.place)

    def leave(self, block: nn.Module, inputs: tuple, out: Tensor) -> None:
        self.place = self.kept


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def count_kept(forward: Callable[[], object], dtype: torch.dtype = torch.bfloat16,
               checkpointed: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """Bytes that a forward pass keeps until the backward pass: (activations, casts of parameters).

    Of `checkpointed` modules, it is the inputs of all and, while one is run again, the rest of the largest."""
    mode = Kept(dtype)
    hooks = [hook for module in checkpointed
             for hook in (module.register_forward_pre_hook(mode.enter), module.register_forward_hook(mode.leave))]
    try:
        with saved_tensors_hooks(mode.pack, lambda x: x), mode:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    copies = [copy for x, copy in mode.casts.items() if isinstance(x, nn.Parameter)]
    weights = mode.weights | set(map(storage, copies))

    def count(kept: Mapping[int, Tensor], counted: Iterable[int]) -> int:
        return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights and at not in counted)

    activations = count(mode.kept, ()) + max((count(kept, mode.kept) for kept in mode.inside), default=0)
    return activations, sum(copy.untyped_storage().nbytes() for copy in copies)


def activations(config: Config, *calls: tuple[nn.Module, Callable[[], object]]) -> tuple[float, int]:
    """Of (network, its forward pass on one picture): (bytes they keep, estimated; bytes of the weights' casts)."""
    dtype = torch.float32 if config.run.dtype == "fp32" else torch.bfloat16
    counts = []
    for net, call in calls:
        checkpointed = config.network.grad_checkpointing and hasattr(net, "grad_checkpointing")
        counts.append(count_kept(call, dtype, repeated_blocks(net) if checkpointed else ()))
    kept, casts = (sum(some) for some in zip(*counts))
    return kept * PARTITIONER * (EAGER if config.run.compile is False else 1), casts


def memory(config: Config, trained: Mapping[str, nn.Module], frozen: int, kept: float, casts: int) -> dict[str, float]:
    """Bytes on the GPU, by kind. frozen: parameters that are not trained; kept: bytes of activations."""
    named = {f"{part}.{name}": p.numel() for part, module in trained.items() for name, p in module.named_parameters()}
    chosen = muon_matrices(trained) if config.optimisation.optimizer == "muon" else ()
    count, matrices = sum(named.values()), sum(named[name] for name in chosen)
    averages = max(1, len(config.optimisation.ema_widths)) if "net" in trained else 0
    return {"weights, fp32": 4 * count, "their casts, for autocast": casts, "gradients, fp32": 4 * count,
            f"optimizer ({config.optimisation.optimizer})": 8 * (count - matrices) + 4 * matrices,
            "averaged weights, fp32": 4 * count * averages, "frozen networks, fp32": 4 * frozen,
            "activations (estimate)": kept, "CUDA, fragmentation (estimate)": RESERVE}
