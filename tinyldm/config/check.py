"""Values that cannot work, refused before anything is loaded or written. (Names of networks, samplers and the like are
looked up in their tables later, which need torch: training/preflight.py.)"""

from __future__ import annotations

import math

from tinyldm.cli import LARGEST, check_scale, check_seed, check_steps
from tinyldm.config.fields import Config, flatten
from tinyldm.config.finetune import check_finetune
from tinyldm.durations import parse_date, parse_duration
from tinyldm.lookup import fits, lookup
from tinyldm.unicode import check_unicode

AT_LEAST = {name: 1 for name in (
    "batch_size", "grad_accum", "resolution", "save_every", "keep_last", "log_every", "scenes", "sample_steps", "vae_batch_size",
    "vae_pictures", "encode_batch_size")} | {name: 0 for name in (
    "seed", "vae_crop", "warmup_steps", "sample_every", "weight_decay", "min_snr_gamma", "noise_offset",
    "input_perturbation", "min_side", "max_aspect", "min_caption", "max_caption", "buckets", "val_every", "val_samples", "eval_every",
    "keep_every", "max_steps", "vae_val_every", "early_stop", "keep_pictures")} | {"eval_num": 2}
POSITIVE = ("lr", "muon_lr", "vae_lr", "vae_muon_lr", "grad_clip", "shift", "huber_c", "p2_gamma")
FRACTIONS = ("utilisation", "caption_dropout", "decay", "vae_decay", "vae_ema", "ema_decay", "max_skip")


def flag(name: str) -> str:
    """A setting's name as it is typed: grad_accum -> --grad-accum."""
    return "--" + name.replace("_", "-")


def check(config: Config) -> None:
    """ValueError, in one line with the fix, for the first value that cannot work."""
    values = flatten(config)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):           # JSON, in which settings are stored, has no such numbers
            raise ValueError(f"{flag(name)} {value} must be a finite number")
    counted = not config.autoencoder.weights and not (config.run.only and (config.optimisation.budget or config.optimisation.deadline))
    described = int(not config.finetune.kind)               # otherwise 0 stands for what the model says
    at_least = AT_LEAST | {"vae_steps": int(counted) * described, "resolution": described, "sample_steps": described}
    for name, smallest in at_least.items():
        if not smallest <= values[name] < math.inf:
            raise ValueError(f"{flag(name)} {values[name]} must be at least {smallest}")
    check_seed(values["seed"])
    check_scale(values["cfg"], "--cfg")
    if values["sample_steps"]:                              # 0: as the model of --finetune says
        check_steps(values["sample_steps"], "--sample-steps")
    for side in (values["resolution"], values["vae_crop"], *(int(side) for side in values["stages"] if side.isdecimal())):
        if side > LARGEST:
            raise ValueError(f"pictures of {side} pixels on a side are too large: {LARGEST} at most")
    for name in POSITIVE:
        if not 0 < values[name] < math.inf:
            raise ValueError(f"{flag(name)} {values[name]} must be a positive number")
    for name in FRACTIONS:
        if not 0 <= values[name] <= 1:
            raise ValueError(f"{flag(name)} {values[name]} must lie between 0 and 1")
    check_objective(config)
    check_autoencoder(config)
    check_data(config)
    check_length(config)
    check_finetune(config)


def check_objective(config: Config) -> None:
    """Settings of the loss that exclude each other."""
    objective = config.objective
    # Beyond 1.75, mode is no distribution. A ladder of one level has no other end.
    low, high = {"mode": (-1, 1.75), "ladder": (2, 1e6)}.get(objective.times, (1e-9, 1e9))
    if objective.times_scale is not None and not low <= objective.times_scale <= high:
        raise ValueError(f"--times-scale {objective.times_scale} must lie between -1 and 1.75 for mode, be 2 or more "
                         "levels for ladder, be a positive number else")
    if objective.min_snr_gamma and objective.loss_weight in ("p2", "edm"):
        raise ValueError("--min-snr-gamma is for min_snr and soft_min_snr, not for --loss-weight "
                         f"{objective.loss_weight}: leave one out")


