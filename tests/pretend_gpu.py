"""A machine that pretends to have a GPU, for tests of code that would run on one: the numbers are real and computed on the CPU.

    with PretendGpu() as gpu:
        ...                                 # anything, with --device auto or torch.device("cuda", 0)
    assert not gpu.mixed and gpu.waits() == {...}

Every tensor that would lie on the GPU is marked, by a mark on its storage, so that views, parameters and `.data` share it:
what is moved there or made there, and the results of operations on marked tensors. Marked tensors answer cuda when asked for their
device, and torch.cuda answers as it would with one GPU. What is written down, with the line of this project that does it:

    wait        the host waits until the GPU has done all that was queued: a value is read, or a copy blocks
    pageable    an asynchronous copy to the GPU from memory that is not pinned: a large one waits as well
    upload      a copy to the GPU that nothing waits for
    download    the same in the other direction
    pin         a copy to pinned memory, which the host makes itself
    mixed       an operation on tensors of both devices, which a real GPU would refuse; it is refused here too

What it does not see: what happens inside torch's C++ code and inside of functions that torch passes to a mode as a whole (such as
Tensor.backward), and other threads, in which tensors must stay on the CPU.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent
PROJECT, TESTS = f"{ROOT}{os.sep}", f"{ROOT / 'tests'}{os.sep}"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__repr__", "__format__", "tolist",
         "numpy", "__array__", "nonzero", "argwhere", "unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal", "allclose",
         "is_nonzero", "bincount"}                      # of which the host needs the values, or the shape of the result
UPLOADING = {"tensor", "as_tensor", "asarray", "new_tensor"}    # make a tensor from Python's numbers: a copy that blocks
# may be given tensors of both devices
RELAXED = {"type_as", "__set__", "untyped_storage", "data_ptr", "is_set_to", "_has_compatible_shallow_copy_type"}


class Event(NamedTuple):
    kind: str
    function: str       # torch's, such as "item"
    place: str          # "train.py accumulate": the file and the function of this project from which it was called
    line: int
    shape: tuple[int, ...]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or a result: alone, or in lists, tuples and dicts. Those without values (meta) do not count."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def on_gpu(tensor: Tensor) -> bool:
    return not tensor.is_meta and getattr(tensor.untyped_storage(), "on_gpu", False)


def pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def move(tensor: Tensor) -> Tensor:
    """A copy on the GPU."""
    tensor = tensor.clone()
    tensor.untyped_storage().on_gpu = True
    return tensor


def page_locked(tensor: Tensor) -> Tensor:
    """A copy in pinned memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().pinned = True
    return tensor


