"""LPIPS from the files in which its two parts are published."""

import re

import pytest
import torch
from safetensors.torch import save_file

from tinyldm.folders import lpips as folders_lpips
from tinyldm.folders.lpips import chosen, load_lpips, open_lpips
from tinyldm.models.lpips import LPIPS, LPIPSConfig
from tinyldm.vendor_loaders.lpips import our_name

WIDTHS = (4, 6, 8, 10, 12)
# Indices of the convolutions in torchvision's `features`, and the slice of the lpips package that each of them is in.
INDICES = {"vgg16": {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5},
           "alexnet": {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}}


def make(trunk="vgg16", widths=WIDTHS) -> LPIPS:
    torch.manual_seed(sum(map(ord, trunk)))
    made = LPIPS(LPIPSConfig(trunk, widths))
    for p in made.parameters():
        p.copy_(torch.rand(p.shape) - 0.3)
    return made


def trunk_file(made: LPIPS) -> dict[str, torch.Tensor]:
    """As torchvision and timm publish it, with a classifier behind the features."""
    found = {f"features.{index}.{kind}": made.features[index].get_parameter(kind).clone()
             for index in INDICES[made.config.trunk] for kind in ("weight", "bias")}
    return found | {"classifier.0.weight": torch.zeros(3, 3), "pre_logits.fc1.weight": torch.zeros(2)}


def linear_file(made: LPIPS) -> dict[str, torch.Tensor]:
    """As the lpips package publishes it."""
    return {f"lin{i}.model.1.weight": linear.weight.clone() for i, linear in enumerate(made.linears)}


def same(one: LPIPS, two: LPIPS) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return one.config == two.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("trunk", INDICES)
def test_two_files_in_any_order_make_one_network_and_the_tensors_say_which(tmp_path, trunk):
    made = make(trunk)
    save_file(trunk_file(made), tmp_path / "trunk.safetensors")
    torch.save(linear_file(made), tmp_path / "linear.pth")
    for sources in (("trunk.safetensors", "linear.pth"), ("linear.pth", "trunk.safetensors")):
        found = load_lpips(*(tmp_path / name for name in sources))
        assert same(found, made) and not any(p.requires_grad for p in found.parameters())
    one, two = torch.rand(2, 2, 3, 40, 40) * 2 - 1
    assert torch.equal(found(one, two), made(one, two))


@pytest.mark.parametrize("prefix", ["", "loss.perceptual_loss."])
def test_a_whole_lpips_is_found_in_a_checkpoint_of_compvis(tmp_path, prefix):
    made = make()
    whole = {f"{prefix}net.slice{number}.{index}.{kind}": made.features[index].get_parameter(kind)
             for index, number in INDICES["vgg16"].items() for kind in ("weight", "bias")}
    twice = {name.replace("lin", "lins.", 1): tensor for name, tensor in linear_file(made).items()}
    others = {name: torch.zeros(1, 3, 1, 1) for name in ("encoder.conv_in.weight", "loss.logvar", f"{prefix}scaling_layer.shift")}
    whole |= {f"{prefix}{name}": tensor for name, tensor in (linear_file(made) | twice).items()} | others
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "model.ckpt")
    assert same(load_lpips(tmp_path / "model.ckpt"), made)


def test_a_folder_gives_the_linear_layers_that_fit_and_safetensors_before_pickles(tmp_path):
    made, other = make(), make("alexnet", (3, 4, 5, 6, 7))
    (tmp_path / "trunk").mkdir(), (tmp_path / "weights").mkdir()
    save_file(trunk_file(made), tmp_path / "trunk" / "model.safetensors")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "trunk" / "pytorch_model.bin")      # not even opened
    torch.save(linear_file(other), tmp_path / "weights" / "alex.pth")
    torch.save(linear_file(made), tmp_path / "weights" / "vgg.pth")
    (tmp_path / "weights" / "README.md").write_text("nothing")
    assert same(load_lpips(tmp_path / "trunk", tmp_path / "weights"), made)
    wrong = {name: tensor + 1 for name, tensor in linear_file(made).items()}
    save_file(wrong, tmp_path / "weights" / "vgg.safetensors")
    assert torch.equal(load_lpips(tmp_path / "trunk", tmp_path / "weights").linears[0].weight, wrong["lin0.model.1.weight"])
    assert chosen({"b.pth", "a.pth", "a.safetensors", "c/d.pth", "e.txt", "z.safetensors"}) == ["a.safetensors", "z.safetensors", "b.pth"]


