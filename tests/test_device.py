"""What device.py does about memory: when it runs out, and when it is given back."""

import gc
import platform
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import ROOT

from tinyldm import device
from tinyldm.device import in_parts, out_of_memory


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), True), (RuntimeError("MPS backend out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("shapes do not fit"), False), (ValueError("out of memory"), False)])
def test_a_lack_of_memory_is_distinguished_from_other_errors(error, expected):
    assert out_of_memory(error) is expected


def parts_of(items, size: int, fits: int, error: Exception) -> tuple[list, list[int]]:
    """-> what in_parts yields, and the lengths of the parts that were tried."""
    tried, found = [], []

    def function(part):
        tried.append(len(part))
        if len(part) > fits:
            raise error
        return part * 2

    try:
        found.extend(in_parts(function, items, size))
    except Exception as raised:
        found.append(raised)
    return found, tried


@pytest.mark.parametrize("count, size, fits, tried", [
    (8, 4, 9, [4, 4]), (7, 4, 9, [4, 3]), (3, 100, 9, [3]), (0, 4, 9, []), (8, 4, 3, [4, 2, 2, 2, 2]), (6, 5, 1, [5, 2, 1, 1, 1, 1, 1, 1]),
    (3, 8, 2, [3, 1, 1, 1])])
def test_parts_are_halved_where_memory_runs_out_and_every_item_comes_once_and_in_order(count, size, fits, tried):
    found, lengths = parts_of(torch.arange(count), size, fits, torch.OutOfMemoryError("CUDA out of memory"))
    assert lengths == tried and [int(x) for part in found for x in part] == [2 * i for i in range(count)]


def test_where_a_single_item_does_not_fit_and_for_other_errors_the_error_is_raised():
    full, other = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not fit")
    assert parts_of(torch.arange(8), 4, 0, full) == ([full], [4, 2, 1]) and parts_of(torch.arange(8), 4, 0, other) == ([other], [4])


def test_the_tensors_of_a_failed_attempt_are_freed_before_the_next_one():
    alive, before = [], []

    def function(part):
        before.append([reference() is not None for reference in alive])
        activations = torch.zeros(len(part))
        alive.append(weakref.ref(activations))
        if len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(part)

    gc.disable()
    try:
        assert [*in_parts(function, torch.arange(4), 4)] == [1] * 4
    finally:
        gc.enable()
    assert before[:3] == [[], [False], [False, False]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.slow
def test_memory_that_tensors_give_back_is_used_again_without_page_faults():
    script = """if True:
        import ctypes, resource, sys, torch
        from tinyldm.device import M_MMAP_THRESHOLD, keep_freed_memory
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**17)      # glibc's own, which it would raise now and then
        assert sys.argv[1] == "usual" or keep_freed_memory()
        work = lambda: [torch.empty(3_000_000).fill_(1.0) + 1.0 for _ in range(2)]
        work(), work(), work()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            work()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    usual, kept = (int(subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
                   for name in ("usual", "kept"))
    assert usual > 100_000 and kept < usual / 10           # pages of 4 KiB: 40 pieces of 12 MB are 117,000


def test_without_glibc_freed_memory_is_left_to_the_c_library(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    assert not device.keep_freed_memory()
