"""Networks that no other library has: what they compute is compared with numbers that were stored once, so that a change is seen.

The weights come from a formula, not from the initialisation, which may change for good reasons; its scales are asserted below. Where
a published implementation exists (U-Net, VAE, TAESD, CLIP), it is the reference instead: tests/vendor_loaders.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from tinyldm.evaluation.recogniser import Recogniser
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig

TINY = dict(width=16, layers=2, heads=2, mlp_width=24, context_dim=12, time_dim=8)


def waves(shape: tuple[int, ...], number: int = 0) -> Tensor:
    """Numbers of a formula, float64, of about unit variance and without any pattern that a permutation would leave as it is."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2) * torch.sin(0.7 * number + 1.3 * i + 0.011 * i * i)).view(shape)


@torch.no_grad()
def with_formula(net: nn.Module) -> nn.Module:
    """The network in float64 with weights of unit gain; scales of norms around 1."""
    for number, (name, p) in enumerate(net.double().named_parameters(), 1):
        gain = (p[0].numel()) ** -0.5 if p.dim() > 1 else 0.2
        p.copy_(gain * waves(p.shape, number) + ("norm" in name and name.endswith("weight")))
    return net.eval()


def dit_inputs() -> tuple[Tensor, Tensor, Cond]:
    cond = Cond(waves((2, 5, 12), 102), torch.arange(5) <= torch.tensor([[4], [1]]), waves((2, 7), 103))
    return waves((2, 4, 6, 4), 101), torch.tensor([17.0, 803.5], dtype=torch.float64), cond


def fingerprint(y: Tensor) -> list[float]:
    """A few numbers that depend on all of y [b, ...]: mean, standard deviation, and the products of each sample with two waves."""
    flat = y.double().flatten(1)
    return [flat.mean().item(), flat.std().item(), *(flat @ waves((flat.shape[1], 2), 7)).flatten().div(flat.shape[1]).tolist()]


@torch.no_grad()
@pytest.mark.parametrize("changes, expected", [
    ({}, [0.179279359, 1.38257309, -0.159953626, -0.030374271, -0.075503102, -0.0607531551]),
    (dict(patch=1, pooled_dim=7, out_channels=8, rope_theta=10_000.0),
     [-0.570467857, 1.34327529, -0.069637921, -0.0381455782, 0.0354772745, -0.0412118312]),
])
def test_the_diffusion_transformer_computes_what_it_did(changes, expected):
    net = with_formula(DiT(DiTConfig(**(TINY | changes))))
    assert fingerprint(net(*dit_inputs())) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@torch.no_grad()
def test_the_recogniser_computes_what_it_did():
    net = with_formula(Recogniser(4)).float()                  # its head computes in float32
    for number, (name, buffer) in enumerate(net.named_buffers(), 50):
        if buffer.is_floating_point():
            buffer.copy_(0.1 * waves(buffer.shape, number) + name.endswith("var"))
    expected = [-0.059231023, 0.227097407, 0.0555669037, 0.0593962573, 0.0555964469, 0.0593840016]
    assert fingerprint(net(waves((2, 3, 64, 64), 104).float())) == pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- initialisation


def check_scales(net: nn.Module, scale) -> None:
    """scale: the name and the tensor of a parameter -> its standard deviation; 0 for zeros; None: a norm's weight, all ones."""
    for name, p in net.state_dict().items():
        if (std := scale(name, p)) is None:
            assert (p == 1).all(), name
        elif std == 0:
            assert not p.any(), name
        else:
            assert abs(p.mean()) < 5 * std / p.numel() ** 0.5 and p.std() == pytest.approx(std, rel=4 / p.numel() ** 0.5), name


def test_the_diffusion_transformer_starts_with_xavier_s_scale_and_zeros_at_the_end_of_every_branch():
    def scale(name, p):
        if "norm" in name:
            return None
        zero = ("table", "bias", "modulation.weight", "patch_out.weight", "cross.to_out.weight")
        if name.endswith(zero):
            return 0
        return 0.02 if name.startswith("time_in") else math.sqrt(2 / sum(p.shape))      # Glorot and Bengio, 2010, Eq. 16
    torch.manual_seed(0)
    check_scales(DiT(DiTConfig(**TINY | dict(width=64, mlp_width=128, pooled_dim=16))), scale)


def test_mmdit_starts_with_xavier_s_scale_and_every_gate_at_zero():
    def scale(name, p):
        if name == "positions" or "norm" in name:
            return None
        if name.endswith(("bias", "modulation.weight", "patch_out.weight")):
            return 0
        return 0.02 if name.startswith("time_in") else math.sqrt(2 / (p.shape[0] + p[0].numel()))
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(width=64, layers=2, heads=2, context_dim=24, pooled_dim=16, qk_norm=True, dual_layers=(0,), max_positions=8,
                            sample_size=16))
    net.positions.fill_(1)                                      # not initial weights: a table, which tests/models/test_mmdit.py looks at
    check_scales(net, scale)


def test_flux_starts_with_xavier_s_scale_and_every_gate_at_zero():
    def scale(name, p):
        if "norm" in name:
            return None
        if name.endswith(("bias", "modulation.weight", "patch_out.weight")):
            return 0
        return 0.02 if name.startswith(("time_in", "guidance_in")) else math.sqrt(2 / sum(p.shape))
    torch.manual_seed(0)
    check_scales(Flux(FluxConfig(width=64, heads=2, double_layers=1, single_layers=2, context_dim=24, pooled_dim=16, guidance=True,
                                 rope_axes=(8, 12, 12))), scale)


def test_the_u_net_and_the_autoencoder_start_with_pytorch_s_scales_and_the_u_net_with_zeros_at_the_end_of_every_branch():
    def scale(name, p):
        module = nets[0].get_submodule(name.rpartition(".")[0])
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            return None if name.endswith("weight") else 0
        if zeros and name.rpartition(".")[0].endswith(("conv2", "proj_out", "conv_out")):
            return 0
        return (3 * module.weight[0].numel()) ** -0.5           # uniform within 1 / sqrt(fan-in)
    torch.manual_seed(0)
    for zeros, net in ((True, UNet(UNetConfig(widths=(32, 64), depth=1, attention=(False, True), heads=(1, 2), context_dim=24, groups=8))),
                       (False, AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8)))):
        nets = [net]
        check_scales(net, scale)


def test_the_text_encoder_starts_with_openai_s_scales():
    def scale(name, p):
        if name.endswith("bias"):
            return 0
        if "norm" in name:
            return None
        part = name.split(".")[-2]
        small = 32**-0.5 * (2 * 4) ** -0.5                      # layers that write to the residual stream of 2 x 4 branches
        return {"token_embedding": 0.02, "position_embedding": 0.01, "out": small, "fc2": small, "fc1": 64**-0.5}.get(part, 32**-0.5)
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=600, width=32, layers=4, heads=2, mlp_width=64, context_length=16, projection_dim=24)
    check_scales(CLIPText(config), scale)
