"""Numbered files: none is ever overwritten."""

import threading

import numpy as np
import pytest
from PIL import Image

from tinyldm.pictures import output
from tinyldm.pictures.output import Output

PICTURE = np.full((8, 8, 3), 7, np.uint8)


def written(folder, caption="A red fox!", seed=3, times=1):
    found = Output(folder, None, [])
    for _ in range(times):
        found.write(PICTURE, "text", caption, seed)
    return [file.name for file in found.written]


@pytest.mark.parametrize("there, next_number", [
    ([], 1), (["0007-1-x.png", "0002-1-y.png"], 8), (["9999-5-x.png"], 10000), (["10004-1-x.png", "9999-1-x.png"], 10005),
    (["0004-1-film.webp"], 5), (["12-x.png", "preview.png", "x-0009-1.png", "٠٠٠٩-1.png"], 1)])
def test_numbers_go_on_after_the_largest_however_long_it_is(tmp_path, there, next_number):
    for name in there:
        (tmp_path / name).touch()
    names = [f"{number:04d}-3-a-red-fox.png" for number in (next_number, next_number + 1)]
    assert written(tmp_path, times=2) == names
    assert Image.open(tmp_path / names[0]).info == {"parameters": "text"}
    assert all((tmp_path / name).stat().st_size == 0 for name in there)


def test_several_processes_never_write_the_same_file(tmp_path):
    names = []
    threads = [threading.Thread(target=lambda: names.extend(written(tmp_path, times=12))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == len(set(names)) == len([*tmp_path.iterdir()]) == 48


def test_a_picture_that_cannot_be_written_leaves_no_file_and_its_number_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_picture", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            written(tmp_path)
    assert not [*tmp_path.iterdir()] and written(tmp_path) == ["0001-3-a-red-fox.png"]


def test_a_named_file_is_replaced_and_stays_when_that_fails(tmp_path, monkeypatch):
    file = tmp_path / "fox.png"
    for shade in (1, 2):
        Output(tmp_path, file, []).write(PICTURE * shade, "", "a fox", 0)
    monkeypatch.setattr("tinyldm.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Output(tmp_path, file, []).write(PICTURE * 3, "", "a fox", 0)
    assert [*tmp_path.iterdir()] == [file] and (np.asarray(Image.open(file)) == 14).all()