def test_of_a_hub_repository_only_the_usual_file_is_fetched(tmp_path, monkeypatch):
    made, asked = make(), []
    save_file(trunk_file(made), tmp_path / "model.safetensors")
    save_file(linear_file(made), tmp_path / "linear.safetensors")

    def locate(source, needed):
        if source != "timm/vgg16.tv_in1k":
            return source
        asked.extend(needed({"README.md", "config.json", "model.safetensors", "pytorch_model.bin"}))
        return tmp_path

    monkeypatch.setattr(folders_lpips.hub, "locate", locate)
    assert same(load_lpips("timm/vgg16.tv_in1k", tmp_path / "linear.safetensors"), made) and asked == ["model.safetensors"]


def test_files_of_torch_before_1_6_whose_storages_were_on_a_gpu_are_read(tmp_path):
    """So are the published linear layers, vgg.pth and alex.pth."""
    made = make()
    save_file(trunk_file(made), tmp_path / "trunk.safetensors")
    torch.save(linear_file(made), tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "vgg.pth").read_bytes()
    old = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert old != content
    (tmp_path / "vgg.pth").write_bytes(old)
    assert same(load_lpips(tmp_path / "trunk.safetensors", tmp_path / "vgg.pth"), made)


def test_loading_draws_no_random_numbers_and_opening_reads_no_tensors(tmp_path):
    save_file(trunk_file(make()) | linear_file(make()), tmp_path / "both.safetensors")
    before = torch.get_rng_state()
    load_lpips(tmp_path / "both.safetensors")
    config, weights = open_lpips([tmp_path / "both.safetensors"])
    assert config == LPIPSConfig("vgg16", WIDTHS) and len(weights.shapes) == 26 + 5 + 2
    assert torch.equal(torch.get_rng_state(), before)


def faulty(kind: str) -> dict[str, torch.Tensor]:
    whole = trunk_file(make()) | linear_file(make())
    if kind == "no trunk":
        return linear_file(make())
    if kind == "no linear layers":
        return trunk_file(make())
    if kind == "linear layers of another trunk":
        return trunk_file(make()) | linear_file(make("alexnet", (3, 4, 5, 6, 7)))
    if kind == "batch norm":
        return whole | {"features.1.weight": torch.zeros(4), "features.1.bias": torch.zeros(4)}
    if kind == "one layer missing":
        return {name: tensor for name, tensor in whole.items() if name != "features.12.weight"}
    return whole | {"features.0.weight": torch.zeros(4, 3, 7, 7)}       # as ResNet's


@pytest.mark.parametrize("kind, said", [
    ("no trunk", "holds no trunk of LPIPS (a tensor features.0.weight): name VGG16 or AlexNet"),
    ("no linear layers", "holds no linear layers that fit vgg16 (lin0.model.1.weight and so on): name the lpips package's file "
                         "weights/v0.1/vgg.pth"),
    ("linear layers of another trunk", "holds no linear layers that fit vgg16"),
    ("batch norm", "features.1.bias is not that of vgg16 (2 tensors are missing, unexpected or of another shape): is it a relative"),
    ("one layer missing", "features.12.weight is not that of vgg16 (1 tensors"),
    ("another network", "features.0.weight [4, 3, 7, 7] is neither VGG16's nor AlexNet's")])
def test_what_is_missing_or_does_not_fit_is_said_with_the_file(tmp_path, kind, said):
    save_file(faulty(kind), tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=f"some.safetensors.*{re.escape(said)}"):
        load_lpips(tmp_path / "some.safetensors")


def test_missing_files_and_pickles_of_more_than_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_lpips(tmp_path / "nothing.safetensors")
    torch.save({"features.0.weight": torch.zeros(1), "run": print}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth is refused"):
        load_lpips(tmp_path / "evil.pth")


def test_names_of_other_networks_are_left_out():
    ours = {"features.0.weight": "features.0.weight", "net.slice1.2.bias": "features.2.bias", "lin3.model.1.weight": "linears.3.weight"}
    others = ("encoder.features.0.weight", "features.0.running_mean", "lin0.model.1.bias", "lins.0.model.1.weight")
    assert {name: our_name(name) for name in (*ours, *others)} == ours | dict.fromkeys(others, "")
