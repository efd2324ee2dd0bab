"""Networks without a published layout: their config.json holds the fields of their dataclass, under a class name of ours."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from helpers import randomise

from tinyldm.folders.rename import export_renamed, recognise
from tinyldm.folders.weights import Weights
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.vendor_loaders import dit
from tinyldm.vendor_loaders.layout import own_config

SMALL = DiTConfig(width=32, layers=2, heads=2, mlp_width=64, context_dim=24, pooled_dim=8)


@dataclass(frozen=True)
class ToyConfig:
    widths: tuple[int, ...] = (8, 16)
    depth: int = 1
    marks: list = field(default_factory=list)


@dataclass(frozen=True)
class BareConfig:
    width: int
    depth: int = 1


@pytest.mark.parametrize("config", [DiTConfig(), SMALL])
def test_a_config_survives_json(config):
    written = json.loads(json.dumps(dit.to_config(config)))
    assert dit.from_config(written) == config and next(iter(written)) == "_class_name"
    assert written["_class_name"] == dit.CLASS == "TinyLDMDiT"
    assert dit.from_config(written | {"_diffusers_version": "0.30"}) == config


def test_the_weights_keep_our_names_and_are_recognised():
    state = randomise(DiT(SMALL)).state_dict()
    exported = export_renamed(state, dit.LAYOUTS["tinyldm"].rules(SMALL))
    assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    layout, weights = recognise(Weights.of(exported), dit.LAYOUTS)
    assert layout is dit.LAYOUTS["tinyldm"] and weights.shapes.keys() == state.keys()


def test_another_class_an_unknown_field_and_a_missing_one_are_refused_by_name():
    for change in ({"_class_name": "SD3Transformer2DModel"}, {"registers": 4}):
        with pytest.raises(ValueError, match="SD3Transformer2DModel|registers"):
            dit.from_config(dit.to_config(SMALL) | change)
    with pytest.raises(ValueError, match="describes a None"):
        dit.from_config({})
    with pytest.raises(ValueError, match="TinyLDMBare config lacks width"):
        own_config("TinyLDMBare", BareConfig).from_config({"_class_name": "TinyLDMBare"})


def test_one_line_makes_the_functions_of_any_other_network_and_tuples_stay_tuples():
    to_config, from_config = own_config("TinyLDMToy", ToyConfig)
    config = ToyConfig(widths=(4, 8, 8), marks=[1])
    assert from_config(json.loads(json.dumps(to_config(config)))) == config
    assert from_config({"_class_name": "TinyLDMToy"}) == ToyConfig()
