"""A network that reads subject, colour and background from a picture, for `evaluate.py --metric prompts`.

A small residual CNN for pictures of 64 px. It learns from drawn toyworld scenes alone, all pairs of colour and
subject alike, so it favours neither what a model was trained on nor what was held out, and it never sees a
generated picture. Its training pictures are a little blurred, noisy, tinted and moved: what a small VAE does to
a good picture should not count against it. Of a half-formed picture it is less sure, and below SURE it says
"unclear", which matches no caption.

Training takes about a minute on two CPU cores, once: the weights are kept in the user's cache folder
(~/.cache/tinyldm, or $TINYLDM_CACHE) until toyworld or this file changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import trange

from tinyldm.data.toyworld import BACKGROUNDS, COLOURS, SUBJECTS, sample
from tinyldm.device import autocast
from tinyldm.files import flush
from tinyldm.folders.weights import write_weights
from tinyldm.models import recogniser
from tinyldm.models.recogniser import RecogniserNet
from tinyldm.pictures.pixels import to_pixels

SIZE = 64
SURE, UNCLEAR = 0.7, "unclear"      # trained with smoothed labels, it gives a perfect scene about 0.96
WORDS: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS), "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


class Reading(NamedTuple):
    """What a picture shows, in toyworld's words or UNCLEAR."""

    subject: str
    colour: str
    background: str


@dataclass(frozen=True)
class RecogniserConfig:
    scenes: int = 12_000        # drawn once; every epoch moves and degrades them anew
    steps: int = 700
    batch_size: int = 128
    lr: float = 4e-3
    width: int = 16             # channels at half resolution
    seed: int = 0
    blur: float = 1.0           # strongest blur: 0 is none, 1 a binomial filter of standard deviation 1 px
    noise: float = 0.08         # largest standard deviation, for pixels in [-1, 1]
    tint: float = 0.06          # largest change of a channel's gain and offset
    shift: int = 3              # largest movement in px, to any side


class Recogniser(RecogniserNet):
    """Pixels [b, 3, 64, 64] in [-1, 1] -> logits [b, 12 + 8 + 5], in the order of WORDS."""

    def __init__(self, width: int = RecogniserConfig.width):
        super().__init__(width, sum(map(len, WORDS.values())))

    @torch.no_grad()
    def read(self, images: np.ndarray, batch_size: int = 250) -> list[Reading]:
        """uint8 [b, h, w, 3] of any size, resized to 64 px -> one Reading per picture."""
        device, found = self.head.weight.device, []
        for start in range(0, len(images), batch_size):
            pixels = to_pixels(images[start : start + batch_size]).to(device)
            if pixels.shape[2:] != (SIZE, SIZE):
                pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
            columns = []
            for words, logits in zip(WORDS.values(), split(self(pixels))):
                sure, best = logits.softmax(1).max(1)
                columns.append([words[i] if p >= SURE else UNCLEAR for p, i in zip(sure.tolist(), best.tolist())])
            found += map(Reading, *columns)
        return found


def split(logits: Tensor) -> tuple[Tensor, ...]:
    """[b, 12 + 8 + 5] -> one [b, n] per attribute."""
    return logits.split([len(words) for words in WORDS.values()], 1)


# ---------------------------------------------------------------- training


def degrade(pixels: Tensor, config: RecogniserConfig, rng: Generator) -> Tensor:
    """Mirror half of the pictures; blur, tint and add noise to each by its own amount. [b, 3, h, w] in [-1, 1] -> the same."""
    b, c = pixels.shape[:2]
    uniform = lambda low, high, channels=1: low + (high - low) * torch.rand(b, channels, 1, 1, generator=rng)
    pixels = torch.where(uniform(0, 1) < 0.5, pixels.flip(3), pixels)
    row = torch.tensor([1.0, 4, 6, 4, 1]) / 16                              # binomial filter, standard deviation 1 px
    blurred = F.conv2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), row.outer(row).expand(c, 1, 5, 5), groups=c)
    pixels = torch.lerp(pixels, blurred, uniform(0, config.blur))
    pixels = pixels * uniform(1 - config.tint, 1 + config.tint, c) + uniform(-config.tint, config.tint, c)
    return pixels + uniform(0, config.noise) * torch.randn(pixels.shape, generator=rng)


def move(images: np.ndarray, shift: int, rng: np.random.Generator) -> np.ndarray:
    """Move each picture by up to `shift` px to any side and repeat its edge. uint8 [b, h, w, 3] -> the same."""
    h, w = images.shape[1:3]
    wide = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    corners = rng.integers(2 * shift + 1, size=(len(images), 2))
    return np.stack([picture[y : y + h, x : x + w] for picture, (y, x) in zip(wide, corners)])


