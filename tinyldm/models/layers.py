"""Building blocks shared by the networks: conditioning, time, attention, and the blocks of transformers. Those of convolutional
networks are in convolutions.py.

Weights keep the shapes of the published Stable Diffusion checkpoints, so that loading them is a matter of renaming
(tinyldm/vendor_loaders). Attention is softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, Eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on.

    context: text features [b, n, d].
    mask: [b, n], True where a token may be attended to; None means all (as in Stable Diffusion). Numbers in [0, 1] are weights of
    the tokens: a token of weight 0.5 counts half as much as it would.
    pooled: one feature vector per caption [b, d], for networks that modulate by it.
    extra: further conditions by name, each [b, ...], such as SDXL's picture sizes or FLUX's guidance scale.
    memo: where networks keep what they make of the text alone (see `once`), so that later calls with this condition need not make it
        again: {} for as long as weights and text stay the same, as while one picture is drawn. None: nothing is kept. It belongs to these
        captions: conditions that are made of this one by `cat` and `tensor_split` have none.
    """

    context: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    memo: dict[nn.Module, Any] | None = field(default=None, repr=False, compare=False)

    def cat(self, *others: Cond) -> Cond:
        """All these conditions along the batch, self first: [b] and [b'] become [b + b']."""
        for other in others:
            if self.extra.keys() != other.extra.keys():
                raise ValueError(f"conditions with extra {sorted(self.extra)} and {sorted(other.extra)} cannot be joined: "
                                 "give both the same names")
        all_, join = (self, *others), lambda values: None if values[0] is None else torch.cat(values)
        return Cond(join([cond.context for cond in all_]), join([cond.mask for cond in all_]), join([cond.pooled for cond in all_]),
                    {name: join([cond.extra[name] for cond in all_]) for name in self.extra})

    def tensor_split(self, parts: int) -> list[Cond]:
        """Parts along the batch, of the sizes that Tensor.tensor_split gives: views of the same memory."""
        cut = lambda value: [None] * parts if value is None else value.tensor_split(parts)
        context, mask, pooled = cut(self.context), cut(self.mask), cut(self.pooled)
        extra = {name: cut(value) for name, value in self.extra.items()}
        return [Cond(context[i], mask[i], pooled[i], {name: pieces[i] for name, pieces in extra.items()}) for i in range(parts)]


def once(memo: dict[nn.Module, Any] | None, module: nn.Module, compute: Callable[[], Any]) -> Any:
    """compute(), which is a module's answer to the text alone: what Cond.memo has of it, else computed and kept there."""
    if memo is None:
        return compute()
    if module not in memo:
        memo[module] = compute()
    return memo[module]


class TextFeatures(NamedTuple):
    """What a text encoder answers to token ids [b, n]."""

    hidden: Tensor    # [b, n, width], one vector per token
    pooled: Tensor    # [b, width] (or [b, projection_dim]), the last layer's vector at EOS


def runner(net: nn.Module, recomputed: bool = True) -> Callable[..., Tensor]:
    """The function with which a network calls its blocks: run(block, *inputs). net.tap, where it is set, stands between them (see Tap, and
    shortcuts.py). In training with net.grad_checkpointing, unless recomputed is False, autograd keeps a block's inputs only, and the
    backward pass runs the block again to recompute the rest (arXiv:1604.06174, Sec. 4.1). Blocks draw no random numbers, so the state of
    the generators need not be kept, unless something beside their layers does (dropout of an adapter), which then says so on the network.
    """
    run = lambda block, *inputs: block(*inputs)
    if recomputed and net.grad_checkpointing and net.training and torch.is_grad_enabled():
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=getattr(net, "draws_random_numbers", False))
    tap = getattr(net, "tap", None)
    return run if tap is None else partial(tap, run)


