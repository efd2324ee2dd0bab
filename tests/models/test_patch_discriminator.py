"""The PatchGAN discriminator: shapes, receptive field, initial weights, and what a norm makes of the batch."""

import pytest
import torch
from torch import nn

from tinyldm.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig


def make(**fields) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(PatchDiscriminatorConfig(**fields))


def test_the_layers_are_the_published_ones():
    net = make()
    convs = [(layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.bias is not None)
             for layer in net.main if isinstance(layer, nn.Conv2d)]
    assert convs == [(64, 4, 2, 1, True), (128, 4, 2, 1, False), (256, 4, 2, 1, False), (512, 4, 1, 1, False), (1, 4, 1, 1, True)]
    kinds = [type(layer).__name__ for layer in net.main]
    assert kinds == ["Conv2d", "LeakyReLU"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3 + ["Conv2d"]
    assert all(layer.negative_slope == 0.2 for layer in net.main if isinstance(layer, nn.LeakyReLU))
    assert sum(p.numel() for p in net.parameters()) == 2_768_705 - 3072      # pix2pix's, which sees 3 channels more
    assert net(torch.zeros(2, 3, 256, 192)).shape == (2, 1, 30, 22)
    deep = make(width=4, layers=5)                              # eight times the width at most
    assert [layer.out_channels for layer in deep.main if isinstance(layer, nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_a_patch_of_the_published_size(layers, field):
    net = make(width=4, layers=layers, norm="none").double()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()                                            # so that no two paths cancel
    pixels = torch.zeros(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    logits = net(pixels)
    row = logits.shape[2] // 2
    gradient, = torch.autograd.grad(logits[0, 0, row, row], pixels)
    seen = gradient[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [field, field]


def test_initial_weights_are_the_published_ones():
    net = make()
    for layer in net.main:
        if isinstance(layer, nn.Conv2d):
            assert abs(layer.weight.mean()) < 0.002 and layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01) and layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert not layer.bias.any()


@pytest.mark.parametrize("norm, alone", [("batch", False), ("group", True), ("none", True)])
def test_a_picture_is_judged_by_itself_but_with_batch_norm(norm, alone):
    net, pixels = make(width=8, norm=norm), torch.rand(4, 3, 32, 32) * 2 - 1
    together, apart = net(pixels), torch.cat([net(part) for part in pixels.split(2)])
    assert torch.allclose(together, apart, atol=1e-6) == alone
    assert sum(layer.bias is not None for layer in net.main if isinstance(layer, nn.Conv2d)) == (5 if norm == "none" else 2)


def test_batch_norm_has_no_state_and_no_other_mode():
    net, pixels = make(width=8), torch.rand(3, 3, 32, 32)
    before = net(pixels)
    assert not [*net.buffers()] and torch.equal(net.eval()(pixels), before)


def test_pictures_that_are_too_small_and_settings_that_do_not_fit_are_refused():
    net = make(width=4)
    assert net.smallest == 24 and net(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="30 x 23 px are too small for the discriminator: it takes 24 px or more; fewer layers"):
        net(torch.zeros(2, 3, 23, 30))
    for fields, said in ((dict(norm="bach"), "did you mean 'batch'"), (dict(layers=0), "layers=0 must be 1 or more"),
                         (dict(width=40, norm="group"), "must be a multiple of 32, or less, for norm=group")):
        with pytest.raises(ValueError, match=said):
            PatchDiscriminatorConfig(**fields)
