"""Pictures that are drawn for evaluation: captions, files, processes, resuming, GenEval's folders."""

import json

import numpy as np
import pytest
import torch
from helpers import pictures, randomise
from PIL import Image
from small_models import unet_model

from tinyldm.evaluation import generation, geneval
from tinyldm.evaluation.base import Evaluation, NotFirst
from tinyldm.evaluation.captions import Captions, of_file, read_captions
from tinyldm.evaluation.generation import generate, read_drawn
from tinyldm.model import Model
from tinyldm.pipeline import draw_settings
from tinyldm.training.distributed import World

TEXTS = [f"caption {i}" for i in range(5)]
CAPTIONS = Captions("list.txt", TEXTS)


def model(seed: int = 1) -> Model:
    made = unet_model()
    randomise(made.net, seed)
    return made


@pytest.fixture
def drawn(monkeypatch):
    """Stands in for drawing: a picture shows its caption's number, its seed and the guidance scale. -> [(prompts, seeds)]"""
    calls = []

    def draw(model, prompts, seeds, settings):
        calls.append((list(prompts), list(seeds)))
        colours = [[int(prompt.split()[-1]), seed, int(10 * settings.cfg)] for prompt, seed in zip(prompts, seeds)]
        return np.tile(np.array(colours, np.uint8)[:, None, None], (1, 2, 2, 1))

    monkeypatch.setattr(generation, "draw", draw)
    return calls


def evaluation(out, count: int = 7, batch_size: int = 3, cfg=(1.5, 3.0), seed: int = 20, net: int = 1, guidance=None, shortcuts=None,
               **options) -> Evaluation:
    net = model(net)
    guidance = [draw_settings(net, cfg=scale, guidance=guidance, shortcuts=shortcuts or {}) for scale in cfg]
    return Evaluation(net, "runs/x", guidance[0], torch.device("cpu"), out, count, seed, batch_size, "fp32", options=options,
                      guidance=guidance)


def contents(folders) -> list[dict[str, list[int]]]:
    return [{file.name: np.asarray(Image.open(file))[0, 0].tolist() for file in sorted(folder.glob("*.png"))} for folder in folders]


def test_picture_i_has_caption_i_and_seed_plus_i_at_every_scale_whatever_the_batch_size(tmp_path, drawn):
    wanted = [{f"{i:07d}.png": [i % 5, 20 + i, round(10 * scale)] for i in range(7)} for scale in (1.5, 3.0)]
    for batch_size in (1, 3, 50):
        assert contents(generate(evaluation(tmp_path / str(batch_size), batch_size=batch_size), CAPTIONS)) == wanted


def test_what_is_there_is_not_drawn_again_and_more_pictures_continue_the_set(tmp_path, drawn):
    first = generate(evaluation(tmp_path, count=4), CAPTIONS)
    (first[0] / "0000001.png").unlink()
    drawn.clear()
    again = generate(evaluation(tmp_path, count=6), CAPTIONS)
    assert again == first and [seeds for _, seeds in drawn] == [[21, 24, 25], [24, 25]]
    images, texts = zip(*read_drawn(again[0], CAPTIONS, 6, 4, World()))
    assert [len(batch) for batch in images] == [4, 2] and np.concatenate(images)[:, 0, 0, 1].tolist() == [*range(20, 26)]
    assert sum(texts, []) == [*TEXTS, TEXTS[0]]


def test_a_kill_between_two_batches_leaves_whole_pictures_which_are_used(tmp_path, drawn, monkeypatch):
    real = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *args: real(*args) if len(drawn) < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(evaluation(tmp_path), CAPTIONS)
    monkeypatch.setattr(generation, "draw", real)
    drawn.clear()
    generate(evaluation(tmp_path), CAPTIONS)
    assert [seeds for _, seeds in drawn] == [[26], [20, 21, 22], [23, 24, 25], [26]]


def test_any_number_of_processes_draws_the_same_set(tmp_path, drawn, monkeypatch):
    alone = contents(generate(evaluation(tmp_path / "alone"), CAPTIONS))
    monkeypatch.setattr(generation, "wait_for", lambda finished: None)
    for rank in (2, 1, 0):
        drawn.clear()
        asked = evaluation(tmp_path / "together")
        asked.world = World(rank, 3)
        folders = generate(asked, CAPTIONS)
        assert sorted(seed for _, seeds in drawn for seed in seeds) == sorted(2 * [*range(20 + rank, 27, 3)])
        if rank:
            with pytest.raises(NotFirst):
                asked.leave_unless_first()
    asked.leave_unless_first()
    assert contents(folders) == alone


def test_the_first_process_waits_for_the_files_of_the_others(tmp_path, drawn, monkeypatch):
    asked = []

    def wait_for(finished):
        asked.append(finished())
        folder = next((tmp_path / "pictures").iterdir())
        for i in range(1, 7, 2):
            Image.new("RGB", (2, 2)).save(folder / f"{i:07d}.png")
        asked.append(finished())

    monkeypatch.setattr(generation, "wait_for", wait_for)
    first = evaluation(tmp_path, cfg=(3.0,))
    first.world = World(0, 2)
    generate(first, CAPTIONS)
    assert asked == [False, True]


