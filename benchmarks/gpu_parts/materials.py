"""Networks of the real shapes with random weights, and caches of random latents, so that nothing is downloaded or encoded."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.bench.pairs import fresh
from gpu_parts.findings import Finding, Job, Report, quantity
from tinyldm.config import Config, parse
from tinyldm.data.cache import ShardWriter, write_index
from tinyldm.data.prepare import settings_of
from tinyldm.data.toyworld import sample
from tinyldm.files import replace_folder
from tinyldm.folders.load import load_text, load_tokenizer, load_vae
from tinyldm.folders.save import save_part, write_part
from tinyldm.lookup import build_dataclass
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.training.second_stage import at_phase, build_model

SPEC = "random"             # the source that the caches name


class Scale(NamedTuple):
    """Networks and sizes, as train.py's flags and as fields."""

    vae: dict
    text: dict
    sizes: tuple[int, int]                  # of pictures, in pixels
    steps: tuple[int, int]                  # training steps at each size
    networks: dict[str, list[str]]          # preset -> further flags
    pictures: int                           # in the caches
    sampling_steps: int
    batches: tuple[int, ...]                # for drawing
    encode_batch: int                       # pictures that are encoded at once


PRESETS = {"5090_week": "dit", "5090_week_unet": "unet"}
SCALES = {
    "full": Scale({}, {"activation": "gelu"}, (256, 512), (12, 4), {preset: [] for preset in PRESETS}, 2048, 20, (1, 4, 32), 32),
    "tiny": Scale(dict(widths=(8, 8, 8, 8), depth=1, groups=4), dict(width=32, layers=1, heads=2, mlp_width=64), (32, 64), (12, 4),
                  {"5090_week": "--dit width=32 layers=2 heads=2 mlp_width=64 --batch-size 8 --grad-accum 2".split(),
                   "5090_week_unet": "--unet widths=16,32 attention=False,True heads=1,2 groups=4 --batch-size 8 --grad-accum 2".split()},
                  64, 2, (1, 2), 2)}
# Small networks for the checks of correctness, at both scales: their losses are compared, not their speed.
SMALL = Scale(SCALES["tiny"].vae, SCALES["tiny"].text, (64, 128), (0, 0), {
    "5090_week": "--dit width=128 layers=2 heads=2 mlp_width=256".split(),
    "5090_week_unet": "--unet widths=32,64 attention=False,True heads=1,1 groups=8".split()}, 256, 2, (1,), 2)


def materials(job: Job, report: Report) -> None:
    """The part: everything that the others need."""
    for name, scale in (("large", SCALES[job.scale]), ("small", SMALL)):
        begun = time.perf_counter()
        folder = networks_folder(job, scale)
        for size in scale.sizes:
            cache_folder(job, scale, size)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
        report(Finding(f"{name} networks and latents", f"{quantity(size, 'GB')}, {time.perf_counter() - begun:.1f} s"))


def networks_folder(job: Job, scale: Scale) -> Path:
    """A folder with vae/ and clip/, random, of this scale; made where it is missing."""
    folder = job.folder("small" if scale is SMALL else "large")

    def fill(partial: Path) -> None:
        partial.mkdir()
        torch.manual_seed(0)
        cpu, length = torch.device("cpu"), CLIPTextConfig().context_length
        tokenizer = Tokenizer.train((sample(i, 64, 0).caption for i in range(200)), 1024, length)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        sized = {"vocab_size": len(tokenizer)} if "width" in scale.text else {}         # at full scale CLIP's own vocabulary
        text = fresh(CLIPText(build_dataclass(CLIPTextConfig, scale.text | ids | sized, "text")), cpu, torch.float32)
        save_part(partial / "vae", fresh(AutoencoderKL(build_dataclass(VAEConfig, scale.vae, "vae")), cpu, torch.float32))
        write_part(partial / "clip", text)
        tokenizer.save(partial / "clip")

    return filled(folder, fill)


def cache_folder(job: Job, scale: Scale, size: int) -> Path:
    """A cache of random latents of pictures of this size, with captions of which nearly all differ; made where it is missing."""
    vae_folder = networks_folder(job, scale) / "vae"

    def fill(partial: Path) -> None:
        folder = partial / "shards" / "s"
        folder.mkdir(parents=True)
        vae = load_vae(vae_folder)
        config = parse(["--resolution", str(size)], "")[0]
        settings = settings_of(config, vae) | {"data": [SPEC], "captions": [], "vae_weights": str(vae_folder)}
        side, rng, writer = size // vae.config.downscale, np.random.default_rng(size), ShardWriter(folder)
        for first in range(0, scale.pictures, 64):
            captions = [[(0, f"{sample(i, 16, 0).caption}, number {i}")] for i in range(first, min(first + 64, scale.pictures))]
            latents = rng.standard_normal((len(captions), 1, 1, vae.config.latent_channels, side, side), np.float32)
            writer.add(latents.astype(np.float16), captions, [[[size, size, 0, 0, size, size]]] * len(captions))
        facts = {"name": "s", "url": SPEC, "stamp": "", "content": "", "read": scale.pictures, "kept": scale.pictures, "skipped": {},
                 "filtered": {}, "stats": dict.fromkeys(("numbers", "sum", "squares", "variance"), 0.0)}
        (folder / "shard.json").write_text(json.dumps(facts | writer.close()), encoding="utf-8")
        (partial / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        write_index(partial, settings, [{"spec": SPEC, "shards": ["s"]}])

    return filled(job.folder(f"{vae_folder.parent.name}-latents-{size}"), fill)


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, made by fill() where it is missing."""
    if not folder.exists():
        replace_folder(folder, fill)
    return folder


def train_flags(job: Job, scale: Scale, preset: str, sizes: tuple[int, ...], *more: object) -> list[str]:
    """train.py's flags for a preset on random networks and latents. sizes: of pictures; several: in turn."""
    folder = networks_folder(job, scale)
    stages = ["--resolution", sizes[0]] if len(sizes) == 1 else ["--stages", *(f"{size}=1" for size in sizes)]
    device = [] if job.on_gpu else ["--device", "cpu"]          # a GPU is found by itself, as in a run that somebody starts
    found = ["--preset", preset, *scale.networks[preset], *device, "--vae-weights", folder / "vae", "--text-weights", folder / "clip",
             "--cache", *(cache_folder(job, scale, size) for size in sizes), *stages, "--val-samples", 0, "--sample-every", 0,
             "--save-every", 10**6, "--sample-prompts", "a red fox", *more]
    return [str(word) for word in found]


def new_run(job: Job, name: str) -> Path:
    """The path of a run folder that is not there."""
    folder = job.folder("runs") / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    return folder


def config_of(flags: list[str]) -> Config:
    return parse(flags, "")[0]


def random_model(job: Job, preset: str, dtype: torch.dtype) -> Model:
    """A whole model of the preset's shapes on the device, with random weights of which none is zero."""
    scale, device = SCALES[job.scale], torch.device(job.device)
    config = config_of(train_flags(job, scale, preset, scale.sizes[:1]))
    folder = networks_folder(job, scale)
    vae, text = load_vae(folder / "vae", device, dtype), load_text(folder / "clip", device, dtype)
    tokenizer = load_tokenizer(folder / "clip", text.config.context_length)
    with torch.device("meta"):
        model = build_model(config, vae, TextEncoders([TextEncoder(text, tokenizer)]))
    torch.manual_seed(0)
    fresh(model.net, device, dtype)
    return at_phase(model, config)


def captions(count: int) -> list[str]:
    return [sample(i, 16, 0).caption for i in range(count)]
