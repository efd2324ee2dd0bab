"""Flags of sample.py, and what is refused of its command line at once, before torch is loaded."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from tinyldm.cli import (LARGEST, add_offload_flag, add_quantize_flag, caption, check_guidance, check_offload, check_scale, check_seed,
                         check_shortcuts, check_steps, fail)

PICTURES = (".png", ".webp", ".gif", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".mp4", ".webm", ".mov")

GREEDY = ("parts", "preview", "offload", "invert", "interpolate")      # flags that take a caption behind them for their value


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is drawn with."""
    add = parser.add_argument
    add("--model", metavar="FOLDER|ID|FILE", help="run or model folder, hub id, or .safetensors/.ckpt (default: the run "
        "that finished last under runs/)")
    add("--revision", metavar="NAME", help="hub id: branch, tag or commit")
    add("--variant", metavar="NAME", help="weights files of a published folder, such as fp16 (default: full precision)")
    add("--tokenizer", action="append", metavar="FOLDER|ID", help="for a single-file checkpoint, which holds none (default: CLIP's and "
        "T5's, from the hub); once for each text encoder, or a model folder")
    add("--parts", nargs="+", metavar="SOURCE", help="for a single file without text encoders or VAE: files, folders or hub ids of these")
    add("--without-t5", action="store_true", help="Stable Diffusion 3: leave out its third text encoder, which takes 9.5 GB in bf16")
    add("--prediction", metavar="NAME", help="for a single file that does not say it: eps or v (default: v for Stable "
        "Diffusion 2, eps for 1)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")


def add_guidance_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change how guidance works; its scale is among those of all scripts that draw."""
    add = parser.add_argument
    add("--skip-layers", type=int, nargs="+", metavar="N", help="also steer away from what the network draws without these layers: "
        "7 8 9 for Stable Diffusion 3.5 medium")
    add("--skip-scale", type=float, metavar="W", help="with --skip-layers (default: 2.8)")
    add("--skip-interval", type=float, nargs=2, metavar=("START", "STOP"), help="with --skip-layers: fractions of the steps "
        "(default: 0.01 0.2)")


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which pictures are drawn."""
    add = parser.add_argument
    add("prompt", nargs="*", type=caption, help="one or several captions")
    add("--prompt", dest="more_prompts", nargs="+", type=caption, metavar="TEXT", help="captions too, for who is used to name them so")
    add("--from-file", metavar="FILE", help="captions from a text file in UTF-8, one per line")
    add("--negative-prompt", type=caption, metavar="TEXT", help="what to steer away from (default: the empty caption; of Stable "
        "Diffusion XL zeros, which are something else)")


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of one picture: seed, size, and the picture that it begins from."""
    add = parser.add_argument
    add("--prompt-weights", action="store_true", help="(x) [x] (x:1.3) change the weight of x, also in --negative-prompt")
    add("--original-size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="Stable Diffusion XL: size of the picture as it was "
        "found, which the network is told (default: that of the picture to draw)")
    add("--crop", type=int, nargs=2, metavar=("LEFT", "TOP"), help="Stable Diffusion XL: what was cut off of it (default: 0 0, nothing)")
    add("--eta", type=float, metavar="E", help="ddim: fraction of fresh noise, 0 to 1")
    add("--seed", type=int, default=0, metavar="S", help="first seed; -1 picks one (printed and stored)")
    add("-n", "--num-images", type=int, default=1, metavar="N", help="pictures per caption")
    add("--batch-size", type=int, default=16, metavar="B", help="pictures drawn at once")
    add("--width", type=int, default=0, metavar="PX", help="(default: the model's)")
    add("--height", type=int, default=0, metavar="PX", help="(default: the model's)")
    add("--init-image", metavar="FILE", help="a picture to start from instead of noise")
    add("--strength", type=float, metavar="S", help="how much of it may change, 0 to 1 (default: 0.75; with a mask 1)")
    add("--mask", metavar="FILE", help="with --init-image: draw where this picture is white, keep the rest; of one that is transparent "
        "somewhere, draw where it is opaque, whatever its colours")
    add("--invert", nargs="?", const="", type=caption, metavar="CAPTION", help="with --init-image: start from its own noise, found by "
        "inversion; CAPTION describes the picture (default: the prompt, which at --cfg 1 draws it again)")
    add("--interpolate", nargs="?", const="", metavar="SEED2", help="an animation from --seed to SEED2 (default: the same seed) "
        "and, of two captions, from the first to the second")
    add("--frames", type=int, metavar="N", help="with --interpolate (default: 16)")
    add("--preview", nargs="?", const="", metavar="TAESD", help="write preview.png while drawing: coarse colours, or with this tiny "
        "autoencoder (folder or hub id; taesd: the published one for the model's latents)")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where pictures go, and what they are computed with."""
    add = parser.add_argument
    add("--out", "--outdir", default="samples", metavar="PATH", help="a folder, or a .png file (default: samples/); an animation "
        "may be .webp or .gif")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (or cuda:1, ...), mps")
    add_offload_flag(parser), add_quantize_flag(parser)
    add("--dtype", default="auto", metavar="NAME", help="of weights and arithmetic: auto (bf16 on CUDA), bf16 (bfloat16), fp16 "
        "(float16), fp32 (float32)")
    add("--map-weights", action="store_true", help="on a CPU, weights that are stored in the wanted dtype stay in the mapped file: nothing "
        "is copied, and what is not used is not read; do not overwrite the file meanwhile")
    add("--dry-run", action="store_true", help="say what drawing will take, and stop: memory, FLOPs, bytes to read; reads no weights")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")


