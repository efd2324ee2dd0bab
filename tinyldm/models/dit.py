"""A diffusion transformer with text cross-attention: latent patches are tokens, the time modulates every block.

Blocks and adaLN-single follow PixArt-alpha (arXiv:2310.00426, Sec. 2.3): one projection of the time serves
all blocks, and each block adds a small table of its own. Beyond PixArt-alpha: RMSNorm instead of LayerNorm
(arXiv:1910.07467), normalised queries and keys (arXiv:2302.05442, Sec. 2), and rotary positions
(arXiv:2104.09864) over rows and columns, so that no table of positions ties the network to one size.
Gates and the last layer start at zero (arXiv:2212.09748, Sec. 3.2: adaLN-Zero): at initialisation every
block is the identity and the output is zero. The default config has 278M parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.layers import Attention, Cond, TimeEmbedding, check_inputs, init_linears, once, runner, two_layers


@dataclass(frozen=True)
class DiTConfig:
    in_channels: int = 4
    out_channels: int = 4
    patch: int = 2                    # latent pixels per token, along each side
    width: int = 1024
    layers: int = 16
    heads: int = 16
    mlp_width: int = 4096
    context_dim: int = 768            # width of the text features
    pooled_dim: int | None = None     # width of the pooled text feature; None: the time alone modulates
    time_dim: int = 256               # number of sinusoids in the time embedding
    rope_theta: float = 100.0         # the slowest pair turns one radian in roughly this many tokens; 10,000 suits long texts
    rounded_residual: bool = False    # under autocast, keep the residual stream in bfloat16 too: less memory traffic, more rounding
    told: tuple[str, ...] = ()        # numbers in Cond.extra that it is told: see TimeEmbedding

    def __post_init__(self):
        check_counts(self, "in_channels", "out_channels", "patch", "width", "heads", "mlp_width", "context_dim", "pooled_dim")
        check_counts(self, "layers", least=0)
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be a positive number: 100 is usual")
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} with {self.heads} heads: the head size must be a multiple of 4, because rotary "
                             f"positions take pairs for rows and for columns: use a width that is a multiple of {4 * self.heads}")


class DiT(nn.Module):
    """x [b, in_channels, h, w], t [b] (0..1000), cond -> [b, out_channels, h, w]; h and w multiples of the patch."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False                                # in training: saves memory for a third more compute
        width, area = config.width, config.patch**2
        self.patch_in = nn.Linear(config.in_channels * area, width)
        self.time_in = TimeEmbedding(config.time_dim, width, config.told)
        self.context_in = two_layers(config.context_dim, width, width)
        self.pooled_in = two_layers(config.pooled_dim, width, width) if config.pooled_dim else None
        self.modulation = nn.Linear(width, 6 * width)                  # the single adaLN of all blocks
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.empty(2, 1, width))
        self.patch_out = nn.Linear(width, config.out_channels * area)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_linears(self)
        # Zero-initialised, so that every residual branch and the output start at 0 for any input. The gates get gradients
        # as soon as the last layer is no longer 0, after the first step. The tables need no random initial values to break
        # symmetry, because the gradients of their entries differ from the start.
        for linear in (self.modulation, self.patch_out, *(block.cross.to_out for block in self.blocks)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for table in (self.final_table, *(block.table for block in self.blocks)):
            nn.init.zeros_(table)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        patch = self.config.patch
        check_inputs(x, cond, self.config, patch)
        x = F.pixel_unshuffle(x, patch)                                # [b, c * patch^2, rows, cols]
        rows, cols = x.shape[2:]
        rope = axial_rope(rows, cols, self.config.width // self.config.heads, self.config.rope_theta, x.device)
        x = self.patch_in(x.flatten(2).transpose(1, 2))                # [b, n, width], n = rows * cols
        context = once(cond.memo, self.context_in, lambda: self.context_in(cond.context))      # [b, m, width]
        time = self.time_in(t, cond.extra)                             # [b, width]
        if self.pooled_in is not None:
            time = time + self.pooled_in(cond.pooled)
        modulation = self.modulation(F.silu(time)).unflatten(1, (6, 1, -1))    # [b, 6, 1, width]
        run = runner(self)
        for block in self.blocks:
            x = run(block, x, context, cond.mask, modulation, rope, cond.memo)
        shift, scale = (self.final_table + time[:, None, None]).unbind(1)      # each [b, 1, width]
        x = self.patch_out(self.final_norm(x) * (1 + scale) + shift)   # [b, n, out * patch^2]
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, cols)), patch)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text, MLP, each a residual branch: x [b, n, width] -> [b, n, width].

    Self-attention and MLP are shifted, scaled and gated by modulation [b, 6, 1, width] + table. Cross-attention has
    no gate, as in PixArt-alpha: the purpose of a gate is that its branch starts at zero, and the zero-initialised
    output projection already does that.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.table = nn.Parameter(torch.empty(6, 1, width))
        self.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)     # no weight: the modulation scales
        self.attn = Attention(width, config.heads, qk_norm=True)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.cross = Attention(width, config.heads, qk_norm=True)
        self.norm3 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = two_layers(width, config.mlp_width, width)
        self.rounded_residual = config.rounded_residual

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, modulation: Tensor,
                rope: tuple[Tensor, Tensor], memo: dict[nn.Module, Any] | None = None) -> Tensor:
        # Under autocast the table is float32 and the other summand bfloat16. So the sum is float32, and so is x after the first gate.
        shared = self.table + modulation
        shared = shared.to(x.dtype) if self.rounded_residual else shared
        shift1, scale1, gate1, shift2, scale2, gate2 = shared.unbind(1)        # each [b, 1, width]
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        x = x + self.cross(self.norm2(x), context, mask, memo=memo)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


def axial_rope(rows: int, cols: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) [rows * cols, head_dim] for layers.rotate, for tokens in row-major order.

    Half of the pairs rotate with the row, half with the column, at head_dim/4 frequencies from theta^0 to theta^-1
    (exclusive), as in arXiv:2403.13298, Sec. 3.2. They are cheap enough to be computed in each forward pass.
    """
    quarter = head_dim // 4
    frequency = theta ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row = torch.arange(rows, device=device).repeat_interleave(cols)    # [n]
    col = torch.arange(cols, device=device).repeat(rows)
    angle = torch.cat([row[:, None] * frequency, col[:, None] * frequency], dim=1)    # [n, head_dim/2]
    angle = torch.cat([angle, angle], dim=1)                           # both members of a pair have one angle
    return angle.cos(), angle.sin()
