"""Everything that has to be done once on a GPU that is new to this code, in one command of at most eight minutes, with one results page.

    python benchmarks/gpu.py                              a page in benchmarks/results
    python benchmarks/gpu.py --minutes 20                 the parts that eight minutes leave no time for, too
    python benchmarks/gpu.py --only memory sampling       some of the parts
    python benchmarks/gpu.py --device cpu --scale tiny    without a GPU: that the command works, not how fast it is

Each part runs in a process of its own and cannot hurt the others. The page is written again after each of them, and ends with a
verdict per line. --list prints the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import groupby
from pathlib import Path

from gpu_parts.child import WHOLE, read_results
from gpu_parts.findings import FAILED, NO_TIME, Detail, Finding, Job, Part
from gpu_parts.page import render, slug, summary

HERE = Path(__file__).parent
ROOT = HERE.parent
TIMES_ON_A_CPU = 10         # a part may take this many times longer there: the tiny setting is about correctness
PARTS = [
    Part("machine", "hardware, driver and versions, kernels for this GPU, the rate of large products", "gpu_parts.machine:machine", 60),
    Part("networks", "random networks and latents for the other parts", "gpu_parts.materials:materials", 60),
    Part("learning", "two minutes of training, and what the model then draws", "gpu_parts.learning:learning", 240, False),
    Part("numbers", "bf16 and fp32, compiled and eager, fused and plain AdamW, pinned copies", "gpu_parts.numbers:numbers", 240, False),
    Part("resume", "--deterministic, kill -9 and resume: the same bytes as an undisturbed run", "gpu_parts.runs:resume", 90, False),
    Part("signal", "SIGTERM while a checkpoint is written", "gpu_parts.runs:stop", 90, False),
    Part("memory", "the GPU's memory runs out: smaller micro-batches, the same losses", "gpu_parts.memory:memory", 90, False),
    Part("processes", "NCCL with one process; torchrun, and its restart after a kill -9", "gpu_parts.runs:processes", 180, False),
    Part("5090_week", "the training step: time, MFU, memory, waits, profile, checkpoint, grid", "gpu_parts.steps:dit", 240),
    Part("5090_week_unet", "the training step of the U-Net", "gpu_parts.steps:unet", 240),
    Part("encoding", "pictures to latents and back", "gpu_parts.drawing:encoding", 80),
    Part("sampling", "pictures from captions", "gpu_parts.drawing:sampling", 40),
    Part("diffusers", "the same U-Net in diffusers", "gpu_parts.layouts:beside_diffusers", 60),
    Part("layout", "memory layouts of the U-Net", "gpu_parts.layouts:layouts", 240),
]


class Run:
    """One run of the command: its parts, what they have reported, and the page."""

    def __init__(self, parts: Sequence[Part], job: Job, page: Path, name: str, minutes: float, jobs: int = 1):
        self.parts, self.job, self.page, self.name, self.minutes, self.jobs = parts, job, page, name, minutes, jobs
        self.results: dict[Part, list[Finding | Detail]] = {}
        self.begun, self.lock = time.monotonic(), threading.Lock()

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.begun)

    def all(self) -> list[Finding]:
        """Run all parts. -> their findings"""
        job_file = self.job.folder("job.json")
        job_file.write_text(json.dumps(self.job._asdict()), encoding="utf-8")
        for alone, group in groupby(self.parts, key=lambda part: part.alone):
            with ThreadPoolExecutor(1 if alone else self.jobs) as pool:
                list(pool.map(lambda part: self.one(part, job_file), group))
        return self.findings()

    def findings(self) -> list[Finding]:
        return [item for items in self.results.values() for item in items if isinstance(item, Finding)]

    def one(self, part: Part, job_file: Path) -> None:
        allowed, left = part.seconds * (1 if self.job.on_gpu else TIMES_ON_A_CPU), self.left
        if left < allowed / 2:
            note = f"{max(left, 0):.0f} seconds were left, and it may take {allowed:.0f}"
            return self.keep(part, [Finding(part.shows, verdict=NO_TIME, note=note)])
        allowed = min(allowed, left)
        print(f"{part.name}: {part.shows}", flush=True)
        results, log = self.job.folder(f"{part.name}.jsonl"), self.job.folder(f"{part.name}.log")
        ended = run_part(part, job_file, results, log, allowed)
        items = read_results(results)
        if ended and not any(isinstance(item, Finding) and item.name == WHOLE for item in items):
            items.append(Finding(WHOLE, verdict=FAILED, note=f"{ended}: {last_line(log)}"))
        if ended or any(isinstance(item, Finding) and item.verdict == FAILED for item in items):
            items.append(Detail(f"What {part.name} printed last", f"```\n{tail(log)}\n```"))
        if not any(isinstance(item, Finding) for item in items):
            items.append(Finding(WHOLE, verdict=FAILED, note="it reported nothing"))
        self.keep(part, items)

    def keep(self, part: Part, items: list[Finding | Detail]) -> None:
        """Add a part's results to the page, in the order of the table."""
        with self.lock:
            self.results[part] = items
            self.results = {known: self.results[known] for known in self.parts if known in self.results}
            waiting = [known for known in self.parts if known not in self.results]
            command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
            text = render(self.name, command, commit(), self.results, waiting, time.monotonic() - self.begun, date.today())
            self.page.parent.mkdir(parents=True, exist_ok=True)
            partial = self.page.with_name(f".{self.page.name}.partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.page)
        for item in items:
            if isinstance(item, Finding):
                print(f"  {item.verdict:8} {item.name}: {item.measured} (expected {item.expected}) {item.note}", flush=True)


def run_part(part: Part, job_file: Path, results: Path, log: Path, allowed: float) -> str:
    """Run a part in a process of its own, for `allowed` seconds at most -> "", or how it ended where that was not with success."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    results.unlink(missing_ok=True)                             # of an earlier run in the same --work
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", "gpu_parts.child", part.function, str(job_file), str(results)], cwd=ROOT,
                                   env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(allowed)
        except subprocess.TimeoutExpired:
            return f"ended after its {allowed:.0f} seconds"
        finally:
            end_all(process)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}" if code else ""


def end_all(process: subprocess.Popen) -> None:
    """End a part and the processes that it has started. torchrun, which has started others in sessions of their own, gets some
    seconds to end them."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)              # its session has its number
            for _ in range(50):
                process.poll()                                  # takes note of its end, if it has ended
                os.killpg(process.pid, 0)                       # an error: all have ended
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass
    process.wait()


def tail(log: Path, lines: int = 30) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").replace("```", "'''")
    return "\n".join([line.rstrip()[:300] for line in text.split("\n") if line.strip()][-lines:])


def last_line(log: Path) -> str:
    return tail(log, 1) or "it printed nothing"


def commit() -> str:
    """The commit of this tree, and whether files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    try:
        found = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return "not known"
    return f"{found or 'not known'}{' with changes' if changed else ''}"


def gpu_name() -> str:
    """The name of the GPU that torch finds, "" where there is none. Asked in another process: this one never uses the GPU, as all
    memory and, in exclusive mode, the GPU itself belong to the part that runs."""
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", question], capture_output=True, text=True).stdout.strip().split("\n")[-1]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    add("--scale", choices=("full", "tiny"), help="networks and sizes of the presets, or a few pixels "
        "(default: full on cuda, else tiny)")
    add("--minutes", type=float, help="for all parts together; those that no longer fit are listed (default: 8, tiny: 60)")
    add("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="some of the parts (see --list)")
    add("--skip", nargs="+", metavar="PART", choices=[part.name for part in PARTS], default=[], help="all parts but these")
    add("--list", action="store_true", help="print the parts and stop")
    add("--data", nargs="+", default=[], metavar="WORD", help="captioned pictures for the two minutes of training, as train.py takes them "
        "(default: the toy world)")
    add("--train-seconds", type=float, help="(default: 120, tiny: 30)")
    add("--memory-gb", type=float, default=32.0, help="training is measured as on a GPU with this memory (default: 32)")
    add("--jobs", type=int, help="how many of the parts that measure no time run at once (default: 6, at most one per core)")
    add("--trace", action="store_true", help="keep the traces of the profiled steps beside the page (chrome://tracing)")
    add("--out", type=Path, help="the page (default: benchmarks/results/gpu-NAME-DATE.md; on a CPU runs/gpu-tiny.md)")
    add("--work", type=Path, help="folder for networks, runs and logs, which is kept (default: one that is removed afterwards)")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    if args.list:
        return print("\n".join(f"{part.name:16}{part.seconds:4.0f} s  {part.shows}" for part in PARTS))
    gpu = gpu_name()
    if args.device == "cuda" and not gpu:
        sys.exit("error: torch finds no GPU here; --device cpu shows that the command works")
    device = args.device or ("cuda" if gpu else "cpu")
    scale = args.scale or ("full" if device == "cuda" else "tiny")
    name = gpu if device == "cuda" else "a CPU"
    if scale == "tiny":
        name += " in the tiny setting"
    page = args.out or (HERE / "results" / f"gpu-{slug(name)}-{date.today()}.md" if device == "cuda" else ROOT / "runs" / "gpu-tiny.md")
    parts = [part for part in PARTS if part.name in (args.only or [part.name]) and part.name not in args.skip]
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        data = [os.path.abspath(word) if os.path.exists(word) else word for word in args.data]      # parts work in another folder
        job = Job(device, scale, str(work), str(page.resolve().with_suffix("")), data,
                  args.train_seconds or (120 if scale == "full" else 30), args.memory_gb, args.trace)
        jobs = args.jobs or min(6, os.cpu_count() or 1)
        run = Run(parts, job, page, name, args.minutes or (8 if scale == "full" else 60), jobs)
        findings = run.all()
    print(f"\n{summary(findings)}; {page}")


if __name__ == "__main__":
    main()
