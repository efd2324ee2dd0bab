"""T5's encoder: token ids in, one feature vector per token out; the second or third text encoder of Stable Diffusion 3 and FLUX.

A pre-norm transformer (arXiv:1910.10683, Sec. 2.1), the default config is version 1.1's XXL. Unlike CLIP's it is not causal, has no
biases, divides by the root mean square instead of normalising (arXiv:1910.07467), and does not divide attention's logits by
sqrt(d): the initial weights of the queries do that. Positions are not embedded: a number that depends on the distance of two
tokens, the same in all layers, is added to their logit. So captions may have any length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.layers import TextFeatures


@dataclass(frozen=True)
class T5Config:
    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64                  # heads * head_dim may differ from the width
    mlp_width: int = 10240
    gated: bool = True                  # version 1.1: GELU times a linear gate (arXiv:2002.05202); False, the original: ReLU
    context_length: int = 512           # tokens per caption, </s> included, unless the tokenizer says otherwise
    eos_token_id: int = 1
    buckets: int = 32                   # of distances between tokens, half of them for keys behind the query
    max_distance: int = 128             # all greater distances share a bucket
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_counts(self, "vocab_size", "width", "layers", "heads", "head_dim", "mlp_width", "context_length")
        check_counts(self, "buckets", least=4)
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"max_distance {self.max_distance} with {self.buckets} buckets: use more than {self.buckets // 4}")


class T5(nn.Module):
    """Token ids [b, n] to TextFeatures, in the dtype of the weights. Works in float16, too, which T5 was not trained in: see Layer."""

    takes_mask = True

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_bias = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The scales of the published code (Mesh TensorFlow): unit gain, but the queries, which make up for the missing 1 / sqrt(d)."""
        config = self.config
        width, inner = config.width, config.heads * config.head_dim
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_bias.weight, std=width**-0.5)
        for layer in self.layers:
            stds = {layer.q: (width * config.head_dim) ** -0.5, layer.k: width**-0.5, layer.v: width**-0.5, layer.out: inner**-0.5,
                    layer.fc1: width**-0.5, layer.gate: width**-0.5, layer.fc2: config.mlp_width**-0.5}
            for linear, std in stds.items():
                if linear is not None:
                    nn.init.normal_(linear.weight, std=std)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextFeatures:
        """ids [b, n] -> features. mask [b, n]: True where a token may be attended to; None: all, as in Stable Diffusion 3 and FLUX.
        `pooled` is the vector at each caption's end. Every row of ids must contain an end."""
        bias = self.bias(ids.shape[1])                                          # [1, heads, n, n]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        x = self.token_embedding(ids).float()                                   # [b, n, width]
        for layer in self.layers:
            x = layer(x, bias)
        last = self.final_norm(x)
        return TextFeatures(last, last[torch.arange(len(ids), device=ids.device), self.ends(ids)])

    def ends(self, ids: Tensor) -> Tensor:
        """The index of each caption's first </s>: ids [b, n] -> [b]."""
        return (ids == self.config.eos_token_id).int().argmax(dim=1)            # argmax returns the first maximum

    def bias(self, n: int) -> Tensor:
        """What is added to the logits of n queries and n keys: [1, heads, n, n]."""
        weight = self.position_bias.weight
        offsets = torch.arange(1 - n, n, device=weight.device)                  # position of the key minus that of the query
        values = self.position_bias(bucket(offsets, self.config.buckets, self.config.max_distance))     # [2n - 1, heads]
        return values.T.unfold(1, n, 1).flip(1)[None]                           # the query at position i begins at offset -i


def bucket(offsets: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each offset: one for every small distance, then ever wider ones up to max_distance (arXiv:1910.10683, Sec. 2.1).
    The second half of the buckets is for keys behind the query."""
    half, distance = buckets // 2, offsets.abs()
    exact = half // 2
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)           # 0 at exact, 1 at max_distance
    wide = (exact + (grown * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, wide) + half * (offsets > 0)


class RMSNorm(nn.RMSNorm):
    """Computes in float32, and returns the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(self.weight.dtype)


class Layer(nn.Module):
    """Self-attention, then an MLP, each a pre-norm residual branch: x [b, n, width] in float32 -> the same.

    Some features of published weights exceed float16's largest number, 65504: in the residual stream, which is float32 here, and
    in the MLP's output (transformers #4586 and #5651; T5 was trained in bfloat16, which has the range of float32). In float16, the
    branch of the MLP that is proportional to its input gets a 64th of it, and the output is multiplied by 64. That is exact but
    for numbers near 0, which are rounded to multiples of 4e-6.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        linear = lambda ins, outs: nn.Linear(ins, outs, bias=False)
        self.heads = config.heads
        self.norm1 = RMSNorm(width, eps=config.norm_eps)
        self.q, self.k, self.v = (linear(width, inner) for _ in range(3))
        self.out = linear(inner, width)
        self.norm2 = RMSNorm(width, eps=config.norm_eps)
        self.fc1 = linear(width, config.mlp_width)
        self.gate = linear(width, config.mlp_width) if config.gated else None
        self.fc2 = linear(config.mlp_width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """bias: added to the logits [b or 1, heads, n, n]."""
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)          # [b, heads, n, head_dim]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        if y.dtype == torch.float16:
            return x + 64 * self.mlp(y, y / 64).float()
        return x + self.mlp(y, y)

    def mlp(self, y: Tensor, small: Tensor) -> Tensor:
        """small: y, or a fraction of it, of which the result is the same fraction."""
        if self.gate is None:
            return self.fc2(F.relu(self.fc1(small)))
        return self.fc2(F.gelu(self.fc1(y), approximate="tanh") * self.gate(small))
