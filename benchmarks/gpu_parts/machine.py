"""What this machine is, whether torch has kernels for its GPU, and how fast that multiplies large matrices."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable

import torch

from benchmarks.bench.measure import in_turns, seconds
from gpu_parts.findings import OK, Detail, Job, Limit, NotPossible, Report, judge, judge_fact, run_checks
from gpu_parts.page import table
from tinyldm.config import PlanConfig
from tinyldm.device import native_bf16, runs_on
from tinyldm.planning.flops import peak_flops

PRODUCT = Limit(0.6, 1.05, "the data sheet's peak; that products of 8192 x 8192 reach 60 % of it is an estimate")
SIZES = {"cuda": 8192, "cpu": 512}


def machine(job: Job, report: Report) -> None:
    report(Detail("Machine", table(["", ""], facts(job).items())))
    run_checks(job, report, kernels_for_this_gpu, a_compiler_for_triton, bf16_in_hardware, rate_of_large_products)


def facts(job: Job) -> dict[str, object]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0
    found: dict[str, object] = {
        "CPU": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB", "system": platform.platform(),
        "Python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "transformers", "safetensors"):
        found[package] = version(package)
    if not job.on_gpu:
        return found
    gpu, driver = torch.cuda.get_device_properties(0), ask_driver()
    return {"GPU": f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, {gpu.multi_processor_count} multiprocessors, "
                   f"capability {gpu.major}.{gpu.minor}"} | driver | found | {
        "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "-",
        "architectures of this torch": " ".join(torch.cuda.get_arch_list()),
        "TF32": f"products {torch.backends.cuda.matmul.allow_tf32}, convolutions {torch.backends.cudnn.allow_tf32}",
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "not set")}


def version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed
    try:
        return installed(package)
    except PackageNotFoundError:
        return "not installed"


def ask_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    names = {"driver": "driver_version", "power limit": "power.limit", "highest clock": "clocks.max.sm", "compute mode": "compute_mode"}
    try:
        answer = subprocess.run(["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"],
                                capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {"driver": "nvidia-smi does not answer"}
    return dict(zip(names, (word.strip() for word in answer.split(","))))


def kernels_for_this_gpu(job: Job, report: Report) -> None:
    if not job.on_gpu or not torch.version.cuda:
        raise NotPossible("no GPU of NVIDIA's")
    capability = torch.cuda.get_device_capability()
    fits = any(runs_on(arch, capability) for arch in torch.cuda.get_arch_list())
    report(judge_fact("kernels for this GPU", fits, "sm_{}{}".format(*capability), "among the architectures of this torch"))


def a_compiler_for_triton(job: Job, report: Report) -> None:
    """torch.compile needs Triton on a GPU, and Triton a C compiler."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    if not job.on_gpu:
        raise NotPossible("no GPU")
    both = importlib.util.find_spec("triton") is not None and bool(compiler)
    report(judge_fact("what torch.compile needs", both, f"Triton {version('triton')}, compiler {compiler or 'missing'}", "both"))


def bf16_in_hardware(job: Job, report: Report) -> None:
    if not job.on_gpu:
        raise NotPossible("no GPU")
    native = native_bf16(torch.device("cuda"))
    report(judge_fact("bfloat16 in hardware", native, str(native), "True"))


def rate_of_large_products(job: Job, report: Report) -> None:
    device, size = torch.device(job.device), SIZES[job.device]
    one, two = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: one @ two, device, rounds=20)
    rate = 2 * size**3 / seconds
    known = peak_flops(PlanConfig(gpu_tflops=rate / 1e12), device)          # what is measured here, for a GPU that is not known
    finding = judge(f"products of {size} x {size} matrices in bf16", rate / 1e12, known and known / 1e12, PRODUCT, "TFLOP/s")
    if known == rate:
        finding = finding._replace(verdict=OK, expected="-", note="the peak of this GPU is not known: this figure is used for it")
    report(finding)
    job.folder("machine.json").write_text(json.dumps({"flops": rate}), encoding="utf-8")


def peak_rate(job: Job) -> float | None:
    """FLOP/s of this GPU in bf16: of the data sheet, else as measured by this part; None without a GPU."""
    file = job.folder("machine.json")
    measured = json.loads(file.read_text(encoding="utf-8"))["flops"] if file.exists() else None
    return peak_flops(PlanConfig(gpu_tflops=(measured or 0) / 1e12), torch.device(job.device)) or None


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int, warm: int = 2) -> float:
    """The median time of a call, with the device waited for before and after."""
    return statistics.median(in_turns([lambda: seconds(work, device)], rounds, warm)[0])
