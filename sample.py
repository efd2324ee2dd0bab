"""Draw pictures from captions.

    python sample.py "a red fox" --cfg 7.5                   with the run that finished last under runs/
    python sample.py "a red fox" "a blue boat at sea" -n 4   four pictures of each, and a grid of all
    python sample.py "a red fox" --model runs/tiny --seed 7 --steps 30 --sampler heun --out fox.png
    python sample.py "a red fox" --model stable-diffusion-v1-5/stable-diffusion-v1-5       a hub id, a folder, or a file
    python sample.py "a blue fox" --init-image fox.png --strength 0.6                      start from a picture
    python sample.py "a red hat" --init-image fox.png --mask hat.png                       draw where the mask is white
    python sample.py "a blue fox" --init-image fox.png --invert "a red fox"                keep the rest, by DDIM inversion
    python sample.py "a red fox" "a blue boat" --interpolate 5 --frames 24                 an animation, and its frames
    python sample.py "a (red:1.4) fox [on grass]" --prompt-weights                         AUTOMATIC1111's parentheses

Image i of a prompt is drawn from seed + i alone, whatever the batch size. PNGs carry what it takes to draw them again.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from tinyldm.cli import Parser, add_drawing_flags, begin, check_guided, fail, guard, outlive_terminal
from tinyldm.config.adapter_arguments import add_adapter_flags
from tinyldm.config.sample_arguments import (add_caption_flags, add_guidance_flags, add_model_flags, add_output_flags, add_picture_flags,
                                             check, is_file_name)
from tinyldm.unicode import read_lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_caption_flags(parser)
    add_model_flags(parser)
    add_adapter_flags(parser)
    add_drawing_flags(parser)
    add_guidance_flags(parser)
    add_picture_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    args.prompt += args.more_prompts or []
    if args.from_file:
        try:
            args.prompt += [line.strip() for line in read_lines(args.from_file) if line.strip()]
        except (OSError, ValueError) as error:
            fail(f"--from-file {args.from_file}: {error.strerror}" if isinstance(error, OSError) else f"--from-file {error}")
    check(args)
    if args.seed == -1:
        args.seed = random.SystemRandom().randrange(2**31)
        print(f"seed {args.seed}")
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    ARGS = parse()

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.cpu_layouts import lay_out
from tinyldm.data import decoding
from tinyldm.device import pick_device, pick_dtype
from tinyldm.diffusion.guidance import SkipLayers
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.files import make_output_folder
from tinyldm.folders.hub import is_hub_id
from tinyldm.folders.load import load_model, load_vae
from tinyldm.folders.weights import mapped_weights
from tinyldm.lookup import DTYPE_NAMES, lookup
from tinyldm.model import NON_EMA, Model, architecture, compile_blocks
from tinyldm.offload import place_for_weights
from tinyldm.pictures.animation import even_fractions, write_animation
from tinyldm.pictures.metadata import parameters
from tinyldm.pictures.output import Output
from tinyldm.pictures.pixels import to_bytes, to_pixels, write_picture
from tinyldm.pictures.sheet import tile
from tinyldm.pipeline import (Canvas, DrawSettings, Morph, PromptFeatures, all_captions, check_size, decode, draw, draw_settings,
                              picture_size, steps_needed)
from tinyldm.planning.drawing import Order, bytes_on_disk, check_memory, offload_to_fit, plan_drawing, render
from tinyldm.quantized import store_weights
from tinyldm.shortcuts import SHORTCUTS
from tinyldm.text.prompt_weights import plain
from tinyldm.text.words import unknown, words_of
from tinyldm.training.learned import apply_learned, learned_facts, load_worse
from tinyldm.training.portable import model_name, portable
from tinyldm.training.run_folder import find_model
from tinyldm.vendor_loaders import latent_rgb
from tinyldm.version import version


def open_model(args: argparse.Namespace) -> tuple[Model, str | Path]:
    """The model, and its source. With --offload its weights are in the host's memory, for --dry-run it has none."""
    device = pick_device(args.device)
    source = find_model(args.model)
    if args.revision:
        if not is_hub_id(source):
            raise ValueError(f"--revision {args.revision} is for a hub id, {source} is a path: leave it out")
        source = f"{source}@{args.revision}"
    if args.prediction:
        lookup(PREDICTIONS, args.prediction, "--prediction")
    if args.map_weights and (device.type != "cpu" or args.offload):
        raise ValueError("--map-weights is for networks that stay in the host's memory: leave it out, or add --device cpu")
    with place_for_weights(device, args.offload) as place, mapped_weights(args.map_weights):
        model = load_model(source, "meta" if args.dry_run else place, pick_dtype(args.dtype, device), not args.no_ema, args.variant,
                           args.tokenizer, args.prediction, args.parts or (), {"text_encoder_3"} if args.without_t5 else ())
    captions = [*args.prompt, args.negative_prompt or "", args.invert or ""]
    learned = apply_learned(model, args, captions)
    if args.quantize:
        with place_for_weights(device, args.offload):
            store_weights(model, args.quantize)
    for prompt in captions:
        for part, length, cut in model.text.truncated(plain(prompt) if args.prompt_weights else prompt):
            who = "the model" if len(model.text.modules) == 1 else f"its encoder {part}"
            print(f'warning: {who} reads {length} tokens; left out: "{cut}"', file=sys.stderr)
    words = model.defaults.get("words", [])
    if odd := unknown(map(plain, [*args.prompt, args.negative_prompt or ""]), words and [*words, *words_of(learned)]):
        print(f"warning: no caption of the training held {', '.join(odd)}; it held {', '.join(words[:150])}", file=sys.stderr)
    return model, source


