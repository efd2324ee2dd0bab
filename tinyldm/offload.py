"""Draws with models that are larger than a GPU's memory: their weights wait in the host's memory, and are on the GPU only while they work.

    device = torch.device("cuda")
    with pinned_weights(device):
        model = load_model("black-forest-labs/FLUX.1-dev", "cpu", torch.bfloat16)
    model = offload(model, device)

draw() says which part works: `with model.at_work("net"): ...`. There are two ways to bring it to the GPU:

    as a whole      All of its weights are copied when it begins to work, and the copies dropped when it has done so.
    by blocks       The same with all weights outside of its repeated blocks. Every block is copied shortly before it works, and dropped
                    after it: at most two are on the GPU, the one that works and the next, which is copied meanwhile.

Nothing is copied back: drawing changes no weights. The same kernels compute with the same numbers, so a picture is the same to the last
bit as without offloading. The modules stay the same objects with the same parameters. Only `.data` of these changes, to a copy and back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyldm.device import free_memory
from tinyldm.lookup import lookup
from tinyldm.model import Model, is_compiled, repeated_blocks
from tinyldm.pinned_memory import PinnedMemory

HOW = {"auto": "a part that does not fit is moved by blocks, all others as wholes", "parts": "all as wholes",
       "blocks": "by blocks wherever a part has some"}


def offload(model: Model, device: torch.device, how: str = "auto", memory: int | None = None) -> Model:
    """The same model, whose parts are on the device only while they work. They must lie in the host's memory: load_model(..., "cpu"),
    for CUDA inside of pinned_weights, or else every copy is waited for.

    how     a key of HOW
    memory  bytes of weights that fit on the device, for "auto"; None: three quarters of what is free now, which leaves a quarter to
            the activations

    What changes the weights while they are on the device is lost: it is for drawing, not for training. ValueError for an unknown `how`,
    and for a network to be moved by blocks that is compiled."""
    lookup(HOW, how, "way to offload")
    if device.type == "cpu":
        return model
    if memory is None:
        memory = math.inf if (free := free_memory(device)) is None else free * 3 // 4

    def mover(module: nn.Module) -> Whole | BlockByBlock:
        blocks = repeated_blocks(module) if how == "blocks" or how == "auto" and weight_bytes(module) > memory else []
        return BlockByBlock(module, blocks, device) if blocks else Whole(module, device)

    return replace(model, placement=Offloaded(device, {part: mover(module) for part, module in model.modules.items()}))


@contextmanager
def place_for_weights(device: torch.device, how: str | None) -> Iterator[torch.device]:
    """Inside, a model is loaded to the device that this yields: to `device`, or where it is to be offloaded (how: see `offload`; None: it
    is not) to the host's memory."""
    with pinned_weights(device) if how else nullcontext():
        yield torch.device("cpu") if how else device


def pinned_weights(device: torch.device) -> AbstractContextManager:
    """Inside, what load_model loads to the CPU lies in pinned memory, from which CUDA copies while the host goes on. (To pin it later
    would take twice the memory.) For other devices nothing happens."""
    return InPinnedMemory() if device.type == "cuda" else nullcontext()


class InPinnedMemory(TorchFunctionMode):
    """Inside, torch.empty(..., device="cpu"), which gives weights their memory (load_renamed in folders/rename.py), gives pinned memory."""

    def __init__(self):
        super().__init__()
        self.memory = PinnedMemory("the weights", "drawing waits for every copy of them", sys.stderr)

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and str(kwargs.get("device")) == "cpu":
            return self.memory.empty_like(torch.empty(*args, **kwargs | {"device": "meta"}))
        return function(*args, **kwargs)


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(module))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


class Offloaded:
    """Moves the parts of one model: its `placement` (model.py). At most one works at a time."""

    def __init__(self, device: torch.device, movers: dict[str, Whole | BlockByBlock]):
        self.device, self.movers = device, movers

    def at_work(self, part: str) -> AbstractContextManager:
        """The context in which a part is on the device. One that is left out has no weights (text/absent.py), and does not move."""
        return self.movers[part].at_work() if part in self.movers else nullcontext()