class Tap:
    """Keeps what one block of a network answers, wherever `net.tap` is set to it. (Forward hooks would run again in the recomputation
    of gradient checkpointing, and torch.compile treats them as part of what it compiles once.)"""

    def __init__(self, block: nn.Module):
        self.block, self.output = block, None

    def __call__(self, run: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
        out = run(block, *inputs)
        if block is self.block:
            self.output = out
        return out

    def take(self) -> Any:
        """The output, which is forgotten here: it would keep the graph of the whole network alive."""
        out, self.output = self.output, None
        return out


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of network times t [b] (0..1000) -> float32 [b, dim], cosines first.

    DDPM's embedding (arXiv:2006.11239, App. B) in the order Stable Diffusion was trained with.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency                             # [b, dim/2]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


TOLD_CHANNELS = 256         # sinusoids of a number that a network is told
TOLD_FROM = {"guidance": 1.0}       # the value that says nothing: without guidance its scale is 1


class TimeEmbedding(nn.Module):
    """Network times t [b] -> embedding [b, out]: sinusoids through a two-layer MLP.

    told: names in Cond.extra of further numbers [b], whose sinusoids are added to the time's, each through a matrix that starts at zero,
    so that a network begins as it was without. "guidance" is time_cond_proj of diffusers, for LCM (arXiv:2310.04378, App. C)."""

    def __init__(self, dim: int, out: int, told: tuple[str, ...] = ()):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"a time embedding of {dim} numbers, half of them cosines and half sines: use an even width, 2 or more")
        self.dim = dim
        self.linear_1 = nn.Linear(dim, out)
        self.linear_2 = nn.Linear(out, out)
        self.told = nn.ModuleDict({name: nn.Linear(TOLD_CHANNELS, dim, bias=False) for name in told})
        for linear in self.told.values():
            nn.init.zeros_(linear.weight)

    def forward(self, t: Tensor, extra: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        embedding = timestep_embedding(t, self.dim).to(self.linear_1.weight.dtype)
        for name, linear in self.told.items():
            if name not in extra:
                raise ValueError(f'this network is told a number by the name {name}, which is missing: pass Cond(extra={{"{name}": [b]}})')
            embedding = embedding + linear(told_embedding(extra[name] - TOLD_FROM.get(name, 0.0)).to(embedding.dtype))
        return self.linear_2(F.silu(self.linear_1(embedding)))


def told_embedding(number: Tensor) -> Tensor:
    """Sinusoids of numbers [b] of about 0 to 10 -> float32 [b, TOLD_CHANNELS], sines first, the last frequency 1 / 10,000. (Angles are up
    to 10,000, so a rounding error of a frequency is seen: they are computed in the order in which diffusers does it.)"""
    half = TOLD_CHANNELS // 2
    step = torch.full((), 10_000.0, device=number.device).log() / (half - 1)
    angle = 1000 * number.float()[:, None] * torch.exp(torch.arange(half, device=number.device) * -step)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


ACTIVATIONS = {                         # of CLIP's two towers
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),    # OpenAI's weights
    "gelu": F.gelu,                                          # LAION's weights; the wrong one degrades silently
}


_plain = False                          # see prefer_plain_attention


def prefer_plain_attention() -> None:
    """From now on, attention that is differentiated on a CPU is computed by plain products, for the whole process: for training. Their
    backward pass over some dozens of tokens is several times faster than that of PyTorch's kernels (bf16), and the same up to
    rounding. For drawing the kernels are faster: forward passes only, and over many tokens."""
    global _plain
    _plain = True


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, Eq. 1) of q [b, heads, n, d] over k and v [b, heads, m, d] -> [b, heads, n, d].

    mask: broadcast to [b, heads, n, m]: True where attention may go, or numbers that are added to the logits. causal: token i sees
    the tokens up to i."""
    if not (_plain and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    logits = q * q.shape[-1] ** -0.5 @ k.mT                                # [b, heads, n, m]
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention of x [b, n, d] over context [b, m, c] (over x itself when context is None).

    bias: whether q, k and v have a bias (in the VAE they do, in the transformers they do not).
    qk_norm: RMS-normalise q and k per head, which keeps attention logits bounded (arXiv:2302.05442, Sec. 2).
    upcast: multiply q, k and v in float32 where they are float16, whose largest value is 65504. Stable Diffusion 2.1
    requires it. (PyTorch's kernels for CUDA and CPU accumulate in float32 by default.)
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False, qk_norm: bool = False,
                 upcast: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by {heads} heads")
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, memo: dict[nn.Module, Any] | None = None) -> Tensor:
        """mask [b, m]: True = may be attended to; numbers are weights. rope: (cos, sin), each [n, head_dim], for self-attention.
        memo: of the Cond that the context comes from."""
        q, k, v = (y.transpose(1, 2) for y in self.project(x, context, memo))  # [b, heads, n, d/heads]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        dtype = torch.float32 if self.upcast and v.dtype == torch.float16 else v.dtype
        if mask is not None:
            weights = mask if mask.dtype == torch.bool else mask.log().to(dtype)        # added to the logits, so -inf is weight 0
            mask = weights[:, None, None, :]                                    # [b, 1, 1, m]
        out = dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
        return self.to_out(out.transpose(1, 2).flatten(2).to(v.dtype))

    def project(self, x: Tensor, context: Tensor | None = None, memo: dict[nn.Module, Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of x [b, n, heads, d/heads], and the keys and values of the context [b, m, heads, d/heads]."""
        q = self.normed(self.q_norm, self.to_q(x).unflatten(-1, (self.heads, -1)))
        return q, *once(memo, self, lambda: self.keys_and_values(x if context is None else context))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (linear(context).unflatten(-1, (self.heads, -1)) for linear in (self.to_k, self.to_v))
        return self.normed(self.k_norm, k), v

    @staticmethod
    def normed(norm: nn.Module, y: Tensor) -> Tensor:
        # Under autocast y is bfloat16 and the weight float32, which PyTorch's fused kernel does not take.
        return norm(y.to(norm.weight.dtype)) if isinstance(norm, nn.RMSNorm) else y


