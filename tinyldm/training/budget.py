"""The plan of a run, before anything is loaded or written: parameters, FLOPs, memory, hours, disk.

The networks are built on the meta device, shapes without values: any machine plans a run of any size in seconds.
FLOPs are those of matrix products and convolutions, two per multiply-add; training counts as three forward passes.
Activations are an estimate (see Kept), hours are projections from a share of the GPU's peak. A GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.config import Config, build
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.training.optim import muon_matrices

RESERVE = 1.5e9        # estimate: CUDA context, workspaces, fragmentation
PARTITIONER = 1.07     # torch.compile (2.13) keeps this much more than Kept counts: traced, for the DiT and the U-Net
EAGER = 1.6            # estimate: and this much more again without it, when every cast and norm keeps its own tensors
ENCODE_MFU = 0.4       # estimate: share of the peak that the VAE's encoder reaches


class Networks(NamedTuple):
    net: nn.Module
    text: CLIPText
    vae: AutoencoderKL


def meta_networks(config: Config) -> Networks:
    """What train.py would build or load. Published weights are taken to have the shapes of Stable Diffusion 1's."""
    vae = VAEConfig() if config.vae_weights else build(VAEConfig, config.vae, "--vae")
    text = (CLIPTextConfig(activation="gelu") if config.text_weights
            else build(CLIPTextConfig, config.text | {"vocab_size": config.vocab_size}, "--text"))
    channels = dict(in_channels=vae.latent_channels, out_channels=vae.latent_channels * (1 + config.learned_variance),
                    context_dim=text.width)
    with torch.device("meta"):
        net = (DiT(build(DiTConfig, config.dit | channels, "--dit")) if config.network == "dit"
               else UNet(build(UNetConfig, config.unet | channels, "--unet")))
        return Networks(net, CLIPText(text), AutoencoderKL(vae))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def forwards(networks: Networks, resolution: int, batch: int = 1) -> dict[str, Callable[[], object]]:
    """A forward pass of each part, on pictures of this size."""
    (net, text, vae), f = networks, networks.vae.config.downscale
    if resolution % f:
        raise ValueError(f"resolution {resolution} is not a multiple of the VAE's {f}: use {-(-resolution // f) * f}")
    x = empty(batch, vae.config.latent_channels, resolution // f, resolution // f)
    ids = empty(batch, text.config.context_length, dtype=torch.long)
    cond = Cond(empty(*ids.shape, text.config.width))
    return {"net": lambda: net(x, empty(batch), cond), "text": lambda: text(ids),
            "encode": lambda: vae.encode(empty(batch, 3, resolution, resolution)), "decode": lambda: vae.decode(x)}


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def count_flops(forward: Callable[[], object]) -> int:
    """FLOPs of a forward pass on the meta device, where attention runs as two matrix products and is counted.
    (On the CPU it would be one fused operation that the counter does not know, and count as nothing.)"""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


class Saves(torch.autograd.Function):
    """Stands for an operation of which only its output's shape and what it keeps for the backward pass matter."""

    @staticmethod
    def forward(ctx, out: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return out


class Kept(TorchFunctionMode):
    """Watches forward passes on the meta device for the tensors they would keep for the backward pass on a GPU.

    That device has neither autocast nor fused attention, so both are acted out: products run in `dtype`, a
    tensor is cast once; attention keeps q, k, v, its output and a number per query; a norm keeps its input.
    Pointwise operations keep outputs of products only, the rest is recomputed, about as torch.compile does.
    """

    products, norms = (F.linear, F.conv2d), (F.group_norm, F.layer_norm, F.rms_norm)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.running = dtype, None
        self.casts, self.made, self.kept = {}, {}, {}     # tensor -> cast; storage -> a tensor, which keeps it alive
        self.weights: set[int] = set()                    # storages of parameters

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.running, kwargs = function, kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args[:3])                                    # [b, heads, n, d]
            out = empty(q.shape[0], q.shape[2], *v.shape[1::2], dtype=v.dtype).transpose(1, 2)
            return Saves.apply(out, q, k, v, out, empty(*q.shape[:3]))
        if function in self.norms:
            with torch.no_grad():
                out = function(args[0].float(), *args[1:], **kwargs)
            return Saves.apply(out, args[0])
        if function in self.products:
            out = function(*map(self.cast, args), **{key: self.cast(x) for key, x in kwargs.items()})
            self.made[storage(out)] = out
            return out
        return function(*args, **kwargs)

    def cast(self, x):
        self.weights |= {storage(x)} if isinstance(x, nn.Parameter) else set()
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if x not in self.casts:
            self.casts[x] = x.to(self.dtype)
        return self.casts[x]

    def pack(self, x: Tensor) -> Tensor:
        if self.running in (*self.products, *self.norms, F.scaled_dot_product_attention) or storage(x) in self.made:
            self.kept[storage(x)] = x
        return x


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def count_kept(forward: Callable[[], object], dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes that a forward pass keeps until the backward pass: (activations, casts of parameters)."""
    mode = Kept(dtype)
    with saved_tensors_hooks(mode.pack, lambda x: x), mode:
        forward()
    copies = [copy for x, copy in mode.casts.items() if isinstance(x, nn.Parameter)]
    weights = mode.weights | set(map(storage, copies))
    kept = [x for at, x in mode.kept.items() if at not in weights]
    return tuple(sum(x.untyped_storage().nbytes() for x in tensors) for tensors in (kept, copies))


@dataclass(frozen=True)
class Stage:
    """One stretch of training at one picture size."""

    name: str
    batch: int
    micro: int
    steps: int
    hours: float                    # 0: limited by steps alone
    rate: float                     # images per second, a projection
    trained: dict[str, nn.Module]
    frozen: int                     # parameters on the GPU beside them
    flops: dict[str, int]           # per image and part, three times the forward pass where it is trained
    kept: float                     # bytes of activations per image
    casts: int                      # bytes of the weights' casts
    cached: int                     # bytes per picture on disk


class Plan(NamedTuple):
    config: Config
    networks: Networks
    stages: list[Stage]
    pictures: int                   # 0: not known


def make_plan(config: Config) -> Plan:
    """ValueError, with the knob to turn, where a stage does not fit the GPU."""
    for name in ("mfu", "gpu_tflops", "gpu_gb"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")
    for key, hours in config.hours.items():
        if not isinstance(hours, (int, float)) or hours < 0:
            raise ValueError(f"--hours {key}={hours} is not a number of hours: for example --hours 256=110")
    sizes = {int(key): hours for key, hours in config.hours.items() if key.isdigit() and hours}
    if config.resolution not in sizes:
        sizes = {config.resolution: 0.0}
    networks = meta_networks(config)
    stages = [] if config.vae_weights else [vae_stage(config, networks)]
    stages += [diffusion_stage(config, networks, side, sizes[side]) for side in sorted(sizes)]
    return Plan(config, networks, stages, config.scenes if config.data == ["toyworld"] else config.pictures)


def vae_stage(config: Config, networks: Networks) -> Stage:
    """Stage 1: the VAE on crops."""
    side, batch = min(config.vae_crop or config.resolution, config.resolution), config.vae_batch_size
    calls = {part: call for part, call in forwards(networks, side).items() if part in ("encode", "decode")}
    flops = {part: 3 * count_flops(call) for part, call in calls.items()}
    kept, casts = activations(config, *calls.values())
    return fitted(config, Stage(f"VAE, {side} px", batch, batch, config.vae_steps, 0.0, 0.0,
                                {"vae": networks.vae}, 0, flops, kept, casts, cached=0), chosen=True)


def diffusion_stage(config: Config, networks: Networks, side: int, hours: float) -> Stage:
    """Stage 2 on pictures of one size, for so many hours (0: for max_steps)."""
    (net, text, vae), calls, batch = networks, forwards(networks, side), config.batch_size
    trained = {"net": net} if config.text_weights else {"net": net, "text": text}
    flops = {part: (3 if part in trained else 1) * count_flops(call) for part, call in calls.items()}
    speed = config.mfu * config.gpu_tflops * 1e12 / (flops["net"] + flops["text"])
    kept, casts = activations(config, *(calls[part] for part in trained))
    latent = vae.config.latent_channels * (side // vae.config.downscale) ** 2
    cached = 2 * (latent + text.config.context_length)                           # fp16, and 16-bit token ids
    steps = int(hours * 3600 * speed / batch) if hours else config.max_steps
    stage = Stage(f"{side} px", batch, batch // config.grad_accum, steps, hours, speed, trained,
                  size(*networks) - size(*trained.values()), flops, kept, casts, cached)
    return fitted(config, stage, chosen=side == config.resolution)


def activations(config: Config, *calls: Callable) -> tuple[float, int]:
    """(bytes per image, estimated; bytes of the weights' casts)."""
    dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    kept, casts = (sum(counts) for counts in zip(*(count_kept(call, dtype) for call in calls)))
    return kept * PARTITIONER * (EAGER if config.compile is False else 1), casts


def memory(config: Config, stage: Stage, micro: int) -> dict[str, float]:
    """Bytes on the GPU, by kind."""
    named = {f"{part}.{name}": p for part, module in stage.trained.items() for name, p in module.named_parameters()}
    chosen = muon_matrices(named, config.optimizer)
    count, matrices = (sum(p.numel() for p in some.values()) for some in (named, chosen))
    return {"weights, fp32": 4 * count, "their casts, for autocast": stage.casts, "gradients, fp32": 4 * count,
            f"optimizer ({config.optimizer})": 8 * (count - matrices) + 4 * matrices,
            "averaged weights, fp32": 4 * count * ("net" in stage.trained), "frozen networks, fp32": 4 * stage.frozen,
            "activations (estimate)": micro * stage.kept, "CUDA, fragmentation (estimate)": RESERVE}


def need(config: Config, stage: Stage, micro: int) -> float:
    """GB in all."""
    return sum(memory(config, stage, micro).values()) / 1e9


def fitted(config: Config, stage: Stage, chosen: bool) -> Stage:
    """The stage, if it fits the GPU; else with the largest micro-batch that does, unless the config has chosen one."""
    if need(config, stage, stage.micro) <= config.gpu_gb:
        return stage
    divisors = (m for m in range(stage.micro, 0, -1) if stage.batch % m == 0)
    if (micro := next((m for m in divisors if need(config, stage, m) <= config.gpu_gb), 0)) and not chosen:
        return replace(stage, micro=micro)
    vae = "vae" in stage.trained
    knob = f"--vae-batch-size {micro}" if vae else f"--grad-accum {stage.batch // max(micro, 1)} (micro-batch {micro})"
    advice = f"{knob} would fit, at {need(config, stage, micro):.1f} GB" if micro else (
        f"single images need {need(config, stage, 1):.1f} GB, so shrink it (--{'vae' if vae else config.network})")
    raise ValueError(f"micro-batch {stage.micro} at {stage.name} needs {need(config, stage, stage.micro):.1f} GB "
                     f"(estimate), the GPU has {config.gpu_gb:g} (--gpu-gb): {advice}")


def render(plan: Plan) -> str:
    config, networks, stages, pictures = plan
    lines = [f"plan of --preset {config.preset}: nothing is loaded, trained or written", "", "parameters"]

    def row(label: str, cell: Callable[[Stage], str], diffusion: bool = False) -> None:
        lines.append(f"  {label:46}" + "".join(f"{cell(s) if s.cached or not diffusion else '':>16}" for s in stages))

    names = dict(net=config.network, text="text encoder", vae="VAE", encode="VAE encoder", decode="VAE decoder")
    weights = {"net": "", "text": config.text_weights, "vae": config.vae_weights}
    for part, module in networks._asdict().items():
        state = f"frozen: {weights[part]}" if weights[part] else "trained"
        lines.append(f"  {names[part]:20}{size(module):14,}  {state}")
    lines += ["", f"{'GFLOP per image: forward, x 3 where trained':48}" + "".join(f"{s.name:>16}" for s in stages)]
    for part in stages[-1].flops:
        row(names[part], lambda s: f"{s.flops[part] / 1e9:,.4g}" if part in s.flops else "")
    lines += ["", f"memory, GB of {config.gpu_gb:g}"]
    row("micro-batch x accumulation", lambda s: f"{s.micro} x {s.batch // s.micro}")
    for kind in memory(config, stages[0], 1):
        row(kind, lambda s: f"{memory(config, s, s.micro)[kind] / 1e9:.3f}")
    row("all", lambda s: f"{need(config, s, s.micro):.3f}")
    lines += ["", "time"]
    if timed := any(s.hours for s in stages):
        lines[-1] = f"time (projection: {config.mfu:.0%} of {config.gpu_tflops:g} TFLOP/s)"
        row("hours", lambda s: f"{s.hours:g}")
        row("images per second", lambda s: f"{s.rate:,.0f}")
    row("steps (--max-steps)" if timed else "steps", lambda s: f"{s.steps:,}")
    row("images", lambda s: f"{s.steps * s.batch:,}")
    if pictures:
        row(f"epochs over {pictures:,} pictures", lambda s: f"{s.steps * s.batch / pictures:,.1f}", diffusion=True)
        row("GB on disk (latents in fp16, token ids)", lambda s: f"{pictures * s.cached / 1e9:,.3g}", diffusion=True)
    if pictures and timed:
        speed = ENCODE_MFU * config.gpu_tflops * 1e12 * 3600                                   # FLOPs per hour
        encoding = {s.name: pictures * s.flops["encode"] / speed for s in stages if s.cached}
        row(f"hours to encode them (at {ENCODE_MFU:.0%})", lambda s: f"{encoding[s.name]:.1f}", diffusion=True)
        used, given = sum(encoding.values()) + sum(s.hours for s in stages), sum(config.hours.values())
        advice = ": TOO MUCH, lower --hours or --pictures" if used > given else ""
        lines.append(f"  training and encoding: {used:.0f} of {given:g} h{advice}")
    return "\n".join(lines)


def print_plan(config: Config) -> None:
    """What train.py --dry-run shows."""
    print(render(make_plan(config)))
