"""Two minutes of real training, from pictures to pictures, and what the model then draws."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from gpu_parts.findings import Detail, Finding, Job, Limit, Report, judge, quantity
from gpu_parts.materials import new_run
from gpu_parts.stepping import finish
from tinyldm.data.cache import Cache
from tinyldm.data.toyworld import PROMPTS
from tinyldm.training.log import read

FALL = Limit(0, 1, "that the loss falls at all: its last quarter is below its first")
# In the tiny setting the networks are those that a CPU trains in seconds.
TINY = ("--scenes 200 --resolution 32 --vae-steps 20 --vae-pictures 100 --vae-batch-size 4 --batch-size 8 --warmup-steps 2 --log-every 2 "
        "--val-samples 8 --sample-steps 4 --autoencoder kl --vae widths=8,16,16,16 groups=4 latent_channels=8 "
        "--unet widths=16,32 heads=1,2 groups=4 --text width=16 layers=1 heads=2 mlp_width=32").split()


def learning(job: Job, report: Report) -> None:
    run, kept = new_run(job, "learned"), Path(job.pictures)
    data = ["--data", *job.data] if job.data else []
    finish(["train.py", "--preset", "tiny", *([] if job.full else TINY), *data, "--device", "auto" if job.on_gpu else "cpu", "--budget",
            f"{job.train_seconds:.0f}s", "--out", run])
    rows = [row for row in read(run / "log.jsonl") if row["stage"] == "step" and row.get("loss") is not None]
    losses = [row["loss"] for row in rows]
    if len(losses) < 4:
        raise RuntimeError(f"{len(losses)} rows with a loss in the log: more --train-seconds are needed here")
    quarter = max(1, len(losses) // 4)
    first, last = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:])
    report(judge(f"{job.train_seconds:.0f} s of --preset tiny: the loss falls from {quantity(first)} to", last, first, FALL,
                 note=f"{rows[-1]['step']:,} steps, {quantity(rows[-1]['images_per_second'])} pictures per second"))
    prompts = [*PROMPTS][:4] if not job.data else [Cache(run / "latents").captions(i)[0][1] for i in range(4)]
    drawn = run / "drawn.png"
    finish(["sample.py", *prompts, "-n", 4, "--model", run, "--out", drawn])
    kept.mkdir(parents=True, exist_ok=True)
    names = {"drawn.png": next(path for path in (drawn, *run.glob("drawn*grid*.png"), *run.glob("drawn*.png")) if path.exists()),
             "training.png": max((run / "samples").glob("step-*.png")), "vae.png": run / "samples" / "vae.png"}
    for name, file in names.items():
        if file.exists():
            shutil.copyfile(file, kept / name)
    report(Finding("pictures drawn by it", ", ".join(sorted(path.name for path in kept.glob("*.png"))), "-", note="beside the page: look"))
    report(Detail(f"What {job.train_seconds:.0f} seconds of training draw",
                  f"{', '.join(prompts)}\n\n![drawn by sample.py]({kept.name}/drawn.png)"))
