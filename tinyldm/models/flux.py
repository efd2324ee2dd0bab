"""The transformer of FLUX.1: MMDiT's blocks with rotary positions, then blocks in which text and image are one sequence.

After black-forest-labs/flux (model.py and modules/layers.py); there is no paper. In the first blocks ("double"), image and text
tokens have weights of their own and attend to each other, as in Stable Diffusion 3 (mmdit.py, arXiv:2403.03206, Sec. 4). In the
others ("single") all tokens share the weights, and attention and MLP work side by side on the same input (arXiv:2302.05442,
Sec. 2). Queries and keys are normalised, and carry the positions: rotary ones (arXiv:2104.09864) over rows and columns, so that
no table ties the network to one size. All tokens of the text are at the same position. There are no masks: the padding of
captions is attended to.

    dev         FluxConfig(guidance=True): distilled from a guided network, it is told the guidance scale (Cond.extra["guidance"])
    schnell     FluxConfig(): distilled to draw in a few steps without guidance

Both have 11.9 billion parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.layers import (
    MLP_RATIO,
    Attention,
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

PATCH = 2                               # latent pixels per token, along each side: published configs cannot say another number
THETA = 10_000.0                        # the slowest pair of channels turns one radian in roughly this many tokens; as fixed as PATCH
TIME_DIM = 256                          # sinusoids in the embeddings of the time and of the guidance scale
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class FluxConfig:
    in_channels: int = 16               # of the latents; a token has four times as many
    out_channels: int = 16
    width: int = 3072
    heads: int = 24
    double_layers: int = 19
    single_layers: int = 38
    context_dim: int = 4096             # width of the text features
    pooled_dim: int = 768               # width of the pooled text feature
    guidance: bool = False              # whether it is told the guidance scale
    rope_axes: tuple[int, ...] = (16, 56, 56)   # channels of a head that tell the picture (always the first), the row and the column

    def __post_init__(self):
        check_counts(self, "in_channels", "out_channels", "width", "heads", "double_layers", "single_layers", "context_dim",
                     "pooled_dim", "rope_axes")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        head = self.width // self.heads
        if len(self.rope_axes) != 3 or any(axis % 2 for axis in self.rope_axes) or sum(self.rope_axes) != head:
            raise ValueError(f"rope_axes={self.rope_axes} must be three even numbers whose sum is the size of a head, width / heads = "
                             f"{head}: use {usual_axes(head)}")


def usual_axes(head: int) -> tuple[int, int, int]:
    """The axes of a head of this size, in the proportions of the published networks. ValueError where there are none."""
    side = (head - max(2, head // 8)) // 4 * 2
    if head % 2 or side < 2:
        raise ValueError(f"heads of size {head}: rotary positions need an even size, 6 or more")
    return head - 2 * side, side, side


class Flux(nn.Module):
    """x [b, in_channels, h, w], t [b] (0..1000), cond -> [b, out_channels, h, w]; h and w even. cond has `pooled` and, where
    config.guidance, extra["guidance"] [b]: the guidance scale, such as 3.5; 1 in training (kohya-ss/sd-scripts, flux_train_network.md)."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False                                # in training: saves memory for a third more compute
        width, area = config.width, PATCH**2
        self.patch_in = nn.Linear(config.in_channels * area, width)
        self.context_in = nn.Linear(config.context_dim, width)
        self.time_in = TimeEmbedding(TIME_DIM, width)
        self.guidance_in = TimeEmbedding(TIME_DIM, width) if config.guidance else None
        self.pooled_in = two_layers(config.pooled_dim, width, width, nn.SiLU())
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.out_channels * area)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_linears(self)
        # With modulations of zero, every gate is 0 and every block the identity. The output is 0 for any input.
        streams = [stream for block in self.double_blocks for stream in (block.image, block.text)]
        for linear in (self.final_modulation, self.patch_out, *(part.modulation for part in (*streams, *self.single_blocks))):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.check(x, cond)
        dtype = self.patch_in.weight.dtype                             # of the residual stream: float32 under autocast
        x = F.pixel_unshuffle(x, PATCH)                                # [b, c * 4, rows, cols]: a token's channels are its slowest axis
        rows, cols = x.shape[2:]
        x = self.patch_in(x.flatten(2).transpose(1, 2)).to(dtype)      # [b, n, width], n = rows * cols
        text = self.context_in(cond.context).to(dtype)                 # [b, m, width]
        c = self.time_in(t) + self.pooled_in(cond.pooled)              # [b, width]
        if self.guidance_in is not None:
            c = c + self.guidance_in(1000 * cond.extra["guidance"].float())    # on the scale of times
        c = F.silu(c)
        rope = rotations(text.shape[1], rows, cols, self.config.rope_axes, x.device)
        run = runner(self)
        for block in self.double_blocks:
            x, text = run(block, x, text, c, rope)
        both = torch.cat([text, x], dim=1)                             # [b, m + n, width]
        for block in self.single_blocks:
            both = run(block, both, c, rope)
        shift, scale = vectors(self.final_modulation, c)
        x = self.patch_out(modulate(normalise(both[:, text.shape[1] :]), shift, scale))    # [b, n, out * 4]
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, cols)), PATCH)

    def check(self, x: Tensor, cond: Cond) -> None:
        """Refuse inputs of the wrong size here, where the message can name the cause."""
        check_inputs(x, cond, self.config, PATCH)
        if self.guidance_in is not None and "guidance" not in cond.extra:
            raise ValueError('this network is told the guidance scale: pass Cond(..., extra={"guidance": ...}), [b] numbers such as 3.5')
        if cond.mask is not None:
            raise ValueError("this network attends to all tokens of the text: pass Cond without a mask")


