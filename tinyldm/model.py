"""The parts of a model, and the tables of the networks that can be its parts.

One row of a table holds everything that the rest of the library needs to know about a class of network: training, planning,
drawing and storing ask the row. (What a published family of models is made of is in vendor_loaders/families.py and pipelines.py.)
To add a network, write it and add a row: it can then be planned, trained, sharded, saved, loaded and drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinyldm.diffusion.as_flow import as_flow
from tinyldm.diffusion.process import AsFlow, Process
from tinyldm.lookup import build_dataclass, lookup
from tinyldm.models.clip import CLIP, CLIPConfig
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTBlock, DiTConfig
from tinyldm.models.flux import PATCH, DoubleBlock, Flux, FluxConfig, SingleBlock
from tinyldm.models.convolutions import ResBlock
from tinyldm.models.mmdit import JointBlock, MMDiT, MMDiTConfig
from tinyldm.models.t5 import T5, T5Config
from tinyldm.models.t5 import Layer as T5Layer
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.unet import SpatialTransformer, UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.encoders import TextEncoders, TextWidths
from tinyldm.text.t5_tokenizer import T5Tokenizer
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip, clip_model, dit, flux, mmdit, t5, taesd, unet, vae
from tinyldm.vendor_loaders.layout import Layout

StateDict = Mapping[str, Tensor]
NON_EMA = "non_ema"                     # the variant of the weights file that holds the raw weights, not the averaged ones
WEIGHTS = "diffusion_pytorch_model"


class NetworkShapes(NamedTuple):
    """The shapes of a network that the other parts of its model determine."""

    in_channels: int                # channels of the latents
    out_channels: int               # the same number, or twice as many where the variance is learned
    text: TextWidths
    sample_size: int                # height and width of the latents that it is trained on


def named(*keys: str) -> Callable[[str, torch.Size], bool]:
    """For `inner`: the matrices whose names have one of these substrings."""
    return lambda name, shape: any(key in name for key in keys)


class Architecture(NamedTuple):
    """A row of a table: a class of network, and everything that the rest of the library needs to know about it."""

    module: type[nn.Module]                     # the class; its constructor takes the config
    config: type                                # a dataclass
    # How it is stored:
    folder: str                                 # its folder in a model folder
    stem: str                                   # name of its weights file without the extension
    classes: tuple[str, ...]                    # its published names in config.json; the first is written
    layouts: Mapping[str, Layout]               # its published layouts of tensors; the first is written
    to_config: Callable[[Any], dict]            # config -> config.json
    from_config: Callable[[dict], Any]          # config.json -> config
    kohya: Callable[[Any], str] = lambda config: ""     # config -> the layout whose paths kohya's files of adapters have; "": the first
    # How it is trained:
    blocks: tuple[type[nn.Module], ...] = ()    # the repeated blocks, for gradient checkpointing and sharding
    inner: Callable[[str, torch.Size], bool] = lambda name, shape: False        # name and shape of a matrix -> whether Muon trains it
    targets: Mapping[str, str] = MappingProxyType({})           # of adapters: group -> regex found in the names of its layers
    compile_options: Mapping[str, Any] = MappingProxyType({})   # of torch.compile
    memory_format: torch.memory_format = torch.contiguous_format    # of its weights, and of an autoencoder's pictures, in training on CPUs
    # For networks that denoise latents:
    fields: Callable[[NetworkShapes], dict] = lambda shapes: {}     # the fields of its config that the other parts determine
    divisor: Callable[[Any], int] = lambda config: 1                # config -> height and width of latents are multiples of this
    # config, longer side of latents -> the fields to change so that it takes such latents; {}: it does
    enlarged: Callable[[Any, int], Mapping[str, Any]] = lambda config, side: {}
    trained_size: Callable[[Any], int | tuple[int, int] | None] = lambda config: None   # config -> latent height and width in training
    conditions: frozenset[str] = frozenset({"context"})             # the fields of Cond that training may give it
    extras: Callable[[Any], tuple[str, ...]] = lambda config: ()    # config -> the names in Cond.extra that it needs
    # For text encoders:
    widths: Callable[[Any], TextWidths] = lambda config: TextWidths(config.width, config.width)
    tokenizer: type[BaseTokenizer] = Tokenizer  # of which one is trained for a new encoder


NETWORKS: dict[str, Architecture] = {           # keyed by the name on the command line
    "unet": Architecture(
        UNet, UNetConfig, "unet", WEIGHTS, (unet.CLASS,), unet.LAYOUTS, unet.to_config, unet.from_config,
        blocks=(ResBlock, SpatialTransformer), inner=named("down.", "middle.", "up."), memory_format=torch.channels_last,
        kohya=lambda config: "CompVis" if config.pooled_dim else "diffusers",      # Stable Diffusion 1 and 2 are trained in diffusers' code
        targets={"attention": r"attention\.to_", "mlp": r"\.feed_forward\.|\.proj_(in|out)$", "conv": r"\.conv(1|2|_shortcut)?$"},
        fields=lambda shapes: dict(in_channels=shapes.in_channels, out_channels=shapes.out_channels,
                                   context_dim=shapes.text.context, sample_size=shapes.sample_size),
        divisor=lambda config: 2 ** (len(config.widths) - 1), trained_size=lambda config: config.sample_size,
        # Channels-last convolutions, which Inductor refuses for training graphs with a convolution that halves the channels
        # (torch/_inductor/graph.py, decide_layout_opt), though bfloat16 convolutions on GPUs want them.
        compile_options={"force_layout_optimization": True},
        # There is no mask: the published pipelines attend to the padding, so an exported model would lose it.
        conditions=frozenset({"context", "pooled"}), extras=lambda config: (*["sizes"] * bool(config.pooled_dim), *config.told)),
    "dit": Architecture(
        DiT, DiTConfig, "transformer", WEIGHTS, (dit.CLASS,), dit.LAYOUTS, dit.to_config, dit.from_config,
        blocks=(DiTBlock,), inner=named("blocks."), targets={"attention": r"\.(attn|cross)\.to_", "mlp": r"\.mlp\."},
        fields=lambda shapes: dict(in_channels=shapes.in_channels, out_channels=shapes.out_channels, context_dim=shapes.text.context),
        divisor=lambda config: config.patch, conditions=frozenset({"context", "mask", "pooled"}), extras=lambda config: config.told),
    "mmdit": Architecture(
        MMDiT, MMDiTConfig, "transformer", WEIGHTS, (mmdit.CLASS,), mmdit.LAYOUTS, mmdit.to_config, mmdit.from_config,
        blocks=(JointBlock,), inner=named(".attn", ".mlp."),
        kohya=lambda config: "original", targets={"attention": r"\.attn2?\.to_", "mlp": r"\.mlp\.", "modulation": r"\.modulation$"},
        fields=lambda shapes: dict(in_channels=shapes.in_channels, out_channels=shapes.out_channels, context_dim=shapes.text.context,
                                   pooled_dim=shapes.text.pooled, sample_size=shapes.sample_size),
        divisor=lambda config: config.patch, trained_size=lambda config: config.sample_size,
        enlarged=lambda config, side: {"max_positions": -(-side // config.patch)} if side > config.max_positions * config.patch else {},
        conditions=frozenset({"context", "pooled"})),
    "flux": Architecture(
        Flux, FluxConfig, "transformer", WEIGHTS, (flux.CLASS,), flux.LAYOUTS, flux.to_config, flux.from_config,
        blocks=(DoubleBlock, SingleBlock), inner=named(".attn.", ".mlp", ".out."),
        kohya=lambda config: "original",
        targets={"attention": r"\.attn\.to_", "mlp": r"\.mlp\.|\.mlp_in$|\.out$", "modulation": r"\.modulation$"},
        fields=lambda shapes: dict(in_channels=shapes.in_channels, out_channels=shapes.out_channels, context_dim=shapes.text.context,
                                   pooled_dim=shapes.text.pooled),
        divisor=lambda config: PATCH, conditions=frozenset({"context", "pooled"}),
        extras=lambda config: ("guidance",) if config.guidance else ()),
}
AUTOENCODERS: dict[str, Architecture] = {
    "kl": Architecture(AutoencoderKL, VAEConfig, "vae", WEIGHTS, (vae.CLASS,), vae.LAYOUTS, vae.to_config, vae.from_config,
                       inner=named("down.", "middle.", "up.")),
    # On CPUs a training step is 1.9 times faster in channels-last; that of `kl` 1.2 times slower, for GroupNorm's sake (torch 2.13).
    "taesd": Architecture(TAESD, TAESDConfig, "vae", WEIGHTS, taesd.CLASSES, taesd.LAYOUTS, taesd.to_config, taesd.from_config,
                          # All convolutions between feature maps, the resampling ones too: they have only indices for names.
                          inner=lambda name, shape: shape[0] == shape[1] or ".pool." in name, memory_format=torch.channels_last),
}
TEXT_ENCODERS: dict[str, Architecture] = {      # their published names are in "architectures" of config.json, or in "model_type" alone
    "clip": Architecture(CLIPText, CLIPTextConfig, "text_encoder", "model", clip.CLASSES, clip.LAYOUTS, clip.to_config, clip.from_config,
                         inner=named("layers."), targets={"attention": r"\.(q|k|v|out)$", "mlp": r"\.fc\d$"},
                         widths=lambda config: TextWidths(config.width, config.projection_dim or config.width)),
    "t5": Architecture(T5, T5Config, "text_encoder", "model", (*t5.CLASSES, t5.MODEL_TYPE), t5.LAYOUTS, t5.to_config, t5.from_config,
                       blocks=(T5Layer,), inner=named("layers."), targets={"attention": r"\.(q|k|v|out)$", "mlp": r"\.(fc\d|gate)$"},
                       tokenizer=T5Tokenizer),
}

# No part of a model: trained by --objective contrastive, and used by evaluate.py --metric clip.
CLIPS: dict[str, Architecture] = {
    "clip": Architecture(CLIP, CLIPConfig, "clip", "model", (clip_model.CLASS,), clip_model.LAYOUTS, clip_model.to_config,
                         clip_model.from_config, inner=named("vision.layers.", "text.layers.")),
}


def architecture(module: nn.Module | type[nn.Module]) -> Architecture:
    """The table row of a network or of its class. ValueError for one that is in no table."""
    kind = module if isinstance(module, type) else type(module)
    rows = {row.module: row for row in (*NETWORKS.values(), *AUTOENCODERS.values(), *TEXT_ENCODERS.values(), *CLIPS.values())}
    for known in kind.__mro__:              # FSDP2 gives a sharded network a new class, derived from its own
        if known in rows:
            return rows[known]
    raise ValueError(f"{kind.__name__} is in none of the tables of tinyldm/model.py: add a row that describes it")


def network_config(name: str, settings: Mapping[str, Any], shapes: NetworkShapes | None = None) -> Any:
    """The dataclass config of a network by name. ValueError for an unknown name or field, and for values that do not fit.

    shapes: given by the other parts of the model; None: the fields for them keep their defaults, for uses that do not depend on
    them, such as `divisor`."""
    row = lookup(NETWORKS, name, "network")
    return build_dataclass(row.config, {**settings, **(row.fields(shapes) if shapes else {})}, settings_flag(name))


def settings_flag(name: str) -> str:
    """The flag that sets fields of a network's config."""
    return f"--{name}" if name in ("unet", "dit") else "--net"


