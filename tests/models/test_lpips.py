"""LPIPS against a reference written from the paper in float64, and against the lpips package where that can be imported."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinyldm.models.lpips import LPIPS, LPIPSConfig

SMALL = {"vgg16": (4, 6, 8, 10, 12), "alexnet": (6, 8, 10, 12, 14)}
# What torchvision documents of both trunks: numbers of output channels, kernel, stride, padding; "M" is max-pooling (kernel, stride);
# "*" marks the ReLUs after which features are taken.
VGG = ["c c*", "M", "c c*", "M", "c c c*", "M", "c c c*", "M", "c c c*"]
CONV = {"vgg16": [(3, 1, 1)] * 13, "alexnet": [(11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]}
PLAN = {"vgg16": " ".join(VGG).split(), "alexnet": "c* M c* M c* c* c*".split()}
POOL = {"vgg16": (2, 2), "alexnet": (3, 2)}


def make(trunk: str, seed: int = 0, widths=None) -> LPIPS:
    """Random weights, as published ones are: biases away from 0, linear layers of positive and zero weights."""
    torch.manual_seed(seed)
    made = LPIPS(LPIPSConfig(trunk, SMALL[trunk] if widths is None else widths))
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.2)
        elif name.startswith("linears"):
            p.copy_(torch.rand(p.shape).mul(2).sub(0.5).clamp(min=0))
    return made


def pictures(side=(40, 33), seed=1, count=3) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.rand(count, 3, *side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return one, (one + 0.3 * torch.randn(one.shape, generator=torch.Generator().manual_seed(seed + 1))).clamp(-1, 1)


def reference(made: LPIPS, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Eq. 1 of arXiv:1801.03924, with the colours scaled as in version 0.1: sum over layers of the mean over pixels of
    |w * (y - y')|^2, y being unit vectors over the channels (w of the paper is the root of the published weights)."""
    trunk, state = made.config.trunk, {name: tensor.double() for name, tensor in made.state_dict().items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    index = convs = taps = 0
    xs, total = [(pixels - shift) / scale for pixels in (one, two)], 0
    for word in PLAN[trunk]:
        if word == "M":
            xs, index = [F.max_pool2d(x, *POOL[trunk]) for x in xs], index + 1
            continue
        kernel, stride, padding = CONV[trunk][convs]
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        assert weight.shape[2:] == (kernel, kernel)
        xs, index, convs = [F.conv2d(x, weight, bias, stride, padding).clamp(min=0) for x in xs], index + 2, convs + 1
        if word == "c*":
            units = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in xs]
            weights = state[f"linears.{taps}.weight"].view(-1, 1, 1)
            total, taps = total + ((units[0] - units[1]).square() * weights).sum(1).mean((1, 2)), taps + 1
    assert taps == 5
    return total


@pytest.mark.parametrize("trunk", SMALL)
def test_the_distance_and_its_gradients_are_those_of_the_paper(trunk):
    made, (one, two) = make(trunk), pictures()
    leaves = [pixels.clone().requires_grad_() for pixels in (one, two)]
    exact = [pixels.double().requires_grad_() for pixels in (one, two)]
    found, expected = made(*leaves), reference(made, *exact)
    assert found.shape == (3,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.sum().backward(), expected.sum().backward()
    for ours, theirs in zip(leaves, exact):
        assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


@pytest.mark.parametrize("trunk, net", [("vgg16", "vgg"), ("alexnet", "alex")])
def test_the_distance_and_its_gradients_are_those_of_the_lpips_package(trunk, net):
    """Skipped where the package or torchvision is missing: nothing here needs either."""
    pytest.importorskip("torchvision")
    lpips = pytest.importorskip("lpips")
    made, (one, two) = make(trunk, widths=()), pictures((64, 48))
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.startswith("net.slice"):
                tensor.copy_(made.state_dict()["features." + name.split(".", 2)[2]])
        for i, linear in enumerate(made.linears):
            getattr(theirs, f"lin{i}").model[1].weight.copy_(linear.weight)
    leaves = [one.clone().requires_grad_() for _ in range(2)]
    found, expected = made(leaves[0], two), theirs(leaves[1], two).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.sum().backward(), expected.sum().backward()
    assert (leaves[0].grad - leaves[1].grad).norm() < 1e-5 * leaves[1].grad.norm()


def test_equal_pictures_are_at_distance_0_and_have_no_gradient_that_is_not_a_number():
    for trunk in SMALL:
        flat = torch.full((1, 3, 32, 32), -1.0).requires_grad_()        # of which some features are all 0
        distance = make(trunk)(flat, flat.detach())
        distance.sum().backward()
        assert distance.item() == 0 and not flat.grad.any()


def test_the_weights_are_frozen_and_training_mode_changes_nothing():
    made, (one, two) = make("vgg16"), pictures()
    before = made(one, two)
    assert torch.equal(made.train()(one, two), before) and not any(p.requires_grad for p in made.parameters())
    assert not any(isinstance(module, nn.Dropout) for module in made.modules())


@pytest.mark.parametrize("trunk, smallest, widths", [("vgg16", 16, (64, 128, 256, 512, 512)), ("alexnet", 31, (64, 192, 384, 256, 256))])
def test_the_published_widths_are_the_default_and_pictures_that_are_too_small_are_refused(trunk, smallest, widths):
    with torch.device("meta"):
        assert tuple(layer.in_channels for layer in LPIPS(LPIPSConfig(trunk)).linears) == widths
    made = make(trunk)
    assert made.smallest == smallest and made(*pictures((smallest, 40))).isfinite().all()
    with pytest.raises(ValueError, match=f"40 x {smallest - 1} px are too small for LPIPS with {trunk}: it takes {smallest} px or more"):
        made(*pictures((smallest - 1, 40)))


def test_unknown_trunks_and_wrong_numbers_of_widths_are_refused():
    with pytest.raises(ValueError, match="unknown trunk of LPIPS 'vgg19': did you mean 'vgg16'"):
        LPIPSConfig("vgg19")
    with pytest.raises(ValueError, match="must be 5 numbers for vgg16"):
        LPIPSConfig("vgg16", (4, 4))


def test_even_a_random_trunk_finds_a_blurred_picture_further_away_than_one_of_less_contrast_which_l1_does_not():
    torch.manual_seed(0)
    made = LPIPS(LPIPSConfig("vgg16", (16, 16, 16, 16, 16)))
    picture = (torch.rand(4, 3, 8, 8).round() * 1.6 - 0.8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    blurred, pale = F.avg_pool2d(picture, 5, 1, 2, count_include_pad=False), picture * 0.6
    assert ((blurred - picture).abs().mean((1, 2, 3)) < (pale - picture).abs().mean((1, 2, 3))).all()
    assert (made(blurred, picture) > made(pale, picture)).all()
