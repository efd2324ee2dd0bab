"""Whether the GPU's ways to compute agree: bf16 with fp32, compiled with eager, fused AdamW with plain, host copies with weights."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from gpu_parts.findings import Job, Limit, Report, judge, judge_fact, run_checks
from gpu_parts.materials import PRESETS, SMALL, new_run, train_flags
from gpu_parts.stepping import Enough, Watch, run_training
from tinyldm.training.checkpoint import host_copy

# bf16 has 8 significant bits, so each rounding changes a number by at most 2^-8 = 0.4 %; sums of many average that out.
BF16 = Limit(0, 1, "8 significant bits; an estimate")
COMPILED = Limit(0, 1, "rounding in another order, over some steps; an estimate")
FUSED = Limit(0, 1, "float32 rounding")
STEPS = 6
TRAIN = ["--batch-size", 16, "--grad-accum", 2, "--max-steps", STEPS, "--warmup-steps", 2, "--log-every", 3]


def numbers(job: Job, report: Report) -> None:
    run_checks(job, report, bf16_against_fp32, fused_adamw, copies_to_the_host, compiled_against_eager)


class Gradients(Watch):
    """The loss and the gradients of the first step, on random weights of which none is zero: new networks begin with zeros, behind
    which no gradient is seen."""

    def phase(self, found: Any) -> None:
        super().phase(found)
        with torch.no_grad():
            for i, p in enumerate(self.learner.parameters.values()):
                random = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
                p.add_(0.1 * random) if p.dim() < 2 else p.copy_(random * p[0].numel() ** -0.5)

    def updating(self) -> None:
        grads = [p.grad for p in self.learner.parameters.values() if p.grad is not None]
        self.found = torch.cat([grad.detach().float().flatten().cpu() for grad in grads])

    def stepped(self, step: int) -> None:
        raise Enough


def bf16_against_fp32(job: Job, report: Report) -> None:
    for preset, network in PRESETS.items():
        watches = {}
        for dtype in ("fp32", "bf16"):
            flags = train_flags(job, SMALL, preset, SMALL.sizes[:1], *TRAIN, "--no-compile", "--dtype", dtype,
                                "--out", new_run(job, "dtypes"))
            watches[dtype] = run_training(flags, Gradients())
        exact, rounded = watches["fp32"], watches["bf16"]
        report(judge(f"{network}: the loss in bf16 differs from that in fp32 by", furthest(rounded.losses, exact.losses), 0.01, BF16, "%"))
        cosine = float(torch.nn.functional.cosine_similarity(exact.found.double(), rounded.found.double(), dim=0))
        report(judge(f"{network}: 1 - cosine between their gradients", 1 - cosine, 0.01, BF16))


def compiled_against_eager(job: Job, report: Report) -> None:
    """The losses of some steps of train.py. On a CPU of the DiT alone, and graphs are made without kernels: those take minutes."""
    compile = torch.compile if job.on_gpu else partial(torch.compile, backend="aot_eager")
    for preset, network in list(PRESETS.items())[:None if job.on_gpu else 1]:
        losses, seconds = {}, {}
        for flag in ("--no-compile", "--compile"):
            begun = time.perf_counter()
            flags = train_flags(job, SMALL, preset, SMALL.sizes[:1], *TRAIN, flag, "--out", new_run(job, "compiled"))
            with patch.object(torch, "compile", compile):
                losses[flag] = run_training(flags, Watch()).losses
            seconds[flag] = time.perf_counter() - begun
        note = f"a run of {STEPS} steps took {seconds['--compile']:.0f} s with --compile, {seconds['--no-compile']:.0f} s without"
        report(judge(f"{network}: losses of {STEPS} compiled steps differ from eager ones by",
                     furthest(losses["--compile"], losses["--no-compile"]), 0.02, COMPILED, "%", note))


def furthest(one: list[float], two: list[float]) -> float:
    """The largest relative difference; infinite where a loss is missing or not finite."""
    if len(one) != len(two) or not one or None in (*one, *two):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(one, two))


def fused_adamw(job: Job, report: Report) -> None:
    """Ten steps on the same gradients, of tensors of many sizes."""
    shapes, results = [(1,), (7, 3), (128, 128), (1024, 257), (64, 32, 3, 3)], {}
    for kind in ("fused", "foreach"):
        rng = torch.Generator().manual_seed(0)
        draw = lambda shape: torch.randn(shape, generator=rng).to(job.device)
        weights = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, **{kind: True})
        for _ in range(10):
            for p in weights:
                p.grad = draw(p.shape)
            optimizer.step()
        results[kind] = torch.cat([p.detach().flatten() for p in weights])
    apart = (results["fused"] - results["foreach"]).abs().max() / 1e-2                  # ten steps move a weight by 1e-2 at most
    report(judge("fused AdamW differs from plain AdamW, relative to the weights' change, by", float(apart), 1e-3, FUSED, "%"))


class Copying(Watch):
    """Copies the weights to host memory at one step, as a checkpoint does, and compares the copy after further steps."""

    AT = 2

    def stepped(self, step: int) -> None:
        super().stepped(step)
        weights = {name: p.detach() for name, p in self.learner.parameters.items()}
        if step == self.AT:
            self.copy = host_copy(weights)
            self.then = {name: p.clone() for name, p in weights.items()}
        if step == STEPS:
            self.pinned = sum(tensor.is_pinned() for tensor in self.copy.values())
            self.unequal = [name for name, tensor in self.copy.items() if not torch.equal(tensor, self.then[name].cpu())]
            self.moved = sum(not torch.equal(weights[name], tensor) for name, tensor in self.then.items())


def copies_to_the_host(job: Job, report: Report) -> None:
    flags = train_flags(job, SMALL, "5090_week", SMALL.sizes[:1], *TRAIN, "--no-compile", "--out", new_run(job, "copies"))
    watch = run_training(flags, Copying())
    pinned = f"{watch.pinned} of {len(watch.copy)} copies in pinned memory" if job.on_gpu else "no pinned memory without a GPU"
    report(judge_fact("host copies that differ from the weights at their step, after further steps",
                      not watch.unequal and watch.moved > 0,
                      f"{len(watch.unequal)} of {len(watch.copy)}; {watch.moved} weights moved since",
                      "0; more than 0", pinned))