def two_layers(dim: int, hidden: int, out: int, activation: nn.Module | None = None) -> nn.Sequential:
    """The MLP of transformers of images: with GELU in its approximation by tanh unless another activation is given."""
    return nn.Sequential(nn.Linear(dim, hidden), activation or nn.GELU(approximate="tanh"), nn.Linear(hidden, out))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, Eq. 34) of x [b, heads, n, d] by angles [n, d].

    Dimensions i and i + d/2 form a pair; cos and sin repeat their first half in the second.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- transformers of images


def init_linears(net: nn.Module) -> None:
    """Initial weights of a transformer, as in DiT (arXiv:2212.09748, facebookresearch/DiT, models.py), but for what starts at zero."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))          # a view, so that the patches' convolution is a matrix too
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in (module for module in net.modules() if isinstance(module, TimeEmbedding)):
        for linear in (embedding.linear_1, embedding.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in embedding.told.values():
            nn.init.zeros_(linear.weight)


def check_inputs(x: Tensor, cond: Cond, config: Any, patch: int) -> None:
    """ValueError, with the fix, for latents x [b, c, h, w] that cannot be cut into patches, and for text features that do not have the
    widths in a transformer's config: context_dim and, unless it is None, pooled_dim."""
    (h, w), kind = x.shape[2:], type(config).__name__
    if h % patch or w % patch:
        near = "x".join(str(max(1, round(side / patch)) * patch) for side in (h, w))
        raise ValueError(f"latent size {h}x{w} is not a multiple of the patch size {patch}: use {near}, for example")
    if cond.context.shape[-1] != config.context_dim:
        raise ValueError(f"text features of width {cond.context.shape[-1]} for a network with context_dim {config.context_dim}: "
                         f"set {kind}.context_dim to the text encoder's width")
    if config.pooled_dim and (cond.pooled is None or cond.pooled.shape[-1] != config.pooled_dim):
        fix = (f"there is one of width {cond.pooled.shape[-1]}: set {kind}.pooled_dim to it" if cond.pooled is not None
               else "there is none: pass Cond(context, pooled=...)")
        raise ValueError(f"this network is modulated by a pooled text feature of width {config.pooled_dim}, and {fix}")


MLP_RATIO = 4                           # width of the inner layer of a stream's MLP over that of its outer ones


class Stream(nn.Module):
    """The weights for one kind of tokens, image or text, in a block where both kinds attend to each other (arXiv:2403.03206, Sec. 4).

    The modulation makes from a vector c, in this order: shift, scale and gate of the attention, shift, scale and gate of the MLP and,
    where there is one (`dual`), those of a second attention, to tokens of the same kind. `read_only`: the tokens are not used after
    this block. They then have queries, keys and values and, of the vectors, the first two.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool = False, read_only: bool = False):
        super().__init__()
        self.read_only = read_only
        attention = lambda: Attention(width, heads, bias=True, qk_norm=qk_norm)
        self.modulation = nn.Linear(width, (2 if read_only else 9 if dual else 6) * width)
        self.attn = attention()
        self.attn2 = attention() if dual else None
        self.mlp = two_layers(width, MLP_RATIO * width, width)
        if read_only:
            del self.attn.to_out, self.mlp

    def update(self, x: Tensor, normed: Tensor | None, attended: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """x [b, n, width] after the block. normed: x before attention, normalised; attended: what the joint attention answers."""
        gate, mlp_shift, mlp_scale, mlp_gate, *second = vectors
        x = x + gate * self.attn.to_out(attended)
        if self.attn2 is not None:
            shift, scale, gate = second
            x = x + gate * self.attn2(modulate(normed, shift, scale))
        return x + mlp_gate * self.mlp(modulate(normalise(x), mlp_shift, mlp_scale))


def vectors(modulation: nn.Linear, c: Tensor) -> tuple[Tensor, ...]:
    """The vectors [b, 1, width] that a modulation makes from c [b, width]."""
    return modulation(c)[:, None].split(c.shape[1], dim=2)


def normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)                     # no weights: the modulation scales


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normed * (1 + scale) + shift
