"""Every setting of a run, in groups, so that a function's signature says which of them it depends on.

    config.data.resolution, config.optimisation.lr                 in the code
    --resolution 256 --lr 1e-3, {"resolution": 256, "lr": 1e-3}    on the command line and in RUN/config.json: no groups there

A setting is defined once, by `fixed(default, help)` where a resumed run keeps it, because weights, optimizer state, word
ids or latents depend on it, or by `free(default, help)` where a resumed run may change it. There is no third way. (Those of --finetune
are in finetune_fields.py.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_type_hints

from tinyldm.config.finetune_fields import FinetuneConfig
from tinyldm.config.setting import fixed, free
from tinyldm.durations import with_zone
from tinyldm.lookup import device_name, dtype_name, fits, in_words, lookup


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, what it computes with, and how often it reports."""

    preset: str = fixed("tiny", "row of settings to start from")
    out: str = free("", "run folder (default: runs/PRESET)")
    only: str = fixed("", "train this part alone: vae. The result is RUN/vae; --vae-steps, or --budget and --deadline, say for how long")
    resume: str = free("no", "auto: continue from the newest checkpoint in the run folder, or start where there is no run yet; yes: only "
                             "continue; no: only start; or RUN, the folder of a run to continue")
    seed: int = fixed(0, "every random choice is a function of (seed, step, position in the batch)")
    device: str = free("auto", "auto, cpu, cuda (or cuda:1, ...), mps")
    dtype: str = free("auto", "autocast: auto (bf16 where the device computes it natively), bf16 (bfloat16), fp32 (float32)")
    compile: bool | None = free(None, "torch.compile the network, and the VAE while it encodes (default: on CUDA; in train.py only for "
                                      "half an hour of work or more, and not with --fsdp)")
    compile_blocks: bool = free(False, "where the network is compiled (--compile), only its repeated blocks, each kind once: the "
                                       "first step comes sooner, later ones may take a little longer")
    fsdp: bool = free(False, "several GPUs: shard weights, gradients and optimizer state over them too (FSDP2)")
    reduce_dtype: str = free("fp32", "several GPUs: gradients are sent and summed in fp32, or in bf16: half the bytes, but each sum of "
                                     "two is rounded to 8 bits (an error of up to 1/256)")
    deterministic: bool = free(False, "use only algorithms that give the same bits every time: on CUDA slower, on CPUs always on")
    log_every: int = free(20, "steps per line of log.jsonl")
    track: str = free("", "repeat the log in tensorboard or wandb (pip install tensorboard, or wandb)")
    save_every: int = free(500, "steps per checkpoint")
    keep_last: int = free(2, "number of newest checkpoints to keep")
    keep_every: int = free(0, "keep every checkpoint whose step is a multiple of this too (0: none)")
    val_every: int = free(100, "steps per validation (0: at the end only)")
    val_samples: int = fixed(128, "samples held out for validation (at most a tenth of all)")
    eval_every: int = free(0, "steps per evaluation of pictures that are drawn with the averaged weights (0: none)")
    eval_num: int = free(100, "pictures per evaluation")
    eval_metric: str = free("", "what is measured of them: prompts, fid, clip, or several as fid,clip (default: prompts for toyworld, else "
                                "fid). fid and clip: of held-out samples' captions, fid beside their pictures")
    eval_weights: list = free([], "weights of networks whose features are compared, as in inception=FILE clip=RUN (as for evaluate.py "
                                  "--weights)")
    sample_every: int = free(500, "steps per sample grid (0: none)")
    sample_prompts: str = free("", "prompts of the sample grid, separated by | (default: toyworld's own, else captions of the data)")


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions, and how they are brought to size."""

    sources: list = fixed(["toyworld"], "toyworld, folders of captioned pictures, WebDataset tars, .npz; paths, patterns or URLs, "
                          "each with a :WEIGHT where several are mixed", flag="data")
    scenes: int = fixed(12_000, "toyworld: number of scenes to draw")
    caption_key: list = fixed([], "where captions are: txt, or keys of the json or metadata, each with a :WEIGHT where several "
                              "are mixed (default: txt, else prompt, caption or text)")
    captions: list = fixed([], "for each word of --data captions for all of its pictures, separated by |, in place of their own ('': "
                           "their own)")
    resolution: int = fixed(64, "picture size in pixels", clears={"stages": {}})
    phases: dict = fixed({}, "train on several picture sizes in turn, each with its fraction of the training, as in 256=0.8 512=0.2 "
                         "(default: --resolution alone). Micro-batches keep their number of pixels, flow's shift grows with the side",
                         flag="stages", also=("phases",))
    buckets: float = fixed(0.0, "aspect buckets, of sides up to this ratio, with the square's number of tokens (0: all cropped square)")
    flip: bool = fixed(False, "encode every picture mirrored too (captions that say left and right become wrong)")
    moments: bool = fixed(False, "keep the posterior's std beside its mean; training then resamples the latents")
    keep_pictures: int = fixed(0, "keep the pictures too, for --objective repa: this many pixels per latent along each side (0: none; "
                                  "8, with a VAE that divides by 8: as they are)")
    min_side: int = fixed(0, "leave out pictures with a smaller side, in pixels")
    max_aspect: float = fixed(0.0, "leave out pictures with a larger ratio of sides (0: none)")
    min_caption: int = fixed(1, "leave out captions with fewer characters")
    max_caption: int = fixed(0, "leave out captions with more characters (0: none; the text encoder cuts off what it cannot take)")
    max_skip: float = free(0.05, "stop when a larger fraction of the samples is unusable")
    cache: list = fixed([], "latents made by prepare.py, used as they are, one per picture size (default: OUT/latents, made where "
                        "missing)")
    encode_batch_size: int = free(32, "number of pictures that the VAE encodes at once")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The VAE: a pretrained one, or how to train one first."""

    preset: str = fixed("", "row of settings for a new VAE: cifar10, kl-f4, kl-f8, kl-f16", flag="vae_preset", clears={"vae_weights": ""})
    name: str = fixed("kl", "class of a new VAE: kl, or taesd, which is smaller and faster", flag="autoencoder")
    fields: dict = fixed({}, "fields of its config (VAEConfig, TAESDConfig), as key=value", flag="vae")
    weights: str = fixed("", "pretrained VAE; empty: train one first (stage 1)", flag="vae_weights")
    init: str = fixed("", "stage 1: train on from these weights (a folder, a file or a hub id), of whatever class and size they are",
                      flag="vae_init", clears={"vae_weights": "", "vae": {}})
    objective: str = fixed("autoencoder", "stage 1: what a training step minimises: autoencoder", flag="vae_objective")
    steps: int = free(0, "stage 1: optimizer steps", flag="vae_steps")
    pictures: int = free(16_384, "stage 1, and --objective contrastive: number of pictures it trains on, in a file that need not fit "
                               "into memory", flag="vae_pictures")
    batch_size: int = free(8, "stage 1: pictures (or crops) per step", flag="vae_batch_size")
    crop: int = free(0, "stage 1: crop size in pixels (0: whole pictures)", flag="vae_crop")
    lr: float = free(3e-3, "stage 1: AdamW's learning rate", flag="vae_lr")
    muon_lr: float = free(1.5e-3, "stage 1: Muon's learning rate, for the inner convolutions", flag="vae_muon_lr")
    decay: float = free(0.6, "stage 1: fraction of the steps, at the end, over which the learning rate falls to 0", flag="vae_decay")
    optimizer: str = fixed("", "stage 1: muon or adamw (default: as --optimizer)", flag="vae_optimizer")
    ema: float = fixed(0.0, "stage 1: decay of averaged weights, which then are the result (0: none)", flag="vae_ema")
    val_every: int = free(0, "stage 1: steps per validation on pictures that are held out (--val-samples of them): loss, PSNR, "
                             "reconstructions, statistics of the latents (0: none)", flag="vae_val_every")
    early_stop: int = free(0, "--only vae: end after this number of validations without a smaller loss, with the weights that had the "
                              "smallest one (0: never)", flag="early_stop")
    loss: dict = fixed({}, "stage 1: weights of the terms of the loss, as key=value: l1 (default 1), mse (1), kl (0.0123, in units in "
                       "which latent diffusion's paper has 1e-6), lpips, gan, edge, laplacian, fft, focal_frequency, se (default 0: off)",
                       flag="vae_loss")
    lpips: list = fixed([], "stage 1: where the term lpips finds VGG16 or AlexNet, and its linear layers: hub ids, folders or files, as "
                        "in timm/vgg16.tv_in1k lpips/weights/v0.1", flag="vae_lpips")
    gan: dict = fixed({}, "stage 1: the term gan, as key=value: kind (hinge or non_saturating), start (0.5, a fraction of the training), "
                      "warmup, adaptive, width, layers, norm (batch, group or none), lr, betas, r1, lecam", flag="vae_gan")
    latents: dict = fixed({}, "stage 1: what is done to latents before they are decoded, as key=value: noise (0.1 for example), eq "
                          "(EQ-VAE: 0.5)", flag="vae_latents")
    freeze: str = fixed("", "stage 1: encoder: train the decoder alone", flag="vae_freeze")


