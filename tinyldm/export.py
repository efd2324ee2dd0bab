"""Exports a trained model as a folder or file to publish.

    python -m tinyldm.export runs/tiny my-model/                       a folder that sample.py and diffusers open
    python -m tinyldm.export runs/tiny my-model/ --dtype fp16          half the size
    python -m tinyldm.export runs/mine my-model/ --single-file my.safetensors     and one file, for a Stable Diffusion 1

The folder has diffusers' layout and a model card with the facts of the training. The pipeline of diffusers for its
network and text encoders draws from it the pictures that sample.py draws: StableDiffusionPipeline, StableDiffusionXLPipeline,
StableDiffusion3Pipeline or FluxPipeline. Where no scheduler of diffusers computes the process and prediction of a U-Net, that is
refused with the reason. Where no such pipeline takes the parts together, the folder is for sample.py, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyldm.cli import Parser, begin, fail, guard
from tinyldm.config.adapter_arguments import add_adapter_flags


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tinyldm.export")
    add = parser.add_argument
    add("run", metavar="RUN", help="run or model folder, hub id or checkpoint file")
    add("folder", metavar="FOLDER", help="where to write; must not exist yet, or be empty")
    add("--sampler", metavar="NAME", help="the sampler that the folder names as its default (default: the model's)")
    add("--dtype", default="fp32", metavar="NAME", help="of the weights: fp32, fp16, bf16 (default: fp32)")
    add("--no-ema", action="store_true", help="the raw weights instead of the averaged ones")
    add("--tokenizer", action="append", metavar="FOLDER|ID", help="of a checkpoint file, which holds none (default: CLIP's and T5's, from "
        "the hub); once for each text encoder, or a model folder")
    add("--parts", nargs="+", metavar="SOURCE", help="for a checkpoint file without text encoders or VAE: files, folders or hub ids of these")
    add("--prediction", metavar="NAME", help="of a single file that does not say it: eps or v (default: v for "
        "Stable Diffusion 2, eps for 1)")
    add("--single-file", metavar="FILE", help="also write one .safetensors in CompVis' layout, for models of Stable Diffusion 1's shape")
    add("--license", metavar="NAME", help="written into the model card, as the hub names licences: mit, apache-2.0, openrail, ...")
    add("--push-to-hub", metavar="OWNER/NAME", help="then upload the folder into this repository of the hub, which is made, private, where "
        "there is none (HF_TOKEN is the key); needs --license")
    add_adapter_flags(parser)
    args = parser.parse_args(argv)
    if args.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        fail(f"--push-to-hub {args.push_to_hub}: name a repository of the hub, OWNER/NAME")
    if args.push_to_hub and not args.license:
        fail("--push-to-hub publishes a model: say under which licence, with --license mit, for example")
    if args.license and not re.fullmatch(r"[a-z0-9.+-]+", args.license):
        fail(f"--license {args.license}: name it as the hub does, as in mit, apache-2.0 or other")
    if args.single_file and Path(args.single_file).suffix != ".safetensors":
        fail(f"--single-file {args.single_file}: the file is written as .safetensors; name it so")
    if args.single_file and not Path(args.single_file).parent.is_dir():
        fail(f"--single-file {args.single_file}: there is no such folder")
    if args.single_file and Path(args.single_file).exists():
        fail(f"--single-file {args.single_file} is there already: name another file")
    if (folder := Path(args.folder)).exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is there already and not empty: name another folder")
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    ARGS = parse()

import torch
from torch import nn

from tinyldm.device import pick_dtype
from tinyldm.files import replace_folder
from tinyldm.folders.load import load_model
from tinyldm.folders.publish import push
from tinyldm.folders.save import save_loaded
from tinyldm.folders.single_file import save_checkpoint, why_not_one_file
from tinyldm.model import Model, architecture
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.vae import AutoencoderKL
from tinyldm.pipeline import DrawSettings, draw_settings
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.training.learned import apply_learned
from tinyldm.training.portable import portable, portable_data, trained_here
from tinyldm.training.run_folder import find_model
from tinyldm.unicode import shown
from tinyldm.vendor_loaders import pipelines, scheduler

SAME_STEPS = {"euler": "ddim"}              # samplers that take the same steps, so their schedulers are interchangeable


@torch.no_grad()
def without_shift(vae: nn.Module) -> nn.Module:
    """The same autoencoder with its shift_factor, which StableDiffusionPipeline ignores, in its 1x1 quant convolutions."""
    if not vae.config.shift_factor or not isinstance(vae, AutoencoderKL):
        return vae
    c = vae.config.latent_channels
    plain = AutoencoderKL(replace(vae.config, quant_convs=True, shift_factor=0.0)).to(next(vae.parameters()))
    plain.encoder, plain.decoder = vae.encoder, vae.decoder
    for name, channels in (("quant_conv", 2 * c), ("post_quant_conv", c)):
        if vae.config.quant_convs:
            getattr(plain, name).load_state_dict(getattr(vae, name).state_dict())
        else:
            nn.init.dirac_(getattr(plain, name).weight)              # the identity
            nn.init.zeros_(getattr(plain, name).bias)
    plain.centre(torch.full((c,), vae.config.shift_factor).to(plain.quant_conv.bias))
    return plain


def without_projection(text: nn.Module) -> nn.Module:
    """The same text encoder without the projection of its pooled feature. A U-Net does not read that feature, and with the
    projection StableDiffusionPipeline would use it in place of the token features."""
    if not isinstance(text, CLIPText) or text.projection is None:
        return text
    with torch.device("meta"):
        plain = CLIPText(replace(text.config, projection_dim=None))
    plain.load_state_dict({name: p for name, p in text.state_dict().items() if not name.startswith("projection.")}, assign=True)
    return plain


def with_projection(text: nn.Module) -> nn.Module:
    """The same text encoder of the class that projects its pooled feature: where it has no projection, by the identity."""
    if not isinstance(text, CLIPText) or text.projection is not None:
        return text
    with torch.device("meta"):
        projected = CLIPText(replace(text.config, projection_dim=text.config.width))
    weights = text.state_dict()
    like = weights["token_embedding.weight"]
    weights["projection.weight"] = torch.eye(text.config.width, dtype=like.dtype, device=like.device)
    projected.load_state_dict(weights, assign=True)
    return projected


def with_texts(model: Model, *changes: Callable[[nn.Module], nn.Module]) -> Model:
    """The same model after a change of each of its first text encoders."""
    encoders = [TextEncoder(change(module), tokenizer) for change, (module, tokenizer) in zip(changes, model.text.encoders)]
    return replace(model, text=TextEncoders([*encoders, *model.text.encoders[len(encoders):]], model.text.join))


def for_u_net(model: Model, *changes: Callable[[nn.Module], nn.Module]) -> Model:
    """The same model in a form that the pipelines of U-Nets compute correctly, which ignore shift_factor, after a change of each text
    encoder. ValueError, with the reason, where none exists."""
    if model.net.config.out_channels == 2 * model.net.config.in_channels:
        raise ValueError("this model cannot be exported: it learned its variance, and of diffusers' schedulers only "
                         "DDPMScheduler reads the channels for it. sample.py draws with its run folder")
    if reason := scheduler.why_not_public(*scheduler.read_process(model.scheduler)):
        raise ValueError(f"this model cannot be exported: {reason}. sample.py draws with its run folder")
    return replace(with_texts(model, *changes), vae=without_shift(model.vae))


# Published pipeline -> the same model in a form that it computes correctly, if there is one.
ADAPT: dict[str, Callable[[Model], Model]] = {
    pipelines.STABLE_DIFFUSION: lambda model: for_u_net(model, without_projection),
    pipelines.SDXL: lambda model: for_u_net(model, without_projection, with_projection),
    pipelines.SD3: lambda model: with_texts(model, with_projection, with_projection),
    pipelines.FLUX: lambda model: model,
}


def configs(model: Model) -> pipelines.Configs:
    """The configs of the model's parts, as they are written."""
    config = lambda module: architecture(module).to_config(module.config)
    return pipelines.Configs(model.scheduler, config(model.net), config(model.vae), [*map(config, model.text.modules.values())])