def check(args: argparse.Namespace) -> None:
    """Refuse wrong arguments of sample.py, and fill in defaults that depend on others."""
    if not args.prompt:
        greedy = next((name for name in GREEDY if getattr(args, name)), None)
        fail('no prompt: python sample.py "a red fox"' + (f" --{greedy} ...: captions come before --{greedy}" if greedy else ""))
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", -1)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if found := next(filter(None, (re.search(r"<lora:([^:>]+)(:[\d.]+)?[^>]*>", prompt) for prompt in args.prompt)), None):
        fail(f"{found[0]} in a caption would be read as words: name the adapter's file with --lora {found[1]}.safetensors{found[2] or ''}")
    if args.eta is not None and not 0 <= args.eta <= 1:
        fail(f"--eta {args.eta} must lie between 0 and 1")
    if args.strength is not None and not 0 < args.strength <= 1:
        fail(f"--strength {args.strength} must lie above 0 and at most at 1")
    for name in ("mask", "strength", "invert"):
        if getattr(args, name) is not None and not args.init_image:
            fail(f"--{name} needs a picture to change: --init-image FILE")
    if args.skip_layers is None and (args.skip_scale is not None or args.skip_interval):
        fail(f"--skip-{'interval' if args.skip_interval else 'scale'} needs the layers to skip: --skip-layers 7 8 9 for Stable Diffusion "
             "3.5 medium")
    for name, sizes, least in (("width", [args.width], 0), ("height", [args.height], 0), ("original-size", args.original_size, 1),
                               ("crop", args.crop, 0)):
        if odd := [size for size in sizes or () if not least <= size <= LARGEST]:
            fail(f"--{name} {odd[0]} must lie between {least} and {LARGEST}, in pixels")
    if args.skip_interval and not 0 <= args.skip_interval[0] < args.skip_interval[1] <= 1:
        fail("--skip-interval must be two rising fractions of the steps, such as 0.01 0.2")
    if args.compile and args.offload == "blocks":
        fail("--compile takes all weights of the network at once: use --offload parts with it")
    if args.quantize and args.dry_run:
        fail("--dry-run plans with the weights as they are: leave out --quantize, which takes half of bf16's bytes for them")
    if args.dry_run and (args.deep_cache or args.first_block_cache is not None):
        fail("--dry-run counts full calls of the network: leave out --deep-cache and --first-block-cache")
    if args.autoguidance and (args.offload or args.dry_run or args.negative_prompt):
        odd = next(name for name in ("offload", "dry_run", "negative_prompt") if getattr(args, name)).replace("_", "-")
        fail(f"--autoguidance steers away from a second model, which --{odd} has no part in: leave one of them out")
    if args.invert is not None and (args.mask or args.eta or args.interpolate is not None):
        fail("--invert starts from the picture's own noise: leave out --mask, --eta and --interpolate")
    check_interpolation(args)
    try:
        check_scale(args.cfg, "--cfg"), check_scale(args.true_cfg, "--true-cfg")
        check_scale(args.skip_scale, "--skip-scale", "2.8 is usual")
        check_offload(args.offload, "the caption"), check_steps(args.steps)
        check_seed(args.seed), check_shortcuts(args), check_guidance(args)
        check_seed(int(args.interpolate or 0), "--interpolate")
    except ValueError as error:
        fail(str(error))
    endings = (".png",) if args.interpolate is None else (".png", ".webp", ".gif")
    if (is_file_name(args.out) or os.path.isfile(args.out)) and Path(args.out).suffix.lower() not in endings:
        fail(f"--out {args.out}: name a folder, or a file that ends in {', '.join(endings)}")
    if args.strength is None:
        args.strength = 1.0 if args.mask else 0.75


def is_file_name(out: str) -> bool:
    """Whether --out names a file: it ends as one of a picture or film does, and no folder of this name exists. Any other name is
    a folder's, with dots too: sd1.5."""
    return Path(out).suffix.lower() in PICTURES and not out.endswith(("/", os.sep)) and not os.path.isdir(out)


def check_interpolation(args: argparse.Namespace) -> None:
    """Refuse wrong values of --interpolate and --frames, and fill in the default of --frames."""
    if args.interpolate is None:
        if args.frames is not None:
            fail(f"--frames {args.frames} needs --interpolate SEED2")
        return
    args.frames = 16 if args.frames is None else args.frames
    if args.interpolate and not args.interpolate.isdecimal():
        fail(f"--interpolate {args.interpolate} must be a seed, 0 or more; captions come before it")
    if args.frames < 2:
        fail(f"--frames {args.frames} must be at least 2")
    if len(args.prompt) > 2 or args.num_images > 1:
        fail(f"--interpolate goes from one picture to one other: give one caption or two, not {len(args.prompt)}, and no -n")
    if len(args.prompt) == 1 and args.interpolate in ("", str(args.seed)):
        fail("--interpolate has nowhere to go: give a second caption, or another seed, --interpolate SEED2")
