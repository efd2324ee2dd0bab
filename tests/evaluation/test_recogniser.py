import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open

from tinyldm.data import toyworld
from tinyldm.data.toyworld import BACKGROUNDS, HELD_OUT, PAIRS, sample
from tinyldm.diffusion.process import make_process
from tinyldm.evaluation import recogniser
from tinyldm.evaluation.recogniser import UNCLEAR, Reading, Settings, get_recogniser, mar, moved, score, train, wilson
from tinyldm.pictures.pixels import to_pixels
from tinyldm.vendor_loaders.scheduler import to_config

ROOT = Path(__file__).parents[2]
TINY = Settings(scenes=32, steps=2, batch_size=16, width=4)


def load_script():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = load_script()


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


def test_a_short_training_beats_chance_by_far():
    images, scenes = unseen(200)
    net = train(Settings(scenes=1000, steps=50, batch_size=48, width=12, lr=1e-2))
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


def test_marring_is_slight_and_differs_between_pictures():
    pixels = to_pixels(unseen(16)[0])
    rng = torch.Generator().manual_seed(0)
    marred = mar(pixels, replace(Settings(), noise=0), rng)
    error = torch.minimum((marred - pixels).abs().mean((1, 2, 3)), (marred - pixels.flip(3)).abs().mean((1, 2, 3)))
    assert 0.002 < error.min() < error.max() < 0.15 and len(set(error.tolist())) == 16


def test_moving_keeps_the_picture_and_repeats_its_edge():
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    shifted = moved(images, 2, np.random.default_rng(0))
    assert shifted.shape == images.shape and not (shifted == images).all()
    assert (moved(images, 0, np.random.default_rng(0)) == images).all()


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
    first = get_recogniser(settings=TINY)
    assert [file.name for file in folder.iterdir()] == ["recogniser.safetensors"]
    monkeypatch.setattr(recogniser, "train", None)
    second = get_recogniser(settings=TINY)
    assert torch.equal(weights(first), weights(second)) and not second.training
    images, _ = unseen(8)
    assert first.read(images) == second.read(images)


def test_a_recogniser_of_other_settings_or_another_toyworld_is_made_anew(folder, monkeypatch):
    file = folder / "recogniser.safetensors"
    get_recogniser(settings=TINY)
    assert recogniser.load(file, TINY) and not recogniser.load(file, replace(TINY, seed=1))
    monkeypatch.setattr(recogniser, "looks", lambda: "another")
    assert recogniser.load(file, TINY) is None
    get_recogniser(settings=TINY)
    assert recogniser.load(file, TINY)


def test_the_fingerprint_sees_how_scenes_look(monkeypatch):
    recogniser.looks.cache_clear()
    before = recogniser.looks()
    monkeypatch.setitem(toyworld.COLOURS, "red", (222, 48, 53))
    recogniser.looks.cache_clear()
    assert recogniser.looks() != before
    recogniser.looks.cache_clear()


def test_a_damaged_cache_is_replaced(folder):
    file = folder / "recogniser.safetensors"
    file.write_bytes(b"not weights")
    get_recogniser(settings=TINY)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["settings"])["scenes"] == TINY.scenes


def test_a_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch, capsys):
    (folder / "file").touch()
    monkeypatch.setenv("TINYLDM_CACHE", str(folder / "file"))
    get_recogniser(settings=TINY)
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


# ---------------------------------------------------------------- evaluate.py


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_prompts_cover_every_pair_and_then_every_background(split):
    pairs = PAIRS[split]
    wishes = evaluate.make_wishes(5 * len(pairs), split)
    of = lambda some: {(wish.scene.colour, wish.scene.subject) for wish in some}
    assert of(wishes[: len(pairs)]) == set(pairs) == of(wishes)
    assert len({(*wish.scene.__dict__.values(),) for wish in wishes}) == 5 * len(pairs)
    assert {wish.scene.background for wish in wishes[:25]} == set(BACKGROUNDS)
    assert wishes == evaluate.make_wishes(5 * len(pairs), split) != evaluate.make_wishes(5 * len(pairs), split, seed=1)


def test_prompts_never_mix_held_out_pairs_with_trained_ones():
    for split, wanted in (("train", False), ("held_out", True)):
        assert all(((wish.scene.colour, wish.scene.subject) in HELD_OUT) == wanted for wish in evaluate.make_wishes(700, split))


def test_prompts_are_worded_like_the_training_captions():
    known = {toyworld.caption(toyworld.scene(i)) for i in range(30_000)}
    wishes = evaluate.make_wishes(100, "train")
    assert sum(wish.prompt in known for wish in wishes) > 80
    assert all(any(phrase in wish.prompt for phrase in BACKGROUNDS[wish.scene.background].phrases)
               and wish.prompt.startswith(f"a{'n' * (wish.scene.colour == 'orange')} {wish.scene.colour} {wish.scene.subject} ")
               for wish in wishes + evaluate.make_wishes(100, "held_out"))


def test_the_table_shows_shares_and_interval():
    scenes = [toyworld.Scene("fox", "red", "sand")] * 10
    lines = evaluate.table({"trained pairs": score(scenes, [Reading("fox", "red", "sea")] * 5 + [Reading("fox", "red", "sand")] * 5)})
    assert lines.splitlines()[1].split() == ["trained", "pairs", "10", "100.0", "100.0", "50.0", "50.0", "23.7", "to", "76.3"]


def test_the_failure_sheet_has_a_cell_per_failure():
    wish, image = evaluate.make_wishes(1, "train")[0], np.zeros((64, 64, 3), np.uint8)
    sheet = evaluate.failure_sheet([(image, wish, Reading("fox", "red", "sand"))] * 7, columns=3, side=64)
    assert sheet.size == (3 * 72, 3 * 100)


@pytest.mark.parametrize("words, message", [
    (["runs/x", "--metric", "promts"], "did you mean 'prompts'"), (["runs/x", "--count", "1"], "at least 2"),
    (["runs/x", "--batch-size", "0"], "at least 1"), (["runs/x", "--smapler", "ddim"], "did you mean '--sampler'"),
    (["runs/x", "--dtype", "fp23"], "did you mean 'fp32'"), ([], "RUN")])
def test_a_mistyped_command_line_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.parse(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


def test_help_and_mistakes_do_not_wait_for_torch():
    code = ("import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
            "try: runpy.run_path('evaluate.py', run_name='__main__')\n"
            "except SystemExit: print('torch' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--metric" in said and said.endswith("False\n")


def test_a_folder_without_a_model_and_a_model_of_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run, a model folder nor"):
        evaluate.find_model(str(tmp_path))
    model = evaluate.Model(*[None] * 7, defaults={"data": "photos/"})
    with pytest.raises(ValueError, match="photos/.*--data toyworld"):
        evaluate.resolve(evaluate.parse([str(tmp_path)]), model)


def test_what_was_not_typed_comes_from_the_model():
    model = evaluate.Model(*[None] * 4, make_process("flow"), "flow", to_config("flow", {}, "flow", "unet"),
                           {"data": "toyworld", "cfg": 2.5, "steps": 7, "sampler": "heun"})
    args = evaluate.parse(["x", "--steps", "9"])
    how = evaluate.resolve(args, model)
    assert (how.cfg, how.steps, how.sampler) == (2.5, 9, "heun")
    for typed in (["--sampler", "huen"], ["--schedule", "karas"]):
        with pytest.raises(ValueError, match="did you mean"):
            evaluate.resolve(evaluate.parse(["x", *typed]), model)
