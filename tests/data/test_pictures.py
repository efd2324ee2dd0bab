"""Pictures from folders and tar shards: paired with their captions, cropped, skipped and counted when unusable."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tinyldm.data.pictures import load_pictures, square


def png(colour, size=(20, 10), mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "PNG")
    return data.getvalue()


def shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_toyworld_is_drawn_at_the_size_asked_for():
    pictures = load_pictures("toyworld", 32, scenes=3)
    assert pictures.images.shape == (3, 32, 32, 3) and pictures.images.dtype == np.uint8 and len(pictures.captions) == 3


def test_a_folder_pairs_pictures_with_their_texts(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, colour, text in (("a.png", "red", "a red thing"), ("sub/b.png", "blue", "a blue thing")):
        (tmp_path / name).write_bytes(png(colour))
        (tmp_path / name).with_suffix(".txt").write_text(text + "\n")
    (tmp_path / "lonely.png").write_bytes(png("green"))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "broken.txt").write_text("a caption")
    pictures = load_pictures(str(tmp_path), 8, scenes=0)
    assert pictures.captions == ["a red thing", "a blue thing"] and pictures.skipped == 2
    assert (pictures.images[0] == (255, 0, 0)).all() and (pictures.images[1] == (0, 0, 255)).all()


def test_shards_are_read_in_name_order_whole_or_gzipped(tmp_path):
    shard(tmp_path / "s-001.tar.gz", {"2.png": png("blue"), "2.txt": b"blue"})
    shard(tmp_path / "s-000.tar", {"1.json": b"{}", "1.txt": b"red", "1.png": png("red"), "no-text.png": png("white")})
    pictures = load_pictures(str(tmp_path / "s-*"), 8, scenes=0)
    assert pictures.captions == ["red", "blue"] and pictures.skipped == 1


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "no such folder or file"),
    (lambda path: path.mkdir(), "no readable captioned picture"),
    (lambda path: path.write_bytes(b"junk" * 500), "not a readable tar"),
    (lambda path: path.write_bytes(b""), "not a readable tar"),
])
def test_sources_that_hold_nothing_say_so(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=words):
        load_pictures(str(tmp_path / "data"), 8, scenes=0)


def test_transparency_becomes_white_and_the_crop_is_central():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (square(clear, 8) == 255).all()
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    assert (square(wide, 10)[:, 2:8] == (0, 0, 255)).all()


def test_a_picture_lying_on_its_side_is_turned_up():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))                       # black above
    exif = image.getexif()
    exif[0x0112] = 3                                          # upside down
    data = io.BytesIO()
    image.save(data, "PNG", exif=exif)
    turned = square(Image.open(io.BytesIO(data.getvalue())), 16)
    assert turned[2].max() == 255 and turned[13].max() == 0