class Loan:
    """Tensors of a module, whose home is the host's memory and of which the device is lent copies."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self.device, self.tensors = device, list(tensors)
        self.home = [tensor.data for tensor in self.tensors]

    @torch.inference_mode()                     # in which tensors may be changed that were made in this mode, and all others too
    def fetch(self) -> None:
        """Copy all to the device. From pinned memory the copies are queued on the current stream, and nobody waits for them. Their
        source is neither changed nor freed as long as the model is there."""
        for tensor, home in zip(self.tensors, self.home):
            tensor.data = home.to(self.device, non_blocking=home.is_pinned())

    @torch.inference_mode()
    def give_back(self) -> None:
        """Drop the copies, also where fetching them has failed half-way."""
        for tensor, home in zip(self.tensors, self.home):
            tensor.data = home


class Whole:
    """A module that is on the device as a whole.

    Copies and kernels are queued on the same stream, which runs them in order: a kernel finds its weights, and memory that is freed
    while kernels wait that read it is only given to what is queued behind them."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.loan = Loan(tensors_of(module), device)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        try:
            self.loan.fetch()
            yield
        finally:
            self.loan.give_back()
            torch.cuda.empty_cache()            # or gaps between what is left would be too small for the next part


class BlockByBlock:
    """A module that is on the device block by block.

    On CUDA, blocks are copied on a stream of their own ("side"), at the same time as kernels run on the current stream. Two waits
    make that safe, the second because memory that is freed goes at once to the next copy on the stream that it was allocated on
    (torch's "CUDA semantics": who lets another stream use a tensor has to wait for that stream before the tensor is freed).

        before a block works            the current stream waits for the side stream: its weights are there
        before a block is dropped       the side stream waits for the current one: no later copy lands in memory that is still read

    Only the streams wait. The host runs ahead of the GPU, and yet no more than two blocks take memory: the copy of the third is
    queued behind the wait for the first."""

    def __init__(self, module: nn.Module, blocks: list[nn.Module], device: torch.device):
        refuse_compiled(module)
        self.module, self.device = module, device
        self.loans = {block: Loan(tensors_of(block), device) for block in blocks}
        inside = {id(tensor) for loan in self.loans.values() for tensor in loan.tensors}
        self.rest = Loan((tensor for tensor in tensors_of(module) if id(tensor) not in inside), device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        # block -> the one that is called after it. A guess at first, in the order of their definition, then what happened last: a U-Net
        # has another order, and guidance may skip layers. A wrong guess costs a wait.
        self.following = dict(zip(blocks, [*blocks[1:], blocks[0]]))
        self.here: list[nn.Module] = []         # blocks on the device, or on their way
        self.last: nn.Module | None = None      # the block that was called last

    @contextmanager
    def at_work(self) -> Iterator[None]:
        refuse_compiled(self.module)
        hooks = [hook for block in self.loans for hook in (block.register_forward_pre_hook(self._before),
                                                           block.register_forward_hook(self._after))]
        try:
            self.rest.fetch()
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._give_back(*self.here)
            self.rest.give_back()
            self.last = None
            torch.cuda.empty_cache()

    def _before(self, block: nn.Module, inputs: tuple) -> None:
        if block not in self.here:              # the first one, or another than was expected
            self._give_back(*self.here)
            self._fetch(block)
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        if self.last is not None:
            self.following[self.last] = block
        self.last = block

    def _after(self, block: nn.Module, inputs: tuple, out: object) -> None:
        """The block's kernels are queued: the next one is fetched while they run. (The host waits for that copy where its source is not
        pinned.)"""
        if (following := self.following[block]) not in self.here:
            self._fetch(following)
        self._give_back(block)

    def _fetch(self, block: nn.Module) -> None:
        self.here.append(block)                 # first, so that it is given back if there is no room for all of it
        with torch.cuda.stream(self.side):      # None: nothing happens
            self.loans[block].fetch()

    def _give_back(self, *blocks: nn.Module) -> None:
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        for block in blocks:
            self.loans[block].give_back()
            self.here.remove(block)


def refuse_compiled(module: nn.Module) -> None:
    """ValueError for a module that torch.compile compiles, or its blocks: a graph takes all of its weights at once."""
    if is_compiled(module):
        raise ValueError(f"a compiled network ({type(module).__name__}) cannot be moved block by block: leave out --compile, or use "
                         "--offload parts")
