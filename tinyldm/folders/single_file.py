"""Stable Diffusion as one file: the checkpoints of CompVis, read (SD 1 and 2) and written (SD 1).

One `.safetensors` or `.ckpt` holds the U-Net (`model.diffusion_model.`), the VAE (`first_stage_model.`) and the
text encoder (`cond_stage_model.`), and no config: the shapes show whether it is Stable Diffusion 1 or 2. They do not show the
tokenizer, which is CLIP's, nor whether the U-Net predicts eps or v (`_stated_prediction`).

Two files beside NAME.safetensors are read, as in AUTOMATIC1111's WebUI: NAME.yaml, the config that says what is predicted, and
NAME.vae.safetensors (or .pt, .ckpt), which replaces the VAE.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinyldm.folders import hub, needed
from tinyldm.folders.build import load_network
from tinyldm.folders.rename import export_renamed, recognise
from tinyldm.folders.weights import Weights, errors_about, open_weights, write_weights
from tinyldm.lookup import lookup
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.tokenizer import EOS, Tokenizer, open_tokenizer
from tinyldm.vendor_loaders import clip
from tinyldm.vendor_loaders import scheduler as schedulers
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders import vae as vaes

TOKENIZER = "openai/clip-vit-large-patch14"
PREFIXES = {"net": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
VAE_BESIDE = (".vae.safetensors", ".vae.pt", ".vae.ckpt")
TEXT = "cond_stage_model."              # read with this shorter prefix: Stable Diffusion 2's text encoder has other names below it
BASE_STEPS = 875_000                    # `global_step` of Stable Diffusion 2's base model, which predicts eps

# The scheduler_config.json that Stable Diffusion 1 and 2 are published with.
CURVE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "trained_betas": None}
SD1 = CURVE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
SD2 = CURVE | {"_class_name": "DDIMScheduler"}

OTHERS = {r"conditioner\.embedders\.": "Stable Diffusion XL", r"model\.diffusion_model\.joint_blocks\.": "Stable Diffusion 3",
          r"(model\.diffusion_model\.)?double_blocks\.": "FLUX", r"lora_|.*\.lora[._](A|B|down|up)\.": "a LoRA"}


def load_checkpoint(file: Path, device: str | torch.device, dtype: torch.dtype, tokenizer: str | None = None,
                    prediction: str | None = None) -> Model:
    """A Stable Diffusion 1 or 2 checkpoint. ValueError for other models, with their name where it is known."""
    weights = open_weights(file)
    for pattern, name in OTHERS.items():
        if any(re.match(pattern, key) for key in weights.shapes):
            raise ValueError(f"{file} holds {name}: only whole checkpoints of Stable Diffusion 1 and 2 can be read")
    beside = next((vae for end in VAE_BESIDE if (vae := file.with_suffix(end)).is_file()), None)
    _check_parts(file, weights, beside)
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    with errors_about(file):
        layout, own = recognise(_with_prefix(weights, PREFIXES["net"]), {"CompVis": unets.LAYOUTS["CompVis"]})
        config = layout.config_of(own.shapes)
        second = config.linear_projection
        scheduler = _scheduler(file, weights, second, prediction)
        size = 96 if second and scheduler["prediction_type"] == "v_prediction" else 64
        net = load_network(UNet, replace(config, sample_size=size), own, device, dtype)
        text = _load_text(_with_prefix(weights, TEXT), device, dtype)
    with errors_about(beside or file):
        there = open_weights(beside) if beside else _with_prefix(weights, PREFIXES["vae"])
        layout, own = recognise(there, {"CompVis": vaes.LAYOUTS["CompVis"]})
        vae = load_network(AutoencoderKL, layout.config_of(own.shapes), own, device, vae_dtype)
    encoder = TextEncoder(text, _load_tokenizer(tokenizer, "!" if second else EOS, text.config.context_length))
    return Model(net, vae, TextEncoders([encoder]), *schedulers.from_config(scheduler), scheduler, {})


def _check_parts(file: Path, weights: Weights, vae_beside: Path | None) -> None:
    """ValueError that says which parts the file lacks, and how to draw with the others."""
    parts = {"U-Net": PREFIXES["net"], "VAE": PREFIXES["vae"], "text encoder": TEXT}
    lacking = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in weights.shapes)]
    if vae_beside and "VAE" in lacking:
        lacking.remove("VAE")
    if not lacking:
        return
    advice = ""
    if lacking == ["VAE"]:
        advice = f": put the file of one beside it, named {file.stem}{VAE_BESIDE[0]}"
    elif "U-Net" not in lacking:
        advice = (": copy the model folder that it was trained from, and put this file there in the place of "
                  "unet/diffusion_pytorch_model.safetensors")
    raise ValueError(f"{file} is no checkpoint of a whole Stable Diffusion, it holds no "
                     f"{' and no '.join(f'{part} ({parts[part]}*)' for part in lacking)}{advice}")


def _scheduler(file: Path, weights: Weights, second: bool, prediction: str | None) -> dict:
    """The scheduler_config.json of the checkpoint. prediction: the one that was asked for, which wins.

    An empty tensor `ztsnr` says that the curve ends at pure noise (AUTOMATIC1111/stable-diffusion-webui#16569). It is then sampled
    from its last entry on (arXiv:2305.08891, Section 3.3), by DDIM: PNDM has no such curve."""
    if prediction is None:
        prediction = _stated_prediction(file, weights)
    if prediction is None:
        prediction = "v" if second and weights.facts.get("global_step") != BASE_STEPS else "eps"
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in weights.shapes else {}
    if zero_snr and prediction == "eps":
        raise ValueError(f"{file} has zero terminal SNR (its tensor ztsnr says so), where eps tells nothing: pass --prediction v")
    return (SD2 if second or zero_snr else SD1) | {"prediction_type": schedulers.PREDICTION_TYPES[prediction]} | zero_snr


def _stated_prediction(file: Path, weights: Weights) -> str | None:
    """What the U-Net predicts, from the first of these that says so; None where none does:
    an empty tensor `v_pred` (AUTOMATIC1111/stable-diffusion-webui#16567); a NAME.yaml for CompVis' code, of which the one line that
    counts is found by a regex, so that no reader of YAML is needed; `modelspec.prediction_type` in the header (Stability-AI/ModelSpec).
    """
    if "v_pred" in weights.shapes:
        return "v"
    names = {published: ours for ours, published in schedulers.PREDICTION_TYPES.items() if ours != "flow"}
    names |= {ours: ours for ours in names.values()}
    beside = file.with_suffix(".yaml")
    text = beside.read_text("utf-8", errors="replace") if beside.is_file() else ""
    if found := re.search(r"""^\s*parameterization\s*:\s*["']?(\w+)""", text, re.MULTILINE):
        return lookup(names, found[1], f"{beside}: parameterization")
    if re.search(r"^\s*target\s*:.*Diffusion\s*$", text, re.MULTILINE):       # the default of CompVis' LatentDiffusion
        return "eps"
    stated = weights.facts.get("modelspec.prediction_type")
    return lookup(names, str(stated), f"{file}: modelspec.prediction_type") if stated else None


def _with_prefix(weights: Weights, prefix: str) -> Weights:
    """The tensors of one part. Without this, another part with the same layout could be read (a ControlNet instead of the U-Net)."""
    return weights.renamed(lambda name: name if name.startswith(prefix) else "")


def _load_text(weights: Weights, device: str | torch.device, dtype: torch.dtype) -> CLIPText:
    """The text encoder. Stable Diffusion 2 uses the output of the last layer but one, so the last layer is left out, as in the
    published folder."""
    layout, own = recognise(weights, clip.LAYOUTS)
    config = layout.config_of(own.shapes)
    if layout is clip.LAYOUTS["open_clip"]:
        config = replace(config, layers=config.layers - 1)
        own = own.renamed(lambda name: "" if name.startswith(f"transformer.resblocks.{config.layers}.") else name)
    return load_network(CLIPText, config, own, device, dtype)


def _load_tokenizer(source: str | None, pad_token: str, context_length: int) -> Tokenizer:
    try:
        path = hub.locate(source or TOKENIZER, needed.of_tokenizer)
    except ValueError as error:
        raise ValueError(f"a single-file checkpoint holds no tokenizer: name CLIP's with --tokenizer, as a folder with "
                         f"vocab.json and merges.txt ({error})") from error
    return open_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path, context_length, pad_token)


def why_not_one_file(model: Model) -> str | None:
    """Why other programs would not load the model correctly from one file, which has no config: they build the networks and
    scheduler of Stable Diffusion 1. None where these are the model's."""
    texts = [module.config for module in model.text.modules.values()]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    sized = lambda config, like: replace(like, sample_size=getattr(config, "sample_size", None)) == config
    reasons = {
        "a U-Net of Stable Diffusion 1's shape": sized(model.net.config, UNetConfig()),
        "its VAE's shape and scaling factor": sized(model.vae.config, VAEConfig()),
        "OpenAI's CLIP-L with quick_gelu": len(texts) == 1 and isinstance(texts[0], CLIPTextConfig)
        and replace(texts[0], **ids) == replace(CLIPTextConfig(), **ids),
        "the scaled_linear process and eps-prediction": schedulers.read_process(model.scheduler)
        == schedulers.read_process(SD1 | {"prediction_type": "epsilon"}),
    }
    lacking = [name for name, present in reasons.items() if not present]
    return f"one-file checkpoints are read as Stable Diffusion 1, which has {lacking[0]}" if lacking else None


def checkpoint_tensors(model: Model) -> dict[str, Tensor]:
    """All weights of a model with a U-Net under CompVis' names, on the CPU."""
    tables = {"net": unets.LAYOUTS["CompVis"], "vae": vaes.LAYOUTS["CompVis"], "text": clip.LAYOUTS["transformers"]}
    modules = model.modules
    return {PREFIXES[part] + name: tensor for part, layout in tables.items() for name, tensor in export_renamed(
        modules[part].state_dict(), layout.rules(modules[part].config)).items()}


def save_checkpoint(file: str | Path, model: Model) -> None:
    """Write the model as one file. ValueError where it is not a Stable Diffusion 1; OSError where it cannot be written."""
    if reason := why_not_one_file(model):
        raise ValueError(reason)
    write_weights(Path(file), checkpoint_tensors(model))
