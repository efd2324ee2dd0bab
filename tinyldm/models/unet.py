"""The U-Net of Stable Diffusion: ResBlocks, and transformers with cross-attention to the caption (arXiv:2112.10752, App. E).

One class serves every level on both sides. The constructor finds the channel counts of the skip connections by
pushing and popping a list, in the order in which forward() pushes and pops the tensors. Any widths and any number
of levels work; the published shapes of SD 1.x, SD 2.x and SDXL are configs. SDXL (arXiv:2307.01952) has more transformer
blocks at its coarser levels, and is conditioned on pooled text and on sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.convolutions import Downsample, ResBlock, Upsample
from tinyldm.models.layers import Attention, Cond, TimeEmbedding, runner, timestep_embedding

SIZES = 6                   # the numbers of Cond.extra["sizes"]: see AddedEmbedding
SIZE_CHANNELS = 256         # sinusoids of each of them


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)        # channels per level, finest first
    depth: int = 2                                          # ResBlocks per level (one more on the way up)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers; the middle always has one
    heads: tuple[int, ...] = (8, 8, 8, 8)                   # attention heads per level (SD 1: 8; SD 2: 5, 10, 20, 20)
    context_dim: int = 768                                  # width of the text features
    linear_projection: bool = False                         # around the transformers: Linear in SD 2, 1x1 convolution in SD 1
    upcast_attention: bool = False                          # multiply in float32: SD 2.1's overflows in float16
    groups: int = 32                                        # GroupNorm groups
    sample_size: int | tuple[int, int] = 64                 # latent height and width in training
    transformer_layers: tuple[int, ...] = ()                # blocks per transformer and level (the middle's: the last); (): one
    pooled_dim: int | None = None                           # width of the pooled text feature; None: told neither that nor sizes
    told: tuple[str, ...] = ()                              # numbers in Cond.extra that it is told: see TimeEmbedding

    def __post_init__(self):
        check_counts(self, "in_channels", "out_channels", "widths", "depth", "heads", "context_dim", "groups", "pooled_dim",
                     *["transformer_layers"] * bool(self.transformer_layers))
        if len(self.transformer_layers) not in (0, len(self.widths)):
            raise ValueError(f"transformer_layers {self.transformer_layers} must have one number for each of the widths {self.widths}")
        if not len(self.widths) == len(self.attention) == len(self.heads):
            raise ValueError(f"widths {self.widths}, attention {self.attention} and heads {self.heads} must name the same levels")
        for width, heads in zip(self.widths, self.heads):
            if width % self.groups or width % heads:
                raise ValueError(f"U-Net width {width} must be a multiple of groups={self.groups} and of heads={heads}")


class GEGLU(nn.Module):
    """Feed-forward with a gated GELU (arXiv:2002.05202, Eq. 6): [b, n, d] -> [b, n, d] through 4d."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)                 # value and gate
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward; each pre-normalised and residual."""

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads, upcast=upcast)
        self.cross_attention = Attention(dim, heads, context_dim, upcast=upcast)
        self.feed_forward = GEGLU(dim)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), cond.context, cond.mask, memo=cond.memo)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map: [b, c, h, w] -> [b, c, h, w]."""

    def __init__(self, dim: int, heads: int, layers: int, config: UNetConfig):
        super().__init__()
        self.linear = config.linear_projection
        project = (lambda: nn.Linear(dim, dim)) if self.linear else (lambda: nn.Conv2d(dim, dim, 1))
        self.norm = nn.GroupNorm(config.groups, dim, eps=1e-6)
        self.proj_in = project()
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, config.context_dim, config.upcast_attention) for _ in range(layers))
        self.proj_out = project()

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        flat = lambda y: y.flatten(2).transpose(1, 2)                      # [b, h*w, c]
        image = lambda y: y.transpose(1, 2).unflatten(2, x.shape[2:])      # [b, c, h, w]
        h = self.norm(x)
        h = self.proj_in(flat(h)) if self.linear else flat(self.proj_in(h))
        for block in self.blocks:
            h = block(h, cond)
        return x + (image(self.proj_out(h)) if self.linear else self.proj_out(image(h)))


class UNetLevel(nn.Module):
    """One resolution of the U-Net: ResBlocks, each followed by a transformer if heads > 0, then resampling."""

    def __init__(self, in_channels: list[int], width: int, emb_dim: int, config: UNetConfig,
                 heads: int = 0, layers: int = 1, resample: nn.Module | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c, width, config.groups, 1e-5, emb_dim) for c in in_channels)
        self.attentions = nn.ModuleList(SpatialTransformer(width, heads, layers, config) for _ in in_channels if heads)
        self.resample = resample

    def apply_block(self, i: int, x: Tensor, emb: Tensor, cond: Cond, run: Callable[..., Tensor]) -> Tensor:
        x = run(self.resnets[i], x, emb)
        return run(self.attentions[i], x, cond) if len(self.attentions) else x


