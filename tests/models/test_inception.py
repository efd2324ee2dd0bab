"""The FID's Inception-v3 against a reference written from the published graph in float64, and against torch-fidelity and pytorch-fid where
these can be imported."""

import pytest
import torch
import torch.nn.functional as F
from photos import photos

from tinyldm.models.inception import FIDInception, resize_tensorflow1


@torch.no_grad()
def scaled(state, seed=0):
    """Fills a state dict with weights that keep activations at about unit size, and statistics of norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(name for name, tensor in state.items() if tensor.is_floating_point()):
        noise = torch.randn(state[name].shape, generator=generator)
        gain = (2 / noise[0].numel()) ** 0.5 if noise.dim() > 1 else 0.2
        state[name].copy_(noise.mul(0.5).exp() if name.endswith("running_var") else noise * gain + name.endswith("bn.weight"))
    return state


def make(seed=0) -> FIDInception:
    net = FIDInception()
    scaled(net.state_dict(), seed)
    return net


def pictures(count=2, width=256, height=256) -> torch.Tensor:
    return torch.from_numpy(photos(count, width, height).transpose(0, 3, 1, 2).copy())


def reference(state, x):
    """x [b, 3, 299, 299] in 0..255, float64 -> features and logits, block by block as torch-fidelity documents them."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def conv(x, name, stride=1, padding=0):
        norm = [state[f"{name}.bn.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding), *norm, eps=0.001).relu()

    def chain(x, block, *steps):
        for name, *how in steps:
            x = conv(x, f"{block}.{name}", *how)
        return x

    def average(x):                                             # the padding does not count
        ones = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / ones

    row, column = (1, (0, 3)), (1, (3, 0))
    x = (x - 128) / 128
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([chain(x, block, ["branch1x1"]), chain(x, block, ["branch5x5_1"], ["branch5x5_2", 1, 2]),
                       chain(x, block, ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1], ["branch3x3dbl_3", 1, 1]),
                       chain(average(x), block, ["branch_pool"])], 1)
    x = torch.cat([chain(x, "Mixed_6a", ["branch3x3", 2]),
                   chain(x, "Mixed_6a", ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1], ["branch3x3dbl_3", 2]), F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat([chain(x, block, ["branch1x1"]),
                       chain(x, block, ["branch7x7_1"], ["branch7x7_2", *row], ["branch7x7_3", *column]),
                       chain(x, block, ["branch7x7dbl_1"], ["branch7x7dbl_2", *column], ["branch7x7dbl_3", *row],
                             ["branch7x7dbl_4", *column], ["branch7x7dbl_5", *row]),
                       chain(average(x), block, ["branch_pool"])], 1)
    x = torch.cat([chain(x, "Mixed_7a", ["branch3x3_1"], ["branch3x3_2", 2]),
                   chain(x, "Mixed_7a", ["branch7x7x3_1"], ["branch7x7x3_2", *row], ["branch7x7x3_3", *column], ["branch7x7x3_4", 2]),
                   F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        one = chain(x, block, ["branch3x3_1"])
        two = chain(x, block, ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1])
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([chain(x, block, ["branch1x1"]),
                       chain(one, block, ["branch3x3_2a", 1, (0, 1)]), chain(one, block, ["branch3x3_2b", 1, (1, 0)]),
                       chain(two, block, ["branch3x3dbl_3a", 1, (0, 1)]), chain(two, block, ["branch3x3dbl_3b", 1, (1, 0)]),
                       chain(pooled, block, ["branch_pool"])], 1)
    pool = x.mean((2, 3))
    return pool, pool @ state["fc.weight"].T


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape and (found - expected).abs().max() < tolerance * expected.abs().max()


def test_features_and_logits_are_those_of_the_published_graph():
    net, x = make(), pictures(1)
    expected = reference(net.state_dict(), resize_tensorflow1(x.double(), 299))
    for found, wanted, width in zip(net(x), expected, (2048, 1008)):
        assert found.shape == (1, width) and found.dtype == torch.float32
        assert_near(found, wanted, 1e-5)


def test_the_names_and_shapes_are_those_of_the_published_file():
    """As torch-fidelity builds them: 94 convolutions, 23,885,392 numbers."""
    with torch.device("meta"):
        state = FIDInception().state_dict()
    assert sum(name.endswith(".conv.weight") for name in state) == 94 and sum(tensor.numel() for tensor in state.values()) == 23_885_392
    assert state["fc.weight"].shape == (1008, 2048) and state["fc.bias"].shape == (1008,)
    assert state["Mixed_6c.branch7x7dbl_5.conv.weight"].shape == (192, 160, 1, 7)


def test_there_is_no_training_mode_and_weights_are_frozen_and_gradients_reach_the_picture():
    net, x = make(), pictures(1, 299, 299).float().requires_grad_()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        expected = net(x).pool
    found = net.train()(x).pool
    found.sum().backward()
    assert torch.equal(found, expected) and x.grad.abs().max() > 0 and not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# ---------------------------------------------------------------- TensorFlow 1's resize


def test_tensorflow_1_s_resize_starts_at_the_first_pixel_and_repeats_the_last():
    """Output i lies at i * 4 / 8 of the input: 0, 0.5, 1, ..., 3, 3.5, and behind the last pixel there is only itself."""
    x = torch.tensor([0.0, 10.0, 30.0, 20.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    expected = torch.tensor([0.0, 5, 10, 20, 30, 25, 20, 20])
    assert torch.equal(resize_tensorflow1(x, 8), expected.expand(1, 1, 8, 8))
    assert torch.equal(resize_tensorflow1(x.mT, 8), expected.view(8, 1).expand(1, 1, 8, 8))
    assert torch.equal(resize_tensorflow1(x, 2), torch.tensor([[0.0, 30.0]]).expand(1, 1, 2, 2))        # every second pixel, no average


@pytest.mark.parametrize("width, height", [(256, 256), (64, 97), (400, 310), (299, 31)])
def test_tensorflow_1_s_resize_equals_a_loop_over_pixels(width, height):
    x = pictures(1, width, height).double()
    rows = torch.arange(299) * torch.tensor(height / 299)               # both in float32
    columns = torch.arange(299) * torch.tensor(width / 299)
    found = resize_tensorflow1(x, 299)
    for i, j in ((0, 0), (298, 298), (17, 281), (150, 149), (298, 3)):
        (y, dy), (left, dx) = ((int(place), float(place) - int(place)) for place in (rows[i], columns[j]))
        below, right = min(y + 1, height - 1), min(left + 1, width - 1)
        top = x[0, :, y, left] * (1 - dx) + x[0, :, y, right] * dx
        bottom = x[0, :, below, left] * (1 - dx) + x[0, :, below, right] * dx
        torch.testing.assert_close(found[0, :, i, j], top * (1 - dy) + bottom * dy, rtol=1e-12, atol=1e-12)


def test_a_picture_of_299_pixels_is_not_changed():
    x = pictures(1, 299, 299).float()
    assert torch.equal(resize_tensorflow1(x, 299), x)


# ---------------------------------------------------------------- the packages themselves


def test_features_logits_and_resize_are_torch_fidelity_s(monkeypatch):
    """Skipped where the package is missing: nothing here needs it."""
    pytest.importorskip("torch_fidelity")
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    resize = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    net = make()
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: net.state_dict())
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", without_counts(torch.nn.Module.load_state_dict))
    extractor = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    for width, height in ((256, 256), (64, 97), (400, 310)):
        x = pictures(2, width, height)
        assert torch.equal(resize_tensorflow1(x.float(), 299), resize(x.float(), (299, 299), align_corners=False))
        for found, expected in zip(net(x), extractor(x)):
            assert_near(found, expected, 1e-5)


def test_features_are_pytorch_fid_s_from_its_own_resize(monkeypatch):
    """Skipped where the package or torchvision is missing: nothing here needs either."""
    pytest.importorskip("torchvision")
    theirs = pytest.importorskip("pytorch_fid.inception")
    net, x = make(), pictures(2).float()
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: net.state_dict())
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", without_counts(torch.nn.Module.load_state_dict))
    extractor = theirs.InceptionV3().eval()
    resized = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert_near(net(resized * 256 / 255).pool, extractor(x / 255)[0].flatten(1), 1e-5)


def without_counts(load):
    """load_state_dict for norms whose count of batches is missing, as in the published file."""
    return lambda self, state, *args, **options: load(self, state, strict=False)
