"""What other programs call our flags: diffusers' and sd-scripts' (kohya's) trainers, AUTOMATIC1111's web UI, CompVis' scripts.

A name that means the same thing is understood as ours. One that means something else, or nothing here, is refused with what to type.
`-` and `_` are alike, as in all of our flags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Same(NamedTuple):
    """Another name of the same thing."""

    ours: str
    values: Mapping[str, str] = {}          # other names of its values


class Differs(NamedTuple):
    """A name of another thing, and what to type instead."""

    advice: str


PRECISIONS = {"no": "fp32", "full": "fp32", "half": "fp16"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
ALWAYS = "is not needed: it is always so here; leave it out"
EPOCHS = "is not known: training is counted in steps, --max-steps N, or in time, --budget 20m (an epoch is pictures / --batch-size steps)"
WORKERS = "is not needed: latents are encoded once and then read by a thread; leave it out"
MEMORY = "is not known: use --offload (auto, parts or blocks)"

BOTH: dict[str, Same | Differs] = {         # in every script
    "--output-dir": Same("--out"), "--output": Same("--out"), "-o": Same("--out"),
    "--pretrained-model-name-or-path": Same("--model"), "--ckpt": Same("--model"), "--model-id": Same("--model"),
    "--mixed-precision": Same("--dtype", PRECISIONS), "--precision": Same("--dtype", PRECISIONS),
    "--guidance-scale": Same("--cfg"), "--cfg-scale": Same("--cfg"),
    "--scheduler": Differs("is not known: name a --sampler (euler, dpmpp_2m, ...) and a --schedule (karras, trailing, ...)"),
    "--fp16": Differs("is not known: use --dtype"), "--bf16": Differs("is not known: use --dtype bf16"),
    "--enable-xformers-memory-efficient-attention": Differs(ALWAYS), "--xformers": Differs(ALWAYS), "--allow-tf32": Differs(ALWAYS),
}
TRAINING: dict[str, Same | Differs] = {     # in train.py and prepare.py
    "--learning-rate": Same("--lr"),
    "--train-batch-size": Same("--batch-size"),             # per process and micro-batch: config/command_line.py refuses where that matters
    "--max-train-steps": Same("--max-steps"),
    "--gradient-accumulation-steps": Same("--grad-accum"),
    "--gradient-checkpointing": Same("--grad-checkpointing"),
    "--max-grad-norm": Same("--grad-clip"),
    "--lr-warmup-steps": Same("--warmup-steps"),
    "--adam-weight-decay": Same("--weight-decay"),
    "--optimizer-type": Same("--optimizer"),
    "--resume-from-checkpoint": Same("--resume", {"latest": "auto"}),
    "--report-to": Same("--track"), "--log-with": Same("--track"),
    "--checkpointing-steps": Same("--save-every"), "--save-every-n-steps": Same("--save-every"),
    "--checkpoints-total-limit": Same("--keep-last"),
    "--validation-prompt": Same("--sample-prompts"), "--validation-steps": Same("--sample-every"),
    "--sample-every-n-steps": Same("--sample-every"),
    "--train-data-dir": Same("--data"), "--instance-data-dir": Same("--data"),
    "--pretrained-vae-model-name-or-path": Same("--vae-weights"),
    "--instance-prompt": Same("--instance"), "--class-prompt": Same("--class"), "--num-class-images": Same("--class-pictures"),
    "--prior-loss-weight": Same("--prior-weight"), "--train-text-encoder": Same("--train-text"),
    "--placeholder-token": Same("--token"), "--initializer-token": Same("--initial"), "--num-vectors": Same("--vectors"),
    "--network-dim": Same("--rank"), "--network-alpha": Same("--alpha"), "--lora-alpha": Same("--alpha"),
    "--snr-gamma": Same("--min-snr-gamma"), "--prediction-type": Same("--prediction", PREDICTIONS),
    "--proportion-empty-prompts": Same("--caption-dropout"), "--caption-dropout-rate": Same("--caption-dropout"),
    "--epochs": Differs(EPOCHS), "--num-train-epochs": Differs(EPOCHS), "--max-train-epochs": Differs(EPOCHS),
    "--num-workers": Differs(WORKERS), "--dataloader-num-workers": Differs(WORKERS), "--max-data-loader-n-workers": Differs(WORKERS),
    "--steps": Differs("can mean two things: --max-steps are those of training, --sample-steps those of a sample grid"),
    "--lr-scheduler": Differs("is not known: the rate rises over --warmup-steps, and falls over the last fraction of the steps, --decay"),
    "--dataset-name": Differs("is not known: name files on the hub, --data \"hf://datasets/OWNER/NAME/*.tar\""),
    "--image-column": Differs("is not known: file_name names the picture (docs/data.md)"),
    "--caption-column": Same("--caption-key"),
    "--random-flip": Differs("is not known: --flip encodes every picture mirrored, too"),
    "--center-crop": Differs(ALWAYS), "--use-ema": Differs(ALWAYS), "--cache-latents": Differs(ALWAYS),
    "--enable-bucket": Differs("is not known: --buckets 2 has aspect buckets of sides up to 2 : 1"),
    "--with-prior-preservation": Differs("is not known: --class \"a photo of a dog\" switches it on"),
    "--network-module": Differs("is not known: --finetune lora"),
    "--use-8bit-adam": Differs("is not known: no optimizer has 8-bit states here; leave it out"),
    "--logging-dir": Differs("is not known: log.jsonl and report.html are in the run's folder, --out"),
    "--revision": Differs("is not known here: write the revision behind the hub id, OWNER/NAME@REVISION"),
}
DRAWING: dict[str, Same | Differs] = {      # in scripts that draw or measure, and in those of files
    "--num-images-per-prompt": Same("--num-images"), "--batch-count": Same("--num-images"), "--n-samples": Same("--num-images"),
    "--ddim-steps": Same("--steps"), "--sampling-steps": Same("--steps"), "--sample-steps": Same("--steps"),
    "--sampling-method": Same("--sampler"), "--sampler-name": Same("--sampler"),
    "--image": Same("--init-image"), "--init-img": Same("--init-image"),
    "--mask-image": Same("--mask"), "--denoising-strength": Same("--strength"),
    "--negative": Same("--negative-prompt"), "--ddim-eta": Same("--eta"),
    "--w": Same("--width"), "--h": Same("--height"), "-W": Same("--width"), "-H": Same("--height"),
    "--lora-weights": Same("--lora"), "--textual-inversion": Same("--embedding"),
    "--vae-weights": Same("--vae"),
    "--enable-model-cpu-offload": Differs(MEMORY), "--lowvram": Differs(MEMORY), "--medvram": Differs(MEMORY),
    "--enable-sequential-cpu-offload": Differs(MEMORY),
}


def ours(flag: str, known: Collection[str]) -> Same | Differs | None:
    """What a flag, spelt with hyphens, is in a script with the `known` flags; None where it is no other name of one."""
    if flag in known:
        return None
    found = (TRAINING if {"--lr", "--encode-batch-size"} & set(known) else DRAWING).get(flag) or BOTH.get(flag)
    return None if isinstance(found, Same) and found.ours not in known else found