class Middle(nn.Module):
    """ResBlock, transformer, ResBlock at the coarsest resolution."""

    def __init__(self, width: int, emb_dim: int, config: UNetConfig, heads: int, layers: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, config.groups, 1e-5, emb_dim) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, heads, layers, config)])

    def forward(self, x: Tensor, emb: Tensor, cond: Cond, run: Callable[..., Tensor]) -> Tensor:
        x = run(self.resnets[0], x, emb)
        return run(self.resnets[1], run(self.attentions[0], x, cond), emb)


class AddedEmbedding(nn.Module):
    """SDXL's further conditions (arXiv:2307.01952, Sec. 2.2) -> [b, out], which is added to the time embedding: pooled text [b, p] and
    six sizes [b, 6] in pixels, in this order: height and width of the original picture, top and left of the crop, height and width of
    the target. A two-layer MLP takes the text and the sinusoids of each number side by side."""

    def __init__(self, pooled_dim: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(pooled_dim + SIZES * SIZE_CHANNELS, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        sinusoids = timestep_embedding(sizes.flatten(), SIZE_CHANNELS).view(len(sizes), SIZES * SIZE_CHANNELS)
        both = torch.cat([part.to(self.linear_1.weight.dtype) for part in (pooled, sinusoids)], dim=1)
        return self.linear_2(F.silu(self.linear_1(both)))


class UNet(nn.Module):
    """net(x [b, in, h, w], t [b] in 0..1000, cond) -> [b, out, h, w]; h and w multiples of 2^(levels - 1).

    With pooled_dim, cond must have `pooled` [b, pooled_dim] and extra["sizes"] [b, 6]: see AddedEmbedding."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False                                    # in training: saves memory for a third more compute
        widths, last = config.widths, len(config.widths) - 1
        emb_dim = 4 * widths[0]
        heads = [h if attended else 0 for h, attended in zip(config.heads, config.attention)]
        layers = config.transformer_layers or (1,) * len(widths)
        self.time_embedding = TimeEmbedding(widths[0], emb_dim, config.told)
        self.add_embedding = AddedEmbedding(config.pooled_dim, emb_dim) if config.pooled_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        channels, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Downsample(width) if i < last else None
            inputs = [channels] + [width] * (config.depth - 1)
            self.down.append(UNetLevel(inputs, width, emb_dim, config, heads[i], layers[i], resample))
            skips += [width] * (config.depth + (resample is not None))
            channels = width
        self.middle = Middle(channels, emb_dim, config, config.heads[-1], layers[-1])
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(channels if j == 0 else width) + skips.pop() for j in range(config.depth + 1)]
            self.up.append(UNetLevel(inputs, width, emb_dim, config, heads[i], layers[i], Upsample(width) if i else None))
            channels = width
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self) -> None:
        """PyTorch's defaults, and zero in the last layer of every residual branch and of the network: every block starts
        as the identity (or its shortcut), and the output is zero. DDPM does so in its code, though its text is silent."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight), nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight), nn.init.zeros_(module.proj_out.bias)
        nn.init.zeros_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """The embedding of the time and of what else is the same for all pixels [b, e]. ValueError where cond lacks any of it."""
        if self.add_embedding is None:
            return self.time_embedding(t, cond.extra)
        sizes, width = cond.extra.get("sizes"), self.config.pooled_dim
        for name, found, shape in (("pooled", cond.pooled, (len(t), width)), ('extra["sizes"]', sizes, (len(t), SIZES))):
            if found is None or found.shape != shape:
                raise ValueError(f"this network is told pooled text [b, {width}] and six sizes [b, {SIZES}], but Cond.{name} is "
                                 f"{'missing' if found is None else list(found.shape)}: pass {list(shape)}, or build the network with "
                                 "the pooled_dim of its text encoders (None: told neither)")
        return self.time_embedding(t, cond.extra) + self.add_embedding(cond.pooled, sizes)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        multiple = 2 ** (len(self.config.widths) - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"latent size {x.shape[2]}x{x.shape[3]} is not a multiple of {multiple}: "
                             f"this U-Net halves it {len(self.config.widths) - 1} times")
        emb = self.embed(t, cond)                                          # [b, e]
        x, run, resample = self.conv_in(x), runner(self), runner(self, recomputed=False)
        skips = [x]
        for level in self.down:
            for i in range(len(level.resnets)):
                x = level.apply_block(i, x, emb, cond, run)
                skips.append(x)
            if level.resample is not None:
                x = resample(level.resample, x)                            # half height and width
                skips.append(x)
        x = self.middle(x, emb, cond, run)
        for level in self.up:
            for i in range(len(level.resnets)):
                x = level.apply_block(i, torch.cat([x, skips.pop()], dim=1), emb, cond, run)
            if level.resample is not None:
                x = resample(level.resample, x)                            # double height and width
        return self.conv_out(F.silu(self.norm_out(x)))
