"""Devices: which one, in which precision, with which algorithms; what happens when its memory runs out; copies that nobody waits for."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyldm.cli import NO_MEMORY
from tinyldm.lookup import device_name, dtype_name

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3             # of mallopt, in glibc's malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; auto: CUDA, else Apple's MPS, else the CPU. ValueError where this machine does not have it."""
    name = device_name(name)
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():                          # LOCAL_RANK is torchrun's number of a process on its host
            return check_kernels(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()))
        if name == "auto":
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)
    if not available() or device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device on this machine; use --device cpu")
    return check_kernels(device) if device.type == "cuda" else device


def check_kernels(device: torch.device) -> torch.device:
    """The same GPU. ValueError where this torch was built without kernels for its architecture: the first operation would fail."""
    built = torch.cuda.get_arch_list() if torch.version.cuda else []        # AMD's architectures have other names
    capability = torch.cuda.get_device_capability(device) if built else (0, 0)
    if not built or any(runs_on(arch, capability) for arch in built):
        return device
    raise ValueError(f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (sm_{capability[0]}"
                     f"{capability[1]}), only for {' '.join(built)}: install a build of torch for this GPU (RTX 50: CUDA 12.8 or "
                     "newer), or use --device cpu")


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for an architecture run on a GPU of this compute capability: those for sm_XY on every X.Z with Z >= Y;
    compute_XY is code that the driver compiles for XY and every later one (CUDA C++ Programming Guide, "Application Compatibility")."""
    kind, major, minor = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch).groups()
    built = int(major), int(minor)
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware. Other devices emulate it, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights for drawing. auto: on CUDA bf16, or fp16 where bf16 is emulated; on other devices fp32."""
    if (name := dtype_name(name, ("auto", *DTYPES))) == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if native_bf16(device) else "fp16"
    return DTYPES[name]


def autocast(device: torch.device, dtype: str = "auto") -> AbstractContextManager:
    """An autocast context: bf16 where the hardware has it (auto), always (bf16) or never (fp32)."""
    dtype = dtype_name(dtype)
    enabled = native_bf16(device) if dtype == "auto" else dtype == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=True)


def deterministic() -> None:
    """Use only algorithms that give the same bits every time; an operation without one raises a RuntimeError. Call this before
    the GPU is first used.

    CPUs need it too: without it, an indexed sum (index_put, the backward pass of x[indices]) adds in the order in which the threads
    come, on as few as some thousand numbers.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False         # an aid for finding bugs that writes all memory once more


def keep_freed_memory() -> bool:
    """For training on CPUs: let glibc keep the memory that tensors give back -> whether it does. By default it hands large pieces back to
    the system and asks for them again in the next operation, page by page: 4,700 page faults in each step of `tiny`'s autoencoder,
    a sixth of its time. (mallopt(3); other C libraries have no such call, or need none.)"""
    limits = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28, M_MMAP_THRESHOLD: 2**30}      # bytes
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all([libc.mallopt(name, size) for name, size in limits.items()])
    except (OSError, AttributeError):
        return False


def fast_convolutions() -> None:
    """Let cuDNN time its algorithms for every new shape, and take the fastest: worth it for shapes that occur thousands of times."""
    torch.backends.cudnn.benchmark = True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the CPU is out of memory. CUDNN_STATUS_INTERNAL_ERROR does not: it has many other causes."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def first_line(error: BaseException) -> str:
    """The type and the first line of an error: torch's messages go on for pages."""
    line, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {line}"


def in_parts(function: Callable[[Any], Any], items: Any, size: int) -> Iterator[Any]:
    """function(part) for one part after another of `items` (anything with a length and slices), each of at most `size` items. From
    where memory runs out, parts are halved, down to single items; where one of these does not fit, the error is raised."""
    start = 0
    while start < len(items):
        part = items[start:start + size]
        try:
            result = function(part)
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not out_of_memory(error):
                raise
            size = len(part) // 2
        else:
            start += len(part)
            yield result
            continue
        torch.cuda.empty_cache()        # for cuBLAS and cuDNN, which cannot use what torch keeps; here the error's tensors are freed


pin_refusals: list[str] = []            # why the system refused pinned memory; after that it is not asked again


def pin(tensor: Tensor) -> Tensor:
    """A copy in pinned (page-locked) memory, from which a GPU reads while the host goes on. WSL2 and containers may allow little of
    it: where they refuse, the tensor itself. For batches, whose few shapes return: torch keeps their memory and uses it again.
    (Checkpoints have too many shapes for that, see pinned_memory.py.)"""
    try:
        return tensor if pin_refusals else tensor.pin_memory()
    except RuntimeError as error:
        pin_refusals.append(str(error).partition("\n")[0])
        print(f"no pinned memory for batches ({pin_refusals[-1]}): training waits a little for each copy to the GPU", flush=True)
        return tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Begin to copy a CPU tensor to the device, and return the copy. The tensor is pinned first, because a copy from ordinary memory
    may wait for all work that is queued on a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = pin(tensor)
    # A copy from ordinary memory must be waited for, because the caller may free or overwrite that memory before it is read (CUDA
    # Runtime API, "API synchronization behavior"; for MPS, PyTorch #189690).
    return tensor.to(device, non_blocking=tensor.is_pinned())


def begin_copy_to_host(z: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a tensor to the host -> a function that waits for the copy and returns it. It does not wait for work that is
    queued on the GPU in between."""
    if not z.is_cuda:
        return z.cpu().numpy
    copy, done = z.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)        # torch makes the copy in pinned memory
    done.record(torch.cuda.current_stream(z.device))                                    # z may be on another GPU than the current one

    def fetch() -> np.ndarray:
        done.synchronize()
        return copy.numpy()
    return fetch


def free_memory(device: torch.device) -> int | None:
    """The bytes of a GPU that are free for tensors, those included that torch holds and does not use. None: not known (only of CUDA)."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def main_memory() -> int | None:
    """The bytes of main memory that are available. None: this system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return None


def memory_gb(device: torch.device) -> float:
    """The peak memory in GB: of the GPU, else of this process. 0: this system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # Windows has none
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
