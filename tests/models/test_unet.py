from dataclasses import replace

import pytest
import torch

from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig

SMALL = UNetConfig(in_channels=3, out_channels=5, widths=(16, 32, 32), depth=2, attention=(False, True, True),
                   heads=(2, 2, 4), context_dim=12, groups=8)
T = torch.tensor([999.0, 3.5, 0.0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return UNet(SMALL)


@torch.no_grad()
def perturb(net, seed=0):
    """With random weights, because half of the gradients vanish at zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p += 0.1 * torch.randn(p.shape, generator=generator)
    return net


def inputs(size=(8, 12), batch=3):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, *size, generator=generator), T[:batch],
            Cond(torch.randn(batch, 7, 12, generator=generator)))


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (20, 4)])
def test_the_output_has_the_input_s_size_and_its_own_channels(net, size):
    assert perturb(net)(*inputs(size)).shape == (3, 5, *size)


def test_the_output_is_zero_at_initialisation_for_any_input(net):
    assert net(*inputs()).count_nonzero() == 0


def test_at_initialisation_caption_and_time_cannot_disturb_the_features(net):
    torch.nn.init.normal_(net.conv_out.weight)
    x, t, cond = inputs()
    assert torch.equal(net(x, t, cond), net(x, t.flip(0), Cond(cond.context.flip(0))))


def test_gradients_reach_every_parameter(net):
    perturb(net)(*inputs()).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_at_initialisation_only_the_last_layer_learns_and_after_one_step_the_rest(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        (net(*inputs()) - 1).square().mean().backward()
        silent = {name for name, p in net.named_parameters() if not p.grad.count_nonzero()}
        assert ("conv_in.weight" in silent) == (step == 0) and "conv_out.weight" not in silent
        optimizer.step()
    assert silent == set()


def test_an_image_does_not_depend_on_its_batch(net):
    x, t, cond = inputs()
    perturb(net).eval()
    with torch.no_grad():
        whole = net(x, t, cond)
        for i in range(3):
            alone = net(x[i:i + 1], t[i:i + 1], Cond(cond.context[i:i + 1]))
            assert (whole[i:i + 1] - alone).abs().max() < 1e-5 * whole.abs().max()


def test_time_and_caption_change_the_output_and_masked_tokens_do_not(net):
    x, t, cond = inputs()
    perturb(net)
    out = net(x, t, cond)
    assert not torch.allclose(out, net(x, t.flip(0), cond), rtol=1e-3)
    assert not torch.allclose(out, net(x, t, Cond(cond.context.flip(0))), rtol=1e-3)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    noisy = torch.where(mask[..., None], cond.context, 100.0)
    assert torch.equal(net(x, t, Cond(cond.context, mask)), net(x, t, Cond(noisy, mask)))


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (1, 8)])
def test_a_latent_size_that_does_not_halve_evenly_is_refused(net, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not a multiple of 4"):
        net(*inputs(size))


@pytest.mark.parametrize("changes, message", [
    ({"heads": (2, 2)}, "same levels"), ({"widths": (16, 36, 32)}, "36 must be a multiple"),
    ({"heads": (2, 3, 4)}, "heads=3"), ({"transformer_layers": (1, 2)}, r"\(1, 2\) must have one number for each"),
    ({"transformer_layers": (1, 0, 2)}, "transformer_layers=.* must be 1 or more"), ({"pooled_dim": 0}, "pooled_dim=0 must be 1 or more"),
])
def test_a_config_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL.__dict__, **changes})


def test_stable_diffusion_1_has_860_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == 859_520_964


# ---- Stable Diffusion XL's additions


XL = replace(SMALL, transformer_layers=(1, 2, 3), pooled_dim=10)
POOLED, SIZES = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)), torch.arange(18.0).view(3, 6) * 50


def test_stable_diffusion_xl_has_2_6_billion_parameters():
    with torch.device("meta"):
        net = UNet(UNetConfig(widths=(320, 640, 1280), attention=(False, True, True), heads=(5, 10, 20), context_dim=2048,
                              linear_projection=True, transformer_layers=(1, 2, 10), pooled_dim=1280))
    assert sum(p.numel() for p in net.parameters()) == 2_567_463_684            # diffusers' count for the published config


def test_transformers_have_their_level_s_number_of_blocks_and_the_middle_the_last_level_s():
    net = UNet(XL)
    assert [[len(transformer.blocks) for transformer in level.attentions] for level in net.down] == [[], [2, 2], [3, 3]]
    assert [[len(transformer.blocks) for transformer in level.attentions] for level in net.up] == [[3, 3, 3], [2, 2, 2], []]
    assert len(net.middle.attentions[0].blocks) == 3


def test_gradients_reach_every_parameter_of_a_network_that_is_told_sizes_and_pooled_text():
    net = perturb(UNet(XL))
    x, t, cond = inputs()
    pooled = POOLED.clone().requires_grad_()
    net(x, t, replace(cond, pooled=pooled, extra={"sizes": SIZES})).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert pooled.grad.count_nonzero()


@pytest.mark.parametrize("pooled, extra, message", [
    (None, {"sizes": SIZES}, r"Cond.pooled is missing: pass \[3, 10\]"),
    (POOLED[:, :8], {"sizes": SIZES}, r"Cond.pooled is \[3, 8\]: pass \[3, 10\].*pooled_dim of its text encoders"),
    (POOLED, {}, r'Cond.extra\["sizes"\] is missing: pass \[3, 6\]'),
    (POOLED, {"sizes": SIZES[:, :4]}, r'Cond.extra\["sizes"\] is \[3, 4\]'),
    (POOLED[:1], {"sizes": SIZES}, r"Cond.pooled is \[1, 10\]"),
])
def test_missing_and_misshapen_conditions_are_refused_with_the_fix(pooled, extra, message):
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=message):
        UNet(XL)(x, t, replace(cond, pooled=pooled, extra=extra))


def test_a_network_without_pooled_dim_ignores_pooled_text_and_sizes(net):
    x, t, cond = inputs()
    perturb(net)
    assert torch.equal(net(x, t, cond), net(x, t, replace(cond, pooled=POOLED, extra={"sizes": SIZES})))
