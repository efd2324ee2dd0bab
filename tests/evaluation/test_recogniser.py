"""The recogniser, its cache, and what is counted from its readings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open

from tinyldm.data import toyworld
from tinyldm.data.toyworld import sample
from tinyldm.evaluation import recogniser
from tinyldm.evaluation.recogniser import UNCLEAR, Reading, RecogniserConfig, degrade, get_recogniser, move, score, train, wilson
from tinyldm.pictures.pixels import to_pixels

TINY = RecogniserConfig(scenes=32, steps=2, batch_size=16, width=4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLDM_CACHE", str(tmp_path))
    return tmp_path


def unseen(count: int, size: int = 64):
    samples = [sample(i, size, seed=77, split="all") for i in range(count)]
    return np.stack([it.image for it in samples]), [it.scene for it in samples]


def weights(net) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in net.state_dict().values()])


# ---------------------------------------------------------------- the recogniser


@pytest.mark.slow
def test_a_short_training_beats_chance_by_far():
    images, scenes = unseen(200)
    net = train(RecogniserConfig(scenes=1000, steps=50, batch_size=48, width=12, lr=1e-2))
    got = {name: row["share"] for name, row in score(scenes, net.read(images)).items()}
    assert got["colour"] > 0.6 and got["background"] > 0.9          # chance: 1/8 and 1/5; subjects take longer


def test_training_is_a_function_of_the_seed_alone():
    first = weights(train(TINY))
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(first, weights(train(TINY)))
    assert not torch.equal(first, weights(train(replace(TINY, seed=1))))


def test_training_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    train(TINY)
    assert torch.equal(before, torch.get_rng_state())


def test_pictures_of_any_size_are_read_and_each_on_its_own():
    net, (images, _) = train(TINY), unseen(12)
    assert net.read(images[3:4])[0] == net.read(images)[3] == net.read(images, batch_size=5)[3]
    for size in (32, 128):
        assert len(net.read(unseen(2, size)[0])) == 2


def test_a_picture_it_is_not_sure_of_is_unclear(monkeypatch):
    net, (images, scenes) = train(TINY), unseen(6)
    assert net.read(images)[0].subject == UNCLEAR                   # two steps of training: sure of nothing
    assert score(scenes, net.read(images))["all"]["right"] == 0
    monkeypatch.setattr(recogniser, "SURE", 0.0)
    assert all(word in words for word, words in zip(net.read(images)[0], recogniser.WORDS.values()))


def test_degrading_is_slight_and_differs_between_pictures():
    pixels = to_pixels(unseen(16)[0])
    rng = torch.Generator().manual_seed(0)
    degraded = degrade(pixels, replace(RecogniserConfig(), noise=0), rng)
    error = torch.minimum((degraded - pixels).abs().mean((1, 2, 3)), (degraded - pixels.flip(3)).abs().mean((1, 2, 3)))
    assert 0.002 < error.min() < error.max() < 0.15 and len(set(error.tolist())) == 16


def test_moving_keeps_the_picture_and_repeats_its_edge():
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    shifted = move(images, 2, np.random.default_rng(0))
    assert shifted.shape == images.shape and not (shifted == images).all()
    assert (move(images, 0, np.random.default_rng(0)) == images).all()


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_recogniser_reads_99_of_100_unseen_scenes_whole(trained, split):
    samples = [sample(i, 64, seed=77, split=split) for i in range(2000)]
    found = score([it.scene for it in samples], trained.read(np.stack([it.image for it in samples])))
    assert found["all"]["share"] >= 0.99, found


@pytest.mark.slow
def test_a_slight_blur_is_forgiven_a_strong_one_and_half_a_subject_are_not(trained):
    images, scenes = unseen(600)
    share = lambda images: score(scenes, trained.read(images))["all"]["share"]
    blurred = lambda radius: np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in images])
    assert share(blurred(1)) > 0.98 > 0.9 > share(blurred(3))
    chimeras = images.copy()
    chimeras[:, 38:] = images[np.arange(len(images)) - 1, 38:]      # the lower half of another scene
    assert share(chimeras) < 0.1


# ---------------------------------------------------------------- its cache


def test_the_second_recogniser_comes_from_the_cache(folder, monkeypatch):
    first = get_recogniser(config=TINY)
    assert [file.name for file in folder.iterdir()] == ["recogniser.safetensors"]
    monkeypatch.setattr(recogniser, "train", None)
    second = get_recogniser(config=TINY)
    assert torch.equal(weights(first), weights(second)) and not second.training
    images, _ = unseen(8)
    assert first.read(images) == second.read(images)


def test_a_recogniser_of_another_config_or_another_toyworld_is_made_anew(folder, monkeypatch):
    file = folder / "recogniser.safetensors"
    get_recogniser(config=TINY)
    assert recogniser.load(file, TINY) and not recogniser.load(file, replace(TINY, seed=1))
    monkeypatch.setattr(recogniser, "toyworld_digest", lambda: "another")
    assert recogniser.load(file, TINY) is None
    get_recogniser(config=TINY)
    assert recogniser.load(file, TINY)


def test_the_fingerprint_sees_how_scenes_look(monkeypatch):
    recogniser.toyworld_digest.cache_clear()
    before = recogniser.toyworld_digest()
    monkeypatch.setitem(toyworld.COLOURS, "red", (222, 48, 53))
    recogniser.toyworld_digest.cache_clear()
    assert recogniser.toyworld_digest() != before
    recogniser.toyworld_digest.cache_clear()


def test_a_damaged_cache_is_replaced_and_a_line_says_so(folder, capsys):
    file = folder / "recogniser.safetensors"
    file.write_bytes(b"not weights")
    get_recogniser(config=TINY)
    assert "training the recogniser again" in capsys.readouterr().err
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["config"])["scenes"] == TINY.scenes


def test_a_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch, capsys):
    (folder / "file").touch()
    monkeypatch.setenv("TINYLDM_CACHE", str(folder / "file"))
    get_recogniser(config=TINY)
    assert "TINYLDM_CACHE" in capsys.readouterr().err


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("right, count, low, high", [      # from scipy.stats.binomtest(...).proportion_ci(method="wilson")
    (0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1.0), (81, 263, 0.2552885, 0.3662096),
    (235, 250, 0.9033771, 0.9633056)])
def test_wilson_intervals_have_their_known_values(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=2e-7)


@pytest.mark.parametrize("right, count", [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_is_refused(right, count):
    with pytest.raises(ValueError, match="count at least one"):
        wilson(right, count)


def test_all_counts_pictures_whose_every_attribute_is_right():
    scenes = [toyworld.Scene("fox", "red", "sand")] * 4
    found = score(scenes, [Reading("fox", "red", "sand"), Reading("cat", "red", "sand"), Reading("fox", "blue", "sand"),
                           Reading("fox", "red", "sea")])
    assert [found[name]["right"] for name in ("subject", "colour", "background", "all")] == [3, 3, 3, 1]