def check_autoencoder(config: Config) -> None:
    """Settings of the first stage that need or exclude each other."""
    vae, only = config.autoencoder, config.run.only and lookup({"vae": "vae"}, config.run.only, "--only")
    wrong = {
        "--vae-weights is for a VAE that is not trained: leave it out, or train on from it with --vae-init":
            vae.weights and (only or vae.init),
        "--vae-init brings the fields of its VAE along: leave out --vae": vae.init and vae.fields,
        "--vae-freeze encoder trains the decoder of a VAE that exists: name it with --vae-init": vae.freeze and not vae.init,
        "--early-stop is for --only vae": vae.early_stop and not only,
        "--early-stop needs validations: add --vae-val-every 100": vae.early_stop and not vae.val_every,
        "--fsdp shards the network of the second stage, so there is nothing to shard with --only vae: leave it out":
            only and config.run.fsdp,
    }
    for text, given in wrong.items():
        if given:
            raise ValueError(text)


def check_data(config: Config) -> None:
    """Captions, sizes and caches."""
    data = config.data
    check_unicode(config.run.sample_prompts, "--sample-prompts ")
    for name in ("instance", "class_prompt", "token", "initial"):
        check_unicode(getattr(config.finetune, name), f"{flag(name)} ")
    check_unicode(config.run.out, "--out ")                 # safetensors opens no file in such a folder
    split_weights(data.caption_key)
    if 0 < data.buckets < 1 or 0 < data.max_aspect < 1:
        raise ValueError("--buckets and --max-aspect are ratios of the longer side to the shorter: 1 or more (0: off)")
    sizes = data.phases or {str(data.resolution or 1): 1.0}     # 0: as the model of --finetune says
    for side, fraction in sizes.items():
        if not (side.isdigit() and int(side) and fits(fraction, float) and 0 < fraction < math.inf):
            raise ValueError(f"--stages {side}={fraction} is not a picture size and its fraction of the training: for example "
                             "--stages 256=0.8 512=0.2")
    if data.cache and len(data.cache) != len(sizes):
        raise ValueError(f"--cache names {len(data.cache)} of the caches of {len(sizes)} picture sizes ({', '.join(sizes)} px): name "
                         "one for each")
    if data.captions and len(data.captions) != len(data.sources):
        raise ValueError(f"--captions has {len(data.captions)} words for {len(data.sources)} sources in --data: give one for each, '' for "
                         "a source that has captions of its own")
    if data.captions and data.cache:
        raise ValueError("--captions goes with --data: the captions of --cache are in it")
    if data.cache and not config.autoencoder.weights and not config.finetune.kind:
        raise ValueError("--cache goes with the VAE that made it: name that with --vae-weights (the cache's settings.json says which)")


def check_length(config: Config) -> None:
    """How long to train, and on how many pictures per step."""
    length = config.optimisation
    if config.run.compile_blocks and config.run.compile is False:
        raise ValueError("--compile-blocks says how to compile: leave out --no-compile")
    if bool(length.max_steps) == bool(length.budget or length.deadline):
        raise ValueError("a run ends by --max-steps or by time (--budget, --deadline): give one of the two")
    for name, value, read in (("budget", length.budget, parse_duration), ("deadline", length.deadline, parse_date)):
        if value:
            try:
                read(value)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
    if length.text_lr < 0:
        raise ValueError(f"--text-lr {length.text_lr} is negative: leave it out, and text encoders are trained with --lr")
    if length.text_lr and not (config.finetune.trains_text if config.finetune.kind else not config.text.weights):
        raise ValueError("--text-lr is for text encoders that are trained, and these are frozen: "
                         f"{'add --train-text' if config.finetune.kind else 'leave it out'}")
    if length.batch_size < length.grad_accum:
        raise ValueError(f"--batch-size {length.batch_size} cannot be divided into --grad-accum {length.grad_accum} micro-batches")


def split_weights(words: list[str]) -> dict[str, float]:
    """["dense:0.75", "short:0.25"] -> {"dense": 0.75, "short": 0.25}; without weights each is 1."""
    result = {}
    for word in words:
        name, colon, weight = word.partition(":")
        try:
            result[name] = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(f"--caption-key takes KEY or KEY:WEIGHT, got '{word}': for example --caption-key dense:0.75 "
                             "short:0.25") from None
        if not 0 < result[name] < math.inf:
            raise ValueError(f"--caption-key {word}: the weight must be a positive number")
    if len(result) < len(words) or len({":" in word for word in words}) > 1:
        raise ValueError(f"--caption-key {' '.join(words)}: name every key once, and give each a weight or none")
    return result


