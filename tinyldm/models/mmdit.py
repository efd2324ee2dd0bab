"""MMDiT, the transformer of Stable Diffusion 3 and 3.5: image and text tokens have weights of their own, and attend to each other.

The blocks are those of arXiv:2403.03206, Sec. 4 and Fig. 2. Time and pooled text become one vector, c, from which each block
makes the shifts, scales and gates of its layers (adaLN-Zero, arXiv:2212.09748, Sec. 3.2). Stable Diffusion 3.5 normalises
queries and keys (`qk_norm`), and in 3.5 medium (MMDiT-X) the image tokens of the first blocks have a second attention, to
image tokens alone (`dual_layers`). There are no masks: the padding of captions is attended to.

    3 medium        the default config
    3.5 medium      MMDiTConfig(qk_norm=True, dual_layers=tuple(range(13)), max_positions=384)
    3.5 large       MMDiTConfig(width=2432, layers=38, heads=38, qk_norm=True)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.layers import (
    Cond,
    Stream,
    TimeEmbedding,
    check_inputs,
    dot_product_attention,
    init_linears,
    modulate,
    normalise,
    runner,
    two_layers,
    vectors,
)

TIME_DIM = 256                          # sinusoids in the time embedding


@dataclass(frozen=True)
class MMDiTConfig:
    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2                      # latent pixels per token, along each side
    width: int = 1536
    layers: int = 24
    heads: int = 24
    context_dim: int = 4096             # width of the text features
    pooled_dim: int = 2048              # width of the pooled text feature
    qk_norm: bool = False
    dual_layers: tuple[int, ...] = ()   # numbers of the blocks whose image tokens have a second attention
    max_positions: int = 192            # rows and columns in the table of positions: the largest number of tokens along a side
    sample_size: int = 128              # height and width of the latents in training, which scale the table

    def __post_init__(self):
        check_counts(self, "in_channels", "out_channels", "patch", "width", "layers", "heads", "context_dim", "pooled_dim",
                     "max_positions", "sample_size")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} with {self.heads} heads: the width must be a multiple of the heads, and of 4 because "
                             f"positions are sines and cosines of rows and of columns: use a multiple of both")
        if wrong := [i for i in self.dual_layers if i not in range(self.layers)]:
            raise ValueError(f"dual_layers names the blocks {', '.join(map(str, wrong))}: there are blocks 0 to {self.layers - 1}")


class MMDiT(nn.Module):
    """x [b, in_channels, h, w], t [b] (0..1000), cond -> [b, out_channels, h, w]; h and w multiples of the patch."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False                                # in training: saves memory for a third more compute
        width, patch, size = config.width, config.patch, config.sample_size
        if size > config.max_positions * patch:     # not in the config: a setting alone is checked before the size is known
            raise ValueError(f"latents of {size}x{size} are larger than the table of positions, {config.max_positions} patches of "
                             f"{patch} pixels along a side: set max_positions to {-(-size // patch)} or more")
        self.patch_in = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.register_buffer("positions", position_table(width, config.max_positions, max(1, size // patch)))
        self.time_in = TimeEmbedding(TIME_DIM, width)
        self.pooled_in = two_layers(config.pooled_dim, width, width, nn.SiLU())
        self.context_in = nn.Linear(config.context_dim, width)
        self.blocks = nn.ModuleList(JointBlock(config, dual=i in config.dual_layers, last=i == config.layers - 1)
                                    for i in range(config.layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch**2 * config.out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_linears(self)
        # With modulations of zero, every gate is 0 and every block the identity. The output is 0 for any input.
        streams = [stream for block in self.blocks for stream in (block.image, block.text)]
        for linear in (self.final_modulation, self.patch_out, *(stream.modulation for stream in streams)):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, skip_layers: Collection[int] = ()) -> Tensor:
        """skip_layers: numbers of blocks that are left out, as skip-layer guidance wants (diffusion/guidance.py)."""
        self.check(x, cond)
        x = self.patch_in(x)                                           # [b, width, rows, cols]
        rows, cols = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()                  # [b, n, width], n = rows * cols; sums keep the order in memory
        x = x + self.central_positions(rows, cols)
        text = self.context_in(cond.context).to(x.dtype)               # [b, m, width]; under autocast both streams are float32
        c = F.silu(self.time_in(t) + self.pooled_in(cond.pooled))      # [b, width]
        run = runner(self)
        for number, block in enumerate(self.blocks):
            if number not in skip_layers:
                x, text = run(block, x, text, c)
        shift, scale = vectors(self.final_modulation, c)
        x = self.patch_out(modulate(normalise(x), shift, scale))       # [b, n, patch * patch * channels], channels last in a patch
        patch = self.config.patch
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, cols))          # [b, rows, cols, patch, patch, channels]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def central_positions(self, rows: int, cols: int) -> Tensor:
        """The positions [1, rows * cols, width] of a picture of so many patches, which lies in the middle of the table."""
        size = self.config.max_positions
        top, left = (size - rows) // 2, (size - cols) // 2
        return self.positions.unflatten(1, (size, size))[:, top : top + rows, left : left + cols].flatten(1, 2)

    def check(self, x: Tensor, cond: Cond) -> None:
        """Refuse inputs of the wrong size here, where the message can name the cause."""
        check_inputs(x, cond, self.config, self.config.patch)
        (h, w), largest = x.shape[2:], self.config.max_positions * self.config.patch
        if max(h, w) > largest:
            raise ValueError(f"latent size {h}x{w} is larger than the network's table of positions: {largest}x{largest} is the largest")
        if cond.mask is not None:
            raise ValueError("this network attends to all tokens of the text: pass Cond without a mask")


class JointBlock(nn.Module):
    """Attention among image and text tokens together, and an MLP for each kind.

    x [b, n, width], text [b, m, width], c [b, width] -> both. dual: the image has a second attention. last: only x is changed.
    """

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        self.image = Stream(config.width, config.heads, config.qk_norm, dual=dual)
        self.text = Stream(config.width, config.heads, config.qk_norm, read_only=last)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        image_vectors, text_vectors = vectors(self.image.modulation, c), vectors(self.text.modulation, c)
        normed = normalise(x)
        ours = self.image.attn.project(modulate(normed, *image_vectors[:2]))
        theirs = self.text.attn.project(modulate(normalise(text), *text_vectors[:2]))
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(ours, theirs))       # [b, heads, n + m, width/heads]
        out = dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        for_image, for_text = out.tensor_split([x.shape[1]], dim=1)
        x = self.image.update(x, normed, for_image, image_vectors[2:])
        if not self.text.read_only:
            text = self.text.update(text, None, for_text, text_vectors[2:])
        return x, text


def position_table(width: int, size: int, base: int) -> Tensor:
    """Positions of size x size tokens in row-major order, float32 [1, size * size, width]: sines and cosines of the column in the
    first half of the channels, then of the row (arXiv:2212.09748, which took them from arXiv:2111.06377).

    Positions run from 0 to `base`, the number of tokens along a side in training, whatever the size of the table. So the middle
    of a larger table is a magnified picture, and its margins are there for larger and for oblong ones. Published weights contain
    their table; this one is for new networks.
    """
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer((torch.arange(size) / (size / base)).double(), frequency)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()        # [size, width/2]
    table = torch.cat([axis.expand(size, -1, -1), axis[:, None].expand(-1, size, -1)], dim=2)
    return table.flatten(0, 1)[None]
