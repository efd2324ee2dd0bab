"""The training configuration: one dataclass, presets as rows of data, and the command line made from both.

Nothing here imports torch, so that `--help` answers at once. The networks' own settings are dictionaries that
become UNetConfig, DiTConfig, VAEConfig and CLIPTextConfig when the networks are built.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from tinyldm.cli import Parser
from tinyldm.lookup import lookup
from tinyldm.training.schedule import moment, seconds


def knob(default: Any, text: str) -> Any:
    """A field with its line of --help."""
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    preset: str = knob("tiny", "row of settings to start from")
    out: str = knob("", "run folder (default: runs/PRESET)")
    resume: str = knob("no", "auto: go on from the newest checkpoint in the run folder; no: start anew")
    seed: int = knob(0, "every random choice is a function of (seed, step, place in the batch)")
    device: str = knob("auto", "auto, cpu, cuda, mps")
    dtype: str = knob("auto", "autocast: auto (bf16 where the device computes it natively), bf16, fp32")
    compile: bool | None = knob(None, "torch.compile the network (default: on CUDA only)")

    data: list = knob(["toyworld"], "toyworld, folders of captioned pictures, WebDataset tars, .npz; paths, patterns or URLs, "
                      "each with a :WEIGHT where several are mixed")
    scenes: int = knob(12_000, "toyworld: how many scenes to draw")
    caption_key: list = knob([], "where captions are: txt, or keys of the json or metadata, each with a :WEIGHT where several "
                             "are mixed (default: txt, else prompt, caption or text)")
    resolution: int = knob(64, "picture size in pixels")
    stages: dict = knob({}, "picture sizes one after another, each with its share of the training, as in 256=0.8 512=0.2 (default: "
                        "--resolution alone). Micro-batches keep their number of pixels, flow's shift grows with the side")
    buckets: float = knob(0.0, "aspect buckets, of sides up to this ratio, with the square's number of tokens (0: all cropped square)")
    flip: bool = knob(False, "encode every picture mirrored too (captions that say left and right become wrong)")
    moments: bool = knob(False, "keep the posterior's std beside its mean; training then resamples the latents")
    min_side: int = knob(0, "leave out pictures with a smaller side, in pixels")
    max_aspect: float = knob(0.0, "leave out pictures with a larger ratio of sides (0: none)")
    min_caption: int = knob(1, "leave out captions shorter than so many characters")
    max_caption: int = knob(0, "leave out longer ones (0: none; what the text encoder cannot take is cut off)")
    max_skip: float = knob(0.05, "stop when a larger share of the samples is unusable")
    cache: list = knob([], "latents made by prepare.py, used as they are, one per stage (default: OUT/latents, made where missing)")
    encode_batch_size: int = knob(32, "pictures the VAE encodes at once")

    vae: dict = knob({}, "VAEConfig fields, as key=value")
    vae_weights: str = knob("", "pretrained VAE; empty: train one first (stage 1)")
    vae_steps: int = knob(0, "stage 1: optimizer steps")
    vae_pictures: int = knob(16_384, "stage 1: how many of the pictures it trains on, held in memory")
    vae_batch_size: int = knob(8, "stage 1: pictures (or crops) per step")
    vae_crop: int = knob(0, "stage 1: crop size in pixels (0: whole pictures)")
    vae_lr: float = knob(3e-3, "stage 1: AdamW's learning rate")
    vae_muon_lr: float = knob(1.5e-3, "stage 1: Muon's learning rate, for the inner convolutions")
    vae_kl: float = knob(1e-6, "stage 1: weight of the KL term, in nats per picture")

    text: dict = knob({}, "CLIPTextConfig fields, as key=value")
    text_weights: str = knob("", "pretrained CLIP text encoder (a model folder); empty: train one along")
    vocab_size: int = knob(1024, "BPE vocabulary trained on the captions, at most this many ids")
    network: str = knob("unet", "unet or dit")
    unet: dict = knob({}, "UNetConfig fields, as key=value")
    dit: dict = knob({}, "DiTConfig fields, as key=value")

    process: str = knob("flow", "scaled_linear, linear, cosine, betas, vp, ve, edm or flow")
    process_options: dict = knob({}, "its options, as key=value (beta_start, betas, sigma_max, ...)")
    shift: float = knob(1.0, "flow: shift of time towards noise")
    zero_terminal_snr: bool = knob(False, "rescale the table so that its last level is pure noise (not for flow, which has it)")
    prediction: str = knob("flow", "what the network predicts: eps, x0, v or flow")
    learned_variance: bool = knob(False, "the network answers with twice the channels and learns its variance (tables only)")
    times: str = knob("logit_normal", "how training times are drawn: uniform, normal, logit_normal, mode, cosmap, log_normal (EDM's)")
    times_mean: float | None = knob(None, "mean of t (normal), logit(t) (logit_normal: 0; above trains more on noise), log(sigma) (log_normal)")
    times_scale: float | None = knob(None, "standard deviation of the same; mode: how much it favours the middle")
    stratified_times: bool = knob(False, "one time from every equal part of their distribution, in every batch")
    loss: str = knob("mse", "mse, l1 or huber")
    huber_c: float = knob(0.1, "huber: the error at which it turns from squared to absolute")
    loss_weight: str = knob("none", "of noise levels, for eps, x0 and v: none, min_snr, soft_min_snr, p2, edm")
    min_snr_gamma: float = knob(0.0, "gamma of min_snr (alone it switches that on) or soft_min_snr (0: 5)")
    p2_gamma: float = knob(1.0, "gamma of p2")
    noise_offset: float = knob(0.0, "offset noise: so much of one number per picture and channel, 0.1 for example (0: none)")
    input_perturbation: float = knob(0.0, "so much more noise than the network is asked for, 0.1 for example (0: none)")
    mask_padding: bool = knob(False, "dit: attend to captions up to their end, not to the padding; text is then encoded up to the "
                              "longest caption of a batch")
    caption_dropout: float = knob(0.1, "share of captions replaced by the empty one, for classifier-free guidance")

    max_steps: int = knob(1000, "optimizer steps (0: as many as --budget or --deadline leave time for)")
    budget: str = knob("", "running time instead, as in 7d or 1h30m, all of it counted, pauses between processes not")
    deadline: str = knob("", "when to be done instead, as in 2030-01-31T18:00 (local time); with --budget, whichever comes first")
    batch_size: int = knob(64, "pictures per optimizer step, over all micro-batches")
    grad_accum: int = knob(1, "micro-batches per step")
    optimizer: str = knob("muon", "muon (AdamW for all but the blocks' matrices) or adamw")
    lr: float = knob(4e-3, "AdamW's peak learning rate")
    muon_lr: float = knob(3e-3, "Muon's peak learning rate")
    weight_decay: float = knob(0.0, "decoupled weight decay")
    warmup_steps: int = knob(50, "steps of linear warm-up")
    decay: float = knob(0.4, "share of the steps, at the end, over which the learning rate falls to 0")
    grad_clip: float = knob(1.0, "largest gradient norm")
    ema_decay: float = knob(0.995, "decay of the averaged weights, after their warm-up")
    ema_widths: list = knob([], "averages of these widths instead, power functions of the step, as in 0.05 0.1: the first is the model's, "
                            "others can be had afterwards (python -m tinyldm.reconstruct)")
    rollback: bool = knob(False, "when the loss leaves its course, go back to the last checkpoint and pass over the batches since")
    grad_checkpointing: bool = knob(False, "keep only the blocks' inputs for the backward pass: a third more work, far less memory")
    fsdp: bool = knob(False, "several GPUs: share out weights, gradients and optimizer state among them too (FSDP2)")
    deterministic: bool = knob(False, "CUDA: only algorithms that give the same bits every time (slower)")

    log_every: int = knob(20, "steps per line of log.jsonl")
    track: str = knob("", "show the log elsewhere too: tensorboard or wandb (pip install 'tinyldm[tensorboard]' or 'tinyldm[wandb]')")
    save_every: int = knob(500, "steps per checkpoint")
    keep_last: int = knob(2, "checkpoints to keep")
    keep_every: int = knob(0, "and besides every one whose step is a multiple of this (0: none)")
    val_every: int = knob(100, "steps per validation (0: at the end only)")
    val_samples: int = knob(128, "samples held out for it (a tenth of them at most)")
    sample_every: int = knob(500, "steps per sample grid (0: none)")
    sample_prompts: str = knob("", "prompts of the sample grid, separated by | (default: toyworld's own, else captions of the data)")
    sampler: str = knob("dpmpp_2m", "sampler of the grids, and the model's default")
    sample_steps: int = knob(20, "its steps")
    cfg: float = knob(4.5, "its guidance scale")

    pictures: int = knob(0, "dry run: pictures in the data set the preset is made for")
    mfu: float = knob(0.55, "dry run: share of the GPU's peak the training reaches")
    gpu_gb: float = knob(32.0, "dry run: memory of the GPU, GB")
    gpu_tflops: float = knob(209.5, "its bf16 peak (RTX 5090), TFLOP/s: for the dry run, and for the MFU of a GPU that is not known")

    def __post_init__(self):
        self.out = self.out or f"runs/{self.preset}"
        self.data = self.data.split() if isinstance(self.data, str) else self.data       # as runs of old say it
        if self.stages and (first := next(iter(self.stages))).isdigit():
            self.resolution = int(first)
        self.cache = [self.cache] * bool(self.cache) if isinstance(self.cache, str) else self.cache


TINY = dict(
    vae=dict(latent_channels=8, widths=(16, 32, 64, 96), depth=1, groups=8, middle_attention=False), vae_steps=950,
    text=dict(width=128, layers=2, heads=4, mlp_width=512, context_length=24, activation="gelu"),
    unet=dict(widths=(64, 128), depth=1, attention=(True, True), heads=(2, 4), groups=8), max_steps=850,
)
WEEK = dict(
    data=["hf://datasets/jackyhate/text-to-image-2M/data_512_2M/data_{000000..000045}.tar"],
    vae_weights="stabilityai/sd-vae-ft-mse", text_weights="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    resolution=256, stages={"256": 0.79, "512": 0.21}, batch_size=512, grad_accum=4, warmup_steps=1500, ema_decay=0.9999,
    caption_dropout=0.1, lr=2e-4, muon_lr=5e-4, weight_decay=0.01, decay=0.2, max_steps=0, budget="7d",
    save_every=1000, sample_every=2000, val_every=1000, val_samples=1024, log_every=100, cfg=5.0, pictures=4_600_000,
)
PRESETS: dict[str, dict] = {
    "tiny": TINY,
    "tiny_dit": TINY | dict(
        network="dit", dit=dict(patch=1, width=192, layers=6, heads=4, mlp_width=768, time_dim=128),
        lr=2e-3, muon_lr=2e-3, max_steps=1000),
    "5090_week": WEEK | dict(network="dit", dit=dict(width=1024, layers=16, heads=16), grad_accum=8),
    "5090_week_unet": WEEK | dict(
        network="unet", unet=dict(widths=(192, 384, 768, 768), heads=(3, 6, 12, 12)), mfu=0.4),
}


def parse(argv: list[str] | None, description: str, own: dict[str, dict] | None = None,
          names: tuple[str, ...] = ()) -> tuple[Config, argparse.Namespace]:
    """A script's command line -> (config: the preset's row, then what was typed; the script's own flags).

    own: those flags, as argparse takes them. names: the fields of Config that the script knows; none: all.
    """
    parser = Parser(description=description)
    hints = get_type_hints(Config)
    for knob_ in (knob_ for knob_ in dataclasses.fields(Config) if not names or knob_.name in names):
        flag, text = "--" + knob_.name.replace("_", "-"), knob_.metadata["help"]
        if hints[knob_.name] in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif metavar := {dict: "KEY=VALUE", list: "WORD"}.get(hints[knob_.name]):
            parser.add_argument(flag, nargs="+", metavar=metavar, default=argparse.SUPPRESS, help=text)
        else:
            kind = float if hints[knob_.name] == float | None else hints[knob_.name]
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, metavar=kind.__name__.upper())
    for flag, options in (own or {}).items():
        parser.add_argument(flag, **options)
    typed = vars(parser.parse_args(argv))
    rest = argparse.Namespace(**{name: typed.pop(name) for flag in own or {} if (name := flag[2:].replace("-", "_")) in typed})
    try:
        row = starting_point(typed)
        typed = {name: merged(row, name, value) if hints[name] is dict else value for name, value in typed.items()}
        for name in EXCLUDES.keys() & typed.keys():
            if name != "resolution" or typed.get("resume") != "auto":             # a resumed run's cannot be another
                row |= {other: nothing for other, nothing in EXCLUDES[name].items() if other not in typed}
        config = Config(**(row | typed))
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, rest


def starting_point(typed: dict[str, Any]) -> dict[str, Any]:
    """The settings under what was typed: a preset's row, or those of the run to be resumed."""
    preset = typed.get("preset", "tiny")
    row = lookup(PRESETS, preset, "preset") | {"preset": preset}
    saved = Path(typed.get("out", f"runs/{preset}")) / "config.json"
    if lookup({"no": False, "auto": True}, typed.get("resume", "no"), "--resume") is False:
        return row
    if not saved.exists():
        raise ValueError(f"nothing to resume: {saved} is not there; start the run without --resume, or name its folder with --out")
    known = {f.name for f in dataclasses.fields(Config)}
    try:
        row = {name: value for name, value in json.loads(saved.read_text()).items() if name in known}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged ({error}): write the run's settings into it again, or start another run with --out") from None
    for name in KEPT.intersection(typed):
        asked = merged(row, name, typed[name]) if isinstance(row.get(name), dict) else typed[name]
        if json.loads(json.dumps(asked)) != row.get(name):
            raise ValueError(f"a run keeps its --{name.replace('_', '-')} ({row.get(name)}): leave it out to resume, "
                             "or start another run with --out")
    return row


