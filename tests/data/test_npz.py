"""Shards of arrays: pictures with captions or labels, and arrays that do not fit."""

import random
import struct

import numpy as np
import pytest
from archives import FS

from tinyldm.data.readers import captions, read_npz

IMAGES = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
LABELS = np.arange(3)


def npz(file, **arrays):
    np.savez(file, **arrays)
    return list(read_npz(FS, str(file), file.stat().st_size))


def test_npz_captions_may_be_one_or_several_for_each_picture(tmp_path):
    out = npz(tmp_path / "a.npz", images=IMAGES, captions=np.array(["a", "é", "c"]))
    assert [sample.fields for sample in out] == [{"text": "a"}, {"text": "é"}, {"text": "c"}]
    assert all(np.array_equal(sample.picture, image) for sample, image in zip(out, IMAGES))
    assert len({sample.key for sample in out}) == 3
    out = npz(tmp_path / "a.npz", images=IMAGES, captions=np.array([["a", "b"]] * 3).astype("S"), labels=np.arange(3))
    assert captions(out[2]) == [(0, "a"), (0, "b")]


def test_npz_labels_become_captions(tmp_path):
    labels, names = np.array([2, 0, 1], np.uint8), np.array(["cat", "Owl", "tree"])
    for given in (names, names.astype("S")):
        out = npz(tmp_path / "a.npz", images=IMAGES, labels=labels, class_names=given)
        assert [sample.fields["text"] for sample in out] == ["a photo of a tree", "a photo of a cat", "a photo of an Owl"]
    assert npz(tmp_path / "a.npz", images=IMAGES, labels=labels)[0].fields == {"text": "class 2"}


def test_grey_npz_pictures_get_three_channels(tmp_path):
    out = npz(tmp_path / "a.npz", images=IMAGES[..., 0], labels=np.arange(3))
    assert out[1].picture.shape == (4, 5, 3) and out[1].picture.dtype == np.uint8
    assert (out[1].picture == IMAGES[1, ..., :1]).all()


@pytest.mark.parametrize("arrays, expected", [
    (dict(labels=LABELS), "has no images: save images as uint8"),
    (dict(images=IMAGES / 255, labels=LABELS), "images of float64 [3, 4, 5, 3]: save images as uint8"),
    (dict(images=IMAGES[0, 0], labels=LABELS), "images of uint8 [5, 3]"),
    (dict(images=IMAGES.transpose(0, 3, 1, 2), labels=LABELS), "images of uint8 [3, 3, 4, 5]"),
    (dict(images=IMAGES), "neither captions (strings) nor labels"),
    (dict(images=IMAGES, labels=LABELS[:2]), "labels has the shape [2]: save one of them for each of the 3"),
    (dict(images=IMAGES, captions=np.array("a")), "captions has the shape []"),
    (dict(images=IMAGES, captions=LABELS), "captions are int64 [3]: save np.array(captions, dtype=str)"),
    (dict(images=IMAGES, captions=np.array(["a"] * 3, dtype=object)), "dtype=str"),
    (dict(images=IMAGES, labels=LABELS / 2), "labels are float64"),
    (dict(images=IMAGES, labels=LABELS - 1, class_names=np.array(["a", "b"])), "labels go from -1 to 1, but there are 2"),
    (dict(images=IMAGES, labels=LABELS, class_names=np.array(["a", "b"])), "labels go from 0 to 2, but there are 2"),
])
def test_arrays_that_do_not_fit_are_errors_with_the_fix(tmp_path, arrays, expected):
    with pytest.raises(ValueError) as error:
        npz(tmp_path / "a.npz", **arrays)
    assert expected in str(error.value) and str(tmp_path / "a.npz") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_file_that_is_no_npz_is_an_error(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a readable"):
        list(read_npz(FS, str(tmp_path / "a.npz"), None))


def test_a_damaged_npz_is_an_error(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[80] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is not a readable"):
        list(read_npz(FS, str(tmp_path / "a.npz"), None))
    assert struct.unpack("<I", bytes(data[:4]))[0] == 0x04034b50


def test_damage_to_the_end_record_of_an_npz_is_an_error_about_the_file_and_not_the_disk(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    data, rng, refused = (tmp_path / "a.npz").read_bytes(), random.Random(1), 0
    for position in range(len(data) - 22, len(data)):           # the end record, with the offset of the directory
        changed = bytearray(data)
        changed[position] ^= rng.randint(1, 255)
        (tmp_path / "a.npz").write_bytes(changed)
        try:
            list(read_npz(FS, str(tmp_path / "a.npz"), len(data)))
        except ValueError as error:
            assert "a.npz" in str(error)
            refused += 1
    assert refused > 5


def test_an_npz_with_negative_offsets_is_not_taken_for_a_failed_disk(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(22, "Invalid argument")                 # the error of a seek to a negative position

    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(ValueError, match="is not a readable .npz file"):
        list(read_npz(FS, str(tmp_path / "a.npz"), None))
