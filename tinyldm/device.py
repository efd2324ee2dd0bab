"""Chooses the device and the precision."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager

import torch

from tinyldm.lookup import device_name, dtype_name


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; auto: CUDA, else Apple's MPS, else the CPU. ValueError where this machine does not have it."""
    name = device_name(name)
    if name == "auto":
        if torch.cuda.is_available():                          # LOCAL_RANK is torchrun's number of a process on its host
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)
    if not available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device on this machine; use --device cpu")
    return device


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


def prefer_plain_attention() -> None:
    """For training on CPUs: attention over a few dozen tokens runs several times faster (backward pass, bf16) as plain matrix
    products than through the fused kernel. For drawing the fused kernel is faster: forward passes only, and over many tokens.
    In spite of its name, this switch also applies to the CPU."""
    torch.backends.cuda.enable_flash_sdp(False)


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
