"""Frozen networks are written once to the run's folder, and checkpoints hold links to them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, randomise, script, small_text, train_here, weights
from safetensors.torch import load_file

from tinyldm import files
from tinyldm.config import change, preset_config
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_texts, save_part
from tinyldm.folders.texts import load_texts
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.planning.texts import join_of, meta_text
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.training import checkpoint
from tinyldm.training.frozen import Frozen

SETTINGS = [*SMALL, "--val-every", "0", "--sample-every", "0", "--save-every", "1", "--keep-last", "2"]
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def train():
    return load_script("train")


def write_text(folder, seed=1):
    tokenizer, config = small_text()
    save_texts(folder, TextEncoders([TextEncoder(randomise(CLIPText(config), seed), tokenizer)]))
    return folder


@pytest.fixture
def begun(train, tmp_path, monkeypatch):
    """A run of two steps on frozen parts, whose words are `words`."""
    vae = randomise(AutoencoderKL(VAEConfig(widths=(8, 16), depth=1, groups=4)), 3)
    save_part(tmp_path / "vae", vae)
    write_text(tmp_path / "source")
    words = ["--out", str(tmp_path / "run"), *SETTINGS, "--text-weights", str(tmp_path / "source"), "--vae-weights", str(tmp_path / "vae")]
    train_here(train, [*words, "--max-steps", "4"], monkeypatch, stop_after=2)
    return tmp_path / "run"


def parts_of(run, step):
    model = run / "checkpoints" / f"step-{step:06d}" / "model"
    return {f"{run}/text/{name}": model / name for name in (TEXT, "tokenizer/vocab.json")} | {
        f"{run}/vae/diffusion_pytorch_model.safetensors": model / "vae/diffusion_pytorch_model.safetensors"}


def resume(train, run, monkeypatch):
    train_here(train, ["--out", str(run), "--resume", "yes"], monkeypatch)


def test_every_checkpoint_holds_links_to_the_one_copy_and_goes_with_it_only(train, begun, tmp_path, monkeypatch):
    source = load_file(tmp_path / "source" / TEXT)
    for step in (1, 2):
        assert all(os.path.samefile(own, there) for own, there in parts_of(begun, step).items())
    resume(train, begun, monkeypatch)
    assert [folder.name for folder in checkpoint.names(begun)] == ["step-000003", "step-000004"]
    own = begun / "text" / TEXT
    assert all(os.path.samefile(own, there) for step in (3, 4) for own, there in parts_of(begun, step).items())
    assert own.stat().st_nlink == 3                             # those of removed checkpoints are gone
    shutil.rmtree(begun / "text"), shutil.rmtree(begun / "vae")
    found = load_file(begun / "checkpoints" / "step-000004" / "model" / TEXT)
    assert found.keys() == source.keys() and all(torch.equal(found[name], source[name]) for name in source)
    assert not checkpoint.find_damage(begun / "checkpoints" / "step-000004")


def test_a_run_goes_on_with_its_own_text_encoder_where_the_source_has_gone_or_changed(train, begun, tmp_path, monkeypatch):
    for name in ("gone", "changed"):
        shutil.copytree(begun, tmp_path / name)
    resume(train, begun, monkeypatch)
    shutil.rmtree(tmp_path / "source")
    resume(train, tmp_path / "gone", monkeypatch)
    write_text(tmp_path / "source", 9)
    resume(train, tmp_path / "changed", monkeypatch)
    expected, *others = (weights(run / "checkpoints" / "step-000004") for run in (begun, tmp_path / "gone", tmp_path / "changed"))
    for found in others:
        assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def test_before_the_first_checkpoint_too_a_run_goes_on_with_what_it_began_with(train, begun, tmp_path, monkeypatch):
    shutil.rmtree(begun / "checkpoints")
    kept = load_file(begun / "text" / TEXT)
    shutil.rmtree(tmp_path / "source")
    write_text(tmp_path / "source", 9)
    resume(train, begun, monkeypatch)
    found = load_model(begun / "checkpoints" / "step-000004" / "model").text.modules["text"].state_dict()
    one = load_texts(begun / "text", "", lambda rule: ()).modules["text"].state_dict()
    assert all(torch.equal(found[name], one[name]) for name in one)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(begun / "text" / TEXT).items())


def test_a_run_of_an_older_version_has_its_text_encoders_in_its_checkpoints_alone(train, begun, tmp_path, monkeypatch):
    kept = load_file(begun / "text" / TEXT)
    shutil.rmtree(begun / "text"), shutil.rmtree(tmp_path / "source")
    (begun / ".writing-text").mkdir()                           # of a process that was killed while it wrote
    resume(train, begun, monkeypatch)
    found = load_file(begun / "checkpoints" / "step-000004" / "model" / TEXT)
    assert all(torch.equal(found[name], kept[name]) for name in kept) and not (begun / ".writing-text").exists()
    assert all(os.path.samefile(own, there) for own, there in parts_of(begun, 4).items())


def test_a_resumed_run_is_planned_with_its_own_text_encoders(tmp_path):
    write_text(tmp_path / "text")
    config = preset_config("tiny", text_weights="someone/gone", out=str(tmp_path))
    count = lambda **settings: sum(p.numel() for p in meta_text(change(config, **settings)).parameters())
    own = sum(p.numel() for p in CLIPText(small_text()[1]).parameters())
    assert count(resume="yes") == own != count(resume="no")     # a new run knows nothing of what lies there
    text = json.loads((tmp_path / "text" / "tinyldm.json").read_text())
    (tmp_path / "text" / "tinyldm.json").write_text(json.dumps(text | {"text_join": "sdxl"}))
    assert join_of(change(config, resume="yes")) == "sdxl"


def test_what_is_linked_takes_no_room_and_what_must_be_copied_takes_its_size(begun, tmp_path, monkeypatch):
    frozen, checkpoints = Frozen(begun), begun / "checkpoints"
    size = sum(file.stat().st_size for part in ("vae", "text") for file in (begun / part).rglob("*") if file.is_file())
    assert frozen.bytes_in_checkpoint() == 0 and not [*checkpoints.glob(".*")]
    os.link(begun / "text" / TEXT, checkpoints / ".writing-link")       # left by a process that was killed
    assert frozen.bytes_in_checkpoint() == 0 and not [*checkpoints.glob(".*")]

    def no_links(*names):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    assert frozen.bytes_in_checkpoint() == size > os.path.getsize(begun / "text" / TEXT)


@pytest.mark.slow
def test_where_there_are_no_links_a_checkpoint_holds_copies(train, begun, monkeypatch):
    def no_links(*names):
        raise OSError("Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "link", no_links)
        resume(train, begun, monkeypatch)
    for own, there in parts_of(begun, 4).items():
        assert not os.path.samefile(own, there) and there.read_bytes() == open(own, "rb").read()


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_its_text_encoder(begun, tmp_path):
    done = script("-m", "tinyldm.export", begun, tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    one, two = load_model(begun / "checkpoints" / "step-000002" / "model"), load_model(tmp_path / "exported")
    for part in one.modules:
        own = two.modules[part].state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in one.modules[part].state_dict().items() if name in own)
    assert not os.path.samefile(begun / "text" / TEXT, tmp_path / "exported" / TEXT)
