"""CLIP's text tower: token ids in, one feature vector per token (and one per caption) out.

A causal pre-LN transformer with learned positions (arXiv:2103.00020, Sec. 2.4); the default config is
ViT-L/14's, the text encoder of Stable Diffusion 1. Only the causal mask is applied, never a padding
mask: the features of padded positions are part of what a diffusion model sees, so the padding rule
belongs to the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.layers import ACTIVATIONS, TextFeatures, dot_product_attention


@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    context_length: int = 77            # longest caption, BOS and EOS included
    activation: str = "quick_gelu"      # or "gelu"
    bos_token_id: int = 49406
    eos_token_id: int = 49407           # the token to pool at; 2, as in old published configs: the largest id
    projection_dim: int | None = None   # width of the projected pooled feature; None: no projection
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_counts(self, "vocab_size", "width", "layers", "heads", "mlp_width", "projection_dim")
        check_counts(self, "context_length", least=2)           # BOS and EOS
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.activation not in tuple(ACTIVATIONS):
            raise ValueError(f"unknown activation {self.activation!r}: use one of {', '.join(ACTIVATIONS)}")


class CLIPText(nn.Module):
    """Token ids [b, n], n <= context_length, to TextFeatures."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.projection = nn.Linear(config.width, config.projection_dim, bias=False) if config.projection_dim else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's scales: layers that write to the residual stream start smaller in deeper towers, biases start at 0."""
        width, residual_scale = self.config.width, (2 * self.config.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        for layer in self.layers:
            for linear, std in ((layer.q, width**-0.5), (layer.k, width**-0.5), (layer.v, width**-0.5),
                                (layer.out, width**-0.5 * residual_scale),
                                (layer.fc1, (2 * width) ** -0.5), (layer.fc2, width**-0.5 * residual_scale)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, ids: Tensor, skip_last: int = 0, norm: bool = True) -> TextFeatures:
        """ids [b, n] -> features.

        skip_last: how many layers before the last one `hidden` is taken. norm: whether `hidden` passes through the final
        norm. Stable Diffusion 1 uses (0, True), Stable Diffusion 2 (1, True), SDXL (1, False). `pooled` always comes from
        the last layer and the final norm. Every row of ids must contain an EOS.
        """
        n = ids.shape[1]
        if n > self.config.context_length:
            raise ValueError(f"{n} tokens do not fit a context of {self.config.context_length}: truncate the captions")
        if not 0 <= skip_last <= len(self.layers):
            raise ValueError(f"skip_last={skip_last} with {len(self.layers)} layers: use 0 to {len(self.layers)}")
        x = self.token_embedding(ids) + self.position_embedding.weight[:n]    # [b, n, width]
        hidden = x
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if depth == len(self.layers) - skip_last:
                hidden = x
        last = self.final_norm(x)
        if skip_last == 0:
            hidden = last if norm else x
        elif norm:
            hidden = self.final_norm(hidden)
        return TextFeatures(hidden, self.pool(ids, last))

    def pool(self, ids: Tensor, last: Tensor) -> Tensor:
        """The vector of last [b, n, width] at each caption's first EOS, projected if the config has a projection_dim."""
        pooled = last[torch.arange(len(ids), device=ids.device), self.ends(ids)]
        return pooled if self.projection is None else self.projection(pooled)

    def ends(self, ids: Tensor) -> Tensor:
        """The index of each caption's first EOS: ids [b, n] -> [b]. (An eos_token_id of 2 means the largest id of CLIP's own
        vocabulary. transformers takes the largest of all there, and so pools at a token that was added to the vocabulary.)"""
        eos, own = self.config.eos_token_id, ids < CLIPTextConfig.vocab_size
        return (ids * own if eos == 2 else (ids == eos).int()).argmax(dim=1)        # argmax returns the first maximum


class Layer(nn.Module):
    """Causal self-attention, then an MLP, each a pre-norm residual branch: x [b, n, width] -> [b, n, width]."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width = config.width
        if width % config.heads:
            raise ValueError(f"width {width} is not divisible by {config.heads} heads")
        self.heads, self.activation = config.heads, config.activation
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = dot_product_attention(q, k, v, causal=True)                       # [b, heads, n, width/heads]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))
