"""The pictures that an autoencoder is trained on: in a file that is read in pieces."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import pictures

from tinyldm.config import parse
from tinyldm.training import vae_pictures
from tinyldm.training.vae_pictures import header, hold_out, middle, random_crops, read_pictures, training_pictures, write_pictures


@pytest.mark.parametrize("shape", [(0,), (3, 8, 8, 3), (2_000_000, 512, 512, 3)])
def test_the_header_is_numpys_own_format_and_of_one_length(shape):
    found = header(*shape)
    assert len(found) == 128
    file = io.BytesIO(found)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype("uint8")) and file.tell() == 128


def test_pictures_are_written_one_by_one_and_read_where_they_are_used(tmp_path):
    images, written = np.random.default_rng(0).integers(256, size=(5, 4, 4, 3), dtype=np.uint8), []
    file = tmp_path / "new" / "pictures.npy"

    def one_by_one():
        for image in images:
            written.append(file.stat().st_size)                 # buffered, but nothing waits for the last picture
            yield image.transpose(1, 0, 2)                      # not contiguous

    write_pictures(file, one_by_one())
    found = read_pictures(file)
    assert isinstance(found, np.memmap) and np.array_equal(found, images.transpose(0, 2, 1, 3))
    assert np.array_equal(np.load(file), found) and len(written) == 5
    assert read_pictures(tmp_path / "none.npy") is None
    file.write_bytes(file.read_bytes()[:-1])
    assert read_pictures(file) is None


def test_training_needs_no_more_memory_than_the_pictures_in_use(tmp_path, monkeypatch):
    config = parse(["--data", str(pictures(tmp_path / "data", 9)), "--resolution", "16", "--vae-pictures", "7"], "")[0]
    run, alive = tmp_path / "run", []
    run.mkdir()
    real = vae_pictures.usable_pictures

    def watched(*words):
        for item in real(*words):
            alive.append(item)
            yield item
            alive.remove(item)                                  # the next one is asked for only when this one has been written

    monkeypatch.setattr(vae_pictures, "usable_pictures", watched)
    monkeypatch.setattr(vae_pictures, "write_pictures", lambda file, images: write_pictures(file, (
        image for image in images if len(alive) == 1)))
    context = SimpleNamespace(folder=run, signals=SimpleNamespace(check=lambda: None))
    images = training_pictures(config, context)
    assert isinstance(images, np.memmap) and images.shape == (7, 16, 16, 3)
    monkeypatch.setattr(vae_pictures.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 7 * 16 * 16 * 3))      # not less than half
    vae_pictures.forget_pictures(run)
    assert np.array_equal(training_pictures(config, context), images) and not [*run.iterdir()]


def test_a_tenth_of_the_pictures_at_most_is_held_out_from_everywhere_among_them():
    kept, held_out = hold_out(100, 5)
    assert held_out.tolist() == [0, 25, 50, 74, 99] and sorted([*kept, *held_out]) == [*range(100)]
    assert [len(part) for part in hold_out(100, 64)] == [90, 10] and [len(part) for part in hold_out(9, 64)] == [9, 0]
    assert [len(part) for part in hold_out(100, 0)] == [100, 0]


def test_crops_come_from_the_pictures_that_are_kept_alone():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(6, 1).repeat(6, 2).repeat(3, 3)
    crops = random_crops(images, 4, 500, 0, 1, np.array([2, 7]))
    assert crops.shape == (500, 4, 4, 3) and {*crops.flatten().tolist()} == {2, 7}
    assert {*random_crops(images, 4, 500, 0, 1).flatten().tolist()} == {*range(10)}


def test_the_middle_of_a_picture_has_equal_margins():
    images = np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1)
    assert middle(images, 2)[0, :, :, 0].tolist() == [[14, 15], [20, 21]]
    assert np.array_equal(middle(images, 0), images) and np.array_equal(middle(images, 99), images)
