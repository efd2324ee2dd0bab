"""Estimates the memory that training takes on a GPU, counted on the meta device: shapes without values, on any machine.

Activations, the tensors saved for the backward pass, are an estimate (see SavedActivations). A GB is 10^9 bytes.
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
# torch.compile's partitioner (torch 2.13) saves this many times what SavedActivations counts: traced for the DiT and the U-Net.
PARTITIONER = 1.07
EAGER = 1.6            # estimate: a further factor for networks that are not compiled: every cast and norm saves its own tensors

CASTS, GRADIENTS = "their casts, for autocast", "gradients, fp32"       # kinds of memory that exist within a training step only
# What autocast runs in 16 bits, and in float32.
PRODUCTS, NORMS = (F.linear, F.conv2d), (F.group_norm, F.layer_norm, F.rms_norm)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class SaveForBackward(torch.autograd.Function):
    """Stands in for an operation: it returns `out`, and saves the given tensors for the backward pass."""

    @staticmethod
    def forward(ctx, out: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return out


class SavedActivations(TorchFunctionMode):
    """Records, during forward passes on the meta device, the tensors that a GPU would save for the backward pass.

    The meta device has neither autocast nor fused attention, so both are simulated: matrix products run in `dtype`, and a tensor
    is cast once; attention saves q, k, v, its output and one number per query; a norm saves its input. Pointwise operations
    save only outputs of matrix products; everything else is recomputed, roughly as torch.compile does.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.running = dtype, None            # running: the function being called
        self.casts: dict[Tensor, Tensor] = {}             # tensor -> its cast to `dtype`
        self.products_made: dict[int, Tensor] = {}        # storage -> output of a matrix product, which keeps the storage alive
        self.saved: dict[int, Tensor] = {}                # storage -> saved tensor, outside checkpointed blocks
        self.saved_in_blocks: list[dict[int, Tensor]] = []      # the same, for each checkpointed block
        self.current = self.saved                         # which of these dicts pack() adds to
        self.weights: set[int] = set()                    # storages of parameters

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.running, kwargs = function, kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args[:3])                                    # [b, heads, n, d]
            out = empty(q.shape[0], q.shape[2], *v.shape[1::2], dtype=v.dtype).transpose(1, 2)
            return SaveForBackward.apply(out, q, k, v, out, empty(*q.shape[:3]))
        if function in NORMS:
            with torch.no_grad():
                out = function(args[0].float(), *args[1:], **kwargs)
            return SaveForBackward.apply(out, args[0])
        if function in PRODUCTS:
            out = function(*map(self.cast, args), **{key: self.cast(x) for key, x in kwargs.items()})
            self.products_made[storage(out)] = out
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
        if self.running in (*PRODUCTS, *NORMS, F.scaled_dot_product_attention) or storage(x) in self.products_made:
            self.current[storage(x)] = x
        return x

    def enter(self, block: nn.Module, inputs: tuple) -> None:
        """A checkpointed block begins: its inputs stay saved; its own activations exist for one block at a time."""
        conds = [x.context for x in inputs if isinstance(x, Cond)]
        self.saved |= {storage(x): x for x in (*tree_leaves(inputs), *conds) if isinstance(x, Tensor)}
        self.current = {}
        self.saved_in_blocks.append(self.current)

    def leave(self, block: nn.Module, inputs: tuple, out: Tensor) -> None:
        """A checkpointed block ends."""
        self.current = self.saved


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def count_saved(forward: Callable[[], object], dtype: torch.dtype = torch.bfloat16,
                checkpointed: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """Bytes that a forward pass saves for the backward pass: (activations, casts of parameters).

    checkpointed: modules that are recomputed in the backward pass. The inputs of all of them count, and the activations inside
    the largest one."""
    mode = SavedActivations(dtype)
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

    def count(saved: Mapping[int, Tensor], counted: Iterable[int]) -> int:
        return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in weights and key not in counted)

    activations = count(mode.saved, ()) + max((count(block, mode.saved) for block in mode.saved_in_blocks), default=0)
    return activations, sum(copy.untyped_storage().nbytes() for copy in copies)


def saved_bytes(config: Config, *calls: tuple[nn.Module, Callable[[], object]]) -> tuple[list[float], int]:
    """What training networks on one picture saves for the backward pass: (bytes of activations of each network under torch.compile,
    an estimate; bytes of the casts of weights).

    calls: (network, a function that runs its forward pass on one picture)"""
    dtype = torch.float32 if config.run.dtype == "fp32" else torch.bfloat16
    counts = []
    for net, call in calls:
        checkpointed = config.network.grad_checkpointing and hasattr(net, "grad_checkpointing")
        counts.append(count_saved(call, dtype, repeated_blocks(net) if checkpointed else ()))
    saved, casts = zip(*counts)
    return [count * PARTITIONER for count in saved], sum(casts)


def memory(config: Config, trained: Mapping[str, nn.Module], frozen: int, saved: float, casts: int, batches: int) -> dict[str, float]:
    """Bytes on the GPU, by kind. frozen: bytes of weights that are not trained; saved: bytes of activations; casts: bytes of
    the casts of weights; batches: bytes of this batch and the next, which is uploaded meanwhile."""
    named = {f"{part}.{name}": p.numel() for part, module in trained.items() for name, p in module.named_parameters()}
    chosen = muon_matrices(trained) if config.optimisation.optimizer == "muon" else ()
    count, matrices = sum(named.values()), sum(named[name] for name in chosen)
    averages = max(1, len(config.optimisation.ema_widths)) if "vae" not in trained else config.autoencoder.ema > 0
    return {"weights, fp32": 4 * count, CASTS: casts, GRADIENTS: 4 * count,
            f"optimizer ({config.optimisation.optimizer})": 8 * (count - matrices) + 4 * matrices,
            "averaged weights, fp32": 4 * count * averages, "frozen networks": frozen,
            "two batches, fp32": batches, "activations (estimate)": saved, "CUDA, fragmentation (estimate)": RESERVE}
