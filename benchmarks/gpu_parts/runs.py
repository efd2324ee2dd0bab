"""Runs of train.py from the command line that are killed, stopped, and started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_parts.findings import Job, NotPossible, Report, judge_fact, run_checks
from gpu_parts.materials import SMALL, new_run, train_flags
from gpu_parts.stepping import finish, start
from tinyldm.training import checkpoint

PATIENCE = 120              # seconds to wait for what must happen
# Optimizer steps, and steps per checkpoint: enough of them to be killed between two checkpoints, on a GPU in milliseconds.
LENGTH = {"cuda": (120, 40), "cpu": (18, 6)}
ATTEMPTS = 3
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]


def command(job: Job, run: Path, *more: object) -> list[str]:
    """train.py on a small DiT, with checkpoints."""
    steps, every = LENGTH[job.device]
    small = ["--batch-size", 8, "--max-steps", steps, "--warmup-steps", 2, "--save-every", every, "--keep-last", 99, "--log-every", 6]
    return ["train.py", *train_flags(job, SMALL, "5090_week", SMALL.sizes[:1], *small, "--out", run, *more)]


def resume(job: Job, report: Report) -> None:
    """An undisturbed run, and one that is killed and resumed: with --deterministic their last checkpoints are the same."""
    whole, cut, (steps, every) = new_run(job, "whole"), new_run(job, "killed"), LENGTH[job.device]
    finish(command(job, whole, "--deterministic"))
    for _ in range(ATTEMPTS):
        killed = start(command(job, new_run(job, "killed"), "--deterministic"))
        wait_for(lambda: (cut / "checkpoints" / f"step-{every:06d}").exists(), killed)
        killed.kill()
        if killed.wait() == -signal.SIGKILL:
            break
    else:
        raise RuntimeError(f"the run of {steps} steps was over {ATTEMPTS} times before it could be killed")
    at = max(checkpoint.names(cut)).name
    finish(["train.py", "--out", cut, "--resume", "yes"])
    last = f"step-{steps:06d}"
    apart = [name for name, data in contents(whole / "checkpoints" / last).items()
             if contents(cut / "checkpoints" / last).get(name) != data]
    count = len(contents(whole / "checkpoints" / last))
    report(judge_fact("files of the last checkpoint that differ after kill -9 and resume", not apart and count > 0,
                      f"{len(apart)} of {count} ({', '.join(apart[:3]) or 'none'})", "0", f"--deterministic; killed after {at}"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, pause: float = 0.002) -> None:
    """Wait until something has happened, or the process has ended. TimeoutError where neither comes."""
    end = time.monotonic() + PATIENCE
    while not happened() and process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened for {PATIENCE} seconds")
        time.sleep(pause)


def stop(job: Job, report: Report) -> None:
    """SIGTERM while a checkpoint is being written: the run ends by itself, with whole checkpoints, and can be resumed."""
    run, (steps, every) = new_run(job, "stopped"), LENGTH[job.device]
    process = start(command(job, run, "--save-every", 1, "--keep-last", 2))
    writing = lambda: any((run / "checkpoints").glob(".writing-*"))
    wait_for(lambda: len(checkpoint.names(run)) > 1, process)
    wait_for(writing, process)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    code = process.wait(PATIENCE)
    damage = {folder.name: checkpoint.find_damage(folder) for folder in checkpoint.names(run)}
    bad = [f"{name}: {what}" for name, what in damage.items() if what]
    report(judge_fact("SIGTERM during a checkpoint: exit code", code == 128 + signal.SIGTERM,
                      f"{code}, {time.monotonic() - begun:.1f} s later", str(128 + signal.SIGTERM)))
    report(judge_fact("damaged checkpoints after it", bool(damage) and not bad, f"{len(bad)} of {len(damage)} {'; '.join(bad)}".strip(), "0"))
    finish(["train.py", "--out", run, "--resume", "yes", "--save-every", every])
    finished = checkpoint.read_state(checkpoint.names(run)[-1])
    report(judge_fact("the stopped run, resumed, ends after", finished["step"] == steps and finished["finished"],
                      f"{finished['step']} steps", f"{steps} steps"))


def processes(job: Job, report: Report) -> None:
    run_checks(job, report, nccl_with_one_process, torchrun_with_one_process, restart_after_kill_9)


def nccl_with_one_process(job: Job, report: Report) -> None:
    if not job.on_gpu:
        raise NotPossible("no GPU")
    if not dist.is_nccl_available():
        raise NotPossible("this torch has no NCCL")
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    numbers = torch.arange(1e6, device="cuda")
    summed = numbers.clone()
    dist.all_reduce(summed)
    fits = torch.equal(numbers, summed)
    dist.destroy_process_group()
    report(judge_fact("NCCL: the sum over one process", fits, "the same numbers" if fits else "other numbers", "the same numbers"))


def torchrun_with_one_process(job: Job, report: Report) -> None:
    run = new_run(job, "torchrun")
    finish([*TORCHRUN, *command(job, run, "--max-steps", 8)])
    step = checkpoint.read_state(checkpoint.names(run)[-1])["step"]
    report(judge_fact("torchrun --nproc-per-node 1 train.py ends after", step == 8, f"{step} steps", "8 steps"))


def restart_after_kill_9(job: Job, report: Report) -> None:
    """torchrun starts a killed process again, as it would one that a CUDA error ends: the run goes on from its newest checkpoint."""
    if sys.platform != "linux":
        raise NotPossible("the processes that torchrun has started are found in /proc")
    run, (steps, every) = new_run(job, "restarted"), LENGTH[job.device]
    launcher = start([*TORCHRUN, "--max-restarts", 2, *command(job, run)])
    wait_for(lambda: (run / "checkpoints" / f"step-{every:06d}").exists(), launcher)
    workers = [pid for pid in children(launcher.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    if len(workers) != 1:
        raise RuntimeError(f"torchrun runs {len(workers)} processes of train.py")
    os.kill(workers[0], signal.SIGKILL)
    code = launcher.wait(PATIENCE)
    step = checkpoint.read_state(checkpoint.names(run)[-1])["step"]
    report(judge_fact("torchrun after a kill -9 of its process", code == 0 and step == steps, f"exit code {code}, {step} steps",
                      f"exit code 0, {steps} steps"))


def children(pid: int) -> list[int]:
    return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_bytes().split()]
