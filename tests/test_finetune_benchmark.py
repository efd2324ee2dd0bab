"""benchmarks/finetune.py asks for the same pictures before and after, and shows the model ten pictures that its data never had."""

from pathlib import Path

import pytest
from helpers import load_script

from tinyldm.config import parse
from tinyldm.data import toyworld
from tinyldm.evaluation.recogniser import Reading


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/finetune")


def task(benchmark, **changes):
    return benchmark.Task(**dict(base="base", subject="cat", kind="fox", count=60, out=Path("out"), recogniser=None) | changes)


def test_the_three_sets_share_no_subject_and_only_the_new_one_s_words_differ_between_the_ways(benchmark):
    plain, other = task(benchmark).requests("cat"), task(benchmark).requests("sks fox")
    subjects = {name: {request.scene.subject for request in requests} for name, requests in plain.items()}
    assert subjects == {"new": {"cat"}, "class": {"fox"}, "others": toyworld.SUBJECTS.keys() - {"cat", "fox"}}
    assert [len(requests) for requests in plain.values()] == [60] * 3
    assert (plain["class"], plain["others"]) == (other["class"], other["others"])
    for one, two in zip(plain["new"], other["new"], strict=True):
        assert one.scene == two.scene and two.prompt == one.prompt.replace("cat", "sks fox") and " cat " in one.prompt
    assert len({request.scene for request in plain["new"]}) == 35           # seven trained colours on five backgrounds


def test_ten_scenes_of_the_new_subject_are_written_with_their_captions(benchmark, tmp_path):
    folder = benchmark.write_pictures(task(benchmark, out=tmp_path), 16)
    captions = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    assert len(captions) == len([*folder.glob("*.png")]) == 10 and all("cat" in caption for caption in captions)
    assert len({scene.scene.colour for scene in benchmark.new_scenes("cat", 16)}) > 3


@pytest.mark.parametrize("way", ["lora", "dreambooth", "dreambooth-prior", "dreambooth-lora", "dreambooth-lora-prior", "textual-inversion"])
def test_each_way_is_a_command_line_that_train_py_takes(benchmark, way):
    flags = benchmark.shlex.split(task(benchmark).fill(benchmark.WAYS[way].flags))
    config = parse([*flags, "--model", "base", "--data", "pictures", "--out", "out"], "")[0].finetune
    assert bool(config.class_prompt) == way.endswith("prior") and (config.rank > 0) == ("lora" in way)
    assert [*benchmark.WAYS] == ["lora", "dreambooth", "dreambooth-prior", "dreambooth-lora", "dreambooth-lora-prior", "textual-inversion"]


def test_a_line_of_the_table_has_wilson_s_intervals(benchmark):
    scenes = [toyworld.Scene("cat", "red", "sand")] * 10
    read = [Reading("cat", "red", "sand")] * 8 + [Reading("cat", "blue", "sand")] + [Reading("fox", "red", "sand")]
    # 9 of 10: (9 + z²/2 -+ z sqrt(9 * 1/10 + z²/4)) / (10 + z²) with z = 1.96
    assert benchmark.line("x", benchmark.score(scenes, read)).split() == "x 10 90.0 (60 to 98) 80.0 (49 to 94)".split()
