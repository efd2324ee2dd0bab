"""For drawing on a CPU: weights laid out once as its matrix units read them. By default oneDNN lays them out anew in every call, which
takes as long as the products where a batch is small."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]
LAST = torch.channels_last      # the order in memory in which convolutions are fastest here, and in which attention reads feature maps


def packed_linear(layer: nn.Linear, x: Tensor) -> Call:
    """The layer as a function, for inputs of about as many rows as x [..., in]."""
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, math.prod(x.shape[:-1]))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


def packed_convolution(layer: nn.Conv2d, x: Tensor) -> Call:
    """The layer as a function, for inputs of about the size of x [b, c, h, w]."""
    sizes = (layer.padding, layer.stride, layer.dilation, layer.groups)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *sizes, x.shape)
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x.contiguous(memory_format=LAST), weight, layer.bias, *sizes, "none", [], "")


# What pays, by the kind of layer and its dtype. In bfloat16 the answers are the same bits, in float32 the same up to rounding.
PACKED: dict[tuple[type[nn.Module], torch.dtype], Callable[[nn.Module, Tensor], Call]] = {
    (nn.Linear, torch.bfloat16): packed_linear,
    (nn.Conv2d, torch.bfloat16): packed_convolution,
    (nn.Conv2d, torch.float32): packed_convolution,
}


def packable(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies numbers of this dtype, and this build of torch has the functions. They are torch's own but not
    public: torch.compile uses them when it freezes weights (torch/_inductor/fx_passes/mkldnn_fusion.py)."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_convolution_pointwise", "_is_mkldnn_bf16_supported")
    there = torch.backends.mkldnn.is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") and all(
        hasattr(torch.ops.mkldnn, name) for name in names)
    return there and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_at_first_call(layer: nn.Module, pack: Callable[[nn.Module, Tensor], Call]) -> None:
    """Pack a layer's weight when the first input is there, for its size, and forget the weight itself: there is one copy of it. From then
    on the network can only draw: it cannot be saved, moved or trained."""
    def first(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():          # the packed weight must outlive an inference mode
            layer.forward = pack(layer, x)
            layer.weight.data = layer.weight.new_empty(0)           # of the same dtype, for whoever asks
        return layer.forward(x)

    layer.forward = first


def lay_out(net: nn.Module, vae: nn.Module) -> None:
    """Prepare a network on the CPU, and the autoencoder that decodes what it draws, for drawing and nothing else. Where this build of torch
    cannot, they stay as they are."""
    if not packable(next(net.parameters()).dtype):
        return
    vae.to(memory_format=LAST)                                      # called once per picture: packing would not pay
    for layer in net.modules():
        if type(layer) in (nn.Linear, nn.Conv2d) and (pack := PACKED.get((type(layer), layer.weight.dtype))):
            pack_at_first_call(layer, pack)
