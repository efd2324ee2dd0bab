"""The text `parameters` of a picture, and that other tools read back what was written."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tinyldm.pictures.animation import write_animation
from tinyldm.pictures.metadata import parameters, quote
from tinyldm.pictures.pixels import write_picture

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')     # AUTOMATIC1111's modules/infotext_utils.py


def read_back(text: str) -> dict[str, str]:
    """The last line as AUTOMATIC1111 reads it."""
    found = PARAMETER.findall(text.split("\n")[-1])
    return {name: json.loads(value) if value[:1] == value[-1:] == '"' else value for name, value in found}


ODD = ["fox, Steps: 99.png", 'the "red" fox', "C:\\foxes\\a", "12:30", "two\nlines", " spaces ", "", "狐 ünï", 'ends in \\', '"', "a, b",
       "999,800,500"]


@pytest.mark.parametrize("value", ODD)
def test_every_value_is_read_back_as_it_was(value):
    text = parameters("a fox, Steps: 7", "ugly: very", {"Steps": 4, "Init image": value, "Schedule type": value, "Seed": 2**61})
    assert text.startswith("a fox, Steps: 7\nNegative prompt: ugly: very\nSteps: 4, Init image: ")
    assert read_back(text) == {"Steps": "4", "Init image": value, "Schedule type": value, "Seed": str(2**61)}


def test_only_what_needs_quotes_gets_them():
    assert [quote(text) for text in ("fox.png", "0.3 to 5", "32x32", "v1-5 [abc]")] == ["fox.png", "0.3 to 5", "32x32", "v1-5 [abc]"]
    assert quote("a, b") == '"a, b"' and parameters("a fox", "", {"Steps": 4, "Size": "8x8"}) == "a fox\nSteps: 4, Size: 8x8"


def test_the_text_is_in_the_file_and_the_pixels_are_untouched(tmp_path):
    text = parameters("a fox", "", dict(zip(("One", "Two"), ODD[:2]), File="caf\udce9"))
    write_picture(tmp_path / "x.png", PICTURE, text)
    opened = Image.open(tmp_path / "x.png")
    assert opened.info == {"parameters": text.replace("\udce9", r"\udce9")} and (np.asarray(opened) == PICTURE).all()
    write_picture(tmp_path / "plain.png", PICTURE)
    assert Image.open(tmp_path / "plain.png").info == {}


@pytest.mark.parametrize("ending", ["webp", "gif", "WEBP"])
def test_an_animation_is_written_whole_or_not_at_all(tmp_path, monkeypatch, ending):
    file = tmp_path / f"x.{ending}"
    write_animation(file, [PICTURE, 255 - PICTURE], "first")
    before = file.read_bytes()
    monkeypatch.setattr("tinyldm.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_animation(file, [PICTURE, PICTURE], "second")
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file] and Image.open(file).n_frames == 2
