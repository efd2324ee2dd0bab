"""A week in minutes: train.py with a budget, interrupted and killed at random moments; the pauses must not count as running time.

    python benchmarks/accelerated_week.py --budget 20m --kills 3 --stops 2

Prints a line per process, then the running time as a fraction of the budget, the last learning rate, and the revised plans.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tinyldm.durations import parse_duration
from tinyldm.training.log import read


def running_time(run: Path) -> float:
    """Seconds in RUN/running.json; 0 where there is none yet."""
    file = run / "running.json"
    return json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.exists() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--kills", type=int, default=3, help="kill -9")
    parser.add_argument("--stops", type=int, default=2, help="SIGTERM")
    parser.add_argument("--pause", type=float, default=15, help="seconds between a process's end and the next one")
    parser.add_argument("--out", default="runs/accelerated_week")
    args, rest = parser.parse_known_args()
    run, budget, rng = Path(args.out), parse_duration(args.budget), random.Random(0)
    shutil.rmtree(run, ignore_errors=True)
    ends = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.stops
    rng.shuffle(ends)
    moments = sorted(rng.uniform(0.05, 0.97) * budget for _ in ends)        # in seconds of running time
    begun, wall = time.monotonic(), 0.0
    for end, moment in [*zip(ends, moments), (None, float("inf"))]:
        resume = ["--resume", "auto"] if (run / "config.json").exists() else ["--preset", args.preset, "--budget", args.budget, *rest]
        started = time.monotonic()
        job = subprocess.Popen([sys.executable, "train.py", "--out", str(run), *resume], stderr=subprocess.DEVNULL)
        before = running_time(run)
        while job.poll() is None and before + time.monotonic() - started < moment:
            time.sleep(0.1)
        if job.poll() is None:
            job.send_signal(end)
            sent = time.monotonic()
            job.wait()
            took = time.monotonic() - sent
            print(f"{end.name} at {before + sent - started:.0f} s of running time, ended {took:.1f} s later", flush=True)
            wall += time.monotonic() - started
            time.sleep(args.pause)
        else:
            wall += time.monotonic() - started
            assert job.returncode == 0, job.returncode
            break
    rows = [row for row in read(run / "log.jsonl") if row["stage"] == "step"]
    last = [row for row in rows if "loss" in row][-1]
    counted = running_time(run)
    print(f"budget {budget:.0f} s; running time as counted {counted:.1f} s ({counted / budget - 1:+.2%}), as measured from outside "
          f"{wall:.1f} s ({wall / budget - 1:+.2%}); with the pauses {time.monotonic() - begun:.0f} s")
    print(f"{max(row['step'] for row in rows)} steps; the learning-rate factor in the last row of the log is {last['lr_factor']:.3f}")
    for row in rows:
        if row.get("event") == "plan":
            print(f"  step {row['step']}: {row['text']}")


if __name__ == "__main__":
    main()