@dataclass(frozen=True)
class TextConfig:
    """The text encoders: pretrained ones, or one trained along with the network."""

    encoder: str = fixed("clip", "which new text encoder: clip or t5", flag="text_encoder", clears={"text": {}})
    join: str = fixed("", "how the answers of text encoders are joined: single (the first one's alone), sdxl, sd3 or flux (default: as in "
                      "the model folder of --text-weights)", flag="text_join")
    fields: dict = fixed({}, "CLIPTextConfig fields, as key=value", flag="text")
    weights: str = fixed("", "pretrained text encoders (a model folder, or that of one encoder); empty: train one along",
                         flag="text_weights")
    vocab_size: int = fixed(1024, "BPE vocabulary trained on the captions, at most this many ids")


@dataclass(frozen=True)
class NetworkConfig:
    """Which network, and its size."""

    name: str = fixed("unet", "unet, dit, mmdit or flux", flag="network")
    unet: dict = fixed({}, "UNetConfig fields, as key=value")
    dit: dict = fixed({}, "DiTConfig fields, as key=value")
    fields: dict = fixed({}, "fields of the config of whichever network --network names, as key=value", flag="net")
    grad_checkpointing: bool = free(False, "keep only the blocks' inputs for the backward pass: a third more work, far less memory")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields given for the chosen network: those under its own flag, then those of --net."""
        return {"unet": self.unet, "dit": self.dit}.get(self.name, {}) | self.fields


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a training step minimises, and on which noise process."""

    name: str = fixed("denoising", "what a training step minimises: denoising, repa (alignment beside it), repa_e (and the autoencoder); "
                      "for few steps, with a --teacher: consistency, lcm, scm, mean_flow, progressive, guided, reflow, self_corrected, "
                      "dmd; diff2flow; contrastive (a CLIP)", flag="objective")
    options: dict = fixed({}, "its own options, as key=value: its class in tinyldm/objectives/ has them", flag="objective_options")
    process: str = fixed("flow", "scaled_linear, linear, cosine, betas, vp, ve, edm, flow or dynamic_flow")
    process_options: dict = fixed({}, "its options, as key=value (beta_start, betas, sigma_max, ...)")
    shift: float = fixed(1.0, "flow: shift of time towards noise")
    zero_terminal_snr: bool = fixed(False, "rescale the table so that its last level is pure noise (not for flow, which has it)")
    prediction: str = fixed("flow", "what the network predicts: eps, x0, v or flow")
    learned_variance: bool = fixed(False, "the network answers with twice the channels and learns its variance (tables only)")
    times: str = free("logit_normal", "how training times are drawn: uniform, normal, logit_normal, mode, cosmap, "
                       "u_shaped, log_normal (EDM's), ladder (NCSN's)")
    times_mean: float | None = free(None, "mean of t (normal), logit(t) (logit_normal: 0; above trains more on noise), "
                                    "log(sigma) (log_normal)")
    times_scale: float | None = free(None, "standard deviation of the same; mode: how much it favours the middle; ladder: levels")
    stratified_times: bool = free(False, "one time from every equal part of their distribution, in every batch")
    loss: str = free("mse", "mse, l1 or huber")
    huber_c: float = free(0.1, "huber: the error at which it turns from squared to absolute")
    loss_weight: str = free("none", "weight of noise levels, for eps, x0 and v: none, min_snr, soft_min_snr, p2, edm")
    min_snr_gamma: float = free(0.0, "gamma of min_snr (alone it switches that on) or soft_min_snr (0: 5)")
    p2_gamma: float = free(1.0, "gamma of p2")
    noise_offset: float = free(0.0, "offset noise: standard deviation of one more number per picture and channel, 0.1 for example "
                               "(0: none)")
    input_perturbation: float = free(0.0, "noise added to the input that the target does not contain, 0.1 for example (0: none)")
    mask_padding: bool = fixed(False, "dit: attend to captions up to their end, not to the padding; text is then encoded up to the "
                               "longest caption of a batch")
    caption_dropout: float = free(0.1, "fraction of captions replaced by the empty one, for classifier-free guidance")


