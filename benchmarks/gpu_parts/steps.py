"""The training step of the presets for a week, at their real sizes: train.py itself, on random networks and latents.

Of the steps at the first picture size some are timed, some run in torch's mode that reports waits, and one is profiled; those at the
second size are timed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gpu_parts.findings import FAILED, NOT_HERE, OFF, Detail, Finding, Job, Limit, Report, judge, judge_fact, one_line, quantity
from gpu_parts.machine import peak_rate
from gpu_parts.materials import SCALES, config_of, new_run, train_flags
from gpu_parts.memory import Capped, events
from gpu_parts.page import table
from gpu_parts.profile import Profile, read_profile, top
from gpu_parts.stepping import Enough, run_training
from gpu_parts.waits import EACH_STEP, LOGGED, counted, unexpected
from tinyldm.planning.flops import useful_flops
from tinyldm.planning.memory import RESERVE
from tinyldm.planning.plan import make_plan
from tinyldm.planning.step import step_seconds
from tinyldm.training import rehearsal

# Steps at the first picture size, by number: 1 and 2 compile and warm up. Those that are timed do not write to the log.
TIMED, WAITING, PROFILED = range(3, 6), range(6, 11), 11
WARM = 2                    # steps at either size before those that are timed
RATE = Limit(0.85, 1.4, "the plan, a projection from the utilisation that is assumed for this network")
TIME = Limit(1 / RATE.high, 1 / RATE.low, RATE.source)
OPTIMIZERS = Limit(0.5, 1.5, "the plan's bytes and FLOPs, an estimate")
MEMORY = Limit(0.85, 1.1, "the plan without its reserve; its activations are an estimate")
IDLE = Limit(0, 1, "5 %: an estimate")
COPY = Limit(0, 1, "an estimate; the first copy allocates pinned memory")
WRITE = Limit(0, 1, "an estimate for a slow disk")
GRID_MEMORY = Limit(0, 1.1, "the plan without its reserve, counted on shapes")
LOADER = Limit(1, float("inf"), "the training's own rate")


class Steps(Capped):
    """Times, waits and a profile of a run over both sizes, reported as soon as they are known: the run may be cut off."""

    def __init__(self, job: Job, report: Report, flags: list[str]):
        super().__init__(job.memory_gb, rehearse=True)
        self.job, self.report, self.flags, self.stack, self.begun = job, report, flags, ExitStack(), time.perf_counter()
        self.phases: list[dict[str, Any]] = []                  # per picture size: see phase(), stepped()
        self.waits: Counter = Counter()
        self.times: dict[str, float] = {}                       # seconds of what happens besides steps

    def phase(self, found: Any) -> None:
        super().phase(found)
        if not self.phases:
            self.report(Finding("until the first step, with the rehearsal", f"{time.perf_counter() - self.begun:.0f} s"))
        self.end_phase()
        self.phases.append({"config": found.config, "samples": found.samples, "micro_batches": found.micro_batches, "ends": []})
        if self.job.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def end_phase(self) -> None:
        if self.phases:
            phase_findings(self.job, self.report, self.flags, len(self.phases) - 1, self.phases[-1])

    def updating(self) -> None:
        if len(self.ends) == WARM - 1:                          # in the step before those that are timed
            self.wait()
            self.mark = time.perf_counter()

    def stepped(self, step: int) -> None:
        super().stepped(step)
        phase = self.phases[-1]
        phase["ends"].append(self.ends[-1])
        if len(self.ends) == WARM:
            self.wait()
            phase["optimizers"] = time.perf_counter() - self.mark
        if self.job.on_gpu:
            phase["peak"] = torch.cuda.max_memory_allocated() / 1e9
        if len(self.phases) > 1:
            return
        next_step = len(phase["ends"]) + 1                      # what begins now belongs to it
        if next_step == WAITING.start and self.job.on_gpu:
            self.stack.enter_context(counted(self.waits))
        if next_step == WAITING.stop:
            self.stack.close()
            self.start_profile()
        if next_step == PROFILED + 1:
            self.end_profile()

    def start_profile(self) -> None:
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if self.job.on_gpu else [kinds.CPU])
        self.wait()
        self.profiler.start()

    def end_profile(self) -> None:
        self.wait()
        self.profiler.stop()
        profile_findings(self.job, self.report, read_profile(self.profiler, self.job.on_gpu), self.phases[0], self.waits)
        if self.job.trace:
            folder = Path(self.job.pictures)
            folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(folder / f"{self.phases[0]['config'].run.preset}.json.gz"))
        del self.profiler

    def wait(self) -> None:
        if self.job.on_gpu:
            torch.cuda.synchronize()

    def drawing(self) -> None:
        if self.job.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def drawn(self, seconds: float) -> None:
        self.times["grid"] = seconds
        self.grid_peak = torch.cuda.max_memory_allocated() / 1e9 if self.job.on_gpu else 0.0

    def saved(self, seconds: float) -> None:
        self.times["copy"] = seconds

    def written(self, seconds: float) -> None:
        self.times["write"] = seconds


class StepsAlone(Steps):
    """Ends before the sample grid and the checkpoint."""

    def stepped(self, step: int) -> None:
        super().stepped(step)
        if step == sum(SCALES[self.job.scale].steps):
            raise Enough


def dit(job: Job, report: Report) -> None:
    watch = steps(job, report, "5090_week", Steps)
    afterwards(job, report, watch)


def unet(job: Job, report: Report) -> None:
    with patch.object(rehearsal, "try_phases", lambda *_: []):          # that of the DiT has shown that it works; this one takes minutes
        steps(job, report, "5090_week_unet", StepsAlone)


def steps(job: Job, report: Report, preset: str, kind: type[Steps]) -> Steps:
    """Run the training, compiled where that works."""
    run = job.folder("runs") / preset
    for compiled in ([True, False] if job.on_gpu else [False]):
        flags = [*flags_of(job, preset), "--compile" if compiled else "--no-compile", "--out", str(new_run(job, preset))]
        watch = kind(job, report, flags)
        try:
            run_training(flags, watch)
            watch.end_phase()
            break
        except RuntimeError as error:
            if not compiled or watch.ends:                      # not before the first step, so not because of the compiler alone
                watch.end_phase()
                raise
            report(Finding("a compiled step", verdict=FAILED, note=f"{one_line(error)}; the rest is without torch.compile"))
    for row in events(run):
        report(Finding("micro-batches became smaller", row["text"], "that they fit as planned", OFF))
    return watch


def flags_of(job: Job, preset: str) -> list[str]:
    scale, found = SCALES[job.scale], peak_rate(job)
    stages = ["--stages", *(f"{size}={count}" for size, count in zip(scale.sizes, scale.steps))]
    gpu = ["--gpu-tflops", f"{found / 1e12:g}", "--gpu-gb", str(job.memory_gb)] if found else []
    return train_flags(job, scale, preset, scale.sizes, *stages, "--max-steps", sum(scale.steps), "--log-every", WAITING.stop - 1,
                 "--sample-steps", scale.sampling_steps, *gpu)


def timed_steps(index: int, ends: list[float]) -> list[float]:
    """Seconds of the steps that are timed. ends: of all steps of a phase; index: of the phase."""
    chosen = TIMED if index == 0 else range(WARM + 1, len(ends) + 1)
    return [ends[number - 1] - ends[number - 2] for number in chosen if number <= len(ends)]


def phase_findings(job: Job, report: Report, flags: list[str], index: int, phase: dict[str, Any]) -> None:
    """Time, MFU and memory at one picture size."""
    config, speed = phase["config"], peak_rate(job)
    name = f"{config.network.name}, {config.data.resolution} px"
    if not (times := timed_steps(index, phase["ends"])):
        return report(Finding(f"{name}: timed steps", verdict=FAILED, note="the run ended before them"))
    seconds, batch = statistics.median(times), config.optimisation.batch_size
    planned = make_plan(config_of(flags), must_fit=False).phases[index]
    on_gpu = lambda value: value if speed else None
    note = f"{quantity(batch / seconds)} pictures per second, {batch} in {phase['micro_batches']} micro-batches, median of {len(times)}"
    report(judge(f"{name}: seconds per step", seconds, on_gpu(planned.batch / planned.rate), TIME, "s", note))
    if "optimizers" in phase:
        estimate = step_seconds(planned)["optimizers, averages"]
        report(judge(f"{name}: optimizers and averages, of that", phase["optimizers"], on_gpu(estimate), OPTIMIZERS, "s"))
    if not speed:
        return
    report(judge(f"{name}: MFU", batch / seconds * useful_flops(config) / speed, config.plan.utilisation, RATE, "%"))
    report(judge(f"{name}: highest memory in training", phase["peak"], planned.memory_gb() - RESERVE / 1e9, MEMORY, "GB",
                 f"capped at {job.memory_gb:g} GB"))


def profile_findings(job: Job, report: Report, profile: Profile, phase: dict[str, Any], waits: Counter) -> None:
    """Waits, idle time and the longest kernels of the first picture size."""
    name, size, steps = phase["config"].network.name, phase["config"].data.resolution, len(WAITING)
    what = f"{profile.launches:,} launches, {profile.waits} waits, GPU idle {profile.idle:.1%}" if job.on_gpu else "operations on the CPU"
    report(Detail(f"One step of the {name} at {size} px ({phase['micro_batches']} micro-batches): {what}", top(profile)))
    if not job.on_gpu:
        report(Finding(f"{name}: waits for the GPU in {steps} steps", verdict=NOT_HERE, note="no GPU"))
        report(Finding(f"{name}: GPU idle in a profiled step", verdict=NOT_HERE, note=f"no GPU; {len(profile.work):,} operations seen"))
        return
    others, total, most = unexpected(waits), sum(waits.values()), EACH_STEP * steps + LOGGED
    report(Detail(f"Waits of the host in {steps} steps of the {name}", table(["where", "times"], waits.most_common(), right=(1,))))
    report(judge_fact(f"{name}: waits for the GPU in {steps} steps", not others and total <= most,
                      f"{total}, at {len(others)} unknown places {' '.join(others)}".strip(), f"at most {most}, at no unknown place"))
    report(judge(f"{name}: GPU idle in a profiled step", profile.idle, 0.05, IDLE, "%", f"{profile.launches:,} launches"))


def afterwards(job: Job, report: Report, watch: Steps) -> None:
    """The sample grid and the checkpoint at the end of the run; the rate of the loader."""
    here = lambda value: value if job.on_gpu else None                      # what is expected
    for what, name, expected, limit in (("grid", "sample grid at the end: seconds", 30, Limit(0, 1, "an estimate")),
                                        ("copy", "checkpoint: seconds in which training stands still", 3, COPY),
                                        ("write", "checkpoint: seconds until it is on the disk", 40, WRITE)):
        if what not in watch.times:                             # training goes on where the grid fails
            report(Finding(name, verdict=FAILED, note="the log says why"))
            continue
        report(judge(name, watch.times[what], here(expected), limit, "s"))
    if "grid" in watch.times:
        planned = make_plan(config_of(watch.flags), must_fit=False).phases[-1].grid_gb() - RESERVE / 1e9
        report(judge("sample grid at the end: highest memory", watch.grid_peak, here(planned), GRID_MEMORY, "GB"))
    phase, count = watch.phases[0], 20
    batch, begun = phase["config"].optimisation.batch_size, time.perf_counter()
    for position in range(count):
        phase["samples"](position)
    rate, training = count * batch / (time.perf_counter() - begun), batch / statistics.median(timed_steps(0, phase["ends"]))
    report(judge(f"loader: samples per second of {phase['config'].data.resolution} px", rate, training, LOADER))
