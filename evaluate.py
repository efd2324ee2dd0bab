"""Measure a trained model.

    python evaluate.py runs/tiny                             prompt accuracy, on 500 pictures
    python evaluate.py runs/tiny --count 2000 --cfg 2        more pictures, another guidance scale

prompts: does the picture show what the caption names? For models trained on toyworld. Half of the captions name
pairs of colour and subject that training saw, half the pairs it never did; a small network that learned from drawn
scenes (tinyldm/evaluation/recogniser.py) reads subject, colour and background from each picture. Its own errors are
measured beside the model's: on drawn scenes, and on drawn scenes that went through the model's VAE, which is the
best that the model can reach. Numbers and a sheet of failures go to RUN/evaluation/ (or --out).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tinyldm.cli import Parser, fail, guard
from tinyldm.lookup import lookup

METRICS = {"prompts": "share of pictures that show the caption's subject, colour and background"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run or model folder")
    add("--metric", default="prompts", metavar="NAME", help="; ".join(f"{name}: {text}" for name, text in METRICS.items()))
    add("--count", type=int, default=500, metavar="N", help="pictures, half of them of pairs never trained on (default: 500)")
    add("--cfg", type=float, metavar="W", help="guidance scale, 1 is none (default: the model's)")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, euler, heun, dpmpp_2m (default: the model's)")
    add("--schedule", metavar="NAME", help="karras, trailing, leading, linspace, ... (default: the model's)")
    add("--batch-size", type=int, default=50, metavar="B", help="pictures drawn at once")
    add("--seed", type=int, default=0, metavar="S", help="seed of the first picture; the next has S + 1")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", metavar="NAME", help="autocast: auto (bf16 where the device computes it natively), bf16, fp32")
    add("--out", metavar="FOLDER", help="(default: RUN/evaluation)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    args = parser.parse_args(argv)
    for name, least in (("count", 2), ("batch_size", 1), ("seed", 0), ("steps", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    try:
        lookup(METRICS, args.metric, "metric")
        lookup(dict.fromkeys(("auto", "bf16", "fp32")), args.dtype, "dtype")
        lookup(dict.fromkeys(("auto", "cpu", "cuda", "mps")), args.device.partition(":")[0], "device")
    except ValueError as error:
        fail(str(error))
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    ARGS = parse()

import time
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tinyldm.data.toyworld import BACKGROUNDS, PAIRS, Scene, sample
from tinyldm.device import autocast, pick_device
from tinyldm.evaluation.recogniser import UNCLEAR, WORDS, Reading, Recogniser, get_recogniser, score
from tinyldm.folders.load import load_model
from tinyldm.model import Model
from tinyldm.pictures.pixels import to_bytes, to_pixels
from tinyldm.pictures.sheet import INK, RED, captioned
from tinyldm.pipeline import Settings, draw, settings
from tinyldm.training.run_folder import find_model

SPLITS = {"train": "trained pairs", "held_out": "held-out pairs"}


class Wish(NamedTuple):
    """A caption, and what the picture of it should show."""

    prompt: str
    scene: Scene


def make_wishes(count: int, split: str, seed: int = 0) -> list[Wish]:
    """`count` captions over the pairs of a split, shuffled; each round over all pairs moves on by one background.

    So n pairs take n captions to cover and 5 n with every background. Worded as toyworld's captions are.
    """
    rng = Random(f"{seed}/{split}/prompts")
    pairs, backgrounds = rng.sample(PAIRS[split], len(PAIRS[split])), rng.sample(list(BACKGROUNDS), len(BACKGROUNDS))
    wishes = []
    for i in range(count):
        turn, place = divmod(i, len(pairs))
        colour, subject = pairs[place]
        background = backgrounds[(turn + place) % len(backgrounds)]
        phrase = rng.choice(BACKGROUNDS[background].phrases)
        article = "an" if colour == "orange" else "a"
        wishes.append(Wish(f"{article} {colour} {subject} {phrase}", Scene(subject, colour, background)))
    return wishes


def resolve(args: argparse.Namespace, model: Model) -> Settings:
    """How to draw: as typed, else by the model's own defaults. Refuses what cannot work before any work is done."""
    if model.defaults.get("data") != "toyworld":
        raise ValueError(f"{args.run} was trained on {model.defaults.get('data', 'something else')}: metric 'prompts' reads "
                         "toyworld's pictures only; use a run trained with --data toyworld")
    return settings(model, sampler=args.sampler, schedule=args.schedule, steps=args.steps, cfg=args.cfg)


def draw_all(args: argparse.Namespace, model: Model, how: Settings, prompts: list[str], device: torch.device) -> np.ndarray:
    """One picture per prompt, picture i from seed + i: uint8 [n, h, w, 3]."""
    images = []
    with tqdm(total=len(prompts), unit="picture", disable=None) as bar, autocast(device, args.dtype):
        for start in range(0, len(prompts), args.batch_size):
            some = prompts[start : start + args.batch_size]
            seeds = range(args.seed + start, args.seed + start + len(some))
            images.append(draw(model, some, seeds, how))
            bar.update(len(some))
    return np.concatenate(images)