def order(args: argparse.Namespace, settings: DrawSettings) -> Order:
    """What is asked for, to plan it. (The size of --init-image is not looked at: pictures drawn from it have about the model's.)"""
    at_once = min(args.batch_size, args.frames or len(args.prompt) * args.num_images)
    return Order(settings, [args.negative_prompt or "", *args.prompt], at_once, args.width, args.height,
                 args.strength if args.init_image else 1.0, args.invert is not None)


def resolve(args: argparse.Namespace, model: Model) -> DrawSettings:
    """The settings for drawing: from the flags, else the model's own defaults."""
    extras, sizes = architecture(model.net).extras(model.net.config), None
    found = draw_settings(model, sampler=args.sampler, schedule=args.schedule, steps=args.steps, cfg=args.cfg, true_cfg=args.true_cfg,
                          guidance=args.guidance, worse=load_worse(args.autoguidance, model, not args.no_ema),
                          shortcuts={name: getattr(args, name) for name in SHORTCUTS})
    if args.eta is not None and found.sampler != "ddim":
        raise ValueError(f"--eta belongs to --sampler ddim, not to {found.sampler}")
    if found.steps < (least := steps_needed(found.sampler, model.process)):
        print(f"warning: {found.sampler} needs about {least} steps on this model's process, and draws noise or worse with {found.steps}: "
              f"--steps {least}, or --sampler dpmpp_2m", file=sys.stderr)
    flag = "--true-cfg" if "guidance" in extras else "--cfg"
    if not found.guided and args.negative_prompt:
        raise ValueError(f"--negative-prompt has no effect at {flag} {found.cfg:g}: use {flag} above 1, or leave it out")
    check_guided(args, found.guided, flag)
    if args.original_size or args.crop:
        if "sizes" not in extras:
            raise ValueError(f"--{'crop' if args.crop else 'original-size'} is for networks that are told sizes (Stable Diffusion XL)")
        width, height = args.original_size or picture_size(model, args.width, args.height)
        sizes = (height, width, *reversed(args.crop or (0, 0)))
    return found._replace(rescale=args.guidance_rescale, interval=args.guidance_interval,
                          weighted=args.prompt_weights, sizes=sizes, skip=None if args.skip_layers is None else choose_layers(args, model))


def choose_layers(args: argparse.Namespace, model: Model) -> SkipLayers:
    """The settings of skip-layer guidance. ValueError where the network has no such layers."""
    if "skip_layers" not in inspect.signature(model.net.forward).parameters:
        raise ValueError("--skip-layers is for Stable Diffusion 3 and 3.5: this model's network cannot be run without some of its layers")
    count = model.net.config.layers
    if odd := [layer for layer in args.skip_layers if not 0 <= layer < count]:
        raise ValueError(f"--skip-layers {odd[0]}: the network has layers 0 to {count - 1}")
    given = {"scale": args.skip_scale, **dict(zip(("start", "stop"), args.skip_interval or ()))}
    return SkipLayers(tuple(args.skip_layers), **{name: value for name, value in given.items() if value is not None})


def open_picture(file: str) -> tuple[bytes, int, int]:
    """The bytes of a picture file, its width and its height, upright. ValueError where it is not one that can be read."""
    try:
        data = Path(file).read_bytes()
        return data, *decoding.upright_size(data)
    except (OSError, decoding.Unusable) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or f'it is not a picture that can be read ({error})'}") from error


