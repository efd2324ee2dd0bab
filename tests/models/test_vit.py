"""The vision transformer by itself. Its parity with published towers is tested in tests/vendor_loaders/test_vit.py."""

from dataclasses import replace

import pytest
import torch
from helpers import randomise

from tinyldm.models.vit import ViT, ViTConfig, swiglu

SMALL = ViTConfig(image_size=24, patch=8, width=32, layers=2, heads=2, mlp_width=48, projection_dim=12)
LARGE = dict(patch=14, width=1024, layers=24, heads=16, mlp_width=4096)
DINOV2 = dict(image_size=518, activation="gelu", input_norm=False, patch_bias=True, layer_scale=True, projection_dim=None)
SIGLIP = dict(activation="gelu_tanh", pooling="attention", input_norm=False, patch_bias=True, projection_dim=None)


@pytest.mark.parametrize("config, millions", [
    (ViTConfig(), 87.85),
    (ViTConfig(**LARGE, projection_dim=768), 303.97),
    (ViTConfig(patch=14, width=1280, layers=32, heads=16, mlp_width=5120, projection_dim=1024), 632.08),
    (ViTConfig(patch=14, width=1664, layers=48, heads=16, mlp_width=8192, projection_dim=1280), 1844.91),
    (ViTConfig(**LARGE, **DINOV2), 304.37),
    (ViTConfig(patch=14, width=1536, layers=40, heads=24, mlp_width=4096, **DINOV2 | {"activation": "swiglu"}), 1136.48),
    (ViTConfig(patch=16, **SIGLIP), 92.88),
], ids=["CLIP B/32", "CLIP L/14", "CLIP H/14", "CLIP bigG/14", "DINOv2 L/14", "DINOv2 g/14", "SigLIP B/16"])
def test_published_towers_have_their_number_of_weights(config, millions):
    """As open_clip's table of models (docs/model_profile.csv) and DINOv2's page have them."""
    with torch.device("meta"):
        assert round(sum(p.numel() for p in ViT(config).parameters()) / 1e6, 2) == millions


def test_pictures_of_any_size_have_features_and_uneven_ones_are_refused():
    net = randomise(ViT(SMALL))
    for h, w in ((24, 24), (8, 40), (48, 24)):
        assert net(torch.rand(2, 3, h, w)).shape == (2, 12) and net.tokens(torch.rand(1, 3, h, w)).shape == (1, 1 + h * w // 64, 32)
    with pytest.raises(ValueError, match="pictures of 24 x 20 px cannot be cut into patches of 8 x 8"):
        net(torch.rand(1, 3, 20, 24))


def test_registers_have_no_position_and_the_picture_s_patches_come_last():
    net = randomise(ViT(replace(SMALL, registers=2, layers=1)))
    seen = []
    net.input_norm = torch.nn.Identity()
    net.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 24, 24)
    net(x)
    tokens = seen[0][0]
    torch.testing.assert_close(tokens[0], net.class_token + net.positions[0])
    assert torch.equal(tokens[1:3], net.registers)
    torch.testing.assert_close(tokens[3:], net.patches(x).flatten(2)[0].mT + net.positions[1:])


def test_positions_of_a_size_that_is_not_square_follow_rows_and_columns():
    """Positions that grow from left to right only: every row of other sizes is the same, and grows too."""
    net = ViT(replace(SMALL, image_size=64, position_offset=0.0))
    with torch.no_grad():
        net.positions.copy_(torch.cat([torch.zeros(1), torch.arange(8.0).repeat(8)])[:, None].expand(-1, 32))
        grid = net.position(3, 5)[1:, 0].view(3, 5)
    assert torch.allclose(grid, grid[:1]) and (grid.diff(dim=1) > 1).all() and net.position(8, 8) is net.positions


def test_features_do_not_depend_on_the_other_pictures_of_a_batch():
    net, x = randomise(ViT(replace(SMALL, pooling="attention"))), torch.rand(3, 3, 24, 24)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-5, atol=1e-6)


def test_swiglu_gates_the_second_half_by_the_first():
    assert torch.equal(swiglu(torch.tensor([0.0, 1.0, 5.0, 3.0])), torch.tensor([0.0, 3 / (1 + torch.exp(torch.tensor(-1.0)))]))


@pytest.mark.parametrize("changes, message", [
    ({"activation": "quickgelu"}, "unknown activation 'quickgelu': did you mean 'quick_gelu'"),
    ({"pooling": "mean"}, "unknown pooling 'mean'"),
    ({"image_size": 25}, "image_size=25 is not a multiple of the patch size 8"),
    ({"heads": 3}, "width 32 is not divisible by 3 heads"),
    ({"layers": 0}, "layers=0 must be 1 or more"),
])
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ViT(replace(SMALL, **changes))
