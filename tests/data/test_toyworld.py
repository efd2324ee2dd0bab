import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tinyldm.data.toyworld import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    POSITIONS,
    SIZES,
    SUBJECTS,
    Scene,
    caption,
    draw,
    sample,
    scene,
)

MANY = [scene(i) for i in range(4000)]


def fraction_near(image, colour: str, tolerance: int = 12) -> float:
    """The fraction of pixels whose three values are all within `tolerance` of the palette's."""
    return (abs(np.asarray(image, int) - COLOURS[colour]).max(-1) <= tolerance).mean()


def test_a_sample_is_a_function_of_its_index_and_seed():
    a, b = sample(7, seed=3), sample(7, seed=3)
    assert (a.image == b.image).all() and a.caption == b.caption and a.scene == b.scene
    assert a.image.shape == (64, 64, 3) and a.image.dtype == np.uint8
    assert sample(7, seed=4).scene != a.scene


def test_the_order_of_drawing_does_not_matter():
    first = sample(3).image
    for i in range(40):
        sample(i)
    assert (sample(3).image == first).all()


def test_different_indices_give_different_pictures():
    assert len({sample(i).image.tobytes() for i in range(200)}) == 200


def test_the_same_words_never_mean_the_same_pixels():
    scenes = [Scene("fox", "red", "sand", seed=i) for i in range(50)]
    assert len({draw(it).tobytes() for it in scenes}) == 50


def test_held_out_pairs_are_a_tenth_and_spare_every_word():
    assert 0.08 < len(HELD_OUT) / (len(COLOURS) * len(SUBJECTS)) < 0.12
    assert max(Counter(subject for _, subject in HELD_OUT).values()) == 1
    assert max(Counter(colour for colour, _ in HELD_OUT).values()) == 2
    assert all(colour in COLOURS and subject in SUBJECTS for colour, subject in HELD_OUT)
    assert ("red", "fox") not in HELD_OUT


def test_held_out_pairs_are_never_trained_on_and_always_held_out():
    assert not any((it.colour, it.subject) in HELD_OUT for it in MANY)
    held_out = {(it.colour, it.subject) for it in (scene(i, split="held_out") for i in range(500))}
    assert held_out == HELD_OUT
    assert any((it.colour, it.subject) in HELD_OUT for it in (scene(i, split="all") for i in range(200)))


def test_every_word_of_every_table_appears():
    for field, table in (("subject", SUBJECTS), ("colour", COLOURS), ("background", BACKGROUNDS),
                         ("size", SIZES), ("position", POSITIONS)):
        counts = Counter(getattr(it, field) for it in MANY)
        assert set(counts) == set(table)
        assert min(counts.values()) > 0.6 * len(MANY) / len(table), field


def test_an_unknown_split_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="held_out"):
        scene(0, split="test")


def test_captions_name_the_colour_and_the_subject_and_contradict_nothing():
    for it in MANY:
        words = caption(it).replace(",", "").split()
        assert f"{it.colour} {it.subject}" in caption(it) and len(words) < 20
        assert sum(word in SUBJECTS for word in words) == sum(word in COLOURS for word in words) == 1
        assert all(word not in words for table, value in ((SIZES, it.size), (POSITIONS, it.position),
                                                          (BACKGROUNDS, it.background))
                   for word in table if word != value)
        assert ("an" in words) == ("an orange" in caption(it))


def test_captions_have_a_small_vocabulary_and_many_wordings():
    captions = [caption(it) for it in MANY]
    assert len({word for text in captions for word in text.replace(",", "").split()}) < 60
    assert len(set(captions)) > 2000


def test_plain_captions_and_backgrounds_are_as_frequent_as_intended():
    plain = np.mean([caption(it) in (f"a {it.colour} {it.subject}", f"an {it.colour} {it.subject}") for it in MANY])
    named = np.mean([any(phrase in caption(it) for phrase in (it.background, *BACKGROUNDS[it.background].phrases))
                     for it in MANY])
    assert 0.10 < plain < 0.16 and 0.80 < named < 0.90


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_a_scene_looks_the_same_at_any_size(size):
    it = Scene("fox", "red", "grass", "large", seed=1)
    image = draw(it, size)
    assert image.size == (size, size) and image.mode == "RGB"
    small, reference = (np.asarray(x.resize((16, 16), 4), float) for x in (image, draw(it, 128)))
    assert abs(small - reference).mean() < 6


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_colour_of_the_caption_fills_the_subject(subject):
    for i, colour in enumerate(COLOURS):
        for k in range(2):
            background = list(BACKGROUNDS)[(i + 2 * k) % len(BACKGROUNDS)]
            image = draw(Scene(subject, colour, background, seed=i))
            assert fraction_near(image, colour) > 0.03, (colour, background)


def test_no_other_colour_of_the_palette_is_on_show():
    for i, it in enumerate(MANY[:300]):
        others = [name for name in COLOURS if name not in (it.colour, "white")]     # clouds and snowflakes are white
        assert max(fraction_near(draw(it), name) for name in others) < 0.02, it


def test_size_and_position_are_visible():
    def spot(size, position):
        image = np.asarray(draw(Scene("heart", "red", "grass", size, position, seed=5)), int)
        y, x = np.nonzero(abs(image - COLOURS["red"]).max(-1) < 12)
        return len(x), x.mean() / 64
    areas = [spot(size, "middle")[0] for size in SIZES]
    centres = [spot("small", position)[1] for position in POSITIONS]
    assert areas[0] * 1.4 < areas[1] and areas[1] * 1.3 < areas[2]
    assert centres[0] < 0.33 < 0.45 < centres[1] < 0.55 < 0.67 < centres[2]


def test_drawing_needs_no_torch():
    code = "import sys, tinyldm.data.toyworld as w; w.sample(0); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
