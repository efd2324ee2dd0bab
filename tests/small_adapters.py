"""Adapters of random numbers, and the commands on their files as tests call them."""

import pytest
import torch

from tinyldm.adapters import __main__ as commands
from tinyldm.adapters.files import read_layers
from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.cli import guard


def trained(model, seed=0, rank=4, **parts):
    """An adapter of random numbers: part -> targets."""
    torch.manual_seed(seed)
    made = {part: LoRA(model.modules[part], LoRAConfig(rank, alpha=2.0, targets=targets)) for part, targets in parts.items()}
    for each in made.values():
        for branch in each.branches.values():
            torch.nn.init.normal_(branch.up, std=0.25)
    return made


def weights(model):
    return {f"{part}.{name}": p.detach().clone() for part, module in model.modules.items() for name, p in module.named_parameters()}


def command(capsys, *words):
    """A command of python -m tinyldm.adapters -> what it printed."""
    capsys.readouterr()
    commands.ARGS = commands.parse([str(word) for word in words])
    commands.main()
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line of error with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        commands.ARGS = commands.parse([str(word) for word in words])
        guard(commands.main)
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1
    return errors[0]


def tensors_of(file):
    """The tensors of an adapter's file by their names."""
    found = read_layers(file)
    return {key: found.layers[name][field] for name, keys in found.keys.items() for field, key in keys.items()}
