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
from tinyldm.data.encoding import posterior
from tinyldm.data.loader import Loader
from tinyldm.data.prepare import adopt, find_shards, prepare, some_pictures
from tinyldm.data.sources import parse_sources
from tinyldm.device import autocast, pick_device, prefer_plain_attention
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.loss import T_SAMPLERS, diffusion_loss, make_noise, make_weight, sample_t
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.process import PROCESSES, Process, make_process
from tinyldm.diffusion.samplers import find_sampler
from tinyldm.lookup import lookup
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.files import replace_folder, write_file
from tinyldm.pipeline import draw, encode_tokens, settings, to_bytes, to_pixels
from tinyldm.sheet import tile
from tinyldm.tokenizer import Tokenizer
from tinyldm.training import checkpoint
from tinyldm.training.budget import forwards, meta_networks, print_plan
from tinyldm.training.ema import EMA
from tinyldm.training.log import Log
from tinyldm.training.optim import make_optimizers, set_lr
from tinyldm.training.run import Interrupted, Progress, Signals, generator, write_picture
from tinyldm.vendor_loaders import scheduler
from tinyldm.vendor_loaders.folder import save_model, save_vae
from tinyldm.vendor_loaders.load import Model, load_model, load_text, load_tokenizer, load_vae, load_weights


def update(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], clip: float, losses: Tensor) -> None:
    """One optimizer step on the gradients at hand, clipped to a global norm."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    losses += 0 * norm                                        # a gradient that is not finite shows in the loss, unasked
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def finite(losses: Tensor, step: int) -> float:
    """The summed loss as a number; an error before a broken network is logged or saved."""
    if not (value := losses.item()) < float("inf"):
        raise ValueError(f"loss or gradient is not finite near step {step}: go on with --resume auto and lower --lr, --muon-lr")
    return value


def write_log(log: Log, stage: str, step: int, losses: Tensor, lr_factor: float, bar: Progress, config: Config) -> None:
    mean = finite(losses, step) / config.log_every
    log.write(stage=stage, step=step, loss=mean, lr_factor=lr_factor, **bar.report(mean))
    losses.zero_()


def restore_counters(saved: Path, losses: Tensor) -> int:
    """The step to go on from; `losses` gets back what was summed before it."""
    state = checkpoint.read_state(saved)
    losses.fill_(state["losses"])
    return state["step"]


# ---------------------------------------------------------------- stage 1: the VAE


def random_crops(images: np.ndarray, size: int, count: int, seed: int, step: int) -> Tensor:
    """count crops of size x size (0: whole pictures) -> float32 [count, 3, size, size] in [-1, 1]."""
    rng = np.random.default_rng([seed, 1, step])
    chosen = rng.integers(len(images), size=count)
    side = images.shape[1]
    size = min(size or side, side)
    ys, xs = rng.integers(side - size + 1, size=(2, count))
    return to_pixels(np.stack([images[i, y : y + size, x : x + size] for i, y, x in zip(chosen, ys, xs)]))


def train_vae(config: Config, run: Path, images: np.ndarray, device: torch.device, signals: Signals) -> AutoencoderKL:
    """L1 + MSE + a small KL (arXiv:2112.10752, Eq. 25 without the adversary), on random crops."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(build(VAEConfig, config.vae | {"sample_size": config.resolution}, "--vae")).to(device)
    parameters = dict(vae.named_parameters())
    optimizers = make_optimizers(parameters, kind=config.optimizer, lr=config.vae_lr, muon_lr=config.vae_muon_lr)
    start, losses = 0, torch.zeros((), device=device)         # summed since the last line of the log
    if last := latest(config, run, "vae"):
        load_weights(vae, last / "vae" / "diffusion_pytorch_model.safetensors")
        checkpoint.load_optimizers(last / "optimizer.safetensors", optimizers, parameters)
        start = restore_counters(last, losses)
    log = Log(run / "log.jsonl", "vae", start)

    def fill(folder: Path) -> None:
        save_vae(folder / "vae", vae)
        checkpoint.save_optimizers(folder / "optimizer.safetensors", optimizers, parameters)

    bar = Progress("VAE", start, config.vae_steps, config.vae_batch_size)
    for step in range(start, config.vae_steps):
        factor = set_lr(optimizers, step, config.vae_steps, config.warmup_steps, decay=0.6)
        pixels = random_crops(images, config.vae_crop, config.vae_batch_size, config.seed, step).to(device)
        with autocast(device, config.dtype):
            posterior = vae.encode(pixels)
            noise = torch.randn(posterior.mean.shape, generator=generator(config.seed, 1, step)).to(device)
            decoded = vae.decode(posterior.sample(noise))
        error = decoded.float() - pixels
        loss = error.abs().mean() + error.square().mean() + config.vae_kl * posterior.kl().mean()
        loss.backward()
        losses += loss.detach()
        update(list(parameters.values()), optimizers, config.grad_clip, losses)
        bar.update()
        if (step + 1) % config.log_every == 0:
            write_log(log, "vae", step + 1, losses, factor, bar, config)
        if signals.received or (step + 1) % config.save_every == 0:
            checkpoint.write(run, "vae", step + 1, fill, {"losses": finite(losses, step)}, config.keep_last)
        if signals.received:
            raise Interrupted
    bar.close()
    return vae