@pytest.mark.parametrize("change", [{"seed": 21}, {"net": 5}, {"cfg": (2.0,)}, {"guidance": "apg"}, {"shortcuts": {"deep_cache": 2}}])
def test_pictures_of_other_settings_or_weights_are_never_taken_for_these(tmp_path, drawn, change):
    folder = generate(evaluation(tmp_path, cfg=(1.5,)), CAPTIONS)[0]
    other = generate(evaluation(tmp_path, **({"cfg": (1.5,)} | change)), CAPTIONS)[0]
    captions = generate(evaluation(tmp_path, cfg=(1.5,)), Captions("list.txt", TEXTS[::-1]))[0]
    assert len({folder, other, captions}) == 3
    facts = json.loads((folder / "settings.json").read_text())
    assert (facts["cfg"], facts["seed"], facts["steps"], facts["captions"]) == (1.5, 20, 3, "list.txt")


# ---------------------------------------------------------------- captions


def test_of_coco_every_pictures_first_caption_comes_before_any_second_one(tmp_path):
    rows = [{"image_id": picture, "id": 100 * turn + picture, "caption": f" {picture}-{turn} "} for picture in range(20) for turn in (1, 0)]
    rows.append({"image_id": 3, "id": 999, "caption": "3-2"})
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": rows}))
    texts = of_file(tmp_path / "coco.json").texts
    assert {*texts[:20]} == {f"{picture}-0" for picture in range(20)} and texts[:20] != sorted(texts[:20], key=lambda text: int(text[:-2]))
    assert [text[:-1] for text in texts[20:40]] == [text[:-1] for text in texts[:20]] and texts[40:] == ["3-2"]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": rows[::-1]}))
    assert of_file(tmp_path / "coco.json").texts == texts


@pytest.mark.parametrize("name, content", [("a.txt", "one\n\n two \nthree"), ("a.json", '["one", "two", "three"]'),
                                           ("a.jsonl", '{"prompt": "one", "tag": 1}\n{"caption": "two"}\n\n{"text": "three"}\n')])
def test_a_list_of_captions_keeps_its_order(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    captions = read_captions([str(tmp_path / name)], 2, 0)
    assert captions.texts == ["one", "two", "three"] and [captions[i] for i in (2, 3)] == ["three", "one"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "\n\n", "holds no captions"), ("a.json", "[1, 2]", "captions that are no text"), ("a.json", "{", "is no file of captions"),
    ("a.json", "{}", "is no file of captions"), ("a.jsonl", '{"tag": 1}', "is no file of captions"), ("a.json", "[]", "holds no captions")])
def test_a_file_without_captions_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path / name)


def test_captions_of_a_data_set_are_those_of_its_pictures(tmp_path):
    folder = pictures(tmp_path / "data", 6)
    assert read_captions([str(folder)], 6, 0).texts == [(folder / f"{i:04d}.txt").read_text() for i in range(6)]


# ---------------------------------------------------------------- GenEval


def test_genevals_folders_hold_the_prompts_own_lines_and_four_pictures_each(tmp_path, drawn):
    rows = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": f"a bench {i}"} for i in range(3)]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = evaluation(tmp_path / "out", cfg=(3.0,), captions=[str(tmp_path / "evaluation_metadata.jsonl")])
    geneval.check(asked)
    folder, = geneval.measure(asked).files
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["00000", "00001", "00002"]
    for i, row in enumerate(rows):                          # as evaluate_images.py reads them
        assert json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) == row
        found = {file.name: np.asarray(Image.open(file))[0, 0, :2].tolist() for file in (folder / f"{i:05d}" / "samples").iterdir()}
        assert found == {f"{j:04d}.png": [i, 20 + 4 * i + j] for j in range(4)}
    drawn.clear()
    geneval.measure(asked)
    assert drawn == []


def test_genevals_lines_follow_the_prompts_and_the_pictures_stay(tmp_path, drawn):
    """The prompt is the same, so its pictures are; what the scorer is to look for in them is in the line's other fields."""
    file = tmp_path / "evaluation_metadata.jsonl"
    for count in (1, 2):
        row = {"tag": "counting", "include": [{"class": "bench", "count": count}], "prompt": "a bench 0"}
        file.write_text(json.dumps(row) + "\n")
        folder, = geneval.measure(evaluation(tmp_path / "out", cfg=(3.0,), captions=[str(file)])).files
        assert json.loads((folder / "00000" / "metadata.jsonl").read_text()) == row
    assert sum(len(prompts) for prompts, _ in drawn) == geneval.COPIES
    assert sorted(path.name for path in (folder / "00000").iterdir()) == ["metadata.jsonl", "samples"]


def test_geneval_without_its_prompts_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"caption": "x"}\n')
    for words, message in ((None, "name its prompts/evaluation_metadata.jsonl"), ([str(tmp_path / "a.jsonl")], 'lines without a "prompt"')):
        with pytest.raises(ValueError, match=message):
            geneval.check(evaluation(tmp_path, captions=words))


def test_a_model_with_text_encoders_draws_into_files(tmp_path):
    """The real road, without a stand-in: the same files at two batch sizes."""
    found = []
    for batch_size in (1, 3):
        net = model()
        how = draw_settings(net, steps=2, cfg=2.0)
        asked = Evaluation(net, "x", how, torch.device("cpu"), tmp_path / str(batch_size), 3, 0, batch_size, "fp32", guidance=[how])
        found.append(np.concatenate([images for images, _ in read_drawn(generate(asked, CAPTIONS)[0], CAPTIONS, 3, 2, World())]).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1 and found[0].std() > 10
