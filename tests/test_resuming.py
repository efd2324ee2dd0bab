"""One command starts a run and continues it: what may be typed again, from where, and what is refused."""

import json

import pytest

from tinyldm.config import Config, change, flatten, parse, preset_config


def parsed(*words) -> Config:
    return parse(list(words), "")[0]


# ---------------------------------------------------------------- the same command every time


def save(folder, config, **more):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flatten(config) | more))


def test_resume_auto_starts_where_there_is_no_run_and_resumes_where_there_is(tmp_path):
    words = ["--preset", "5090_week", "--out", str(tmp_path / "run"), "--resume", "auto", "--lr", "0.5", "--resolution", "128"]
    first = parsed(*words)
    assert first.run.resume == "no" and first == parsed(*words[:4], *words[6:])
    assert not first.data.phases                               # as where a run is started, --resolution replaces the preset's --stages
    save(tmp_path / "run", change(first, save_every=7))
    again = parsed(*words)
    assert again.run.resume == "auto" and again == change(first, save_every=7, resume="auto")
    assert parsed(*words[:5], "yes") == parsed(*words[:6]) == change(again, lr=0.5)


def test_the_weight_of_kl_in_the_settings_of_an_older_run_is_read_in_today_s_units(tmp_path):
    """It was one of nats beside means over a picture's values."""
    older = {name: value for name, value in flatten(preset_config("tiny")).items() if name != "vae_loss"} | {"vae_kl": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(older))
    resumed = parsed("--out", str(tmp_path), "--resume", "yes")
    assert resumed.autoencoder.loss == {"kl": pytest.approx(1e-5 * 3 * 64**2)}


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "running.json", "log.jsonl"]])
def test_a_folder_without_settings_holds_no_run_yet(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    assert parsed("--out", str(tmp_path), "--resume", "auto").run.resume == "no"


@pytest.mark.parametrize("left", ["checkpoints", "vae"])
def test_a_run_whose_settings_are_lost_is_not_started_again(tmp_path, left, capsys):
    (tmp_path / left).mkdir()
    for word in ("auto", "yes"):
        with pytest.raises(SystemExit):
            parsed("--out", str(tmp_path), "--resume", word)
        assert "config.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--preset tiny_dit", "--unet widths=8,8", "--optimizer adamw", "--data elsewhere", "--seed 3"])
def test_resume_auto_refuses_another_run_s_settings(tmp_path, other, capsys):
    save(tmp_path, preset_config("tiny"))
    with pytest.raises(SystemExit) as end:
        parsed("--out", str(tmp_path), "--resume", "auto", *other.split())
    assert end.value.code == 2 and f"a run keeps its {other.split()[0]}" in capsys.readouterr().err
    assert parsed("--out", str(tmp_path), "--resume", "auto", "--preset", "tiny", "--optimizer", "Muon", "--data", "toyworld")


def test_a_kept_setting_that_is_typed_again_replaces_no_others(tmp_path):
    """Where a run is started, --text-encoder clears the preset's --text, and --resolution its --stages."""
    save(tmp_path, preset_config("5090_week", text={"width": 32}))
    again = parsed("--out", str(tmp_path), "--resume", "auto", "--text-encoder", "clip", "--resolution", "256")
    assert again.text.fields == {"width": 32} and again.data.phases == {"256": 0.79, "512": 0.21}


# ---------------------------------------------------------------- paths, wherever they are typed


def places(tmp_path, monkeypatch, **settings):
    """A run that was begun in `home`, beside which is another folder with the same names in it: that is the current one."""
    for name in ("home", "away"):
        (tmp_path / name / "pictures").mkdir(parents=True)
    save(tmp_path / "run", preset_config("tiny", **settings), directory=str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "away")
    return lambda *words: parsed("--out", str(tmp_path / "run"), "--resume", "auto", *words)


@pytest.mark.parametrize("typed", ["HOME/pictures", "../home/pictures", "../home/../home/pictures", "HOME/link"])
def test_a_run_may_be_told_its_path_in_any_spelling_from_anywhere(tmp_path, monkeypatch, typed):
    again = places(tmp_path, monkeypatch, data=["pictures"], vae_weights="pictures")
    (tmp_path / "home" / "link").symlink_to("pictures")
    typed = typed.replace("HOME", str(tmp_path / "home"))
    assert again("--data", typed, "--vae-weights", typed).run.resume == "auto"
    monkeypatch.chdir(tmp_path / "home")
    assert again("--data", "pictures", "--vae-weights", "pictures").run.resume == "auto"


def test_the_same_words_typed_elsewhere_are_other_data_where_they_mean_some(tmp_path, monkeypatch, capsys):
    again = places(tmp_path, monkeypatch, data=["pictures"])
    with pytest.raises(SystemExit):
        again("--data", "pictures")
    assert "a run keeps its --data (['pictures'])" in capsys.readouterr().err
    (tmp_path / "home").rename(tmp_path / "moved")             # as on another machine: the only pictures are those here
    assert again("--data", "pictures").run.resume == "auto"


@pytest.mark.parametrize("words", [["toyworld"], ["s3://bucket/{000..045}.tar:0.7", "pictures/*.tar:0.3"], ["a:0.5", "b:0.5"]])
def test_words_that_are_no_paths_are_compared_as_they_are(tmp_path, monkeypatch, words, capsys):
    again = places(tmp_path, monkeypatch, data=words, vae_weights="stabilityai/sd-vae-ft-mse")
    assert again("--data", *words, "--vae-weights", "stabilityai/sd-vae-ft-mse").data.sources == words
    for other in (["--data", *words[:-1], words[-1] + "x"], ["--data", *words, "more"], ["--vae-weights", "stabilityai/sd-vae-ft-ema"]):
        with pytest.raises(SystemExit):
            again(*other)
        assert f"a run keeps its {other[0]}" in capsys.readouterr().err


def test_a_run_on_a_cache_may_be_told_its_sources_in_any_order(tmp_path, monkeypatch, capsys):
    again = places(tmp_path, monkeypatch, data=["a:0.7", "b:0.3"], cache=["pictures"], vae_weights="v")
    assert again("--data", "b:0.3", "a:0.7").data.sources == ["a:0.7", "b:0.3"]
    with pytest.raises(SystemExit):
        again("--data", "b:0.7", "a:0.3")