def labels(scenes: Iterable) -> Tensor:
    """Scenes (or Readings) -> the indices of their words in WORDS, int64 [n, 3]."""
    return torch.tensor([[words.index(getattr(it, name)) for name, words in WORDS.items()] for it in scenes])


def train(config: RecogniserConfig = RecogniserConfig(), device: torch.device | str = "cpu", dtype: str = "auto") -> Recogniser:
    """Train a recogniser from new weights. The same config, device and thread count give the same result."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = Recogniser(config.width).to(device, memory_format=torch.channels_last).train()
    samples = [sample(i, SIZE, config.seed, "all") for i in trange(config.scenes, desc="recogniser: scenes", disable=None)]
    images, wanted = np.stack([it.image for it in samples]), labels(it.scene for it in samples)
    rng, noise = np.random.default_rng(config.seed), Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.2)
    order = np.concatenate([rng.permutation(config.scenes)
                            for _ in range(-(-config.steps * config.batch_size // config.scenes))])
    bar = trange(config.steps, desc="recogniser: training", disable=None)
    for step in bar:
        chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
        pixels = degrade(to_pixels(move(images[chosen], config.shift, rng)), config, noise).to(device)
        with autocast(device, dtype):
            logits = net(pixels)
        parts = zip(split(logits), wanted[chosen].to(device).T)
        loss = sum(F.cross_entropy(part, target, label_smoothing=0.05) for part, target in parts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- the cache


def cache_folder() -> Path:
    return Path(os.environ.get("TINYLDM_CACHE") or Path.home() / ".cache" / "tinyldm")


@lru_cache
def toyworld_digest() -> str:
    """Hash of a few hundred drawn scenes: it changes with toyworld's tables, shapes, colours and drawing."""
    digest = hashlib.sha256(json.dumps(WORDS).encode())
    for i in range(300):
        digest.update(sample(i, 32, split="all").image.tobytes())
    return digest.hexdigest()


def fingerprint(config: RecogniserConfig) -> str:
    """Hash of everything that decides a recogniser's weights: toyworld, the config, this file, and that of the network."""
    facts = json.dumps([toyworld_digest(), asdict(config)]).encode()
    return hashlib.sha256(b"".join([facts, *(Path(file).read_bytes() for file in (__file__, recogniser.__file__))])).hexdigest()


def save(file: Path, net: Recogniser, config: RecogniserConfig) -> None:
    """Write the weights, with fingerprint and config in the file's header, whole or not at all. OSError where that fails."""
    metadata = {"fingerprint": fingerprint(config), "config": json.dumps(asdict(config))}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".writing-{os.getpid()}-{file.name}")         # a name of its own: two evaluations may finish at once
    try:
        write_weights(partial, {name: tensor.contiguous() for name, tensor in net.state_dict().items()}, metadata)
        flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def load(file: Path, config: RecogniserConfig) -> Recogniser | None:
    """The recogniser in a file; None where there is no file, it is damaged, or its fingerprint is another one."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("fingerprint") != fingerprint(config):
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError):
        return None
    net = Recogniser(config.width)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def get_recogniser(device: torch.device | str = "cpu", config: RecogniserConfig = RecogniserConfig()) -> Recogniser:
    """Load the recogniser from the cache; where there is none that fits, train one and put it there."""
    file = cache_folder() / "recogniser.safetensors"
    if (net := load(file, config)) is None:
        if file.exists():
            print(f"{file} is damaged or of another version of tinyldm: training the recogniser again", file=sys.stderr)
        net = train(config, device)
        try:
            save(file, net, config)
        except OSError as error:
            print(f"warning: the recogniser is not kept for next time: {error}; set TINYLDM_CACHE to a writable folder",
                  file=sys.stderr)
    return net.to(device)


# ---------------------------------------------------------------- counting


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of right / count, 95 % by default (E. B. Wilson, 1927, J. Am. Stat. Assoc. 22)."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} right of {count}: count at least one, and no more right than there are")
    centre, half_width = right + z * z / 2, z * (right * (count - right) / count + z * z / 4) ** 0.5    # times (count + z²)
    return (centre - half_width) / (count + z * z), (centre + half_width) / (count + z * z)


def score(wanted: Iterable, read: Iterable[Reading]) -> dict[str, dict]:
    """Scenes and what was read from their pictures -> {"subject", "colour", "background", "all"}, each {right, count, share,
    interval}; "all": all three words are right."""
    same = [[getattr(scene, name) == getattr(reading, name) for name in WORDS]
            for scene, reading in zip(wanted, read, strict=True)]
    columns: Mapping[str, list[bool]] = dict(zip(WORDS, zip(*same))) | {"all": [all(row) for row in same]}
    return {name: {"right": sum(hits), "count": len(hits), "share": sum(hits) / len(hits),
                   "interval": wilson(sum(hits), len(hits))} for name, hits in columns.items()}
