"""The plan of a run with --finetune: what an adapter takes beside a model that stays as it is, and which GPUs have room for that.

Frozen weights need neither gradients nor an optimizer, and on a GPU they are in bfloat16. Gradients pass through them all the same, so
a step costs two forward passes more, not three, and activations are kept, or computed again with --grad-checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tinyldm.adapters.lora import LoRA
from tinyldm.config import Config, change, phases
from tinyldm.lookup import lookup
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.pipeline import PromptFeatures
from tinyldm.planning.base import frozen_dtype, load_base, lora_config, tune
from tinyldm.planning.flops import EXTRA_SHAPES, MetaNetworks, count_flops, passes, size, vae_forwards
from tinyldm.planning.memory import EAGER, empty, memory, saved_bytes
from tinyldm.planning.peak import peak_bytes
from tinyldm.planning.phase import PlannedPhase
from tinyldm.planning.texts import MODULES, PUBLISHED, condition, on_meta
from tinyldm.vendor_loaders import pipelines

GPUS = (8, 12, 16, 24, 32)              # GB
BATCHES = (8, 4, 2, 1)                  # micro-batches that are tried
# Stable Diffusion 2's text encoder: CLIP-H without its last layer.
CLIP_H = CLIPTextConfig(activation="gelu", width=1024, layers=23, heads=16, mlp_width=4096)


class Published(NamedTuple):
    """A published model: its network, how its text encoders are joined, and the side of its pictures, in pixels."""

    net: type[nn.Module]
    config: Any
    join: str
    side: int
    text: CLIPTextConfig | None = None      # None: those of planning/texts.py that are joined so


PUBLISHED_MODELS = {
    "Stable Diffusion 1.5": Published(UNet, UNetConfig(), "single", 512),
    "Stable Diffusion 2.1": Published(UNet, UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, sample_size=96),
                                      "single", 768, CLIP_H),
    "Stable Diffusion XL": Published(UNet, UNetConfig(
        widths=(320, 640, 1280), attention=(False, True, True), heads=(5, 10, 20), context_dim=2048, linear_projection=True,
        sample_size=128, transformer_layers=(1, 2, 10), pooled_dim=1280), "sdxl", 1024),
    "Stable Diffusion 3 medium": Published(MMDiT, MMDiTConfig(), "sd3", 1024),
    "Stable Diffusion 3.5 medium": Published(MMDiT, MMDiTConfig(qk_norm=True, dual_layers=tuple(range(13)), max_positions=384),
                                             "sd3", 1024),
    "Stable Diffusion 3.5 large": Published(MMDiT, MMDiTConfig(width=2432, layers=38, heads=38, qk_norm=True), "sd3", 1024),
    "FLUX.1 dev": Published(Flux, FluxConfig(guidance=True), "flux", 1024),
}


def plan_base(config: Config) -> tuple[MetaNetworks, dict[str, nn.Module], Cond]:
    """The networks of the model that is trained further, what is trained of it, and what its network is told: shapes."""
    model, modules = tune(config, load_base(config))
    with torch.no_grad():
        cond = PromptFeatures(model)(["a picture"])
    return MetaNetworks(model.net, nn.ModuleList(model.text.modules.values()), model.vae), modules, cond


def plan_tuned_phase(config: Config, networks: MetaNetworks, modules: Mapping[str, nn.Module], cond: Cond) -> PlannedPhase:
    """The plan at one picture size. modules, cond: see plan_base()."""
    own, (net, text, vae), side = config.finetune, networks, config.data.resolution
    latent, batch = side // vae.config.downscale, config.optimisation.batch_size
    x, numbers = empty(1, vae.config.latent_channels, latent, latent), vae.config.latent_channels * latent**2
    cond = with_extras(net, cond)
    if own.trains_text:                                         # gradients go back through the network to its condition
        cond = replace(cond, context=cond.context.detach().requires_grad_(True))
    ids = [empty(1, module.config.context_length, dtype=torch.long) for module in text]
    calls: dict[str, Callable[[], object]] = {"net": lambda: net(x, empty(1), cond),
                                              "text": lambda: [module(own) for module, own in zip(text, ids)], **vae_forwards(vae, side)}
    factors = passes(config)
    flops = {part: factors.get(part, 1) * count_flops(call) for part, call in calls.items()}
    with_gradients = {"net": net} | ({"text": text} if own.trains_text else {})
    saved, casts = saved_bytes(config, *((module, calls[part]) for part, module in with_gradients.items()))
    resident = networks if own.whole or own.trains_text else (net,)             # put_on() in training/finetune.py
    width = frozen_dtype(config).itemsize                       # the shapes here are float32, for the sake of what counts them
    frozen = width * (size(*resident) - (size(*modules.values()) if own.whole else 0))
    dtype = torch.float32 if config.run.dtype == "fp32" else torch.bfloat16
    peaks = {part: peak_bytes(call, dtype) for part, call in calls.items()}
    return PlannedPhase(f"{side} px", config, batch, -(-batch // config.optimisation.grad_accum), dict(modules), frozen, flops,
                        dict(zip(with_gradients, saved)), casts if width == 4 else 0, peaks,
                        4 * (2 * numbers + cond.context.numel()), cache_bytes=2 * numbers + 2 * sum(map(torch.numel, ids)))


# ---------------------------------------------------------------- which GPUs have room


def fitting(needed: Mapping[bool, Callable[[int], float]]) -> list[str]:
    """For each of GPUS the largest micro-batch that fits, with a * where that takes gradient checkpointing; "-": none does. needed:
    without it and with it, a micro-batch -> GB."""
    def best(gpu: int) -> str:
        return next((f"{micro}{' *' * kept}" for kept in (False, True) for micro in BATCHES if needed[kept](micro) <= gpu), "-")

    return [best(gpu) for gpu in GPUS]


def render_fitting(config: Config) -> list[str]:
    """Lines on which GPUs have room for a run, at its last picture size."""
    networks, modules, cond = plan_base(config)
    last = phases(config)[-1]
    plans = {kept: plan_tuned_phase(change(last, grad_checkpointing=kept), networks, modules, cond) for kept in (False, True)}
    found = fitting({kept: plan.memory_gb for kept, plan in plans.items()})
    return ["", "largest micro-batch by the GPU's memory (* with --grad-checkpointing; -: none fits)",
            "  " + "".join(f"{f'{gpu} GB':>9}" for gpu in GPUS), "  " + "".join(f"{each:>9}" for each in found)]


def published_memory(row: Published, side: int, config: Config) -> dict[bool, Callable[[int], float]]:
    """GB that an adapter takes beside a published model, whose text encoders are not trained: without gradient checkpointing and with it,
    a micro-batch -> GB."""
    network = architecture(row.net)
    lengths = pipelines.PIPELINES[pipelines.written_as(network.classes[0], row.join)].lengths(network.to_config(row.config))
    texts = [replace(each, context_length=count or each.context_length)
             for each, count in zip([row.text] if row.text else PUBLISHED[row.join], [*lengths, None, None, None])]
    text = on_meta((MODULES[type(each)], each) for each in texts)
    with torch.device("meta"):
        net = row.net(row.config).requires_grad_(False)
    adapter = LoRA(net, replace(lora_config(config.finetune), targets=tuple(group for group in config.finetune.groups if group != "text")))
    adapter.attach()
    x, cond = empty(1, row.config.in_channels, side // 8, side // 8), with_extras(net, condition(text, row.join))
    frozen, batch = frozen_dtype(config).itemsize * size(net), 4 * (2 * x.numel() + cond.context.numel())
    needed = {}
    for kept in (False, True):
        with_it = change(config, grad_checkpointing=kept)
        (saved,), _ = saved_bytes(with_it, (net, lambda: net(x, empty(1), cond)))
        needed[kept] = lambda micro, saved=saved: sum(memory(config, {"net": adapter}, frozen, EAGER * saved * micro, 0,
                                                             2 * micro * batch).values()) / 1e9
    return needed


def with_extras(net: nn.Module, cond: Cond) -> Cond:
    return replace(cond, extra={name: empty(1, *lookup(EXTRA_SHAPES, name, "condition")) for name in architecture(net).extras(net.config)})


def render_published(config: Config) -> str:
    """What an adapter takes beside each published model, and the largest micro-batches that fit on GPUs of some sizes."""
    own = config.finetune
    lines = [f"adapters of rank {own.rank} ({', '.join(own.targets)}) beside published models in bf16: GB of GPU memory for one picture at",
             "a time (estimates), and the largest micro-batch that fits (* with --grad-checkpointing; -: none)", "",
             f"{'model':30}{'px':>6}{'GB':>8}{'GB *':>8}  " + "".join(f"{f'{gpu} GB':>8}" for gpu in GPUS)]
    for name, row in PUBLISHED_MODELS.items():
        for side in dict.fromkeys((row.side, 512)):
            needed = published_memory(row, side, config)
            best = "".join(f"{micro:>8}" for micro in fitting(needed))
            lines.append(f"{name:30}{side:6}{needed[False](1):8.1f}{needed[True](1):8.1f}  {best}")
    return "\n".join(lines)