class PretendGpu(TorchFunctionMode):
    """The mode. events: what was written down so far."""

    def __init__(self, name: str = "NVIDIA GeForce RTX 5090", capability: tuple[int, int] = (12, 0)):
        super().__init__()
        self.events: list[Event] = []
        self.patches, self.name, self.capability, self.thread = ExitStack(), name, capability, threading.current_thread()

    @property
    def mixed(self) -> list[Event]:
        return [event for event in self.events if event.kind == "mixed"]

    def waits(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """How often the host waits or may wait, by "file function: torch's function", among events[start:stop]."""
        return dict(Counter(f"{event.place}: {event.function}" for event in self.events[start:stop] if event.kind in ("wait", "pageable")))

    def shapes(self, kind: str, start: int = 0, stop: int | None = None) -> Counter[tuple[int, ...]]:
        """The shapes of the tensors of one kind of event, among events[start:stop]."""
        return Counter(event.shape for event in self.events[start:stop] if event.kind == kind)

    def __enter__(self) -> PretendGpu:
        group, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast
        waits = dict(synchronize=lambda: self.write("wait", "synchronize"), record=lambda stream=None: None, query=lambda: True)
        stream = SimpleNamespace(**waits, cuda_stream=0, device=GPU, wait_stream=lambda other: None)        # a stream waits, not the host
        properties = SimpleNamespace(name=self.name, total_memory=32 * 10**9, major=self.capability[0], minor=self.capability[1],
                                     multi_processor_count=170)
        answers = dict(
            is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
            get_device_name=lambda device=None: self.name, get_device_capability=lambda device=None: self.capability,
            get_device_properties=lambda device=None: properties, get_arch_list=lambda: ["sm_{}{}".format(*self.capability)],
            is_bf16_supported=lambda *_, **__: True, is_current_stream_capturing=lambda: False, empty_cache=lambda: None,
            current_stream=lambda device=None: stream, Stream=lambda device=None: stream, stream=lambda chosen: nullcontext(),
            Event=lambda **options: SimpleNamespace(**waits),
            synchronize=lambda device=None: self.write("wait", "synchronize"),
            max_memory_allocated=lambda device=None: 10**9, max_memory_reserved=lambda device=None: 10**9,
            memory_allocated=lambda device=None: 10**9, memory_reserved=lambda device=None: 10**9,
            reset_peak_memory_stats=lambda device=None: None, mem_get_info=lambda device=None: (32 * 10**9, 32 * 10**9),
            set_per_process_memory_fraction=lambda fraction, device=None: None)
        enter = self.patches.enter_context
        for function, answer in answers.items():
            enter(patch.object(torch.cuda, function, answer))
        # The optimizers of torch 2.14 ask whether an accelerator captures a graph, and a build for CUDA would look for its driver.
        enter(patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: None))
        enter(patch.object(Tensor, "pin_memory", lambda tensor: self.pin(tensor)))
        enter(patch.object(torch, "autocast", lambda device_type, *more, **options: autocast("cpu", *more, **options)))
        enter(patch.object(torch._C, "_group_tensors_by_device_and_dtype", lambda lists, *more: {
            (GPU if on_gpu(next(tensor for tensor in found[0][0] if tensor is not None)) else device, dtype): found
            for (device, dtype), found in group(lists, *more).items()}))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def write(self, kind: str, function: str, tensor: Tensor | None = None) -> None:
        frame, place, line = sys._getframe(1), "outside of the project", 0
        while frame is not None:
            file, caller = frame.f_code.co_filename, frame.f_code.co_name
            if file.startswith(PROJECT) and not file.startswith(TESTS) and not caller.startswith("<"):      # a lambda's caller says more
                place, line = f"{Path(file).relative_to(ROOT).as_posix()} {caller}", frame.f_lineno
                break
            frame = frame.f_back
        self.events.append(Event(kind, function, place, line, () if tensor is None else tuple(tensor.shape)))

    def pin(self, tensor: Tensor) -> Tensor:
        """Tensor.pin_memory(). Only that in the thread that uses the GPU is written down."""
        if threading.current_thread() is self.thread:
            self.write("pin", "pin_memory", tensor)
        return page_locked(tensor)

    def refuse(self, function: str, reason: str) -> None:
        self.write("mixed", function)
        raise RuntimeError(f"{function}: {reason} (pretended GPU, {self.events[-1].place}:{self.events[-1].line})")

    def upload(self, function: str, tensor: Tensor, non_blocking: bool) -> None:
        self.write("wait" if not non_blocking else "upload" if pinned(tensor) else "pageable", function, tensor)

    # ---------------------------------------------------------------- what a function does on a GPU

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and func in GETTERS and on_gpu(args[0]):
            return GETTERS[func]
        if name in SPECIAL:
            return SPECIAL[name](self, func, args, kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        there = [tensor for tensor in tensors if on_gpu(tensor)]
        if there and name not in RELAXED and any(tensor.dim() for tensor in tensors if not on_gpu(tensor)):
            self.refuse(name, "tensors of both devices")
        if there and name in READS:
            self.write("wait", name, there[0])
        wanted = kwargs.get("device")
        marked = bool(there) if wanted is None else torch.device(wanted).type == "cuda"
        if wanted is not None and marked:
            kwargs["device"] = CPU
            if isinstance(kwargs.get("generator"), torch.Generator):
                self.refuse(name, "a generator of the CPU")
            if not there and name in UPLOADING:
                self.write("wait", name)
        pin_it = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            if marked:
                tensor.untyped_storage().on_gpu = True
            if pin_it:
                tensor.untyped_storage().pinned = True
        return result

    def do_to(self, func, args, kwargs):
        tensor, *words = args
        other = next((word for word in (*words, kwargs.pop("other", None)) if isinstance(word, Tensor)), None)
        if other is not None:
            wanted, words = GPU if on_gpu(other) else other.device, [word for word in words if word is not other]
            kwargs["dtype"] = other.dtype
        else:
            wanted = next((word for word in (*words, kwargs.pop("device", None)) if isinstance(word, (str, torch.device, int))
                           and not isinstance(word, bool)), None)
            words = [word for word in words if not isinstance(word, (str, torch.device, int)) or isinstance(word, bool)]
        if len(words) > 1 and isinstance(words[1], bool):           # to(device, dtype, non_blocking), to(dtype, non_blocking)
            kwargs["non_blocking"] = words.pop(1)
        elif words and isinstance(words[0], bool):
            kwargs["non_blocking"] = words.pop(0)
        words = [word for word in words if word is not None]
        kind = torch.device(wanted).type if wanted is not None else None
        here, result = on_gpu(tensor), tensor
        if kind not in (None, "cpu", "cuda") or tensor.device.type == "meta":
            return func(tensor, wanted, *words, **kwargs)
        if words or kwargs.keys() - {"non_blocking"}:
            result = func(tensor, *words, **kwargs)
        if kind == "cuda" and not here:
            self.upload("to", tensor, kwargs.get("non_blocking", False))
            return move(result)
        if kind == "cpu" and here:                                  # torch copies without a wait into pinned memory of its own
            non_blocking = kwargs.get("non_blocking", False)
            self.write("download" if non_blocking else "wait", "to", tensor)
            return page_locked(result) if non_blocking else result.clone()
        if here:
            result.untyped_storage().on_gpu = True
        return result

    def do_cuda(self, func, args, kwargs):
        return self.do_to(Tensor.to, (args[0], GPU), {"non_blocking": kwargs.get("non_blocking", False)})

    def do_cpu(self, func, args, kwargs):
        return self.do_to(Tensor.to, (args[0], CPU), {})

    def do_is_pinned(self, func, args, kwargs):
        return pinned(args[0])

    def do_copy(self, func, args, kwargs):
        """tensor.copy_(other, non_blocking)"""
        tensor, other = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if on_gpu(tensor) and not on_gpu(other):
            self.upload("copy_", other, non_blocking)
        elif on_gpu(other) and not on_gpu(tensor):
            self.write("download" if non_blocking and pinned(tensor) else "wait", "copy_", other)
        return func(*args, **kwargs)

    def do_getitem(self, func, args, kwargs):
        tensor, index = args
        self.check_index(tensor, index)
        result = func(tensor, index)
        result.untyped_storage().on_gpu = on_gpu(tensor)
        return result

    def do_setitem(self, func, args, kwargs):
        tensor, index, value = args
        self.check_index(tensor, index)
        if on_gpu(tensor) and (not isinstance(value, Tensor) or not on_gpu(value)):
            # torch fills with a number, but where a single element is set, it copies that from the CPU.
            if isinstance(value, Tensor) and value.dim() or tensor[index].dim() == 0:
                self.write("wait", "__setitem__", tensor[index])
        elif not on_gpu(tensor) and isinstance(value, Tensor) and on_gpu(value):
            self.write("wait", "__setitem__", value)
        return func(*args, **kwargs)

    def check_index(self, tensor: Tensor, index: Any) -> None:
        for each in index if isinstance(index, tuple) else (index,):
            if not isinstance(each, Tensor):
                continue
            if on_gpu(each) and not on_gpu(tensor):
                self.refuse("__getitem__", "an index on the GPU, of a tensor on the CPU")
            if on_gpu(tensor) and (not on_gpu(each) or each.dtype in (torch.bool, torch.uint8)):
                self.write("wait", "__getitem__", each)                     # a mask's number of elements is needed


SPECIAL = {"to": PretendGpu.do_to, "cuda": PretendGpu.do_cuda, "cpu": PretendGpu.do_cpu, "is_pinned": PretendGpu.do_is_pinned,
           "copy_": PretendGpu.do_copy, "__getitem__": PretendGpu.do_getitem, "__setitem__": PretendGpu.do_setitem}
GETTERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
