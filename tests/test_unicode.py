"""Text from outside: what a model may read, how the rest is written, where lines end, and in which encoding files are."""

import ast
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script, mistake
from PIL import Image
from safetensors.torch import save_file

from tinyldm.data.cache import read_index, write_index
from tinyldm.folders.weights import open_weights
from tinyldm.pictures.animation import write_animation
from tinyldm.pictures.pixels import write_picture
from tinyldm.training import log, track
from tinyldm.unicode import check_unicode, read_lines, shown

BYTE, HALF = "caf\udce9", "\ud83d"                  # the byte E9 as Python reads it from a command line; half of an emoji
PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("text, escaped", [(BYTE, r"caf\udce9"), (HALF, r"\ud83d"), ("狐 é", "狐 é"), ("", "")])
def test_what_is_no_text_is_shown_as_an_escape_and_refused_where_a_model_would_read_it(text, escaped):
    assert shown(text) == escaped
    if escaped == text:
        assert check_unicode(text) == text
    else:
        with pytest.raises(ValueError, match="^--flag '.*' is not valid UTF-8"):
            check_unicode(text, "--flag ")


@pytest.mark.parametrize("content, lines", [
    (b"\xef\xbb\xbfa red fox\r\na boat\n", ["a red fox", "a boat", ""]), (b"one\rtwo\r\n\r\nthree", ["one", "two", "", "three"]),
    ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg".encode(), ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]), (b"", [""]), (b"\xef\xbb\xbf", [""])])
def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path, content, lines):
    (tmp_path / "file.txt").write_bytes(content)
    assert read_lines(tmp_path / "file.txt") == lines


def test_a_file_in_another_encoding_is_refused(tmp_path):
    for content in (b"caf\xe9", "a red fox".encode("utf-16")):
        (tmp_path / "file.txt").write_bytes(content)
        with pytest.raises(ValueError, match="file.txt is not text in UTF-8"):
            read_lines(tmp_path / "file.txt")


def test_captions_of_a_file_are_its_lines(tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbf" + " a red fox \n\n\u2028a\u2028boat\x0b\x85 at sea\r\n".encode())
    args = load_script("sample").parse(["first", "--from-file", str(tmp_path / "captions.txt")])
    assert args.prompt == ["first", "a red fox", "a\u2028boat\x0b\x85 at sea"]


@pytest.mark.parametrize("script, words, message", [
    ("sample", [BYTE], "argument prompt: '"), ("sample", ["fox", HALF], "argument prompt: '"),
    ("sample", ["fox", "--negative-prompt", BYTE], "argument --negative-prompt: '"),
    ("sample", ["fox", "--init-image", "x.png", "--invert", BYTE], "argument --invert: '"),
    ("train", ["--dry-run", "--sample-prompts", f"fox|{BYTE}"], "--sample-prompts '"), ("train", ["--dry-run", "--out", BYTE], "--out '")])
def test_a_prompt_that_is_not_unicode_is_refused_before_any_work(script, words, message, capfd):
    error = mistake(script, words, capfd)
    assert error.startswith(f"error: {message}") and "is not valid UTF-8" in error


def test_the_file_of_captions_is_named_where_it_is_not_text(tmp_path, capfd):
    (tmp_path / "captions.txt").write_bytes(b"caf\xe9")
    assert mistake("sample", ["--from-file", tmp_path / "captions.txt"], capfd) == (
        f"error: --from-file {tmp_path / 'captions.txt'} is not text in UTF-8")


# ---- names that are no text, in what is written


def test_pictures_and_animations_take_any_name_into_their_metadata(tmp_path):
    write_picture(tmp_path / "one.png", PICTURE, f"狐\nModel: {BYTE}")
    assert Image.open(tmp_path / "one.png").text["parameters"] == "狐\nModel: caf\\udce9"
    for name in ("one.gif", "one.webp"):
        write_animation(tmp_path / name, [PICTURE, PICTURE + 99], f"狐 {BYTE}")
    assert Image.open(tmp_path / "one.gif").info["comment"] == "狐 caf\\udce9".encode()
    assert "狐 caf\\udce9".encode("utf-16-be") in Image.open(tmp_path / "one.webp").info["exif"]


def test_a_cache_knows_its_source_again_by_any_name(tmp_path):
    write_index(tmp_path, {"data": [BYTE, "狐"]}, [])
    assert read_index(tmp_path)["settings"] == {"data": [BYTE, "狐"]}


def test_weights_under_a_name_that_safetensors_cannot_open_are_not_called_damaged(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / f"{BYTE}.safetensors")
    with pytest.raises(ValueError, match=r"^[^:]*\.safetensors' is not valid UTF-8: .*rename the file or folder$"):
        open_weights(tmp_path / f"{BYTE}.safetensors")


def test_tracking_is_told_of_any_name(tmp_path, monkeypatch):
    told = []
    module = ModuleType("wandb")
    run = SimpleNamespace(log=told.append, define_metric=lambda *words, **options: None)
    module.init = lambda **settings: told.append(settings["config"]) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = track.Tracker("wandb", tmp_path, {"data": [BYTE], "out": BYTE, "lr": 0.1, "stages": {}}, 0)
    tracker.row({"stage": "step", "step": 1, "event": "data", "text": f"read {BYTE}", "folder": "狐"})
    assert told[0] == {"data": [r"caf\udce9"], "out": r"caf\udce9", "lr": 0.1, "stages": {}}
    assert told[1]["step/data"].startswith(r"read caf\udce9")


def test_the_log_keeps_any_text(tmp_path):
    log.Log(tmp_path / "log.jsonl").write(stage="step", step=1, text=f"{BYTE}\u2028狐")
    assert log.read(tmp_path / "log.jsonl") == [{"stage": "step", "step": 1, "text": f"{BYTE}\u2028狐"}]
    (tmp_path / "log.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert log.read(tmp_path / "log.jsonl") == [{"text": "a\u2028b"}]


# ---- files


def careless(source: str) -> list[tuple[int, str]]:
    """The calls in a Python source that read or write text in whatever encoding the machine has, or split lines as str.splitlines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, named = getattr(node.func, "attr", getattr(node.func, "id", "")), {keyword.arg for keyword in node.keywords}
            mode = next((word.value for word in node.args[1:2] if isinstance(word, ast.Constant)), "r")
            chosen = {"open": "b" in str(mode) or not isinstance(node.func, ast.Name), "read_text": node.args, "write_text": node.args[1:],
                      "splitlines": False}.get(name, True)
            found += [(node.lineno, name)] if not chosen and "encoding" not in named else []
    return found


def test_every_text_file_is_read_and_written_in_a_named_encoding():
    assert careless('open("a")\nopen("a", "w", encoding="utf-8")\nopen("a", "rb")\np.read_text()\np.write_text(x)\np.read_text("utf-8")\n'
                    'x.splitlines()\nImage.open(f)') == [(1, "open"), (4, "read_text"), (5, "write_text"), (7, "splitlines")]
    files = [*ROOT.glob("*.py"), *ROOT.glob("tinyldm/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]
    mistakes = {str(path.relative_to(ROOT)): calls for path in files if (calls := careless(path.read_text(encoding="utf-8")))}
    assert len(files) > 100 and not mistakes