# What a typed setting leaves of those in a preset's row that say otherwise.
EXCLUDES: dict[str, dict[str, Any]] = {
    "max_steps": {"budget": "", "deadline": ""}, "budget": {"max_steps": 0}, "deadline": {"max_steps": 0}, "resolution": {"stages": {}}}

# What weights, optimizer state, word ids and latents hang on: a resumed run cannot change it.
KEPT = {"seed", "data", "scenes", "caption_key", "resolution", "buckets", "flip", "moments", "min_side", "max_aspect", "min_caption",
        "max_caption", "cache", "vae", "vae_weights", "text", "text_weights", "vocab_size", "network",
        "unet", "dit", "stages", "ema_widths", "process", "process_options", "shift", "zero_terminal_snr", "prediction", "learned_variance",
        "optimizer", "mask_padding"}


def merged(row: dict[str, Any], name: str, words: list[str]) -> dict[str, Any]:
    """A preset's fields with those typed in their place; but stages are all typed or none."""
    return pairs(name, words) if name == "stages" else {**row.get(name, {}), **pairs(name, words)}


def split_weights(words: list[str]) -> dict[str, float]:
    """["dense:0.75", "short:0.25"] -> {"dense": 0.75, "short": 0.25}; without weights each is 1."""
    result = {}
    for word in words:
        name, colon, weight = word.partition(":")
        try:
            result[name] = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(f"--caption-key takes KEY or KEY:WEIGHT, got '{word}': for example --caption-key dense:0.75 short:0.25") from None
        if not 0 < result[name] < float("inf"):
            raise ValueError(f"--caption-key {word}: the weight must be a positive number")
    if len(result) < len(words) or len({":" in word for word in words}) > 1:
        raise ValueError(f"--caption-key {' '.join(words)}: name every key once, and give each a weight or none")
    return result