def pipeline_of(model: Model) -> str:
    """The pipeline that the model is written for: a key of PIPELINES."""
    name = pipelines.written_as(architecture(model.net).classes[0], model.text.join)
    if name == pipelines.STABLE_DIFFUSION:              # a model with these parts is refused where it cannot be exported, others are OWN
        told = {*architecture(model.net).extras(model.net.config)} - {"guidance"}         # which the pipeline tells, too
        own = [type(module) for module in model.text.modules.values()] != [CLIPText] or told
        return pipelines.OWN if own else name
    return name


def public(model: Model, sampler: str | None) -> Model:
    """The model in a form that published classes can hold, with a scheduler config that draws with `sampler`."""
    learned, name = scheduler.read_process(model.scheduler), pipeline_of(model)
    adapted = ADAPT[name](model) if name in ADAPT else model
    trial = replace(adapted, scheduler=_scheduler(adapted, name, learned, sampler))
    if pipelines.for_parts(configs(trial), model.text.join) == name:
        model = adapted
    else:
        name = pipelines.OWN
    pipeline, stock = pipelines.PIPELINES[name], name != pipelines.OWN
    wanted, config = sampler or model.defaults.get("sampler"), _scheduler(model, name, learned, sampler)
    requested = draw_settings(model, sampler=wanted).sampler
    drawn_with = scheduler.sampling(config).sampler if stock else requested                 # sample.py has all samplers
    if SAME_STEPS.get(requested, requested) == SAME_STEPS.get(drawn_with, drawn_with):
        drawn_with = requested
    elif sampler:
        raise ValueError(f"no scheduler of diffusers runs sampler '{sampler}' on this model's process: the nearest is {drawn_with}")
    else:
        print(f"no scheduler of diffusers runs the model's sampler {requested} on its process: the folder names {drawn_with}")
    # A scheduler that is kept as it was published says more than the name of its sampler: order, variant, spacing.
    defaults = model.defaults | ({} if config is model.scheduler else {"sampler": drawn_with})
    if schedule := pipeline.defaults(architecture(model.net).to_config(model.net.config)).get("schedule"):
        defaults["schedule"] = schedule                         # the pipeline's own times, whatever its scheduler says
    if data := defaults.get("data"):
        defaults["data"] = [portable_data(word) for word in data]
    return replace(model, scheduler=config, defaults=defaults)


