"""A GPU whose memory runs out, really: a cap is set between what two numbers of micro-batches need, and the trainer halves them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gpu_parts.findings import Job, Limit, Report, judge, judge_fact, run_checks
from gpu_parts.materials import SMALL, new_run, train_flags
from gpu_parts.numbers import furthest
from gpu_parts.stepping import Watch, run_training
from tinyldm.training.log import read

STEPS = 4
SAME = Limit(0, 1, "the same micro-batches, so rounding alone; an estimate")
# Large enough for the sizes of two micro-batches to differ by several times what torch's allocator rounds to (20 MB).
LARGE = "--dit width=512 layers=8 heads=8 mlp_width=2048 --batch-size 128".split()
TINY = "--batch-size 8".split()


class Capped(Watch):
    """A run with a cap on its memory, which is set when the networks are on the GPU. On a CPU, where there is none, the network
    refuses more samples than a number at once, as if memory had run out.

    gigabytes, samples: None, no cap. rehearse: the rehearsal before the training is capped as well."""

    def __init__(self, gigabytes: float | None = None, samples: int | None = None, rehearse: bool = False):
        super().__init__()
        self.gigabytes, self.samples, self.rehearse, self.peak = gigabytes, samples, rehearse, 0.0

    def cap(self) -> None:
        if self.gigabytes and torch.cuda.is_initialized():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * self.gigabytes / total))
        if self.samples:
            self.learner.trained.modules["net"].register_forward_pre_hook(self.refuse)

    def started(self, found: Any) -> None:
        super().started(found)
        if self.rehearse:
            self.cap()

    def phase(self, found: Any) -> None:
        super().phase(found)
        self.cap()

    def refuse(self, net: torch.nn.Module, inputs: tuple) -> None:
        if len(inputs[0]) > self.samples:
            raise torch.OutOfMemoryError(f"as if memory did not suffice for {len(inputs[0])} samples")

    def stepped(self, step: int) -> None:
        super().stepped(step)
        self.peak = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_initialized() else 0.0


def memory(job: Job, report: Report) -> None:
    run_checks(job, report, micro_batches_that_do_not_fit)


def run_capped(job: Job, name: str, watch: Capped, accumulate: int, compile: str = "--no-compile") -> tuple[Capped, list[dict]]:
    """A run of a few steps -> the watch, the rows of its log about memory."""
    run = new_run(job, name)
    flags = [*(LARGE if job.full else TINY), "--max-steps", STEPS, "--warmup-steps", 2, "--log-every", 1, "--grad-accum", accumulate]
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    run_training(train_flags(job, SMALL, "5090_week", (256,) if job.full else SMALL.sizes[:1], *flags, compile, "--out", run), watch)
    if torch.cuda.is_initialized():
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    return watch, events(run)


def events(run: Path) -> list[dict]:
    return [row for row in read(run / "log.jsonl") if row.get("event") == "memory"]


def micro_batches_that_do_not_fit(job: Job, report: Report) -> None:
    whole, _ = run_capped(job, "memory-1", Capped(), 1)
    halved, _ = run_capped(job, "memory-2", Capped(), 2)
    cap, samples = (whole.peak + halved.peak) / 2, None if job.on_gpu else 4
    how = f"whole {whole.peak:.2f} GB, halved {halved.peak:.2f} GB, cap {cap:.2f} GB" if job.on_gpu else "no GPU: the error was made up"
    found, rows = run_capped(job, "memory-capped", Capped(cap, samples), 1)
    said = rows[0]["text"] if rows else "nothing"
    report(judge_fact("memory runs out in training, and it goes on", bool(rows) and len(found.losses) == STEPS,
                      f"{len(found.losses)} steps; micro-batches made smaller {len(rows)} x ({said})", f"{STEPS} steps; 1 x or more", how))
    report(judge("its losses differ from those of that many micro-batches by", furthest(found.losses, halved.losses), 1e-3, SAME, "%"))
    rehearsed = Capped(cap, samples, rehearse=True)
    if job.on_gpu:
        found, rows = run_capped(job, "memory-rehearsed", rehearsed, 1)
    else:                                                       # where only a run that compiles is rehearsed
        with patch.object(torch, "compile", lambda net, **options: net):
            found, rows = run_capped(job, "memory-rehearsed", rehearsed, 1, "--compile")
    report(judge_fact("memory runs out in the rehearsal, and training begins with", found.micro_batches == [2] and not rows,
                      f"{found.micro_batches[0]} micro-batches, made smaller {len(rows)} x later", "2 micro-batches, 0 x", how))
