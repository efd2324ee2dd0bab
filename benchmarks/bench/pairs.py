"""Networks of ours, and the same ones of diffusers and transformers with the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.folders.rename import export_renamed
from tinyldm.folders.save import written_rules
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT
from tinyldm.models.flux import PATCH, Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.t5 import T5
from tinyldm.models.taesd import TAESD
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.planning.flops import count_flops

Inputs = Mapping[str, Tensor]
EXACT = ("t", "sizes", "guidance", "elapsed")       # inputs that stay float32, as in drawing
MMDIT_TOKENS, FLUX_TOKENS, CLIP_TOKENS = 154, 128, 77


class Pair(NamedTuple):
    """How a network of ours is called, and how the peer's is, where another library has it."""

    module: type[nn.Module]
    inputs: Callable[[Any, int, int], dict[str, Tensor]]        # config, batch, side (pixels, latents or tokens) -> random inputs
    ours: Callable[[nn.Module, Inputs], Tensor]
    library: str = ""                                           # the peer's
    peer: Callable[[dict], nn.Module] | None = None             # config.json -> its network
    theirs: Callable[[nn.Module, Inputs], Tensor] | None = None
    rescale: Callable[[nn.Module], None] = lambda module: None  # of random weights, where unit scale is not enough
    tied: Mapping[str, str] = MappingProxyType({})              # further names of tensors -> those that they have in a file


class Row(NamedTuple):
    """A row of a table of cases: a network, and how large it and its inputs are at each scale."""

    name: str
    kind: str                                                   # in PAIRS
    config: Any
    scales: Mapping[str, tuple[dict, int, int]]                 # scale -> changes of the config, batch, side

    def at(self, scale: str) -> tuple[Any, int, int]:
        """(config, batch, side)"""
        changes, batch, side = self.scales[scale]
        return replace(self.config, **changes), batch, side


def diffusers_class(name: str) -> Callable[[dict], nn.Module]:
    def build(config: dict) -> nn.Module:
        import diffusers
        return getattr(diffusers, name).from_config(config)
    return build


def transformers_class(name: str, config_name: str) -> Callable[[dict], nn.Module]:
    def build(config: dict) -> nn.Module:
        import transformers
        return getattr(transformers, name)(getattr(transformers, config_name)(**config))
    return build


def unet_inputs(config: UNetConfig, batch: int, side: int) -> dict[str, Tensor]:
    made = {"x": torch.randn(batch, config.in_channels, side, side), "t": torch.full((batch,), 600.0),
            "context": torch.randn(batch, CLIP_TOKENS, config.context_dim)}
    if config.pooled_dim is not None:
        made |= {"pooled": torch.randn(batch, config.pooled_dim), "sizes": torch.tensor([[256.0, 256, 0, 0, 256, 256]] * batch)}
    return made


def our_unet(net: nn.Module, i: Inputs) -> Tensor:
    return net(i["x"], i["t"], Cond(i["context"], pooled=i.get("pooled"), extra={"sizes": i["sizes"]} if "sizes" in i else {}))


def their_unet(net: nn.Module, i: Inputs) -> Tensor:
    added = {"text_embeds": i["pooled"], "time_ids": i["sizes"]} if "sizes" in i else None
    return net(i["x"], i["t"], i["context"], added_cond_kwargs=added).sample


def text_ids(config: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(2, min(1000, config.vocab_size), (batch, tokens))
    ids[:, -1] = config.eos_token_id
    return {"ids": ids}


def mmdit_inputs(config: MMDiTConfig, batch: int, side: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, config.in_channels, side, side), "t": torch.full((batch,), 600.0),
            "context": torch.randn(batch, MMDIT_TOKENS, config.context_dim), "pooled": torch.randn(batch, config.pooled_dim)}


