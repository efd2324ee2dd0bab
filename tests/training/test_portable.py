"""What is published tells nothing of this machine and its accounts: model folders, metadata, tracking services, the report."""

import json

import pytest
from reports import data_of, make_run
from test_sample import make

from tinyldm.config import flatten, make_config
from tinyldm.training import report, track
from tinyldm.training.portable import model_name, portable, portable_data, portable_settings
from tinyldm.training.second_stage import at_phase

SECRETS = ("alice", "acme", "SECRET")
DATA = {
    "/home/alice smith/clients/acme corp/cats": "cats", "/home/alice/cats/": "cats", "/home/alice/cats:0.7": "cats:0.7",
    "/home/alice/cats/:0.5": "cats:0.5",
    "acme/cats": "cats", r"C:\Users\alice\cats": "cats", "toyworld:0.3": "toyworld:0.3", "a:0.7": "a:0.7", "./shards-*.tar": "shards-*.tar",
    "https://alice:SECRET@host.org:8080/shards/{0..3}.tar": "https://host.org:8080/shards/{0..3}.tar",
    "https://host.org/x.tar?X-Amz-Signature=SECRET&user=alice": "https://host.org/x.tar",
    "https://alice:SEC#RET@host.org/x.tar?token=SECRET:0.25": "https://host.org/x.tar:0.25",
    "https://host.org?token=SECRET": "https://host.org", "file:///home/alice/cats.tar": "cats.tar",
    "s3://bucket/x.tar#SECRET": "s3://bucket/x.tar", "hf://datasets/owner/name@v2/x.tar": "hf://datasets/owner/name@v2/x.tar",
    "simplecache::zip://*.png::/home/alice/cats.zip": "simplecache::zip://*.png::cats.zip",
    "zip://*.png::https://alice:SECRET@host.org/x.zip?SECRET": "zip://*.png::https://host.org/x.zip",
}


@pytest.mark.parametrize("word, public", DATA.items())
def test_of_a_path_the_last_part_and_of_a_url_all_but_its_secrets_is_published(word, public):
    assert portable_data(word) == public and not any(secret in public for secret in SECRETS)


def test_a_hub_id_is_published_as_it_is_unless_it_is_a_path_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable("openai/clip@main") == "openai/clip@main" and portable("/home/alice/clip") == "clip" and portable("") == ""
    (tmp_path / "alice" / "clip").mkdir(parents=True)
    assert portable("alice/clip") == "clip"


def test_a_model_is_named_by_its_run_and_checkpoint_or_else_by_its_id_or_folder(tmp_path, monkeypatch):
    model = tmp_path / "alice" / "foxes" / "checkpoints" / "step-000006" / "model"
    model.mkdir(parents=True)
    assert model_name(model) == "model"                        # a copy, without a run around it
    (model.parent / "state.json").touch(), (tmp_path / "alice" / "foxes" / "config.json").touch()
    monkeypatch.chdir(model.parent)
    assert model_name(model) == model_name("model") == "foxes step-000006"
    assert model_name("owner/name@v2") == "owner/name@v2" and model_name("/home/alice/v1-5.safetensors") == "v1-5.safetensors"


def private_settings():
    return flatten(make_config(data=[*DATA], out="/home/alice/run", cache=["/home/alice/latents"], vae_weights="owner/vae",
                               text_weights="/home/alice/clip")) | {"directory": "/home/alice/acme"}


def test_a_checkpoint_names_its_data_without_secrets():
    assert at_phase(make(), make_config(data=[*DATA])).defaults["data"] == [*DATA.values()]


def test_services_get_settings_without_secrets(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(track, "find_backend", lambda kind: lambda run, config, step: told.append(config))
    track.Tracker("wandb", tmp_path, private_settings(), 0)
    assert told[0]["data"] == [*DATA.values()] and told[0]["lr"] == flatten(make_config())["lr"]
    assert [told[0][name] for name in ("out", "cache", "vae_weights", "text_weights", "directory")] == [
        "run", ["latents"], "owner/vae", "clip", "acme"]
    damaged = {"data": 3, "cache": [None, ["/a/b"]], "out": {}}
    assert portable_settings(damaged) == damaged | {"cache": [None, ["b"]]}


def test_the_report_shows_no_secrets_and_still_what_differs(tmp_path):
    run = make_run(tmp_path / "alice" / "run", config=json.loads(json.dumps(private_settings())))
    page = report.write_report(run)
    text = page.read_text(encoding="utf-8")
    assert not any(secret in text for secret in ("alice", "SECRET", "acme corp"))
    rows = {row["name"]: row for row in data_of(page)["config"]}
    assert json.loads(rows["data"]["value"]) == [*DATA.values()] and rows["data"]["differs"] and not rows["lr"]["differs"]