def open_canvas(args: argparse.Namespace, model: Model) -> Canvas:
    """--init-image and --mask, decoded as training decodes pictures, and fitted to the size to draw: --width and --height, else the
    picture's shape at the model's size."""
    picture, *sides = open_picture(args.init_image)
    scale, multiple = min(picture_size(model)) / min(sides), model.divisor
    width, height = (typed or max(multiple, round(side * scale / multiple) * multiple)
                     for typed, side in zip((args.width, args.height), sides))
    check_size(model, width, height)
    framing, mask = decoding.Framing(min(height, width), ((height, width),)), None
    if args.mask:
        drawn, across, down = open_picture(args.mask)
        if abs(across * sides[1] / (down * sides[0]) - 1) > 0.02:       # crops of the two would not match
            raise ValueError(f"--mask {args.mask} is {across}x{down}, the picture {sides[0]}x{sides[1]}: paint it in the picture's shape")
        mask = torch.from_numpy(decoding.decode_mask(drawn, framing))[None, None] / 255
        if not mask.any():
            raise ValueError(f"--mask {args.mask} has no white in it, or is transparent everywhere: nothing would be drawn")
    return Canvas(to_pixels(decoding.decode(picture, framing)[None]), args.strength, mask, args.invert)


def open_preview(args: argparse.Namespace, model: Model, file: Path) -> Callable[[Tensor], None]:
    """A function that writes the current prediction of the pictures to `file`."""
    if not args.preview:
        pixels = latent_rgb.preview(model.vae)
    else:
        known = latent_rgb.family(model.vae.config)
        if args.preview.lower() == "taesd" and known is None:
            raise ValueError("--preview taesd: no tiny autoencoder is published for this model's latents: name one, or leave its name out")
        try:
            tiny = load_vae(known.taesd if args.preview.lower() == "taesd" else args.preview, model.device)
        except (ValueError, OSError) as error:
            raise ValueError(f"--preview takes the folder or hub id of a tiny autoencoder, or taesd: {error}") from error
        channels = model.vae.config.latent_channels
        if tiny.config.latent_channels != channels:
            raise ValueError(f"--preview {args.preview} has {tiny.config.latent_channels} latent channels, the model {channels}")
        pixels = lambda x0: decode(tiny, x0.float())
    return lambda x0: write_picture(file, tile(to_bytes(pixels(x0))))


def describe(args: argparse.Namespace, settings: DrawSettings, about: dict[str, str], image: np.ndarray, prompt: str, seed: int) -> str:
    """The settings as AUTOMATIC1111's `parameters` text. about: the facts about the model."""
    return parameters(prompt, args.negative_prompt or "", {
        "Steps": settings.steps, "Sampler": settings.sampler, "Schedule type": settings.schedule, "CFG scale": settings.cfg,
        "Seed": seed, "Size": f"{image.shape[1]}x{image.shape[0]}", **about, "RNG": "CPU",
        **({"Eta": args.eta} if args.eta is not None else {}),
        **({"CFG Rescale": settings.rescale} if settings.rescale else {}),
        **({"Guidance interval": "{:g} to {:g}".format(*settings.interval)} if settings.interval else {}),
        **({"Emphasis": "No norm"} if settings.weighted else {}),
        **({"Distilled CFG Scale": settings.told} if settings.told != 1 else {}),
        **({"Told sizes": "{1}x{0}, crop {3},{2}".format(*settings.sizes)} if settings.sizes else {}),
        **({"Skip layers": "{0}, scale {1:g}, steps {2:g} to {3:g}".format(*settings.skip)} if settings.skip else {}),
        **({"Guidance": args.guidance} if args.guidance else {}),
        **({"Autoguidance": portable(args.autoguidance)} if args.autoguidance else {}),
        **({settings.shortcut.kind.label: settings.shortcut} if settings.shortcut else {}),
        **({"Denoising strength": args.strength, "Init image": Path(args.init_image).name} if args.init_image else {}),
        **({"Inverted as": args.invert or prompt} if args.invert is not None else {}),
        **({"Mask": Path(args.mask).name} if args.mask else {}),
        **({"Variation seed": args.interpolate or args.seed, "Frames": args.frames} if args.frames else {})})


def facts_about(args: argparse.Namespace, model: Model, name: str) -> dict[str, str]:
    """All about the model that another picture could come of: which one it is, and how it was loaded."""
    facts = {"Model": name, "Variant": args.variant, "Weights": "raw" if args.no_ema else "", "Prediction": args.prediction,
             "Tokenizer": " ".join(map(portable, args.tokenizer or ())), "Parts": " ".join(map(portable, args.parts or ())),
             "Left out": "T5" if args.without_t5 else "", **learned_facts(args), "Trained with": model.defaults.get("version"),
             "Precision": DTYPE_NAMES[str(next(model.net.parameters()).dtype).partition(".")[2]], "Quantized": args.quantize,
             "Version": f"tinyldm {version()}"}
    return {key: value for key, value in facts.items() if value}


class Inputs(NamedTuple):
    """What pictures are drawn from and with. All that can be wrong with the flags has been found out when it is there."""

    model: Model
    settings: DrawSettings
    canvas: Canvas | None
    show: Callable[[Tensor], None] | None       # writes a preview


