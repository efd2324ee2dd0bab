import re

import pytest
import torch
from torch import nn

from tinyldm.folders.rename import export_renamed, load_renamed, published_names, published_shapes

RULES = [(r"^first\.", "stem."), (r"^second\.(\w)", r"head.0.\1")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Conv2d(4, 2, 3)


def published():
    torch.manual_seed(0)
    return export_renamed(Net().state_dict(), RULES)


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rules_apply_in_order_and_give_published_names():
    assert published_names(["first.bias", "second.weight"], RULES) == {
        "first.bias": "stem.bias", "second.weight": "head.0.weight"}


def test_two_keys_with_one_published_name_are_an_error():
    with pytest.raises(ValueError, match="second.bias and first.bias the same name x.bias"):
        published_names(["first.bias", "second.bias"], [(r"first|second", "x")])


def test_what_was_exported_loads_back_bit_for_bit():
    torch.manual_seed(1)
    net, tensors = Net(), published()
    load_renamed(net, tensors, RULES)
    again = export_renamed(net.state_dict(), RULES)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_exported_tensors_are_contiguous_even_where_the_weights_are_channels_last():
    net = Net().to(memory_format=torch.channels_last)
    assert not net.second.weight.is_contiguous()
    tensors = export_renamed(net.state_dict(), RULES)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    assert torch.equal(tensors["head.0.weight"], net.second.weight)


def test_loading_into_the_meta_device_copies_the_tensors_and_keeps_the_module_s_dtype():
    with torch.device("meta"):
        net = Net()
    tensors = {name: tensor.half() for name, tensor in published().items()}
    load_renamed(net, tensors, RULES)
    assert net.first.weight.dtype == torch.float32 and not net.first.weight.is_meta
    assert torch.equal(net.first.weight, tensors["stem.weight"].float())
    with torch.device("meta"):
        net = Net()
    tensors = published()
    load_renamed(net, tensors, RULES)
    assert net.first.weight.data_ptr() != tensors["stem.weight"].data_ptr()
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in net.parameters())


def test_missing_and_unexpected_names_are_counted_and_named():
    tensors = published()
    tensors["stem.wieght"] = tensors.pop("stem.weight")
    net = Net()
    before = net.second.weight.clone()
    with pytest.raises(ValueError) as error:
        load_renamed(net, tensors, RULES)
    assert re.search(r"missing 1 \(stem\.weight\), unexpected 1 \(stem\.wieght\)", message(error))
    assert torch.equal(net.second.weight, before)


def test_the_error_names_the_likely_cause():
    short = published()
    del short["head.0.bias"]
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in published().items()}
    foreign = {f"x.{i}": torch.zeros(1) for i in range(9)}
    for tensors, cause in ((short, "cut short"), (compiled, "compiled"), (foreign, "another layout")):
        with pytest.raises(ValueError) as error:
            load_renamed(Net(), tensors, RULES)
        assert cause in message(error)
    assert "unexpected 9 (x.0, x.1, x.2, ...)" in message(error)


def test_a_wrong_shape_names_the_tensor_and_both_shapes_and_changes_nothing():
    tensors = published()
    tensors["stem.weight"] = torch.zeros(4, 5)
    net = Net()
    before = net.second.weight.clone()
    with pytest.raises(ValueError) as error:
        load_renamed(net, tensors, RULES)
    assert "stem.weight is [4, 5], expected [4, 3]" in message(error)
    assert torch.equal(net.second.weight, before)


class Fused(nn.Module):
    """A query, a key and an MLP four times as wide as each, which are stored in one tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.mlp, self.last = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 8), nn.Linear(5, 4)


FUSED = [(r"^q\.(.*)", r"all.\1@0/6"), (r"^k\.(.*)", r"all.\1@1/6"), (r"^mlp\.(.*)", r"all.\1@2-5/6"), (r"^last\.(.*)", r"end.\1@swap")]


def test_parts_of_different_sizes_and_swapped_halves_are_written_and_read():
    net = Fused()
    tensors = export_renamed(net.state_dict(), FUSED)
    assert torch.equal(tensors["all.weight"], torch.cat([net.q.weight, net.k.weight, net.mlp.weight]))
    assert torch.equal(tensors["all.bias"], torch.cat([net.q.bias, net.k.bias, net.mlp.bias]))
    assert torch.equal(tensors["end.weight"], net.last.weight[[2, 3, 0, 1]])
    assert torch.equal(tensors["end.bias"], net.last.bias[[2, 3, 0, 1]])
    assert published_shapes(net.state_dict(), FUSED) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    other = Fused()
    load_renamed(other, tensors, FUSED)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("form, shape", [("1,", (1, 4, 3)), ("1,1,", (1, 1, 4, 3))])
def test_a_tensor_with_more_axes_in_front_is_written_and_read(form, shape):
    net, rules = Net(), [(r"^first\.weight$", f"token@{form}")]
    stored = export_renamed(net.state_dict(), rules)
    assert stored["token"].shape == shape and torch.equal(stored["token"].view(4, 3), net.first.weight)
    assert published_shapes(net.state_dict(), rules)["token"] == shape
    other = Net()
    load_renamed(other, stored, rules)
    assert torch.equal(other.first.weight, net.first.weight)


def test_the_parts_of_a_fused_tensor_are_written_in_order_where_there_are_more_than_ten():
    values = {f"part.{i}": torch.full((1, 2), float(i)) for i in reversed(range(12))}
    fused = export_renamed(values, [(r"part\.(\d+)", r"all@\1/12")])["all"]
    assert fused[:, 0].tolist() == [float(i) for i in range(12)]


@pytest.mark.parametrize("parts", [(0, 2), (0, 1), (1, 2), (0, 1, 1, 2)], ids=str)
def test_rules_that_do_not_use_each_part_of_a_fused_tensor_once_are_an_error(parts):
    names = [f"{i}.{part}" for i, part in enumerate(parts)]
    with pytest.raises(ValueError, match="same name|each part must be used once"):
        export_renamed({name: torch.zeros(2) for name in names}, [(r"\d+\.(\d+)", r"all@\1/3")])


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="no form @twist"):
        export_renamed({"x": torch.zeros(2)}, [(r"x", "y@twist")])