@dataclass(frozen=True)
class OptimisationConfig:
    """How long to train, on what batches, with which optimizers."""

    max_steps: int = free(1000, "optimizer steps (0: as many as --budget or --deadline leave time for)",
                          clears={"budget": "", "deadline": ""})
    budget: str = free("", "running time instead, as in 7d or 1h30m, all of it counted, pauses between processes not",
                       clears={"max_steps": 0})
    deadline: str = free("", "date of the end instead, as in 2030-01-31T18:00 (local time); with --budget, whichever comes first",
                         clears={"max_steps": 0})
    batch_size: int = fixed(64, "pictures per optimizer step, over all micro-batches")
    grad_accum: int = free(1, "micro-batches per step")
    optimizer: str = fixed("muon", "muon (AdamW for all but the blocks' matrices) or adamw")
    lr: float = free(4e-3, "AdamW's peak learning rate")
    muon_lr: float = free(3e-3, "Muon's peak learning rate")
    text_lr: float = free(0.0, "learning rate of text encoders that are trained, in place of --lr; Muon's is changed by the same factor")
    weight_decay: float = free(0.0, "decoupled weight decay")
    warmup_steps: int = free(50, "steps of linear warm-up")
    decay: float = free(0.4, "fraction of the steps, at the end, over which the learning rate falls to 0")
    grad_clip: float = free(1.0, "largest gradient norm")
    ema_decay: float = free(0.995, "decay of the averaged weights, after their warm-up")
    ema_widths: list = fixed([], "averages of these widths instead, power functions of the step, as in 0.05 0.1: the first is the "
                             "model's, others can be made afterwards (python -m tinyldm.reconstruct)")
    rollback: bool = free(False, "when the loss diverges, go back to the last checkpoint and skip the batches since")