def open_inputs(args: argparse.Namespace, model: Model, settings: DrawSettings, preview_file: Path) -> Inputs:
    if not args.init_image:
        check_size(model, *picture_size(model, args.width, args.height))
    canvas = open_canvas(args, model) if args.init_image else None
    return Inputs(model, settings, canvas, open_preview(args, model, preview_file) if args.preview is not None else None)


def draw_all(args: argparse.Namespace, inputs: Inputs, jobs: list[tuple[str, int]], morph: Morph | None = None) -> Iterator[np.ndarray]:
    """Draw one picture per (prompt, seed), in batches -> one by one, uint8 [h, w, 3], as soon as its batch is done. morph:
    interpolate towards another picture."""
    model, settings, canvas, show = inputs
    features = PromptFeatures(model, settings.weighted)
    with tqdm(total=len(jobs) * settings.steps * (1 if args.invert is None else 2), unit="step", disable=None) as bar:
        def on_step(x0: Tensor) -> None:
            bar.update(len(x0))
            if show:
                show(x0)

        for start in range(0, len(jobs), args.batch_size):
            part = slice(start, start + args.batch_size)
            prompts, seeds = zip(*jobs[part])
            if not features.known.keys() >= {*prompts}:
                features.prepare(all_captions(settings, [prompt for prompt, _ in jobs[start:]], args.negative_prompt, canvas, morph))
            turn = morph and morph._replace(fractions=morph.fractions[part])
            yield from draw(model, prompts, seeds, settings, negative=args.negative_prompt, width=args.width, height=args.height,
                            eta=args.eta, canvas=canvas, morph=turn, features=features, on_step=on_step)


def draw_pictures(args: argparse.Namespace, inputs: Inputs, about: dict[str, str], output: Output) -> None:
    """Draw and write one file per caption and seed and, where there are several, one file with a grid of all. Every batch is written
    before the next is drawn, and after an error the grid of what has been drawn."""
    jobs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.num_images)]
    images = []
    try:
        for image, (prompt, seed) in zip(draw_all(args, inputs, jobs), jobs):
            images.append(image)
            if not output.file or len(jobs) == 1:
                output.write(image, describe(args, inputs.settings, about, image, prompt, seed), prompt, seed)
    finally:
        if len(images) > 1:
            text = describe(args, inputs.settings, about, images[0], " | ".join(args.prompt), args.seed)
            output.write(tile(np.stack(images), columns=args.num_images if args.num_images > 1 else 0), text, "grid", args.seed)


def draw_animation(args: argparse.Namespace, inputs: Inputs, about: dict[str, str], output: Output) -> None:
    """Draw and write an animation from one picture to another, and its frames side by side in a .png of the same name: after an
    error only those that have been drawn."""
    jobs = [(args.prompt[0], args.seed)] * args.frames
    morph = Morph(args.prompt[-1], int(args.interpolate or args.seed), even_fractions(args.frames))
    images = []
    try:
        for image in draw_all(args, inputs, jobs, morph):
            images.append(image)
    finally:
        if images:
            text = describe(args, inputs.settings, about, images[0], " | ".join(args.prompt), args.seed)
            output.write(tile(np.stack(images), columns=min(len(images), 12)), text, "-to-".join(args.prompt), args.seed)
    moving = output.written[0].with_suffix(".gif" if Path(args.out).suffix.lower() == ".gif" and output.file else ".webp")
    write_animation(moving, images, text)
    output.written.insert(0, moving)


@torch.inference_mode()
def main() -> None:
    args = ARGS
    model, source = open_model(args)
    settings, name = resolve(args, model), model_name(source)
    if args.dry_run:
        disk = bytes_on_disk(source, model, NON_EMA if args.no_ema else args.variant, args.parts or ())
        return print(render(plan_drawing(model, order(args, settings)), name, disk))
    if args.compile:
        compile_blocks(model.net)               # before offload(), which refuses to move a compiled network by blocks
    if args.offload:
        model = offload_to_fit(model, pick_device(args.device), args.offload, order(args, settings))
    out, still = Path(args.out), args.interpolate is None
    file = (out if still else out.with_suffix(".png")) if is_file_name(args.out) else None
    output = Output(out.parent if file else out, file, [])
    inputs = open_inputs(args, model, settings, output.folder / "preview.png")
    if not args.init_image:
        check_memory(model, order(args, settings), pick_device(args.device))
    make_output_folder(output.folder)
    if model.device.type == "cpu" and not (args.compile or args.offload):
        lay_out(model.net, model.vae)
    try:
        (draw_pictures if still else draw_animation)(args, inputs, facts_about(args, model, name), output)
    finally:
        print(*output.written, sep="\n", end="\n" if output.written else "")
    if settings.shortcut:
        print(settings.shortcut.summary(), file=sys.stderr)


if __name__ == "__main__":
    outlive_terminal()
    guard(main)