class DoubleBlock(nn.Module):
    """MMDiT's block with rotary positions: attention among text and image tokens together, and an MLP for each kind.

    x [b, n, width], text [b, m, width], c [b, width], rope of all m + n tokens, the text's first -> x, text."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.image, self.text = (Stream(config.width, config.heads, qk_norm=True) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        image_vectors, text_vectors = vectors(self.image.modulation, c), vectors(self.text.modulation, c)
        theirs = self.text.attn.project(modulate(normalise(text), *text_vectors[:2]))
        ours = self.image.attn.project(modulate(normalise(x), *image_vectors[:2]))
        attended = attend(*(torch.cat(pair, dim=1) for pair in zip(theirs, ours)), rope)
        for_text, for_image = attended.tensor_split([text.shape[1]], dim=1)
        x = self.image.update(x, None, for_image, image_vectors[2:])
        return clipped(x), clipped(self.text.update(text, None, for_text, text_vectors[2:]))


class SingleBlock(nn.Module):
    """Attention and MLP side by side, behind one modulation (shift, scale, gate): x [b, m + n, width], c [b, width] -> x."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width, hidden = config.width, MLP_RATIO * config.width
        self.modulation = nn.Linear(width, 3 * width)
        self.attn = Attention(width, config.heads, bias=True, qk_norm=True)
        del self.attn.to_out                                           # `out` takes its place
        self.mlp_in = nn.Linear(width, hidden)
        self.out = nn.Linear(width + hidden, width)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = vectors(self.modulation, c)
        normed = modulate(normalise(x), shift, scale)
        attended = attend(*self.attn.project(normed), rope)
        hidden = F.gelu(self.mlp_in(normed), approximate="tanh")
        return clipped(x + gate * self.out(torch.cat([attended, hidden], dim=2)))


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
    """Attention of q, k, v [b, n, heads, d] -> [b, n, heads * d]. Rotations turn q and k, so that q * k tells their distance."""
    q, k = (rotate_pairs(y, rope).to(v.dtype) for y in (q, k))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))                   # [b, heads, n, d]
    return dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def clipped(x: Tensor) -> Tensor:
    """In float16, whose largest number the residual stream exceeds with some captions, that number instead of infinity, as in
    diffusers (#9097). In bfloat16 and float32 nothing is cut."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x


def rotations(text: int, rows: int, cols: int, axes: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [text + rows * cols, 1, head/2, 2]: cosine and sine of the angle by which each pair of channels of a head is turned.

    A token has three coordinates: (0, 0, 0) in the text, (0, row, column) in the picture. Each of them turns channels of its own,
    at the frequencies 10000^(-2i / axis) of arXiv:2104.09864, Sec. 3.3. The angles are float64: positions of hundreds times float32
    frequencies would be off in the fifth digit.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64   # Apple's GPUs have no float64
    number = lambda n: torch.arange(n, dtype=dtype, device=device)
    picture = torch.cartesian_prod(number(1), number(rows), number(cols))              # [rows * cols, 3], row-major
    position = torch.cat([picture.new_zeros(text, 3), picture])
    angle = torch.cat([position[:, i, None] * THETA ** (-2 * number(axis // 2) / axis) for i, axis in enumerate(axes)], dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()[:, None]


def rotate_pairs(x: Tensor, rope: Tensor) -> Tensor:
    """x [b, n, heads, d] with channels 2i and 2i + 1 turned as a pair (in layers.rotate, i and i + d/2 are one), float32 or more."""
    pairs = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)).flatten(-2)
    # The same in real numbers, for torch.compile, which makes no kernels for complex ones. Without it they are many times slower.
    (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