def _scheduler(model: Model, pipeline: str, learned: Any, sampler: str | None) -> dict:
    """The scheduler config with which the pipeline draws with this sampler, or with the model's; the model's own where it serves."""
    own = model.scheduler
    flow_match = own["_class_name"] == scheduler.FLOW_MATCH
    if pipeline != pipelines.OWN:                       # tinyldm runs every scheduler
        sampler = sampler or model.defaults.get("sampler")
        runs = pipelines.PIPELINES[pipeline].flow_match
        if flow_match and not runs or sampler:
            return scheduler.to_config(*learned, sampler, flow_match=runs)
    return scheduler.to_config(*learned, sampler, flow_match=flow_match) if sampler else own


def opens_in(model: Model) -> str | None:
    """The stock pipeline of diffusers that runs the model; None where none does."""
    name = pipelines.for_parts(configs(model), model.text.join)
    return None if name == pipelines.OWN else name


def opening(model: Model, pipeline: str, folder: Path | str) -> str:
    """The Python that opens the folder. diffusers wants to be told which text encoders a folder leaves out."""
    absent = [f", {name}=None" for i, name in enumerate(pipelines.TEXT_FOLDERS) if name in pipelines.PIPELINES[pipeline].optional
              and i >= len(model.text.modules)]
    return "".join([f'{pipeline}.from_pretrained("{folder}"', *absent, *(word.replace("text_encoder", "tokenizer") for word in absent), ")"])


def not_stock(model: Model) -> str:
    """Why no stock pipeline of diffusers runs the model, in a sentence."""
    network = architecture(model.net).classes[0]
    near = [f"{name} {row.why_not}" for name, row in pipelines.PIPELINES.items() if row.network == network]
    reason = "; ".join(near) or f"none has a {type(model.net).__name__} as its network"
    return f"No stock pipeline of diffusers fits ({reason}): draw with tinyldm."


