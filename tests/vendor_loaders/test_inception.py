"""The FID's Inception-v3 from the files in which it is published."""

import pytest
import torch
from photos import photos
from safetensors.torch import save_file

from tinyldm.evaluation.towers import load_inception, open_tower, outputs
from tinyldm.models.inception import FIDInception


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in FIDInception().state_dict().items()}


def same(net, tensors) -> bool:
    state = net.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


def test_a_published_pth_is_read_with_what_training_left_in_it(tmp_path, tensors):
    """Of torchvision's modules a file may hold counts of batches and the auxiliary classifier; and a prefix."""
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in tensors if name.endswith("running_var")}
    more = {"AuxLogits.conv0.conv.weight": torch.ones(1, 2, 1, 1)} | counts
    torch.save(tensors | more, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    save_file({f"inception.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "prefixed.safetensors")
    for name in ("pt_inception-2015-12-05-6726825d.pth", "prefixed.safetensors"):
        net = load_inception(tmp_path / name)
        assert same(net, tensors) and not net.training and not any(p.requires_grad for p in net.parameters())


def test_a_file_with_more_than_tensors_and_other_networks_are_refused(tmp_path, tensors):
    torch.save({"model": torch.nn.Conv2d(1, 1, 1)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match="module.pth is refused: it is a pickle that holds more than tensors"):
        load_inception(tmp_path / "module.pth")
    program = torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1))
    torch.jit.save(program, tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(ValueError, match="inception-2015-12-05.pt is refused: it is a TorchScript program"):
        load_inception(tmp_path / "inception-2015-12-05.pt")
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="none of the layouts pytorch-fid fits"):
        load_inception(tmp_path / "other.pth")
    torch.save(tensors | {"fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"fc.weight is \[1000, 2048\], expected \[1008, 2048\]"):
        load_inception(tmp_path / "torchvision.pth")


def test_the_three_towers_of_one_file_differ_by_their_preparation_alone(tmp_path, tensors):
    """pytorch-fid scales by x / 127.5 - 1, the others by (x - 128) / 128."""
    torch.save(tensors, tmp_path / "inception.pth")
    images, seen = photos(1, 299, 299), {}
    for name in ("inception", "inception-clean", "inception-pytorch"):
        tower = open_tower(name, tmp_path / "inception.pth")
        assert same(tower.module, tensors) and tower.settings["size"] == 299
        tower.module.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
        with pytest.raises(InterruptedError):
            tower.module.Conv2d_2a_3x3.register_forward_pre_hook(stop)
            outputs(tower, images)
    bytes_ = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    for name, expected in (("inception", (bytes_ - 128) / 128), ("inception-clean", (bytes_ - 128) / 128),
                           ("inception-pytorch", bytes_ / 127.5 - 1)):
        torch.testing.assert_close(seen[name].double(), expected, rtol=0, atol=3e-7)


def stop(module, inputs):
    raise InterruptedError