def finish_vae(config: Config, run: Path, vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Measure the latents' mean and scale, make them part of the VAE, save it and a picture of what it loses."""
    z = torch.cat([posterior(vae, batch, device, config.dtype).mean for batch in np.array_split(images[:2048], -(-len(images) // 64))])
    mean = z.mean((0, 2, 3))
    vae.centre(mean)
    scale = 1 / float((z - mean[:, None, None]).std())
    vae.config = dataclasses.replace(vae.config, scaling_factor=scale)
    shown = images[:8]
    with torch.no_grad():
        decoded = to_bytes(vae.decode(vae.encode(to_pixels(shown).to(device)).mean))
    psnr = -10 * np.log10((((decoded.astype(float) - shown) / 255) ** 2).mean(axis=(1, 2, 3))).mean()
    write_picture(run / "samples" / "vae.png", tile(np.concatenate([shown, decoded]), columns=8))
    print(f"VAE: {psnr:.1f} dB on 8 pictures, scaling factor {vae.config.scaling_factor:.4f}")
    replace_folder(run / "vae", lambda folder: save_vae(folder, vae))


# ---------------------------------------------------------------- stage 2: diffusion


def build_networks(config: Config, vae: AutoencoderKL, captions: Iterable[str]) -> tuple[nn.Module, CLIPText, Tokenizer]:
    """The network to train, and its text encoder: pretrained and frozen, or new and trained along."""
    if config.text_weights:
        text = load_text(config.text_weights)
        tokenizer = load_tokenizer(config.text_weights, text.config.context_length)
    else:
        length = config.text.get("context_length", 77)
        tokenizer = Tokenizer.train(captions, config.vocab_size, length)
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
    write_tokens(data.folder, tokenizer)
    weights = [source.weight for source in parse_sources(config.data)]
    loader = Loader(data, tokenizer.fingerprint, batch_size=config.batch_size, seed=config.seed,
                    weights=weights if len(weights) > 1 and weights[0] else None, pin=device.type == "cuda",
                    caption_weights=tuple(split_weights(config.caption_key).values()) or (1.0,))
    for size, count in loader.order.never_drawn:
        print(f"{count:,} pictures of latent size {size} are never drawn: fewer than one batch of {config.batch_size}")
    return loader


def train_diffusion(config: Config, run: Path, vae: AutoencoderKL, data: Cache, device: torch.device, signals: Signals) -> None:
    torch.manual_seed(config.seed + 1)
    net, text, tokenizer = build_networks(config, vae, data.all_captions())
    net, text = net.to(device), text.to(device)
    trained = {"net": net} if config.text_weights else {"net": net, "text": text}
    parameters = {f"{part}.{name}": p for part, module in trained.items() for name, p in module.named_parameters()}
    optimizers = make_optimizers(parameters, kind=config.optimizer, lr=config.lr, muon_lr=config.muon_lr,
                                 weight_decay=config.weight_decay)
    process = make_process(config.process, **process_options(config))
    goal = objective(config, process)
    start, losses = 0, torch.zeros((), device=device)         # summed since the last line of the log
    ema = EMA(trained, config.ema_decay)
    if last := latest(config, run, "step"):
        raw, averaged = (load_model(last / "model", device, ema=wanted) for wanted in (False, True))
        for part, module in trained.items():
            module.load_state_dict(getattr(raw, part).state_dict())
            ema.load_state_dict(part, getattr(averaged, part).state_dict())
        checkpoint.load_optimizers(last / "optimizer.safetensors", optimizers, parameters)
        start = restore_counters(last, losses)
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

    def fill(folder: Path) -> None:
        averaged = {part: (module, ema.state_dict(part)) for part, module in trained.items()}
        save_model(folder / "model", net=averaged["net"], vae=run / "vae", text=averaged.get("text", text),
                   tokenizer=tokenizer, scheduler=model.scheduler, defaults=model.defaults | {"step": step + 1},
                   non_ema={part: module.state_dict() for part, module in trained.items()})
        checkpoint.save_optimizers(folder / "optimizer.safetensors", optimizers, parameters)

    bar = Progress(config.network, start, config.max_steps, config.batch_size)
    for step, (_, x0, tokens) in enumerate(loader.run(start, config.max_steps), start):     # x0 [b, c, h, w]
        factor = set_lr(optimizers, step, config.max_steps, config.warmup_steps, config.decay)
        rng = generator(config.seed, 2, step)                                   # one stream for the whole global batch
        noise = make_noise(x0.shape, rng, config.noise_offset, config.input_perturbation)
        t = sample_t(config.times, len(x0), rng, config.times_mean, config.times_scale, process, config.stratified_times)
        dropped = torch.rand(len(x0), generator=rng) < config.caption_dropout
        tokens = torch.where(dropped[:, None], empty, tokens)                   # [b, context_length]
        whole = [part.to(device, non_blocking=True) for part in (x0, noise.eps, t, noise.mixed)] + [tokens]
        for *micro, mixed, words in zip(*(part.chunk(config.grad_accum) for part in whole)):
            with autocast(device, config.dtype):
                cond = encode_tokens(text, words, device, config.mask_padding, cut=True)
                part = diffusion_loss(compiled, *micro, cond, process, mixed=mixed, **goal) / config.grad_accum
            part.backward()
            losses += part.detach()                                             # no .item(): no waiting for the device
        update(list(parameters.values()), optimizers, config.grad_clip, losses)
        ema.update(step + 1)
        bar.update()
        finished = step + 1 == config.max_steps
        if (step + 1) % config.log_every == 0:
            write_log(log, "step", step + 1, losses, factor, bar, config)
        if finished or signals.received or (step + 1) % config.save_every == 0:
            state = {"losses": finite(losses, step), "finished": finished}
            checkpoint.write(run, "step", step + 1, fill, state, config.keep_last)
        if config.sample_every and (step + 1) % config.sample_every == 0 and not finished:
            sample_grid(config, model, ema, run, step + 1, data)
        if signals.received and not finished:
            raise Interrupted
    bar.close()
    sample_grid(config, model, ema, run, config.max_steps, data)


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


def latest(config: Config, run: Path, stage: str) -> Path | None:
    """The checkpoint to go on from, if it is of this stage."""
    found = checkpoint.names(run) if config.resume == "auto" else []
    return found[-1] if found and found[-1].name.startswith(stage) else None


def refuse_early(config: Config) -> None:
    """Whatever cannot work is refused here, before anything is written or trained: names, sizes, fields, weights."""
    find_sampler(config.sampler)
    lookup(T_SAMPLERS, config.times, "--times")
    process, pixel = make_process(config.process, **process_options(config)), torch.zeros(1, 1, 1, 1)
    for first in (grid(process, config.sample_steps)[0], process(torch.ones(1))):
        to_x0(config.prediction, pixel, pixel, first)                           # eps from pure noise
    answer = torch.zeros(1, 1 + config.learned_variance, 1, 1)
    diffusion_loss(lambda *told: answer, pixel, pixel, torch.ones(1), None, process, **objective(config, process))
    if not config.cache and not (Path(config.out) / "latents" / "index.json").exists():
        find_shards(config)                                                     # the sources are there
    if config.vae_weights:
        load_vae(config.vae_weights)                                            # downloaded, whole and of the right kind
    if config.text_weights:
        load_text(config.text_weights), load_tokenizer(config.text_weights)
    if not config.vae_weights:
        networks = meta_networks(config)                                        # shapes without values: sizes that do
        for size in {config.resolution, config.vae_crop or config.resolution}:  # not divide fail here, in a second
            for part, forward in forwards(networks, size).items():
                if part != "net" or size == config.resolution:
                    forward()


def prepare_run(config: Config) -> Path:
    """The run folder, new or resumed, with the resolved config in it."""
    run = Path(config.out)
    if config.resume == "no" and ((run / "vae").exists() or checkpoint.names(run)):
        raise ValueError(f"{run} holds a run already: continue it with --resume auto, or name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.json", json.dumps(dataclasses.asdict(config) | {"resume": "no"}, indent=1))
    print(f"run folder {run}, configuration in {run / 'config.json'}")
    return run


def prepare_data(config: Config, run: Path, device: torch.device, signals: Signals) -> tuple[AutoencoderKL, Cache]:
    """The frozen VAE and the latents of all pictures, each made only where it is not there yet."""
    if not (run / "vae").is_dir():
        if config.vae_weights:
            replace_folder(run / "vae", lambda folder: save_vae(folder, load_vae(config.vae_weights)))
        else:
            pictures, faults = some_pictures(config, config.vae_pictures)
            images = np.stack([item.image for item in pictures])
            del pictures
            print(f"the VAE trains on {len(images):,} pictures" + f" ({sum(faults.values()):,} unusable ones passed over)" * bool(faults))
            finish_vae(config, run, train_vae(config, run, images, device, signals), images, device)
    vae = load_vae(run / "vae", device)
    if config.cache:
        return vae, Cache(Path(config.cache))
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
    refuse_early(config)
    run, signals = prepare_run(config), Signals()
    try:
        vae, data = prepare_data(config, run, device, signals)
        config = adopt(config, data, vae)
        train_diffusion(config, run, vae, data, device, signals)
    except Interrupted:
        print(f"saved; continue with: python train.py --out {run} --resume auto")
        sys.exit(128 + signals.received)
    last = run / "samples" / f"step-{config.max_steps:06d}.png"
    print(f"done: look at {last}, and draw what you like: python sample.py \"a red fox\" --model {run}")


if __name__ == "__main__":
    guard(main)