def facts(model: Model, source: Path | str) -> dict[str, str]:
    """Facts about the model and, where its folder is inside a run folder, about its training: name -> text."""
    file = Path(source).resolve().parents[2] / "config.json" if trained_here(source) else None
    config = json.loads(file.read_text(encoding="utf-8")) if file else {}
    came_from = lambda part, else_: (portable(config.get(f"{part}_weights", "")) or else_) + ", " if file else ""
    millions = lambda net: f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million parameters"
    process, options, prediction = scheduler.read_process(model.scheduler)
    numbers = ", ".join(f"{name} {value:g}" for name, value in options.items() if isinstance(value, (int, float)))
    named = {
        "preset": model.defaults.get("preset"),
        "network": f"{type(model.net).__name__}, {millions(model.net)}",
        "text encoder": came_from("text", "trained with the network") + " and ".join(map(millions, model.text.modules.values())),
        "autoencoder": came_from("vae", "trained first") + millions(model.vae),
        "data": ", ".join(model.defaults.get("data", [])),
        "picture size": model.defaults.get("resolution"),
        "process": f"{process} ({numbers})" if numbers else process,
        "prediction": prediction,
        "steps": model.defaults.get("step"),
        "trained with": f"tinyldm {version}" if (version := model.defaults.get("version")) else None,
        "pictures per step": config.get("batch_size"),
        "optimizer": config.get("optimizer"),
        "learning rate": config.get("lr"),
        "caption dropout": config.get("caption_dropout"),
        "EMA decay": config.get("ema_decay"),
        "seed": config.get("seed"),
    }
    return {name: str(value) for name, value in named.items() if value not in (None, "")}


def guidance_words(model: Model, settings: DrawSettings) -> str:
    """The arguments with which the model's pipeline is guided as sample.py is. FluxPipeline calls classifier-free guidance another name."""
    if opens_in(model) != pipelines.FLUX:
        return f"guidance_scale={settings.cfg:g}"
    true = f', negative_prompt="", true_cfg_scale={settings.cfg:g}' if settings.guided else ""
    return f"guidance_scale={settings.told:g}{true}"


def card(model: Model, source: Path | str, folder: Path, licence: str | None = None) -> str:
    """The text of README.md in the exported folder, its model card."""
    settings = draw_settings(model)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts(model, source).items())
    pipeline = opens_in(model)
    with_diffusers = not_stock(model) if pipeline is None else f"""```python
from diffusers import {pipeline}

pipeline = {opening(model, pipeline, folder.name)}
pipeline("a red fox", num_inference_steps={settings.steps}, {guidance_words(model, settings)}).images[0]
```"""
    return f"""---
{f'license: {licence}' if licence else '# license: none was named'}
library_name: {'diffusers' if pipeline else 'tinyldm'}
pipeline_tag: text-to-image
tags: [text-to-image, latent-diffusion, tinyldm]
---

# {folder.name}

{'A latent diffusion model trained with tinyldm.' if trained_here(source) else
 f'Converted with tinyldm from {portable(str(source))}; its licence and its limits are those of the original.'}

| | |
|---|---|
{rows}
| sampler | {settings.sampler}, {settings.steps} steps, guidance {settings.cfg:g} |

## Draw

```sh
python sample.py "a red fox" --model {folder.name}
```

{with_diffusers}

Nobody has examined what this model draws for bias or harm. It knows what its data showed, and no more.
"""


def main() -> None:
    args = ARGS
    source = find_model(args.run)
    dtype = pick_dtype(args.dtype, torch.device("cpu"))
    model = load_model(source, ema=not args.no_ema, tokenizer=args.tokenizer, prediction=args.prediction, parts=args.parts or ())
    apply_learned(model, args)
    model = public(model, args.sampler)
    for part in model.modules.values():                         # after public(), so that the weights it changes are rounded once
        part.to(dtype)
    if args.single_file and (reason := why_not_one_file(model)):
        raise ValueError(f"--single-file: {reason}")
    folder = Path(args.folder).resolve()

    def fill(partial: Path) -> None:
        save_loaded(partial, model)
        (partial / "README.md").write_text(shown(card(model, source, folder, args.license)), encoding="utf-8")

    replace_folder(folder, fill)
    if args.single_file:
        save_checkpoint(args.single_file, model)
        print(f"{args.single_file}: loads as a Stable Diffusion 1 wherever those load")
    if args.push_to_hub:
        print(push(folder, args.push_to_hub))
    pipeline = opens_in(model)
    print(f"{folder}: python sample.py \"a red fox\" --model {folder}\n" + (
        f"  or in Python: {opening(model, pipeline, folder)}" if pipeline else not_stock(model)))


if __name__ == "__main__":
    guard(main)
