"""The U-Net alone, forward and backward: in several memory layouts, and beside diffusers'."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.bench.measure import in_turns, seconds
from benchmarks.bench.pairs import fresh, same
from gpu_parts.findings import FAILED, NOT_HERE, OK, Detail, Finding, Job, Limit, NotPossible, Report, judge, one_line, quantity
from gpu_parts.machine import median_seconds
from gpu_parts.materials import SCALES, config_of, train_flags
from gpu_parts.page import table
from tinyldm.config import phases
from tinyldm.device import autocast, pick_device
from tinyldm.model import architecture
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.planning.flops import meta_networks

PARITY = Limit(0, 1.05, "as on a CPU, where the two take the same time (cpu-2-cores.md)")
LAYOUT = Limit(0, 1, "that channels last are no slower where the compiler is made to use them: a guess")
ROUNDS = {"cuda": 10, "cpu": 2}
FORCED = {"options": {"force_layout_optimization": True}}       # of Inductor: see the U-Net's compile_options in tinyldm/model.py


def layouts(job: Job, report: Report) -> None:
    """Milliseconds of a micro-batch of 5090_week_unet at its first size: compiled with Inductor's own choice of layouts, compiled with
    channels last forced, as train.py does it, and with weights in channels last; eager for comparison."""
    scale, device = SCALES[job.scale], pick_device("auto" if job.on_gpu else "cpu")
    config = phases(config_of(train_flags(job, scale, "5090_week_unet", scale.sizes[:1])))[0]
    torch.manual_seed(0)
    net = fresh(meta_networks(config).net, device, torch.float32).train().requires_grad_(True)
    batch, side = -(-config.optimisation.batch_size // config.optimisation.grad_accum), scale.sizes[0] // 8
    x = torch.randn(batch, net.config.in_channels, side, side, device=device)
    t, cond = torch.full((batch,), 500.0, device=device), Cond(torch.randn(batch, 77, net.config.context_dim, device=device))
    last = torch.channels_last
    # Options of torch.compile, None for eager; the memory format of the weights.
    variants = {"eager": (None, torch.contiguous_format), "eager, channels last": (None, last), "compiled": ({}, torch.contiguous_format),
                "compiled, layout forced": (FORCED, torch.contiguous_format), "compiled, weights in channels last": ({}, last)}
    found: dict[str, float] = {}
    for name, (options, layout) in variants.items():
        if options is not None and not job.on_gpu:
            continue
        try:
            seconds, note = layout_seconds(job, net, options, layout, (x, t, cond), device)
        except Exception as error:
            report(Finding(f"U-Net, {name}: ms per micro-batch", verdict=FAILED, note=one_line(error)))
            continue
        found[name] = seconds
        report(Finding(f"U-Net, {name}: ms per micro-batch of {batch}", quantity(1e3 * seconds, "ms"), "-", OK, note))
    if "compiled" not in found:
        return report(Finding("U-Net: the compiled layouts", verdict=NOT_HERE, note="see above" if job.on_gpu else "no GPU"))
    best = min(found, key=found.get)
    report(Detail("Memory layouts of the U-Net", table(["variant", "ms", "of compiled"], [
        (name, f"{1e3 * seconds:.1f}", f"{seconds / found['compiled']:.3f}") for name, seconds in found.items()], right=(1, 2))))
    if "compiled, layout forced" in found:
        ratio = found["compiled, layout forced"] / found["compiled"]
        report(judge("U-Net: time with the layout forced, of that without", ratio, 1.0, LAYOUT, note=f"the fastest is: {best}"))


def layout_seconds(job: Job, net: nn.Module, options: dict | None, layout: torch.memory_format, inputs: tuple,
                   device: torch.device) -> tuple[float, str]:
    """Median seconds of forward and backward pass, and how long the first took. options: arguments of torch.compile; None: not compiled."""
    net.to(memory_format=layout)
    torch.compiler.reset()
    gc.collect()
    call = net if options is None else torch.compile(net, dynamic=False, **options)
    x, t, cond = inputs

    def step() -> None:
        with autocast(device):
            out = call(x, t, cond)
        out.float().square().mean().backward()
        net.zero_grad()

    begun = time.perf_counter()
    step()
    first = time.perf_counter() - begun
    return median_seconds(step, device, ROUNDS[job.device]), f"the first took {first:.1f} s"


def beside_diffusers(job: Job, report: Report) -> None:
    """Stable Diffusion 1's U-Net with the same weights, bf16, both in turns: forward, and forward with backward."""
    if importlib.util.find_spec("diffusers") is None:
        raise NotPossible("diffusers is not installed")
    device = pick_device("auto" if job.on_gpu else "cpu")
    config = UNetConfig() if job.full else replace(UNetConfig(), widths=(32, 64, 64, 64))
    ours, theirs = pair(config, device)
    x, t = torch.randn(4, 4, 64 if job.full else 16, 64 if job.full else 16), torch.full((4,), 600.0)
    x, t, context = (a.to(device, torch.bfloat16) for a in (x, t, torch.randn(4, 77, config.context_dim)))
    one, two = (lambda: ours(x, t, Cond(context))), (lambda: theirs(x, t, context).sample)
    with torch.no_grad():
        a, b = one().float(), two().float()
        report(judge("U-Net of Stable Diffusion 1: its output differs from diffusers' by", float((a - b).norm() / b.norm()), 0.05,
                     Limit(0, 1, "rounding to bf16"), "%"))
        compare(job, report, "forward", one, two, device)
    ours.requires_grad_(True), theirs.requires_grad_(True)
    back = lambda module, forward: lambda: (forward().float().square().mean().backward(), module.zero_grad())
    compare(job, report, "forward and backward", back(ours, one), back(theirs, two), device)


def compare(job: Job, report: Report, what: str, one: Callable[[], object], two: Callable[[], object], device: torch.device) -> None:
    times = in_turns([partial(seconds, call, device) for call in (one, two)], ROUNDS[job.device])
    mine, other = (1e3 * statistics.median(found) for found in times)
    report(judge(f"U-Net of Stable Diffusion 1, {what}: time over diffusers'", mine / other, 1.0 if job.on_gpu else None, PARITY,
                 note=f"{mine:.1f} ms and {other:.1f} ms, batch 4"))


def pair(config: UNetConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Our U-Net and diffusers', with the same random weights in bf16."""
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(architecture(UNet).to_config(config))
    torch.manual_seed(0)
    same(fresh(ours, device, torch.bfloat16), theirs)
    return ours, theirs