def pairs(name: str, words: list[str]) -> dict[str, Any]:
    """["widths=64,128", "groups=8"] -> {"widths": (64, 128), "groups": 8}."""
    result = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            example = "256=0.8 512=0.2" if name == "stages" else "widths=32,64,128"
            raise ValueError(f"--{name} takes KEY=VALUE, got '{word}': for example --{name} {example}")
        try:
            result[key] = ast.literal_eval(value.replace("true", "True").replace("false", "False"))
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def check(config: Config) -> None:
    """Numbers that cannot work, refused before anything is written."""
    least = dict.fromkeys(("batch_size", "grad_accum", "resolution", "save_every", "keep_last", "log_every",
                           "scenes", "sample_steps", "vae_batch_size", "vae_pictures", "encode_batch_size"), 1)
    least |= dict.fromkeys(("seed", "vae_crop", "vae_kl", "warmup_steps", "sample_every", "weight_decay", "min_snr_gamma",
                            "noise_offset", "input_perturbation", "min_side", "max_aspect", "min_caption", "max_caption", "buckets",
                            "val_every", "val_samples", "keep_every", "max_steps"), 0)
    least["vae_steps"] = 0 if config.vae_weights else 1
    for name, smallest in least.items():
        if not smallest <= getattr(config, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {smallest}")
    for name in ("lr", "muon_lr", "vae_lr", "vae_muon_lr", "grad_clip", "shift", "huber_c", "p2_gamma"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be a positive number")
    low, high = (-1, 1.75) if config.times == "mode" else (1e-9, 1e9)        # beyond, mode is no distribution
    if config.times_scale is not None and not low <= config.times_scale <= high:
        raise ValueError(f"--times-scale {config.times_scale} must lie between -1 and 1.75 for mode, be a positive number else")
    if config.min_snr_gamma and config.loss_weight in ("p2", "edm"):
        raise ValueError(f"--min-snr-gamma is for min_snr and soft_min_snr, not for --loss-weight {config.loss_weight}: leave one out")
    for name in ("caption_dropout", "decay", "ema_decay", "max_skip"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must lie between 0 and 1")
    split_weights(config.caption_key)
    if 0 < config.buckets < 1 or 0 < config.max_aspect < 1:
        raise ValueError("--buckets and --max-aspect are ratios of the longer side to the shorter: 1 or more (0: off)")
    if config.mask_padding and config.network != "dit":
        raise ValueError("--mask-padding is for --network dit: the pipelines that a U-Net is exported to attend to the padding")
    if bool(config.max_steps) == bool(config.budget or config.deadline):
        raise ValueError("a run ends by --max-steps or by time (--budget, --deadline): give one of the two")
    for name, read in (("budget", seconds), ("deadline", moment)):
        if said := getattr(config, name):
            try:
                read(said)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
    stages = config.stages or {str(config.resolution): 1.0}
    for side, share in stages.items():
        if not (side.isdigit() and int(side) and isinstance(share, (int, float)) and 0 < share < float("inf")):
            raise ValueError(f"--stages {side}={share} is not a picture size and its share of the training: for example "
                             "--stages 256=0.8 512=0.2")
    if config.cache and len(config.cache) != len(stages):
        raise ValueError(f"--cache names {len(config.cache)} of the caches of {len(stages)} stages ({', '.join(stages)} px): name one for each")
    if config.cache and not config.vae_weights:
        raise ValueError("--cache goes with the VAE that made it: name that with --vae-weights (the cache's settings.json says which)")
    if config.batch_size < config.grad_accum:
        raise ValueError(f"--batch-size {config.batch_size} cannot be divided into --grad-accum {config.grad_accum} micro-batches")
    for name, known in (("network", ("unet", "dit")), ("optimizer", ("muon", "adamw")), ("dtype", ("auto", "bf16", "fp32")),
                        ("device", ("auto", "cpu", "cuda", "mps"))):
        lookup(dict.fromkeys(known), getattr(config, name).partition(":")[0], name)


def stages(config: Config) -> list[Config]:
    """The settings of every stage, in their order; just `config` where there is one. (check() has seen the sizes.)"""
    if not config.stages:
        return [config]
    caches, first = config.cache or [None] * len(config.stages), int(next(iter(config.stages)))
    result = []
    for side, cache in zip(map(int, config.stages), caches):
        accumulation = min(config.batch_size, round(config.grad_accum * max(1.0, (side / first) ** 2)))
        result.append(dataclasses.replace(config, resolution=side, stages={}, cache=[cache] * bool(cache), grad_accum=accumulation,
                                          shift=config.shift * side / first))      # the root of the tokens' ratio (arXiv:2403.03206, Eq. 23)
    return result


def build(kind: type, settings: dict[str, Any], what: str) -> Any:
    """A network's dataclass config from a preset's dictionary; unknown keys are refused with the nearest name."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in settings:
        lookup(known, key, f"{what} field")
    listed = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return kind(**listed)