@torch.no_grad()
def through_vae(model: Model, images: np.ndarray, device: torch.device, batch_size: int) -> np.ndarray:
    """Encoded and decoded again: uint8 [n, h, w, 3] -> the same."""
    return np.concatenate([to_bytes(model.vae.decode(model.vae.encode(to_pixels(images[i : i + batch_size]).to(device)).mean))
                           for i in range(0, len(images), batch_size)])


def judge_the_judge(model: Model, recogniser: Recogniser, args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """The recogniser on scenes it has not seen, as drawn and as the model's VAE gives them back."""
    size = model.defaults.get("resolution") or model.vae.config.sample_size
    unseen = [sample(i, size, seed=2**32, split="all") for i in range(1000)]
    images, scenes = np.stack([it.image for it in unseen]), [it.scene for it in unseen]
    return {"drawn scenes": score(scenes, recogniser.read(images)),
            "  after the VAE": score(scenes, recogniser.read(through_vae(model, images, device, args.batch_size)))}


def table(rows: dict[str, dict]) -> str:
    """Shares in per cent, one line per set of pictures, with the 95 % interval of the last column."""
    lines = [f"{'correct, %':16}{'pictures':>9}" + "".join(f"{name:>12}" for name in (*WORDS, "all")) + "   95 % interval"]
    for name, row in rows.items():
        low, high = row["all"]["interval"]
        shares = "".join(f"{row[column]['share'] * 100:12.1f}" for column in (*WORDS, "all"))
        lines.append(f"{name:16}{row['all']['count']:>9}{shares}{low * 100:10.1f} to {high * 100:.1f}")
    return "\n".join(lines)


def right(wish: Wish, reading: Reading) -> bool:
    return all(getattr(wish.scene, name) == getattr(reading, name) for name in WORDS)


def failure_sheet(failures: list[tuple[np.ndarray, Wish, Reading]], columns: int = 6, side: int = 192) -> Image.Image:
    """The pictures in a grid, each over its prompt and, in red, what was read instead (?: unclear)."""
    lines = [[(wish.prompt, INK), (f"read: {read.colour} {read.subject}, {read.background}".replace(UNCLEAR, "?"), RED)]
             for _, wish, read in failures]
    return captioned([image for image, _, _ in failures], lines, columns, side)


def main() -> None:
    args = ARGS
    device = pick_device(args.device)
    path = find_model(args.run)
    model = load_model(path, device, ema=not args.no_ema)
    how = resolve(args, model)
    out = Path(args.out) if args.out else Path(args.run) / "evaluation"
    out.mkdir(parents=True, exist_ok=True)

    recogniser = get_recogniser(device)
    judged = judge_the_judge(model, recogniser, args, device)
    wishes = {"train": make_wishes(args.count - args.count // 2, "train", args.seed),
              "held_out": make_wishes(args.count // 2, "held_out", args.seed)}
    asked = [(split, wish) for split, some in wishes.items() for wish in some]
    begun = time.perf_counter()
    images = draw_all(args, model, how, [wish.prompt for _, wish in asked], device)
    seconds = time.perf_counter() - begun
    readings = recogniser.read(images)

    answers = list(zip(images, asked, readings))
    scores = {title: score([wish.scene for wish in wishes[split]], [read for _, (own, _), read in answers if own == split])
              for split, title in SPLITS.items()}
    print(f"{path}: {how.sampler}, {how.steps} steps, cfg {how.cfg:g}; {len(images)} pictures in {seconds:.0f} s\n")
    print(table(judged | scores) + "\n")

    failures = {split: [(image, wish, read) for image, (own, wish), read in answers if own == split and not right(wish, read)]
                for split in SPLITS}
    if shown := failures["train"][:18] + failures["held_out"][:18]:
        failure_sheet(shown).save(out / "failures.png")
    else:
        (out / "failures.png").unlink(missing_ok=True)
    record = {
        "model": str(path), "seconds": round(seconds, 1), "step": model.defaults.get("step"),
        **{name: getattr(how, name) for name in ("cfg", "steps", "sampler", "schedule")},
        **{name: getattr(args, name) for name in ("seed", "dtype", "no_ema")},
        "recogniser": {name.strip(): row for name, row in judged.items()},
        "scores": {split: scores[title] for split, title in SPLITS.items()},
        "pictures": [{"prompt": wish.prompt, "seed": args.seed + i, "split": split, "right": right(wish, read), **read._asdict()}
                     for i, (_, (split, wish), read) in enumerate(answers)]}
    (out / "prompts.json").write_text(json.dumps(record, indent=1) + "\n")
    print(out / "prompts.json")


if __name__ == "__main__":
    guard(main)
