"""Encoding pictures, decoding them, and sampling, with the library's own functions on networks of the real shapes."""

from __future__ import annotations

import time

import numpy as np
import torch

from gpu_parts.findings import NOT_HERE, Finding, Job, Limit, Report, judge, run_checks
from gpu_parts.machine import median_seconds, peak_rate
from gpu_parts.materials import SCALES, captions, config_of, networks_folder, random_model, train_flags
from tinyldm.data.encoding import encode
from tinyldm.device import pick_device, pick_dtype
from tinyldm.folders.load import load_vae
from tinyldm.models.tiling import PIXELS_AT_ONCE
from tinyldm.pipeline import decode, draw, draw_settings
from tinyldm.planning.memory import RESERVE
from tinyldm.planning.phase import GRID_PICTURES, PlannedPhase
from tinyldm.planning.plan import ENCODE_UTILISATION, make_plan

ENCODE = Limit(0.75, 1.6, "the plan's utilisation of the encoder, an estimate")
DECODE = Limit(0.6, 1.8, "the utilisation that the plan assumes for the encoder, an estimate")
MEMORY = Limit(0.7, 1.25, "the plan without its reserve, counted on shapes")
SAMPLE = Limit(0, 1, "twice the FLOPs at 40 % of the peak, and 15 ms a step for launches: an estimate")
ROUNDS = {"cuda": 5, "cpu": 2}


def encoding(job: Job, report: Report) -> None:
    run_checks(job, report, encoding_rate, decoding_rate)


def planned(job: Job, size: int) -> PlannedPhase:
    """The plan's figures for pictures of this size."""
    return make_plan(config_of(train_flags(job, SCALES[job.scale], "5090_week", (size,))), must_fit=False).phases[-1]


def expected(job: Job, flops: float, fraction: float) -> float | None:
    """How often per second this GPU computes so much, at this fraction of its peak; None without a GPU."""
    speed = peak_rate(job)
    return speed and fraction * speed / flops


def peak_memory(job: Job, report: Report, name: str, gigabytes: float) -> None:
    """Compare the highest memory since it was last reset; without a GPU there is nothing to report."""
    if job.on_gpu:
        report(judge(f"{name}: highest memory", torch.cuda.max_memory_allocated() / 1e9, gigabytes, MEMORY, "GB"))
        torch.cuda.reset_peak_memory_stats()


def encoding_rate(job: Job, report: Report) -> None:
    """Pictures per second through encode(), as prepare calls it for each batch, eager and compiled."""
    scale, device = SCALES[job.scale], pick_device("auto" if job.on_gpu else "cpu")
    for compiled in (False, True):
        vae = load_vae(networks_folder(job, scale) / "vae", device)
        if compiled and not job.on_gpu:
            report(Finding("encoding, compiled", verdict=NOT_HERE, note="no GPU"))
            continue
        if compiled:
            vae.encode = torch.compile(vae.encode, dynamic=False)
        for size in scale.sizes:
            name, plan = f"encoding {size} px, {'compiled' if compiled else 'eager'}", planned(job, size)
            images = np.random.default_rng(0).integers(0, 256, (scale.encode_batch, size, size, 3), np.uint8)
            begun = time.perf_counter()
            encode(vae, images, device, "auto", False)
            first = time.perf_counter() - begun
            seconds = median_seconds(lambda: encode(vae, images, device, "auto", False), device, ROUNDS[job.device])
            report(judge(f"{name}: pictures per second", scale.encode_batch / seconds,
                         expected(job, plan.flops["encode"], ENCODE_UTILISATION[compiled]), ENCODE, "",
                         f"{scale.encode_batch} at once, the first batch after {first:.1f} s"))
            peak_memory(job, report, name, plan.encoding_gb(vae) - RESERVE / 1e9)


@torch.no_grad()
def decoding_rate(job: Job, report: Report) -> None:
    """A sample grid's latents to pixels, as drawing does it."""
    scale, device = SCALES[job.scale], pick_device("auto" if job.on_gpu else "cpu")
    vae, size = load_vae(networks_folder(job, scale) / "vae", device, pick_dtype("auto", device)), scale.sizes[-1]
    name, plan, side = f"decoding {GRID_PICTURES} pictures of {size} px", planned(job, size), size // vae.config.downscale
    z = torch.randn(GRID_PICTURES, vae.config.latent_channels, side, side, device=device)
    seconds = median_seconds(lambda: decode(vae, z), device, ROUNDS[job.device])
    report(judge(f"{name}: per second", GRID_PICTURES / seconds, expected(job, plan.flops["decode"], ENCODE_UTILISATION[False]), DECODE))
    weights, at_once = sum(p.nbytes for p in vae.parameters()), max(1, min(GRID_PICTURES, PIXELS_AT_ONCE // size**2))
    peak_memory(job, report, name, (weights + at_once * plan.peaks["decode"]) / 1e9)


@torch.no_grad()
def sampling(job: Job, report: Report) -> None:
    """Seconds from captions to pictures, as sample.py draws them, with the DiT."""
    scale, device = SCALES[job.scale], pick_device("auto" if job.on_gpu else "cpu")
    model, size = random_model(job, "5090_week", pick_dtype("auto", device)), scale.sizes[0]
    settings = draw_settings(model, steps=scale.sampling_steps)
    flops = (2 if settings.guided else 1) * settings.steps * planned(job, size).flops["net"] / 3        # the plan counts three passes
    for batch in scale.batches:
        prompts = captions(batch)
        images = draw(model, prompts, range(batch), settings)
        if images.shape != (batch, size, size, 3):
            raise ValueError(f"{batch} pictures of {size} px have the shape {images.shape}")
        seconds = median_seconds(lambda: draw(model, prompts, range(batch), settings), device, ROUNDS[job.device], warm=0)
        rate = expected(job, batch * flops, 0.4)
        report(judge(f"sampling {batch} at once, {size} px, {settings.steps} steps of {settings.sampler}: seconds", seconds,
                     rate and 2 / rate + 0.015 * settings.steps, SAMPLE, "s", f"{seconds / batch:.3g} s a picture"))
