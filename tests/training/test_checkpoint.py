"""Checkpoints are whole or absent, optimizers come back exactly, and channels_last moments survive."""

import pytest
import torch
from torch import nn

from tinyldm.training import checkpoint
from tinyldm.training.optim import make_optimizers


def trained(module: nn.Module, steps: int, optimizers: list) -> None:
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def small(memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layers", nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)))
    net.add_module("head", nn.Conv2d(4, 2, 1))
    return net.to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_restored_optimizers_continue_bit_for_bit(tmp_path, memory_format):
    make = lambda parameters: make_optimizers(parameters, kind="muon", lr=1e-2, muon_lr=1e-2, weight_decay=0.1)
    one = small(memory_format)
    parameters = dict(one.named_parameters())
    optimizers = make(parameters)
    trained(one, 3, optimizers)
    checkpoint.save_optimizers(tmp_path / "o.safetensors", optimizers, parameters)

    two = small(memory_format)
    two.load_state_dict(one.state_dict())
    restored = make(dict(two.named_parameters()))
    checkpoint.load_optimizers(tmp_path / "o.safetensors", restored, dict(two.named_parameters()))
    trained(one, 3, optimizers)
    trained(two, 3, restored)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_foreign_optimizer_file_is_refused_with_its_name(tmp_path):
    one = small()
    parameters = dict(one.named_parameters())
    optimizers = make_optimizers(parameters, kind="adamw", lr=1e-2, muon_lr=1e-2)
    trained(one, 1, optimizers)
    checkpoint.save_optimizers(tmp_path / "o.safetensors", optimizers, parameters)
    other = {"else": nn.Parameter(torch.zeros(3))}
    with pytest.raises(ValueError, match="o.safetensors"):
        checkpoint.load_optimizers(tmp_path / "o.safetensors", make_optimizers(other, kind="adamw", lr=1, muon_lr=1), other)


def test_the_newest_are_kept_and_both_stages_sort_in_their_order(tmp_path):
    for stage, step in (("vae", 900), ("step", 5), ("step", 40), ("step", 1000)):
        checkpoint.write(tmp_path, stage, step, lambda folder: (folder / "x").write_text("x"), {}, keep=3)
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000005", "step-000040", "step-001000"]
    assert checkpoint.read_state(checkpoint.names(tmp_path)[-1]) == {"stage": "step", "step": 1000}


def test_a_failure_while_writing_leaves_the_older_checkpoints_and_no_torso(tmp_path):
    checkpoint.write(tmp_path, "step", 1, lambda folder: (folder / "x").write_text("x"), {}, keep=2)

    def disk_full(folder):
        (folder / "y").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.write(tmp_path, "step", 2, disk_full, {}, keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".writing-step-000008").mkdir()
    assert checkpoint.names(tmp_path) == []
