"""The vision transformer (arXiv:2010.11929) as CLIP's picture tower (arXiv:2103.00020), DINOv2 (arXiv:2304.07193, with registers
arXiv:2309.16588) and SigLIP (arXiv:2303.15343).

A pre-norm transformer over patches with learned positions. What the three differ in are fields of the config: the tokens beside the
patches, the norm in front, the scale of each branch, the activation, and how one vector is made of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts, lookup
from tinyldm.models import layers
from tinyldm.models.layers import Attention, init_linears


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2 d] -> [..., d] (arXiv:2002.05202, Eq. 6)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS = layers.ACTIVATIONS | {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),       # SigLIP
    "swiglu": swiglu,                                           # DINOv2's giant
}
POOLING = ("class", "attention")        # the class token, or attention of a learned query to all tokens ("MAP")


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 224               # height and width in training, for which there are positions
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    pooling: str = "class"
    registers: int = 0                  # further tokens without a position
    input_norm: bool = True             # a norm in front of the first layer
    patch_bias: bool = False
    layer_scale: bool = False           # a learned factor per channel at the end of each branch
    projection_dim: int | None = 512    # width of the projected feature; None: no projection
    norm_eps: float = 1e-5
    # For pictures of another size, positions are resampled bicubically:
    antialias: bool = True
    position_offset: float = 0.0        # is added to the new number of patches per side, for the scale only (see `position`)

    def __post_init__(self):
        check_counts(self, "image_size", "patch", "width", "layers", "heads", "mlp_width")
        if self.projection_dim is not None:
            check_counts(self, "projection_dim")
        lookup(ACTIVATIONS, self.activation, "activation")
        lookup(dict.fromkeys(POOLING), self.pooling, "pooling")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} is not a multiple of the patch size {self.patch}")


class ViT(nn.Module):
    """forward: pixels [b, 3, h, w], normalised as in training, of sides that are multiples of the patch -> features [b, projection_dim or
    width], not normalised."""

    def __init__(self, config: ViTConfig = ViTConfig()):
        super().__init__()
        self.config, width, has_class = config, config.width, config.pooling == "class"
        self.patches = nn.Conv2d(3, width, config.patch, config.patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(width)) if has_class else None
        self.registers = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        # One position for each patch; that of the class token comes first.
        self.positions = nn.Parameter(torch.empty((config.image_size // config.patch) ** 2 + has_class, width))
        self.input_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.input_norm else nn.Identity()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = None if has_class else AttentionPooling(config)
        self.projection = nn.Linear(width, config.projection_dim, bias=False) if config.projection_dim else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_linears(self)
        for name, p in self.named_parameters():
            if name in ("class_token", "registers", "positions", "head.probe"):
                nn.init.normal_(p, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.tokens(pixels)
        pooled = tokens[:, 0] if self.head is None else self.head(tokens)
        return pooled if self.projection is None else self.projection(pooled)

    def tokens(self, pixels: Tensor) -> Tensor:
        """All tokens behind the final norm [b, n, width]: the class token and the registers where there are some, then the patches."""
        (h, w), patch = pixels.shape[2:], self.config.patch
        if h % patch or w % patch:
            raise ValueError(f"pictures of {w} x {h} px cannot be cut into patches of {patch} x {patch}: resize them to multiples")
        x = self.patches(pixels).flatten(2).mT                                             # [b, n, width]
        special = 0 if self.class_token is None else 1
        alone = lambda tokens: tokens.expand(len(x), -1, -1)
        if special:
            x = torch.cat([alone(self.class_token[None]), x], 1)
        x = x + self.position(h // patch, w // patch)
        if self.registers is not None:
            x = torch.cat([x[:, :special], alone(self.registers), x[:, special:]], 1)
        x = self.input_norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)

    @property
    def patch(self) -> int:
        """Pixels per position of `patch_features`, along each side."""
        return self.config.patch

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Features of the patches alone, behind the final norm [b, width, h / patch, w / patch]."""
        size = [side // self.config.patch for side in pixels.shape[2:]]
        return self.tokens(pixels)[:, -size[0] * size[1]:].mT.unflatten(2, size)

    def position(self, h: int, w: int) -> Tensor:
        """The positions for h x w patches [n, width], resampled unless these are those of training.

        DINOv2's own code without registers passes (h + 0.1) / side as the scale, which moves the samples by a little: features of 224 px
        from weights for 518 px depend on it (facebookresearch/dinov2, interpolate_pos_encoding)."""
        side, offset = self.config.image_size // self.config.patch, self.config.position_offset
        if (h, w) == (side, side):
            return self.positions
        special = len(self.positions) - side**2
        grid = self.positions[special:].float().mT.reshape(1, -1, side, side)
        size = {"scale_factor": ((h + offset) / side, (w + offset) / side)} if offset else {"size": (h, w)}
        grid = F.interpolate(grid, **size, mode="bicubic", antialias=self.config.antialias)
        return torch.cat([self.positions[:special], grid.flatten(2)[0].mT.to(self.positions.dtype)])


class Layer(nn.Module):
    """Self-attention, then an MLP, each a pre-norm residual branch: x [b, n, width] -> the same shape."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, scale = config.width, lambda: nn.Parameter(torch.ones(config.width)) if config.layer_scale else 1.0
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.heads, bias=True)
        self.scale1 = scale()
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.scale2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.mlp_width * (2 if config.activation == "swiglu" else 1))
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class AttentionPooling(nn.Module):
    """A learned query attends to all tokens [b, n, width], and an MLP follows: [b, width]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(config.width))
        self.attn = Attention(config.width, config.heads, bias=True)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attn(self.probe.expand(len(tokens), 1, -1), tokens)[:, 0]
        return x + self.mlp(self.norm(x))