@dataclass(frozen=True)
class DrawingConfig:
    """How the model draws by default: in sample grids, and when somebody opens it."""

    sampler: str = free("dpmpp_2m", "sampler of the grids, and the model's default")
    steps: int = free(20, "its steps", flag="sample_steps")
    cfg: float = free(4.5, "its guidance scale; 1 or less is none")


@dataclass(frozen=True)
class PlanConfig:
    """What only the plan of --dry-run depends on: the GPU, and the size of the data set."""

    pictures: int = free(0, "dry run: pictures in the data set the preset is made for")
    utilisation: float = free(0.55, "dry run: fraction of the GPU's peak FLOP/s that training reaches", also=("mfu",))
    gpu_gb: float = free(32.0, "dry run: memory of the GPU, GB")
    gpu_tflops: float = free(209.5, "its bf16 peak (RTX 5090), TFLOP/s: for the dry run, and for the model FLOPs utilisation (MFU) of "
                             "a GPU that is not known")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    drawing: DrawingConfig = DrawingConfig()
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    plan: PlanConfig = PlanConfig()


class Setting(NamedTuple):
    """A field of one of the groups, as the command line and config.json see it."""

    group: str                      # attribute of Config
    name: str                       # attribute of the group
    type: Any
    help: str
    kept: bool                      # whether a resumed run keeps it
    also: tuple[str, ...]           # other names
    clears: dict[str, Any]


