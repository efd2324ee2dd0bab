"""Values of a wrong type, typed or from a file, are answered in one line that names the setting; what fits is taken."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from helpers import SMALL, mistake

from tinyldm.config import flatten, parse, preset_config
from tinyldm.diffusion.process import check_options, make_process
from tinyldm.folders.build import load_network
from tinyldm.folders.load import load_defaults
from tinyldm.lookup import build_dataclass, check_types, fit, lookup
from tinyldm.model import NETWORKS, network_config
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.dit import DiTConfig
from tinyldm.models.layers import TimeEmbedding
from tinyldm.models.unet import UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.objectives import OBJECTIVES
from tinyldm.training.preflight import check_settings


@pytest.mark.parametrize("value, hint, result", [
    (8, tuple[int, ...], (8,)), ([8, 16], tuple[int, ...], (8, 16)), (True, tuple[bool, ...], (True,)), (1, bool, 1),
    (2, float, 2), (2.5, float, 2.5), (None, int | None, None), (64, int | tuple[int, int], 64),
    ([32, 64], int | tuple[int, int], (32, 64)),
    ([[1, 2], [3, 4]], tuple[tuple[int, int], ...], ((1, 2), (3, 4))), ("gelu", Literal["gelu", "relu"], "gelu"),
    (0.1, Sequence[float] | None, (0.1,)), ("anything", Any, "anything"), ({"a": 1}, "a hint that nobody can read", {"a": 1})])
def test_a_value_that_fits_becomes_what_the_hint_wants(value, hint, result):
    found = fit(value, hint, "--net x")
    assert found == result and type(found) is type(result)


@pytest.mark.parametrize("value, hint, said", [
    ("abc", int, "a whole number"), (2.5, int, "a whole number"), (1e4, int, "a whole number, written without a point: 10000"),
    (True, int, "a whole number"), (True, float, "a number"),
    ("two", float, "a number"), (2, bool, "true or false"), (3, str, "a word"), ("x", int | None, "a whole number or None"),
    ((1, "x"), tuple[int, ...], "a whole number, or several separated by commas"), (8, tuple[int, int], "(a whole number, a whole number)"),
    ((1, 2, 3), tuple[int, int], "(a whole number, a whole number)"), ("tanh", Literal["gelu", "relu"], "one of gelu, relu")])
def test_a_value_that_does_not_fit_is_refused_with_what_is_expected(value, hint, said):
    with pytest.raises(ValueError) as error:
        fit(value, hint, "--net x")
    assert str(error.value) == f"--net x={value} must be {said}"


@dataclass(frozen=True)
class Outside:
    """The config of a network that somebody added: hints of its own, and a default that contradicts its hint."""

    width: int
    shape: "NoSuchType" = 3            # noqa: F821
    limit: float = None


@dataclass(frozen=True)
class Plain:
    width: int
    limit: float = None


def test_hints_that_cannot_be_found_and_defaults_that_contradict_theirs_are_not_checked():
    assert build_dataclass(Outside, {"width": "abc", "shape": "round"}, "--net") == Outside("abc", "round")
    assert build_dataclass(Plain, {"width": 8, "limit": None}, "--net") == Plain(8)
    check_types(Plain(8)), check_types(Outside("abc"))
    with pytest.raises(ValueError, match="--net needs width=VALUE"):
        build_dataclass(Plain, {}, "--net")
    with pytest.raises(ValueError, match="^--net limit=x must be a number$"):
        build_dataclass(Plain, {"width": 8, "limit": "x"}, "--net")


def test_a_list_in_place_of_a_name_is_an_unknown_name():
    with pytest.raises(ValueError, match=r"unknown sampler '\['ddim'\]'"):
        lookup({"ddim": 1}, ["ddim"], "sampler")


@pytest.mark.parametrize("kind, values, said", [
    (UNetConfig, {"heads": 0, "widths": 32, "attention": True}, r"heads=\(0,\) must be 1 or more"), (UNetConfig, {"depth": -1}, "depth=-1"),
    (UNetConfig, {"groups": 0}, "groups=0"), (UNetConfig, {"groups": 7}, "multiple of groups=7"),
    (UNetConfig, {"widths": ()}, r"widths=\(\) must be one number at least"), (UNetConfig, {"depth": 0}, "depth=0 must be 1 or more"),
    (DiTConfig, {"patch": 0}, "patch=0"), (DiTConfig, {"heads": 0}, "heads=0"), (DiTConfig, {"layers": -1}, "layers=-1 must be 0 or more"),
    (DiTConfig, {"rope_theta": 0}, "rope_theta=0"), (DiTConfig, {"pooled_dim": 0}, "pooled_dim=0"),
    (VAEConfig, {"widths": 8}, "width 8 must be a multiple of groups=32"), (VAEConfig, {"groups": 0}, "groups=0"),
    (VAEConfig, {"widths": (64, 0)}, "widths="), (VAEConfig, {"depth": 0}, "depth=0"),
    (VAEConfig, {"latent_channels": 0}, "latent_channels=0"),
    (VAEConfig, {"scaling_factor": 0}, "scaling_factor=0"), (CLIPTextConfig, {"heads": 0}, "heads=0"),
    (CLIPTextConfig, {"layers": 0}, "layers=0"),
    (CLIPTextConfig, {"heads": 5}, "not divisible by 5"), (CLIPTextConfig, {"context_length": 1}, "context_length=1 must be 2 or more")])
def test_numbers_of_which_no_network_can_be_made_are_refused(kind, values, said):
    with pytest.raises(ValueError, match=f"^--it: .*{said}"):
        build_dataclass(kind, values, "--it")


@pytest.mark.parametrize("width", [0, 1, 33])
def test_a_time_embedding_needs_an_even_width(width):
    with pytest.raises(ValueError, match=f"time embedding of {width} numbers"):
        TimeEmbedding(width, 8)


def test_the_flag_of_an_added_network_is_net(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", NETWORKS["dit"])
    for name, flag in (("mine", "--net"), ("dit", "--dit")):
        with pytest.raises(ValueError, match=f"^{flag} width=x must be a whole number"):
            network_config(name, {"width": "x"})


@pytest.mark.parametrize("words, said", [
    ("--unet depth=abc", "--unet depth=abc must be a whole number"),
    ("--network dit --net width=abc", "--dit width=abc must be a whole number"),
    ("--text layers=two", "--text layers=two must be a whole number"),
    ("--vae groups=x", "--vae groups=x must be a whole number"),
    ("--stages 64=true", "--stages 64=True is not a picture size"),
    ("--process betas --prediction eps --process-options betas=0.1", "betas must be two or more numbers"),
    ("--process linear --prediction eps --process-options beta_start=abc", "linear option beta_start=abc must be a number"),
    ("--process-options shift=abc", "flow option shift=abc must be a number")])
def test_wrong_values_of_every_flag_that_takes_key_value_are_one_line(words, said, tmp_path, capsys):
    error = mistake("train", ["--out", tmp_path / "run", *SMALL, *words.split()], capsys)
    assert said in error and error.count("\n") <= 1 and not (tmp_path / "run").exists()


def test_options_of_an_objective_are_compared_with_their_defaults(monkeypatch):
    monkeypatch.setattr(OBJECTIVES["denoising"], "options", {"speed": 1.0, "count": 1, "mode": "slow", "other": None})
    check_settings(parse(["--objective-options", "speed=2", "count=2", "mode=fast", "other=3"], "")[0])
    for word, said in (("speed=x", "speed=x must be a number"), ("count=1.5", "count=1.5 must be a whole number"),
                       ("count=2.0", "count=2.0 must be a whole number, written without a point: 2"), ("mode=3", "mode=3 must be a word")):
        with pytest.raises(ValueError, match=f"^denoising option {said}$"):
            check_settings(parse(["--objective-options", word], "")[0])


@pytest.mark.parametrize("objective, word", [
    ("repa", "block=1.5"), ("reflow", "pairs=2.5"), ("reflow", "steps=1.5"), ("dmd", "steps=1.5"), ("dmd", "every=1.5"),
    ("contrastive", "layers=1.5"), ("lcm", "levels=2.5"), ("consistency", "stages=1.5"), ("self_corrected", "width=8.5")])
@pytest.mark.parametrize("teacher", [[], ["--finetune", "whole", "--model", "nowhere"]])
def test_a_fraction_of_a_count_is_refused_before_a_teacher_is_asked_for(objective, word, teacher):
    with pytest.raises(ValueError, match=f"^{objective} option {word} must be a whole number$"):
        check_settings(parse(["--objective", objective, *teacher, "--objective-options", word], "")[0])


def test_a_whole_default_of_a_function_without_annotations_stands_for_any_number():
    assert check_options(lambda process, eta=1, twice=False: None, {"eta": 0.5}, "option") == {"eta": 0.5}
    with pytest.raises(ValueError, match="^linear option steps=2.5 must be a whole number$"):
        make_process("linear", steps=2.5)


@pytest.mark.parametrize("name, value, said", [
    ("lr", "abc", "--lr=abc must be a number"), ("unet", 3, "--unet=3 must be a table"), ("batch_size", None, "--batch-size=None"),
    ("stages", "big", "--stages=big must be a table"), ("device", 3, "--device=3 must be a word"),
    ("flip", "no", "--flip=no must be true")])
def test_a_config_json_with_a_value_of_a_wrong_type_is_named(name, value, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(flatten(preset_config("tiny")) | {name: value}))
    with pytest.raises(SystemExit) as end:
        parse(["--out", str(tmp_path), "--resume", "auto"], "")
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"{tmp_path / 'config.json'} is damaged" in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name, value, said", [
    ("steps", "20", "a whole number"), ("cfg", "high", "a number"), ("sampler", 3, "a word"), ("resolution", 64.5, "a whole number")])
def test_a_tinyldm_json_with_a_value_of_a_wrong_type_is_named(name, value, said, tmp_path):
    (tmp_path / "tinyldm.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"tinyldm.json: {name}={value!r} must be {said}"):
        load_defaults(tmp_path, must=True)


def test_a_published_number_that_is_a_string_is_refused_where_the_network_is_built():
    """Building it would succeed: the factor is used only when a picture is decoded."""
    with pytest.raises(ValueError, match="scaling_factor='0.18' must be a number"):
        load_network(AutoencoderKL, VAEConfig(scaling_factor="0.18"), None, "cpu", None)