def flux_inputs(config: FluxConfig, batch: int, side: int) -> dict[str, Tensor]:
    """`places` and `origin` are the peer's: the positions of its tokens."""
    rows, columns = torch.meshgrid(torch.arange(side // PATCH), torch.arange(side // PATCH), indexing="ij")
    return {"x": torch.randn(batch, config.in_channels, side, side), "t": torch.full((batch,), 500.0),
            "context": torch.randn(batch, FLUX_TOKENS, config.context_dim), "pooled": torch.randn(batch, config.pooled_dim),
            "guidance": torch.full((batch,), 4.0), "origin": torch.zeros(FLUX_TOKENS, 3),
            "places": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()}


def their_flux(net: nn.Module, i: Inputs) -> Tensor:
    from diffusers import FluxPipeline
    packed, side = FluxPipeline._pack_latents(i["x"], *i["x"].shape), 8 * i["x"].shape[-1]
    out = net(packed, i["context"], i["pooled"], i["t"] / 1000, i["places"], i["origin"], i["guidance"]).sample
    return FluxPipeline._unpack_latents(out, side, side, 8)


def latents(config: Any, batch: int, side: int) -> dict[str, Tensor]:
    """side: of the picture."""
    return {"z": torch.randn(batch, config.latent_channels, side // config.downscale, side // config.downscale)}


def pixels(config: Any, batch: int, side: int) -> dict[str, Tensor]:
    return {"pixels": torch.rand(batch, 3, side, side) * 2 - 1}


def autoencode(vae: nn.Module, i: Inputs) -> Tensor:
    return vae.decode(vae.encode(i["pixels"]).mean)


def encode_text(net: nn.Module, i: Inputs) -> Tensor:
    return net(i["ids"]).hidden


def their_text(net: nn.Module, i: Inputs) -> Tensor:
    return net(i["ids"]).last_hidden_state


def rescale_t5(net: nn.Module) -> None:
    net.token_embedding.weight.mul_(net.config.width**0.5)
    for layer in net.layers:
        layer.q.weight.div_(net.config.head_dim**0.5)           # logits of unit scale, as trained ones are: nothing divides them


KL, TINY_AE = diffusers_class("AutoencoderKL"), diffusers_class("AutoencoderTiny")
PAIRS = {
    "unet": Pair(UNet, unet_inputs, our_unet, "diffusers", diffusers_class("UNet2DConditionModel"), their_unet),
    "dit": Pair(DiT, unet_inputs, our_unet),
    "mmdit": Pair(MMDiT, mmdit_inputs, lambda net, i: net(i["x"], i["t"], Cond(i["context"], pooled=i["pooled"])),
                  "diffusers", diffusers_class("SD3Transformer2DModel"),
                  lambda net, i: net(i["x"], i["context"], i["pooled"], i["t"]).sample, lambda net: net.positions.normal_()),
    "flux": Pair(Flux, flux_inputs,
                 lambda net, i: net(i["x"], i["t"], Cond(i["context"], pooled=i["pooled"], extra={"guidance": i["guidance"]})),
                 "diffusers", diffusers_class("FluxTransformer2DModel"), their_flux),
    "encode": Pair(AutoencoderKL, pixels, lambda vae, i: vae.encode(i["pixels"]).mean,
                   "diffusers", KL, lambda vae, i: vae.encode(i["pixels"]).latent_dist.mean),
    "decode": Pair(AutoencoderKL, latents, lambda vae, i: vae.decode(i["z"]), "diffusers", KL, lambda vae, i: vae.decode(i["z"]).sample),
    "autoencode": Pair(AutoencoderKL, pixels, autoencode, "diffusers", KL, lambda vae, i: vae(i["pixels"]).sample),
    "taesd": Pair(TAESD, pixels, autoencode, "diffusers", TINY_AE,      # whose forward() rounds the latents
                  lambda vae, i: vae.decode(vae.encode(i["pixels"]).latents).sample),
    "clip": Pair(CLIPText, text_ids, encode_text,
                 "transformers", transformers_class("CLIPTextModel", "CLIPTextConfig"), their_text),
    "t5": Pair(T5, text_ids, encode_text, "transformers", transformers_class("T5EncoderModel", "T5Config"), their_text,
               rescale_t5, {"encoder.embed_tokens.weight": "shared.weight"}),
}
# Configs and small versions of them that several tables have.
SD1, SD1_SMALL, SD1_TINY = UNetConfig(), dict(widths=(64, 128, 256, 256)), dict(widths=(32, 32, 64, 64), heads=(2, 2, 2, 2), depth=1)
KL8, KL8_SMALL, KL8_TINY = VAEConfig(), dict(widths=(32, 64, 128, 128)), dict(widths=(32, 32, 32, 32), depth=1)
CLIP_L, CLIP_SMALL = CLIPTextConfig(), dict(width=192, heads=3, mlp_width=768)
CLIP_TINY = dict(width=64, heads=1, mlp_width=128, layers=2)


@torch.no_grad()
def fresh(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights that keep activations near unit scale, none of them zero."""
    for name, p in module.to_empty(device="cpu").named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return module.eval().requires_grad_(False).to(device, dtype)


def same(ours: nn.Module, theirs: nn.Module, tied: Mapping[str, str] = MappingProxyType({})) -> nn.Module:
    """The peer with our weights, on a CPU the very same memory. tied: see Pair."""
    theirs.load_state_dict(their_names(ours, theirs, ours.state_dict(), tied), assign=True)
    return theirs.eval().requires_grad_(False).to(next(ours.parameters()).device)


def their_names(ours: nn.Module, theirs: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str] = MappingProxyType({})
                ) -> dict[str, Tensor]:
    """Tensors by our names (weights or gradients) -> by the peer's."""
    renamed, known = export_renamed(tensors, written_rules(ours)), {name for name, _ in theirs.named_parameters()}
    if not known & renamed.keys():                              # transformers' class drops the prefix that the file has
        renamed = {name.partition(".")[2]: value for name, value in renamed.items()}
    return renamed | {name: renamed[other] for name, other in tied.items()}


def our_network(row: Row, scale: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Ours, with the same random weights in every process."""
    pair = PAIRS[row.kind]
    with torch.device("meta"):
        net = pair.module(row.at(scale)[0])
    torch.manual_seed(0)
    net = fresh(net, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pair.rescale(net)
    return net.to(device, dtype)


def their_network(row: Row, ours: nn.Module) -> nn.Module:
    pair = PAIRS[row.kind]
    with torch.device("meta" if pair.library == "diffusers" else "cpu"):       # transformers computes buffers in its constructors
        theirs = pair.peer(architecture(ours).to_config(ours.config))
    return same(ours, theirs, pair.tied)


def make_inputs(row: Row, scale: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in every process."""
    torch.manual_seed(1)
    made = PAIRS[row.kind].inputs(*row.at(scale))
    typed = lambda name, value: value.to(device, dtype if value.is_floating_point() and name not in EXACT else value.dtype)
    return {name: typed(name, value) for name, value in made.items()}


def forward_flops(row: Row, scale: str) -> int:
    """FLOPs of a forward pass, counted on the meta device."""
    pair = PAIRS[row.kind]
    with torch.device("meta"):
        net = pair.module(row.at(scale)[0])
    inputs = make_inputs(row, scale, torch.device("meta"), torch.float32)
    return count_flops(lambda: pair.ours(net, inputs))