def _settings() -> dict[str, Setting]:
    found = {}
    for group, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind)
        for each in dataclasses.fields(kind):
            about = {key: each.metadata[key] for key in ("help", "kept", "also", "clears")}
            found[each.metadata["flag"] or each.name] = Setting(group, each.name, hints[each.name], **about)
    return found


SETTINGS: dict[str, Setting] = _settings()                      # by their names on the command line and in config.json
OTHER_NAMES = {other: name for name, setting in SETTINGS.items() for other in setting.also}
# Settings whose values have several spellings: functions that return the library's own, with which the code and config.json work.
SPELLINGS = {"device": device_name, "dtype": dtype_name, "deadline": with_zone,
             "reduce_dtype": lambda typed: dtype_name(typed, ("fp32", "bf16"), "--reduce-dtype"),
             "optimizer": lambda typed: lookup({"muon": "muon", "adamw": "adamw"}, typed.lower(), "--optimizer"),
             "vae_optimizer": lambda typed: lookup({"": "", "muon": "muon", "adamw": "adamw"}, typed.lower(), "--vae-optimizer")}


def make_config(**values: Any) -> Config:
    """A configuration from values by their flat names, as the command line and config.json give them; defaults elsewhere.
    ValueError for a name that no setting has, for a value of the wrong type, and for an unknown device, dtype or optimizer."""
    return change(Config(), **_complete(values))


def change(config: Config, **values: Any) -> Config:
    """The configuration with other values, by their flat names."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        name = OTHER_NAMES.get(name, name)
        if name not in SETTINGS:
            raise ValueError(f"there is no setting '{name}'")
        groups.setdefault(SETTINGS[name].group, {})[SETTINGS[name].name] = value
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **inside) for group, inside in groups.items()})


def flatten(config: Config) -> dict[str, Any]:
    """All settings by their flat names: what config.json holds."""
    return {name: getattr(getattr(config, setting.group), setting.name) for name, setting in SETTINGS.items()}


def current(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by their flat names: other names, and those of older config.json files, become today's."""
    values = {OTHER_NAMES.get(name, name): value for name, value in values.items()}
    if (weight := values.pop("vae_kl", None)) is not None:      # of nats, beside means over a picture's values
        side = values.get("vae_crop") or values.get("resolution", DataConfig.resolution)
        values["vae_loss"] = {"kl": weight * 3 * side**2}
    return values


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """The values with what follows from them, and older config.json files in today's form. ValueError for a value of the wrong
    type and for an unknown device, dtype or optimizer."""
    values = current(values)
    values["out"] = values.get("out") or f"runs/{values.get('preset', RunConfig.preset)}"
    if isinstance(values.get("data"), str):
        values["data"] = values["data"].split()
    if isinstance(values.get("cache"), str):
        values["cache"] = [values["cache"]] * bool(values["cache"])
    for name, value in values.items():
        if name in SETTINGS and not fits(value, SETTINGS[name].type):
            raise ValueError(f"--{name.replace('_', '-')}={value} must be {in_words(SETTINGS[name].type)}")
    values |= {name: spelled(values[name]) for name, spelled in SPELLINGS.items() if name in values}
    if (sizes := values.get("stages")) and (first := next(iter(sizes))).isdigit():
        values["resolution"] = int(first)
    return values


def phases(config: Config) -> list[Config]:
    """The configuration of every phase of training, one per picture size, in their order; `config` itself where there is one."""
    sizes = config.data.phases
    if not sizes:
        return [config]
    caches, first = config.data.cache or [None] * len(sizes), int(next(iter(sizes)))
    result = []
    for side, cache in zip(map(int, sizes), caches):
        micro_batches = min(config.optimisation.batch_size, round(config.optimisation.grad_accum * max(1.0, (side / first) ** 2)))
        result.append(change(config, resolution=side, stages={}, cache=[cache] * bool(cache), grad_accum=micro_batches,
                             shift=config.objective.shift * side / first))     # root of the ratio of tokens (arXiv:2403.03206, Eq. 23)
    return result
