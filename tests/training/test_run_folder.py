"""The folder of a run: its settings hold in whatever directory it is resumed, and its model is found whatever the folder's name."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tinyldm.config import change, flatten, parse, preset_config
from tinyldm.folders.weights import open_weights
from tinyldm.training.run_folder import find_learned, find_model, find_paths, write_settings


def start(folder, monkeypatch, **settings):
    """A run that is begun in `folder`, where these files are, and the function that resumes it, which returns its configuration."""
    for name in ("pictures/a.png", "shards/x-0.tar", "a:0.5/a.png", "vae/config.json", "cache/index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    monkeypatch.chdir(folder)
    run = folder.parent / "run"
    run.mkdir()
    write_settings(find_paths(preset_config("tiny", out=str(run), **settings)))
    return lambda *words: find_paths(parse(["--out", str(run), "--resume", "auto", *words], "")[0])


HERE = ["pictures", "./pictures:2", "shards/*.tar:0.7", "shards/x-{0..3}.tar", "a:0.5", "*/*.tar"]
ELSEWHERE = ["toyworld", "toyworld:0.3", "s3://bucket/x.tar:0.7", "hf://datasets/a/b/*.tar", "~/pictures", "/data/x.tar:0.7", "gone/x"]


@pytest.mark.parametrize("word", HERE)
def test_relative_sources_are_those_of_the_folder_where_the_run_began(tmp_path, monkeypatch, word):
    home = tmp_path / "home"
    resume = start(home, monkeypatch, data=[word])
    assert resume().data.sources == [word]                      # nothing changes where it began
    (tmp_path / "away" / "pictures").mkdir(parents=True)        # not these
    monkeypatch.chdir(tmp_path / "away")
    assert resume().data.sources == [os.path.join(home, word)]


@pytest.mark.parametrize("word", ELSEWHERE)
def test_what_is_no_path_there_stays_as_it_was_typed(tmp_path, monkeypatch, word):
    resume = start(tmp_path / "home", monkeypatch, data=[word])
    (tmp_path / "home" / "toyworld").mkdir()                    # a word of the table of sources is never a folder
    monkeypatch.chdir(tmp_path)
    assert resume().data.sources == [word]


def test_relative_weights_and_caches_are_found_too_and_hub_ids_left_alone(tmp_path, monkeypatch):
    home = tmp_path / "home"
    resume = start(home, monkeypatch, data=["pictures:2"], vae_weights="vae", text_weights="openai/clip-vit-large-patch14", cache=["cache"])
    monkeypatch.chdir(tmp_path)
    found = resume()
    assert (found.autoencoder.weights, found.text.weights) == (str(home / "vae"), "openai/clip-vit-large-patch14")
    assert found.data.cache == [str(home / "cache")] and found.data.sources == ["pictures:2"]      # which the cache is asked for, by name


def test_config_json_keeps_the_paths_as_they_were_typed_and_where(tmp_path, monkeypatch):
    resume = start(tmp_path / "home", monkeypatch, data=["pictures"], vae_weights="vae")
    file = tmp_path / "run" / "config.json"
    before = json.loads(file.read_text())
    assert (before["data"], before["vae_weights"], before["directory"]) == (["pictures"], "vae", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_settings(resume("--lr", "0.5"))
    assert json.loads(file.read_text()) == before | {"lr": 0.5}
    (tmp_path / "home").rename(tmp_path / "other")              # on another machine, from the folder that has everything
    monkeypatch.chdir(tmp_path / "other")
    assert resume().data.sources == ["pictures"]


def test_a_run_of_a_version_that_did_not_note_the_folder_is_resumed_as_before(tmp_path, monkeypatch):
    resume = start(tmp_path / "home", monkeypatch, data=["pictures"])
    config = resume()
    (tmp_path / "run" / "config.json").write_text(json.dumps(flatten(change(config, resume="no"))))
    assert resume() == config
    write_settings(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["directory"] == os.getcwd()


def test_settings_that_config_json_lacks_are_added_with_their_defaults(tmp_path, monkeypatch):
    resume, file = start(tmp_path / "home", monkeypatch, data=["pictures"]), tmp_path / "run" / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in before.items() if name not in ("cache", "text_weights")}))
    monkeypatch.chdir(tmp_path)
    write_settings(resume())
    assert json.loads(file.read_text()) == before


@pytest.mark.parametrize("name", ["sd1.5", "my.safetensors", "my.ckpt", "model.v2.bin"])
def test_a_run_is_found_whatever_its_folder_is_called(tmp_path, name):
    model = tmp_path / name / "checkpoints" / "step-000001" / "model"
    model.mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model.parent / "state.json").write_text('{"finished": true}')
    assert find_model(str(tmp_path / name)) == model == find_model(None, tmp_path)


@pytest.mark.parametrize("name", ["v1.5.safetensors", "MODEL.CKPT", "sd.v1-5.bin"])
def test_a_checkpoint_file_is_one_by_its_ending_in_either_case(tmp_path, name):
    file = tmp_path / name
    (torch.save if "safetensors" not in name else save_file)({"x": torch.ones(2)}, file)
    assert find_model(str(file)) == file and dict(open_weights(file).stream())["x"].tolist() == [1, 1]


def test_what_was_learned_beside_a_model_is_found_in_the_newest_checkpoint_of_its_run_and_the_rest_of_the_word_kept(tmp_path):
    run, file = tmp_path / "my:dog", "learned_embeds.safetensors"
    for step in (1, 2):
        (run / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step-{step:06d}/state.json").write_text("{}")
        (run / f"checkpoints/step-{step:06d}" / file).touch()
    for rest in ("", ":<my-dog>", ":a:b"):
        assert find_learned(f"{run}{rest}") == f"{run}/checkpoints/step-000002/{file}{rest}"
    for other in (f"{run}/checkpoints/step-000001/{file}:x", "none:x", ":", str(tmp_path)):
        assert find_learned(other) == other
    assert find_learned(f"{run}/checkpoints/step-000001:x") == f"{run}/checkpoints/step-000001/{file}:x"


def test_hub_ids_may_have_dots():
    assert find_model("stable-diffusion-v1.5/sd.1.5") == "stable-diffusion-v1.5/sd.1.5"
