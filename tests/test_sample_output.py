"""What sample.py writes, and when: nothing that has been drawn is lost, and the files say what drew them, not where that lies."""

import shutil

import pytest
import torch
from helpers import load_script, thinned
from PIL import Image
from test_sample import make

from tinyldm.folders.save import save_model
from tinyldm.pipeline import draw
from tinyldm.version import version


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("model") / "model", make()
    save_model(path, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return path


def in_this_process(monkeypatch, words, draw_with=draw):
    """sample.py's work here, where its calls can be replaced."""
    sample = load_script("sample")
    monkeypatch.setattr(sample, "draw", draw_with)
    sample.ARGS = sample.parse([str(word) for word in words])
    sample.main()


def failing(call: int, error: BaseException):
    """`draw`, which raises an error the n-th time."""
    calls = []

    def drawn_until(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise error
        return draw(*args, **options)
    return drawn_until


def names_in(folder):
    return sorted(file.name for file in folder.glob("[!.]*"))


@pytest.mark.parametrize("error", thinned(3, [
    KeyboardInterrupt(), ValueError("the pictures are not finite"), torch.OutOfMemoryError("memory")]))
def test_what_is_drawn_before_an_error_is_written_and_named(folder, tmp_path, monkeypatch, capsys, error):
    words = ["a", "--model", folder, "-n", 6, "--batch-size", 2, "--steps", 1, "--out"]
    in_this_process(monkeypatch, [*words, tmp_path / "whole"])
    capsys.readouterr()
    with pytest.raises(type(error)):
        in_this_process(monkeypatch, [*words, tmp_path / "out"], failing(3, error))
    names = [f"000{i + 1}-{i}-a.png" for i in range(4)] + ["0005-0-grid.png"]
    assert names_in(tmp_path / "out") == names and capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    for name in names[:4]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(type(error)):                           # with a single file, there is only the grid to keep them
        in_this_process(monkeypatch, [*words, tmp_path / "one.png"], failing(3, error))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "0005-0-grid.png").read_bytes()
    assert Image.open(tmp_path / "one.png").size == (4 * 34 - 2, 32)


def test_a_batch_is_written_before_the_next_one_is_drawn(folder, tmp_path, monkeypatch):
    found = []
    in_this_process(monkeypatch, ["a", "--model", folder, "-n", 3, "--batch-size", 1, "--steps", 1, "--out", tmp_path],
                    lambda *args, **options: found.append(len(names_in(tmp_path))) or draw(*args, **options))
    assert found == [0, 1, 2] and names_in(tmp_path) == ["0001-0-a.png", "0002-1-a.png", "0003-2-a.png", "0004-0-grid.png"]


def test_the_frames_of_an_animation_that_breaks_off_are_kept(folder, tmp_path, monkeypatch, capsys):
    words = ["a", "--model", folder, "--interpolate", 5, "--frames", 6, "--batch-size", 2, "--steps", 1, "--out", tmp_path]
    with pytest.raises(ZeroDivisionError):
        in_this_process(monkeypatch, words, failing(3, ZeroDivisionError()))
    assert names_in(tmp_path) == ["0001-0-a.png"] and Image.open(tmp_path / "0001-0-a.png").size == (4 * 34 - 2, 32)
    assert capsys.readouterr().out.split() == [str(tmp_path / "0001-0-a.png")]


def test_a_picture_says_which_model_drew_it_and_not_where_that_lies(folder, tmp_path, monkeypatch):
    run = tmp_path / "alice" / "foxes, v2"
    shutil.copytree(folder, run / "checkpoints" / "step-000006" / "model")
    for file in (run / "config.json", run / "checkpoints" / "step-000006" / "state.json"):
        file.touch()
    for model, name in ((run, '"foxes, v2 step-000006"'), (folder, folder.name)):
        in_this_process(monkeypatch, ["a", "--model", model, "--steps", 1, "--out", tmp_path / "x.png"])
        text = Image.open(tmp_path / "x.png").text["parameters"]
        assert f"Size: 32x32, Model: {name}, Precision: fp32, Version: tinyldm {version()}, RNG: CPU" in text and "alice" not in text
