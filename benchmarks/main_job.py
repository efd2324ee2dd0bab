"""Times the main job as complete processes: `--help`, train.py --preset tiny from an empty folder, sample.py, evaluate.py.

    python benchmarks/main_job.py [--preset tiny] [--out runs/benchmark] [--keep]

Prints wall-clock seconds and peak resident memory of each process. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def timed(*words: str) -> tuple[float, float]:
    """Run a script -> (seconds, peak resident memory in GB of that process)."""
    begun = time.perf_counter()
    quiet = subprocess.DEVNULL if "--help" in words else None
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=quiet)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} failed")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--keep", action="store_true", help="keep the run folder")
    args = parser.parse_args()
    if (ROOT / args.out).exists() and not (ROOT / args.out / "config.json").exists():
        sys.exit(f"{args.out} is there and is no run: name another --out")
    shutil.rmtree(ROOT / args.out, ignore_errors=True)
    rows = [(f"{script} --help", *timed(script, "--help")) for script in ("train.py", "sample.py", "evaluate.py")]
    rows.append((f"train.py --preset {args.preset}", *timed("train.py", "--preset", args.preset, "--out", args.out)))
    words = ("sample.py", "a red fox", "--cfg", "7.5", "--model", args.out, "--out", f"{args.out}/fox.png")
    drawn = [timed(*words) for _ in range(3)]
    rows.append(('sample.py "a red fox" --cfg 7.5 (median of 3)', *sorted(drawn)[1]))
    rows.append(("evaluate.py --metric prompts", *timed("evaluate.py", args.out, "--metric", "prompts")))
    if not args.keep:
        shutil.rmtree(ROOT / args.out)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"| {'process':<46} | seconds | peak GB |\n|{'-' * 48}|--------:|--------:|")
    for name, seconds, memory in rows:
        print(f"| {name:<46} | {seconds:7.2f} | {memory:7.2f} |")


if __name__ == "__main__":
    main()
