"""Draw pictures from captions.

    python sample.py "a red fox" --cfg 7.5                   with the run that finished last under runs/
    python sample.py "a red fox" "a blue boat at sea" -n 4   four pictures of each, and a grid of all
    python sample.py "a red fox" --model runs/tiny --seed 7 --steps 30 --sampler heun --out fox.png

Image i of a prompt is drawn from seed + i alone, whatever the batch size. PNGs carry what it takes to draw them again.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

from tinyldm.cli import Parser, fail, guard


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or several captions")
    add("--from-file", metavar="FILE", help="captions from a text file, one per line")
    add("--negative-prompt", default="", metavar="TEXT", help="what to steer away from (default: the empty caption)")
    add("--model", metavar="FOLDER", help="run or model folder (default: the run that finished last under runs/)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    add("--cfg", "--guidance-scale", "--scale", type=float, metavar="W", help="guidance scale, 1 is none (default: the model's)")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, euler, heun, dpmpp_2m (default: the model's)")
    add("--schedule", default="normal", metavar="NAME", help="normal, karras, trailing, leading, linspace, ...")
    add("--eta", type=float, metavar="E", help="ddim: share of fresh noise, 0 to 1")
    add("--seed", type=int, default=0, metavar="S", help="first seed; -1 picks one (printed and stored)")
    add("-n", "--num-images", type=int, default=1, metavar="N", help="pictures per caption")
    add("--batch-size", type=int, default=16, metavar="B", help="pictures drawn at once")
    add("--width", type=int, default=0, metavar="PX", help="(default: the model's)")
    add("--height", type=int, default=0, metavar="PX", help="(default: the model's)")
    add("--out", "--outdir", default="samples", metavar="PATH", help="a folder, or a .png file (default: samples/)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", metavar="NAME", help="autocast: auto (bf16 on GPUs), bf16, fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    args = parser.parse_args(argv)
    if args.from_file:
        try:
            lines = Path(args.from_file).read_text("utf-8").splitlines()
        except OSError as error:
            fail(f"--from-file {args.from_file}: {error.strerror}")
        args.prompt += [line.strip() for line in lines if line.strip()]
    if not args.prompt:
        fail('no prompt: python sample.py "a red fox"')
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", -1), ("width", 0), ("height", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.seed >= 2**62:
        fail(f"--seed {args.seed} must be below 2^62")
    if args.eta is not None and not 0 <= args.eta <= 1:
        fail(f"--eta {args.eta} must lie between 0 and 1")
    if Path(args.out).suffix.lower() not in ("", ".png"):
        fail(f"--out {args.out}: pictures are written as .png; name such a file, or a folder")
    if args.seed == -1:
        args.seed = random.SystemRandom().randrange(2**31)
        print(f"seed {args.seed}")
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    ARGS = parse()

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from tinyldm.device import autocast, pick_device
from tinyldm.diffusion.samplers import SAMPLERS, find_sampler
from tinyldm.pipeline import draw, find_model
from tinyldm.sheet import tile
from tinyldm.vendor_loaders.folder import Model, load_model


def resolve(args: argparse.Namespace, model: Model) -> None:
    """Fill what was not typed from the model's own defaults; 'dpmpp_2m_karras' names sampler and schedule at once."""
    for name, default in (("cfg", 4.0), ("steps", 20), ("sampler", "dpmpp_2m")):
        if getattr(args, name) is None:
            setattr(args, name, model.defaults.get(name, default))
    spelled = re.sub(r"[ _-]karras$", "", args.sampler.strip(), flags=re.IGNORECASE)
    if spelled != args.sampler.strip():
        args.sampler, args.schedule = spelled, "karras"
    if args.eta is not None and find_sampler(args.sampler) is not SAMPLERS["ddim"]:
        raise ValueError(f"--eta belongs to --sampler ddim, not to {args.sampler}")
    find_sampler(args.sampler)
    own = model.defaults.get("resolution") or model.vae.config.sample_size
    args.width, args.height = args.width or own, args.height or own
    for prompt in [*args.prompt, args.negative_prompt]:
        if cut := model.tokenizer.cut(prompt):
            print(f"warning: the model reads {model.tokenizer.context_length} tokens; left out: \"{cut}\"", file=sys.stderr)


def metadata(args: argparse.Namespace, prompt: str, seed: int, name: str) -> PngInfo:
    """The settings as AUTOMATIC1111's `parameters` text, which other tools read back."""
    sampler = args.sampler + (f" {args.schedule.capitalize()}" if args.schedule != "normal" else "")
    facts = {"Steps": args.steps, "Sampler": sampler, "CFG scale": args.cfg, "Seed": seed,
             "Size": f"{args.width}x{args.height}", "Model": name, "RNG": "CPU",
             **({"Eta": args.eta} if args.eta is not None else {})}
    lines = [prompt, *([f"Negative prompt: {args.negative_prompt}"] if args.negative_prompt else []),
             ", ".join(f"{key}: {value}" for key, value in facts.items())]
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def free_name(folder: Path, prompt: str, seed: int) -> Path:
    """The next numbered file: 0003-42-a-red-fox.png."""
    taken = [int(file.name[:4]) for file in folder.glob("[0-9][0-9][0-9][0-9]-*.png")]
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return folder / f"{max(taken, default=0) + 1:04d}-{seed}-{slug}.png"


def main() -> None:
    args = ARGS
    device = pick_device(args.device)
    path = find_model(args.model)
    model = load_model(path, device, ema=not args.no_ema)
    resolve(args, model)
    if args.compile:
        model.net.compile()
    out = Path(args.out)
    single = out.suffix.lower() == ".png"
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)

    jobs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.num_images)]
    dtype = "fp32" if args.dtype == "auto" and device.type == "cpu" else args.dtype    # exact where speed allows
    images = []
    with tqdm(total=len(jobs) * args.steps, unit="step", disable=None) as bar, autocast(device, dtype):
        for start in range(0, len(jobs), args.batch_size):
            prompts, seeds = zip(*jobs[start : start + args.batch_size])
            images.extend(draw(
                model, prompts, seeds, negative=args.negative_prompt, cfg=args.cfg, steps=args.steps, eta=args.eta,
                sampler=args.sampler, schedule=args.schedule, width=args.width, height=args.height, on_step=bar.update))
    name = str(model.defaults.get("preset", path))
    files = []
    for (prompt, seed), image in zip(jobs, images):
        if not single or len(jobs) == 1:
            files.append(out if single else free_name(out, prompt, seed))
            Image.fromarray(image).save(files[-1], pnginfo=metadata(args, prompt, seed, name))
    if len(jobs) > 1:
        files.append(out if single else free_name(out, "grid", args.seed))
        sheet = tile(np.stack(images), columns=args.num_images if args.num_images > 1 else 0)
        Image.fromarray(sheet).save(files[-1], pnginfo=metadata(args, " | ".join(args.prompt), args.seed, name))
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    guard(main)
