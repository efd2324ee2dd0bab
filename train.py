"""Train a latent diffusion model: a VAE first (or a pretrained one), then the network on its latents.

    python train.py --preset tiny                            a whole miniature Stable Diffusion, minutes on a laptop
    python train.py --preset tiny --resume auto              go on where an interrupted run stopped
    python train.py --data "shards/*.tar" --out runs/mine    your own captioned pictures (or a folder of them, or a URL)
    python train.py --cache CACHE --vae-weights V --out ...  latents that prepare.py made before
    python train.py --preset 5090_week --dry-run             the plan of a week on one RTX 5090

Any field of tinyldm.config.Config is a flag; network fields are KEY=VALUE pairs (--unet widths=64,128,256 depth=2).
Everything lands in runs/PRESET (or --out): log.jsonl, samples/, checkpoints/. Then: python sample.py "a red fox"
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyldm.cli import guard
from tinyldm.config import Config, build, parse, split_weights

FLAGS = {"--dry-run": dict(action="store_true", help="print the plan (sizes, FLOPs, memory, hours) and stop")}

if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    CONFIG, ARGS = parse(sys.argv[1:], __doc__, FLAGS)

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.data import toyworld
from tinyldm.data.cache import Cache, write_tokens
from tinyldm.data.loader import Loader
from tinyldm.data.prepare import adopt, find_shards, prepare, some_pictures
from tinyldm.data.sources import parse_sources
from tinyldm.device import autocast, pick_device, prefer_plain_attention
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.loss import T_SAMPLERS, make_noise, make_weight, sample_losses, sample_t
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.process import PROCESSES, Process, make_process
from tinyldm.diffusion.samplers import find_sampler
from tinyldm.files import replace_folder, write_file
from tinyldm.lookup import lookup
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL
from tinyldm.pipeline import draw, encode_tokens, settings
from tinyldm.sheet import tile
from tinyldm.tokenizer import Tokenizer
from tinyldm.training import checkpoint
from tinyldm.training.autoencoder import finish_vae, train_vae
from tinyldm.training.budget import forwards, meta_networks, print_plan
from tinyldm.training.ema import EMA
from tinyldm.training.log import Log
from tinyldm.training.loop import attempt, refresh_report, resumed_from, update, write_log
from tinyldm.training.meter import Meter
from tinyldm.training.optim import make_optimizers, set_lr
from tinyldm.training.run import Interrupted, Progress, Signals, generator, write_picture
from tinyldm.training.validation import Validation
from tinyldm.vendor_loaders import scheduler
from tinyldm.vendor_loaders.folder import save_model, save_vae
from tinyldm.vendor_loaders.load import Model, load_model, load_text, load_tokenizer, load_vae


def build_networks(config: Config, vae: AutoencoderKL, captions: Iterable[str],
                   last: Path | None) -> tuple[nn.Module, CLIPText, Tokenizer]:
    """The network to train, and its text encoder: pretrained and frozen, or new and trained along. last: the checkpoint
    whose vocabulary to keep."""
    if config.text_weights:
        text = load_text(config.text_weights)
        tokenizer = load_tokenizer(config.text_weights, text.config.context_length)
    else:
        length = config.text.get("context_length", 77)
        tokenizer = Tokenizer.load(last / "model" / "tokenizer") if last else Tokenizer.train(captions, config.vocab_size, length)
        text = CLIPText(build(CLIPTextConfig, config.text | dict(
            vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id), "--text"))
    channels = dict(in_channels=vae.config.latent_channels, context_dim=text.config.width,
                    out_channels=vae.config.latent_channels * (1 + config.learned_variance))
    if config.network == "dit":
        return DiT(build(DiTConfig, config.dit | channels, "--dit")), text, tokenizer
    size = config.resolution // vae.config.downscale
    return UNet(build(UNetConfig, config.unet | channels | {"sample_size": size}, "--unet")), text, tokenizer


def make_loader(config: Config, data: Cache, tokenizer: Tokenizer, device: torch.device) -> Loader:
    """Batches of the cache, mixed as --data and --caption-key say."""
    try:
        data.check_tokens(tokenizer.fingerprint)
    except ValueError:                                         # of a cache that others use too, the run keeps them itself
        place = Path(config.out) / "tokens" if config.cache else None
        write_tokens(data.folder, tokenizer, place)
        data = Cache(data.folder, place)
    weights = [source.weight for source in parse_sources(config.data)]
    loader = Loader(data, tokenizer.fingerprint, batch_size=config.batch_size, seed=config.seed,
                    weights=weights if len(weights) > 1 and weights[0] else None, pin=device.type == "cuda", hold_out=config.val_samples,
                    caption_weights=tuple(split_weights(config.caption_key).values()) or (1.0,))
    for size, count in loader.order.never_drawn:
        print(f"{count:,} pictures of latent size {size} are never drawn: fewer than one batch of {config.batch_size}")
    return loader


def train_diffusion(config: Config, run: Path, vae: AutoencoderKL, data: Cache, device: torch.device, signals: Signals,
                    last: Path | None) -> None:
    torch.manual_seed(config.seed + 1)
    net, text, tokenizer = build_networks(config, vae, data.all_captions(), last)
    net, text = net.to(device), text.to(device)
    trained = {"net": net} if config.text_weights else {"net": net, "text": text}
    parameters = {f"{part}.{name}": p for part, module in trained.items() for name, p in module.named_parameters()}
    optimizers = make_optimizers(parameters, kind=config.optimizer, lr=config.lr, muon_lr=config.muon_lr,
                                 weight_decay=config.weight_decay)
    process = make_process(config.process, **process_options(config))
    goal = objective(config, process)
    start, meter = 0, Meter(device)
    ema = EMA(trained, config.ema_decay)
    if last:
        state = checkpoint.read_state(last)
        if state["data"] != data.digest:
            raise ValueError(f"{data.folder} has changed since {last}: put back the latents it began with, or start another run with --out")
        raw, averaged = (load_model(last / "model", device, ema=wanted) for wanted in (False, True))
        for part, module in trained.items():
            module.load_state_dict(getattr(raw, part).state_dict())
            ema.load_state_dict(part, getattr(averaged, part).state_dict())
        checkpoint.load_optimizers(last / "optimizer.safetensors", optimizers, parameters)
        start = state["step"]
        meter.load(state["meter"])
    log = Log(run / "log.jsonl", "step", start)
    model = Model(net, vae, text, tokenizer, process, config.prediction,
                  scheduler.to_config(config.process, process_options(config), config.prediction, config.network, config.sampler,
                                      config.learned_variance),
                  dict(preset=config.preset, resolution=config.resolution, sampler=config.sampler,
                       steps=config.sample_steps, cfg=config.cfg, data=" ".join(config.data),
                       mask_padding=config.mask_padding))
    loader = make_loader(config, data, tokenizer, device)
    empty = torch.from_numpy(tokenizer.encode([""]))[0]
    compiled = torch.compile(net) if (config.compile if config.compile is not None else device.type == "cuda") else net

    def save(writer: checkpoint.Writer, step: int, finished: bool) -> None:
        """Copy what changes to the host; the rest happens in the background."""
        writer.wait()                                                           # at most one copy at a time
        averaged = {part: (module, checkpoint.host_copy(ema.state_dict(part))) for part, module in trained.items()}
        raw = {part: checkpoint.host_copy(module.state_dict()) for part, module in trained.items()}
        moments = checkpoint.host_copy(checkpoint.optimizer_tensors(optimizers, parameters))

        def fill(folder: Path) -> None:
            save_model(folder / "model", net=averaged["net"], vae=run / "vae", text=averaged.get("text", text), non_ema=raw,
                       tokenizer=tokenizer, scheduler=model.scheduler, defaults=model.defaults | {"step": step})
            checkpoint.save_tensors(folder / "optimizer.safetensors", moments)

        if found := checkpoint.names(run):
            checkpoint.check_room(run, checkpoint.size_of(found[-1]))
        writer.save("step", step, fill, {"meter": meter.state(), "finished": finished, "data": data.digest})

    def losses_of(x0: Tensor, eps: Tensor, t: Tensor, mixed: Tensor, tokens: Tensor) -> Tensor:
        with autocast(device, config.dtype):
            cond = encode_tokens(text, tokens, device, config.mask_padding, cut=True)
            return sample_losses(compiled, x0, eps, t, cond, process, mixed=mixed, **goal)      # [micro-batch]

    validate = Validation(loader.cache, loader.held_out, tokenizer.fingerprint, config.seed, config.batch_size // config.grad_accum, device,
                          losses_of)
    bar, writer = Progress(config.network, start, config.max_steps, config.batch_size), checkpoint.Writer(run, config.keep_last, config.keep_every)
    for step, (_, x0, tokens) in enumerate(loader.run(start, config.max_steps), start):     # x0 [b, c, h, w]
        factor = set_lr(optimizers, step, config.max_steps, config.warmup_steps, config.decay)
        rng = generator(config.seed, 2, step)                                   # one stream for the whole global batch
        noise = make_noise(x0.shape, rng, config.noise_offset, config.input_perturbation)
        t = sample_t(config.times, len(x0), rng, config.times_mean, config.times_scale, process, config.stratified_times)
        dropped = torch.rand(len(x0), generator=rng) < config.caption_dropout
        tokens = torch.where(dropped[:, None], empty, tokens)                   # [b, context_length]
        whole = [part.to(device, non_blocking=True) for part in (x0, noise.eps, t, noise.mixed)] + [tokens]
        for micro in zip(*(part.tensor_split(config.grad_accum) for part in whole)):
            losses = losses_of(*micro)
            (losses.sum() / config.batch_size).backward()                       # a mean over the global batch, however it is split
            meter.add(losses, 1 / config.batch_size, micro[2])
        if update(list(parameters.values()), optimizers, config.grad_clip, meter):
            ema.update(step + 1)
        else:
            log.write(stage="step", step=step + 1, event="skipped", text=meter.skip(step, config.seed))
        bar.update()
        finished = step + 1 == config.max_steps
        if (step + 1) % config.log_every == 0:
            write_log(log, "step", step + 1, meter, factor, bar)
        if finished or signals.received or (step + 1) % config.save_every == 0:
            save(writer, step + 1, finished)
            refresh_report(run)
        if len(loader.held_out) and (finished or config.val_every and (step + 1) % config.val_every == 0):
            raw = validate()
            with ema.applied():
                averaged = validate()
            log.write(stage="step", step=step + 1, val_raw=raw["loss"], val_ema=averaged["loss"], val_bins=averaged["t_bins"])
        if config.sample_every and (step + 1) % config.sample_every == 0 and not finished:
            attempt("the sample grid", lambda: sample_grid(config, model, ema, run, step + 1, data))
        if signals.received and not finished:
            writer.close()
            raise Interrupted
    bar.close()
    writer.close()
    sample_grid(config, model, ema, run, config.max_steps, data)
    refresh_report(run)


def process_options(config: Config) -> dict[str, Any]:
    """What make_process takes: --shift and --zero-terminal-snr where the process has them, and --process-options."""
    takes = inspect.signature(lookup(PROCESSES, config.process, "process")).parameters
    if config.zero_terminal_snr and "zero_snr" not in takes:
        raise ValueError(f"--zero-terminal-snr is for tables, not for {config.process}: leave it out (flow ends in pure noise by itself)")
    if config.process == "betas" and not config.process_options.get("betas"):
        raise ValueError("--process betas needs them: --process-options betas=0.0001,0.0002,... from the cleanest level to the noisiest")
    named = {"shift": config.shift, "zero_snr": config.zero_terminal_snr}
    return {name: value for name, value in named.items() if name in takes} | config.process_options


def objective(config: Config, process: Process) -> dict[str, Any]:
    """How diffusion_loss measures: prediction, weight, loss."""
    name = "min_snr" if config.min_snr_gamma and config.loss_weight == "none" else config.loss_weight
    gamma = config.p2_gamma if name == "p2" else config.min_snr_gamma or None
    return dict(prediction=config.prediction, weight=make_weight(name, config.prediction, gamma, process), loss=config.loss,
                huber_c=config.huber_c)


def sample_grid(config: Config, model: Model, ema: EMA, run: Path, step: int, data: Cache) -> None:
    """A picture of fixed prompts from fixed seeds: comparable between steps and between runs."""
    spread = dict.fromkeys(data.captions(i)[0][1] for i in range(0, len(data), -(-len(data) // 8)))
    known = toyworld.PROMPTS if config.data == ["toyworld"] else list(spread)
    prompts = config.sample_prompts.split("|") if config.sample_prompts else known
    repeated = [prompt for prompt in prompts for _ in range(2)]
    model.net.eval(), model.text.eval()
    with ema.applied(), autocast(pick_device(config.device), config.dtype):
        images = draw(model, repeated, range(len(repeated)), settings(model))
    model.net.train(), model.text.train()
    write_picture(run / "samples" / f"step-{step:06d}.png", tile(images, columns=8))


# ---------------------------------------------------------------- the run


def refuse_early(config: Config) -> Config:
    """Whatever cannot work is refused here, before anything is written or trained. -> config, with what --cache decides in it."""
    find_sampler(config.sampler)
    lookup(T_SAMPLERS, config.times, "--times")
    process, pixel = make_process(config.process, **process_options(config)), torch.zeros(1, 1, 1, 1)
    for first in (grid(process, config.sample_steps)[0], process(torch.ones(1))):
        to_x0(config.prediction, pixel, pixel, first)                           # eps from pure noise
    answer = torch.zeros(1, 1 + config.learned_variance, 1, 1)
    sample_losses(lambda *told: answer, pixel, pixel, torch.ones(1), None, process, **objective(config, process))
    if not config.cache and not (Path(config.out) / "latents" / "index.json").exists():
        find_shards(config)                                                     # the sources are there
    if config.vae_weights:
        vae = load_vae(config.vae_weights)                                      # downloaded, whole and of the right kind
        config = adopt(config, Cache(Path(config.cache)), vae) if config.cache else config
    if config.text_weights:
        load_text(config.text_weights), load_tokenizer(config.text_weights)
    if not config.vae_weights:
        networks = meta_networks(config)                                        # shapes without values: sizes that do
        for size in {config.resolution, config.vae_crop or config.resolution}:  # not divide fail here, in a second
            for part, forward in forwards(networks, size).items():
                if part != "net" or size == config.resolution:
                    forward()
    return config


def prepare_run(config: Config) -> Path:
    """The run folder, new or resumed, with the resolved config in it."""
    run = Path(config.out)
    if config.resume == "no" and ((run / "vae").exists() or checkpoint.names(run)):
        raise ValueError(f"{run} holds a run already: continue it with --resume auto, or name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.lock(run)
    write_file(run / "config.json", json.dumps(dataclasses.asdict(config) | {"resume": "no"}, indent=1))
    print(f"run folder {run}, configuration in {run / 'config.json'}")
    return run


def prepare_data(config: Config, run: Path, device: torch.device, signals: Signals, last: Path | None) -> tuple[AutoencoderKL, Cache]:
    """The frozen VAE and the latents of all pictures, each made only where it is not there yet. last: the checkpoint to go
    on from."""
    if not (run / "vae").is_dir():
        if config.vae_weights:
            replace_folder(run / "vae", lambda folder: save_vae(folder, load_vae(config.vae_weights)))
        else:
            pictures, faults = some_pictures(config, config.vae_pictures, signals.check)
            images = np.stack([item.image for item in pictures])
            del pictures
            print(f"the VAE trains on {len(images):,} pictures" + f" ({sum(faults.values()):,} unusable ones passed over)" * bool(faults))
            finish_vae(config, run, train_vae(config, run, images, device, signals, last), images, device)
    vae = load_vae(run / "vae", device)
    if config.cache:
        return vae, Cache(Path(config.cache))
    if last and last.name.startswith("step"):                  # whatever has become of the sources since
        return vae, Cache(run / "latents")
    report = prepare(config, run / "latents", vae, device, check=signals.check)
    if report is None:
        raise ValueError(f"other processes are still preparing {run / 'latents'}: run this again when they are done")
    print(report)
    return vae, Cache(run / "latents")


def main() -> None:
    config = CONFIG
    if ARGS.dry_run:
        return print_plan(config)
    device = pick_device(config.device)
    if device.type == "cpu":
        prefer_plain_attention()
    config = refuse_early(config)
    run, signals = prepare_run(config), Signals()
    try:
        last = resumed_from(config, run)
        vae, data = prepare_data(config, run, device, signals, last)
        train_diffusion(config, run, vae, data, device, signals, last if last and last.name.startswith("step") else None)
    except Interrupted:
        print(f"saved; continue with: python train.py --out {run} --resume auto")
        sys.exit(128 + signals.received)
    last = run / "samples" / f"step-{config.max_steps:06d}.png"
    print(f"done: look at {last}, and draw what you like: python sample.py \"a red fox\" --model {run}")


if __name__ == "__main__":
    guard(main)
