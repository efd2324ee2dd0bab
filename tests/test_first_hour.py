"""What a person sees in the first hour: help, words that a model knows, sizes, progress, versions, and what files say about themselves."""

import configparser
import json
import re
import runpy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import lowest
import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, load_script, pictures, train_here
from lowest import requirements
from PIL import Image
from safetensors import safe_open

from tinyldm.__main__ import COMMANDS, find_script
from tinyldm.cli import WithoutBars
from tinyldm.config import PRESETS, DataConfig, help, parse
from tinyldm.data.cache_folder import holds_work
from tinyldm.data.report import describe_sizes
from tinyldm.data.source_kind import Shard
from tinyldm.data.readers import Sample
from tinyldm.device import main_memory
from tinyldm.diffusion.process import make_process
from tinyldm.evaluation.base import Measurement
from tinyldm.folders.modelspec import modelspec
from tinyldm.folders.weights import write_weights
from tinyldm.models.unet import UNetConfig
from tinyldm.pipeline import steps_needed
from tinyldm.planning.show import Measured, compare
from tinyldm.config import preset_config
from tinyldm.text.words import MOST, unknown, words_of
from tinyldm.training import report
from tinyldm.version import version


def test_the_words_of_captions_are_kept_and_others_are_found():
    known = words_of(["A red fox, on grass.", "the fox's 2 houses"])
    assert known == ["a", "fox", "fox's", "grass", "houses", "on", "red", "the"]
    assert unknown(["a Red dragon", "a blue fox"], known) == ["dragon", "blue"]
    assert unknown(["anything"], []) == []
    assert words_of(f"word{chr(97 + i // 676)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for i in range(MOST + 1)) == []


def test_words_that_were_learned_later_are_known_too(tmp_path, monkeypatch, capsys):
    """By a text encoder that --finetune trains along; and the token of an --embedding."""
    train, sample, run, tuned = load_script("train"), load_script("sample"), tmp_path / "run", tmp_path / "tuned"
    data = [*SMALL, "--max-steps", "2", "--sample-every", "0"]
    train_here(train, [*data, "--out", str(run)], monkeypatch)
    short = ["--model", str(run), "--data", str(pictures(tmp_path / "mine", 3)), "--max-steps", "2", "--sample-every", "0", "--out"]
    train_here(train, ["--finetune", "dreambooth", "--instance", "a sks square", "--train-text", *short, str(tuned)], monkeypatch)
    inversion = ["--finetune", "textual_inversion", "--token", "<my-dog>", "--initial", "a", "--batch-size", "2", "--grad-accum", "1"]
    train_here(train, [*inversion, *short, str(tmp_path / "token")], monkeypatch)
    capsys.readouterr()
    for model, more, prompt, odd in ((run, [], "a sks dragon", "sks, dragon;"), (tuned, [], "a sks red dragon", "dragon;"),
                                     (run, ["--embedding", str(tmp_path / "token")], "a <my-dog> dragon", "dragon;")):
        sample.open_model(sample.parse([prompt, "--model", str(model), "--device", "cpu", *more]))
        assert f"no caption of the training held {odd}" in capsys.readouterr().err


@pytest.mark.parametrize("process, options, least", [("flow", {}, 50), ("scaled_linear", {"zero_snr": True}, 50), ("scaled_linear", {}, 1)])
def test_samplers_that_extrapolate_need_more_steps_where_the_first_level_is_pure_noise(process, options, least):
    curve = make_process(process, **options)
    assert steps_needed("lms", curve) == steps_needed("PNDM", curve) == least and steps_needed("euler", curve) == 1


def test_help_has_a_line_for_every_preset_and_the_fields_of_the_networks(capsys):
    assert help.SHOWN.keys() == PRESETS.keys()
    assert help.fields("models/unet.py", "UNetConfig")[:3] == ("widths=320,640,1280,1280", "depth=2", "attention=True,True,True,False")
    assert {word.partition("=")[0] for word in help.fields("models/unet.py", "UNetConfig")} | set(help.FOUND) >= UNetConfig().__dict__.keys()
    for file, name in help.FIELDS.values():
        assert len(help.fields(file, name)) > 3
    with pytest.raises(SystemExit):
        parse(["--help"], "what it does")
    shown = " ".join(capsys.readouterr().out.split())
    assert "AdamW's peak learning rate (default: 0.004)" in shown and "--dit patch=2 width=1024" in shown and "100%" not in shown


def pictures_of(*sizes) -> Shard:
    import io
    def read():
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(file := io.BytesIO(), "PNG")
            yield Sample(str(i), file.getvalue(), {})
        yield Sample("drawn", np.zeros((9, 9, 3), np.uint8), {})
    return Shard("name", "url", "stamp", False, read)


@pytest.mark.parametrize("sizes, said", [
    ([(512, 512)] * 3, "pictures of 512x512 (the first 3) are encoded at 64x64, --resolution 64; --resolution 512 would keep more of them"),
    ([(40, 30), (900, 100)], "pictures of 40x30 to 900x100 (the first 2) are encoded at 64x64, --resolution 64"),
    ([(20, 20)], "pictures of 20x20 (the first 1) are encoded at 64x64, --resolution 64; they are enlarged"), ([], "")])
def test_sizes_that_are_found_and_used_are_said(sizes, said):
    assert describe_sizes([pictures_of(*sizes)], DataConfig()) == said
    assert describe_sizes([], DataConfig()) == ""


def test_a_cache_without_a_picture_is_what_a_failed_command_left(tmp_path):
    (tmp_path / "shards" / "one").mkdir(parents=True)
    facts = tmp_path / "shards" / "one" / "shard.json"
    for kept, works in ((0, False), (3, True)):
        facts.write_text(json.dumps({"kept": kept}))
        assert holds_work(tmp_path) == works
    facts.write_text(json.dumps({"kept": 0}))
    (tmp_path / "shards" / ".writing-two").mkdir()
    assert holds_work(tmp_path)                                 # perhaps another process writes it now


def test_on_a_cpu_measurements_are_not_compared_with_the_plan_of_a_gpu():
    measured = Measured(2.0, 32.0, None, None, 750, "Friday")
    alone = compare(preset_config("tiny"), measured, after=200, planned=False)
    assert "plan" not in alone and re.search(r"images per second +32\n", alone) and "MFU" not in alone and "after 200 steps" in alone


def test_the_report_is_written_at_once_and_then_every_minute(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(report, "refresh_report", lambda run: written.append("page"))
    timer = SimpleNamespace(outside_steps=lambda what: nullcontext())
    page = report.Refresher(tmp_path, True, lambda: written.append("picture"))
    for now[0] in (100.0, 130.0, 159.0, 161.0):
        page(timer)
    assert written == ["picture", "page"] * 2
    report.Refresher(tmp_path, False, lambda: 1 / 0)(timer)


def test_earlier_results_of_a_metric_are_kept(tmp_path, capsys):
    evaluate = load_script("evaluate")
    for value in (1, 1, 2, 3):
        evaluate.report("prompts", Measurement([], {"value": value}), tmp_path)
    found = {file.name: json.loads(file.read_text())["value"] for file in tmp_path.iterdir()}
    assert found == {"prompts.json": 3, "prompts-1.json": 1, "prompts-2.json": 2}


def test_a_header_says_what_modelspec_wants_in_the_same_bytes_every_time(tmp_path):
    about = modelspec("stable-diffusion-v1/lora", 'a "red" fox 狐', 64, "eps", tags=None)
    assert about == {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation":
                     "tinyldm", "modelspec.title": 'a "red" fox 狐', "modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon"}
    contents = set()
    for i in range(8):
        write_weights(file := tmp_path / f"{i}.safetensors", {"x": torch.arange(3.0)}, about)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    with safe_open(file, "pt") as read:
        assert read.metadata() == about | {"format": "pt"} and read.get_tensor("x").tolist() == [0, 1, 2]


def test_quiet_drops_bars_and_keeps_warnings():
    heard = []
    stream = WithoutBars(SimpleNamespace(write=heard.append))
    for text in ("\r 50%", "\r100%", "\n", "warning: x", "\n", "\r 1%", "", "error: y"):
        stream.write(text)
    assert heard == ["warning: x", "\n", "error: y"]


def test_every_command_finds_its_script_and_a_wheel_gives_the_command(capsys, monkeypatch):
    for name in COMMANDS:
        file = find_script(name)
        assert file == ROOT / f"{name}.py" if file else (ROOT / "tinyldm" / name).is_dir() or (ROOT / "tinyldm" / f"{name}.py").is_file()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["options.entry_points"]["console_scripts"].strip() == "tinyldm = tinyldm.__main__:main"
    assert {f"{name}.py" for name in COMMANDS if find_script(name)} == set(re.findall(r'"(\w+\.py)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    monkeypatch.setattr(sys, "argv", ["tinyldm", "--version"])
    runpy.run_module("tinyldm", run_name="__main__")
    assert capsys.readouterr().out == f"tinyldm {version()}\n"
    monkeypatch.setattr(sys, "argv", ["tinyldm", "trian"])
    with pytest.raises(SystemExit):
        runpy.run_module("tinyldm", run_name="__main__")
    assert "did you mean 'train'? " in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [(["--push-to-hub", "name", "--license", "mit"], "OWNER/NAME"), (["--push-to-hub", "me/x"], "--license mit"),
                                         (["--license", "MIT License"], "name it as the hub does")])
def test_what_is_published_has_a_name_and_a_licence(words, said, tmp_path, capsys):
    from tinyldm import export
    with pytest.raises(SystemExit):
        export.parse(["run", str(tmp_path / "out"), *words])
    assert said in capsys.readouterr().err


def test_lowest_versions_are_those_of_setup_cfg():
    assert requirements()["tokenizers"] == "0.20" and {"pytest", "peft"} <= requirements("test").keys()
    assert ("pillow" in requirements("test")) == (sys.version_info >= (3, 11))             # Pillow 13 has no wheels for Python 3.10


@pytest.mark.parametrize("extra", ["", "test"])
def test_the_lowest_versions_are_printed_as_pip_reads_constraints(extra, monkeypatch, capsys):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.extras_require"][extra] if extra else config["options"]["install_requires"]
    monkeypatch.setattr(sys, "argv", ["lowest.py", "--constraints", "--extra", extra])
    lowest.main()
    known = [line for line in lines.strip().splitlines() if sys.version_info >= (3, 11) or not line.endswith('"3.11"')]
    assert capsys.readouterr().out.split() == [line.partition(";")[0].replace(">=", "==") for line in known]


def test_memory_that_is_there_is_a_plausible_number():
    have = main_memory()
    assert have is None or 10**8 < have < 10**14