def new_network(name: str, settings: Mapping[str, Any], shapes: NetworkShapes) -> nn.Module:
    """A network by name, with newly initialised weights."""
    return lookup(NETWORKS, name, "network").module(network_config(name, settings, shapes))


def told_too(net: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The network, told further numbers (see TimeEmbedding), which have no effect before it is trained. ValueError where its class cannot
    be told any."""
    if not (new := tuple(name for name in names if name not in architecture(net).extras(net.config))):
        return net
    if not hasattr(net.config, "told"):
        able = [name for name, row in NETWORKS.items() if any(field.name == "told" for field in fields(row.config))]
        raise ValueError(f"a {type(net).__name__} cannot be told {', '.join(new)}: use a network that can ({', '.join(able)})")
    told = type(net)(replace(net.config, told=(*net.config.told, *new)))
    told.load_state_dict({**told.state_dict(), **net.state_dict()})
    return told.train(net.training).requires_grad_(next(net.parameters()).requires_grad)


def autoencoder_config(name: str, settings: Mapping[str, Any], **more: Any) -> Any:
    """The dataclass config of an autoencoder by name, from the fields that --vae gives. ValueError as for network_config."""
    return build_dataclass(lookup(AUTOENCODERS, name, "autoencoder").config, {**settings, **more}, "--vae")


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks inside a network, outermost first; [] for a module that is in no table."""
    try:
        kinds = architecture(module).blocks
    except ValueError:
        return []
    return [block for block in module.modules() if isinstance(block, kinds)]


def compile_blocks(net: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """The same network, whose repeated blocks are compiled at their first call. Blocks of one kind and of equal shapes share a graph, so
    that the first step comes many times sooner than when the whole network is compiled; what is between the blocks stays as it is."""
    blocks = repeated_blocks(net)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 4 * len(blocks))        # shapes of a kind of blocks
    for block in blocks:
        block.compile(dynamic=dynamic, options=dict(architecture(net).compile_options) or None)
    return net


def is_compiled(net: nn.Module) -> bool:
    """Whether torch.compile compiles a network, or blocks in it."""
    return any(part._compiled_call_impl is not None for part in net.modules())


def muon_matrices(modules: Mapping[str, nn.Module]) -> set[str]:
    """The "part.name" of all weight matrices inside repeated blocks, which Muon optimizes; part is the key in modules."""
    found = set()
    for part, module in modules.items():
        try:
            inner = architecture(module).inner
        except ValueError:
            continue
        found |= {f"{part}.{name}" for name, p in module.named_parameters() if p.ndim in (2, 4) and inner(name, p.shape)}
    return found


class Placement(Protocol):
    """Where the parts of a model are while they work (offload.py)."""

    device: torch.device

    def at_work(self, part: str) -> AbstractContextManager:
        """See Model."""


@dataclass
class Model:
    """A whole model: networks, text encoders, and the noise process that the network was trained on."""

    net: nn.Module
    vae: nn.Module
    text: TextEncoders
    process: Process
    prediction: str
    scheduler: dict         # content of scheduler_config.json; save_model writes it
    defaults: dict          # content of tinyldm.json; {} where there is none
    placement: Placement | None = None      # None: all parts stay where they are

    def __post_init__(self):
        if isinstance(self.process, AsFlow):
            as_flow(self.net, self.process)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Part name -> network: net, vae, text, text_2 ..."""
        return {"net": self.net, "vae": self.vae, **self.text.modules}

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        return next(self.net.parameters()).device if self.placement is None else self.placement.device

    def at_work(self, part: str) -> AbstractContextManager:
        """The context in which a part (a key of `modules`) is called, for models whose parts are on the device only while they work."""
        return nullcontext() if self.placement is None else self.placement.at_work(part)

    @property
    def divisor(self) -> int:
        """Width and height of pictures, in pixels, must be multiples of this: the VAE's downscale times the network's divisor."""
        return self.vae.config.downscale * architecture(self.net).divisor(self.net.config)
