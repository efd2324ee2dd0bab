"""The metric 'prompts': its captions, its table, and the files that it writes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.data import toyworld
from tinyldm.data.toyworld import BACKGROUNDS, HELD_OUT, PAIRS
from tinyldm.diffusion.process import make_process
from tinyldm.evaluation import base, prompts
from tinyldm.evaluation.base import Evaluation
from tinyldm.evaluation.prompts import Answer, failure_sheet, make_requests, table
from tinyldm.evaluation.recogniser import Reading, score
from tinyldm.model import Model
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import draw_settings
from tinyldm.vendor_loaders.scheduler import to_config


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_prompts_cover_every_pair_and_then_every_background(split):
    pairs = PAIRS[split]
    requests = make_requests(5 * len(pairs), split)
    of = lambda some: {(request.scene.colour, request.scene.subject) for request in some}
    assert of(requests[: len(pairs)]) == set(pairs) == of(requests)
    assert len({(*request.scene.__dict__.values(),) for request in requests}) == 5 * len(pairs)
    assert {request.scene.background for request in requests[:25]} == set(BACKGROUNDS)
    assert requests == make_requests(5 * len(pairs), split) != make_requests(5 * len(pairs), split, seed=1)


def test_prompts_never_mix_held_out_pairs_with_trained_ones():
    for split, expected in (("train", False), ("held_out", True)):
        assert all(((request.scene.colour, request.scene.subject) in HELD_OUT) == expected for request in make_requests(700, split))


def test_prompts_are_worded_like_the_training_captions():
    known = {toyworld.caption(toyworld.scene(i)) for i in range(30_000)}
    requests = make_requests(100, "train")
    assert sum(request.prompt in known for request in requests) > 80
    for prompt, scene in requests + make_requests(100, "held_out"):
        assert any(phrase in prompt for phrase in BACKGROUNDS[scene.background].phrases)
        assert prompt.startswith(f"a{'n' * (scene.colour == 'orange')} {scene.colour} {scene.subject} ")


def test_the_table_shows_shares_and_interval():
    scenes = [toyworld.Scene("fox", "red", "sand")] * 10
    lines = table({"trained pairs": score(scenes, [Reading("fox", "red", "sea")] * 5 + [Reading("fox", "red", "sand")] * 5)})
    assert lines.splitlines()[1].split() == ["trained", "pairs", "10", "100.0", "100.0", "50.0", "50.0", "23.7", "to", "76.3"]


def test_the_failure_sheet_has_a_cell_per_failure():
    answer = Answer("train", make_requests(1, "train")[0], np.zeros((64, 64, 3), np.uint8), Reading("fox", "red", "sand"))
    assert failure_sheet([answer] * 7, columns=3, side=64).size == (3 * 72, 3 * 100)


class Oracle:
    """A recogniser that is told the scenes of the pictures that it is about to see."""

    def __init__(self, requests, wrong):
        self.readings = [Reading(it.scene.subject, "unclear" if i in wrong else it.scene.colour, it.scene.background)
                         for i, it in enumerate(requests)]

    def read(self, images):
        return self.readings if len(images) == len(self.readings) else [Reading("fox", "red", "sand")] * len(images)


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    vae = AutoencoderKL(VAEConfig(widths=(4, 4), depth=1, groups=2, sample_size=16)).eval()
    model = Model(UNet(UNetConfig(widths=(8,), attention=(False,), heads=(1,), groups=4)), vae, None, make_process("flow"), "flow", to_config("flow", {}, "flow"),
                  {"data": ["toyworld"], "resolution": 16, "step": 40, "steps": 7, "cfg": 2.5, "sampler": "heun"})
    monkeypatch.setattr(base, "draw", lambda model, prompts, seeds, how: np.zeros((len(prompts), 16, 16, 3), np.uint8))
    return Evaluation(model, "runs/x", draw_settings(model), torch.device("cpu"), tmp_path, count=15, seed=2, batch_size=500)


def test_the_record_holds_every_reading_and_the_sheet_the_failures(evaluation, monkeypatch):
    asked = make_requests(8, "train", 2) + make_requests(7, "held_out", 2)
    monkeypatch.setattr(prompts, "get_recogniser", lambda device: Oracle(asked, wrong={1, 9, 10}))
    lines, record, files = prompts.measure(evaluation)
    assert lines[:2] == ["runs/x: heun, 7 steps, cfg 2.5; 15 pictures in 0 s", ""]
    assert [line[:16].strip() for line in lines[2].splitlines()] == [
        "correct, %", "drawn scenes", "after the VAE", "trained pairs", "held-out pairs"]
    assert list(record) == ["model", "seconds", "step", "cfg", "steps", "sampler", "schedule", "seed", "dtype", "no_ema",
                            "recogniser", "scores", "pictures"]
    assert list(record["recogniser"]) == ["drawn scenes", "after the VAE"] and json.dumps(record)
    assert [record["scores"][split]["all"]["right"] for split in ("train", "held_out")] == [7, 5]
    assert [picture["seed"] for picture in record["pictures"]] == list(range(2, 17))
    assert record["pictures"][9] == {"prompt": asked[9].prompt, "seed": 11, "split": "held_out", "right": False,
                                     "subject": asked[9].scene.subject, "colour": "unclear", "background": asked[9].scene.background}
    assert files == [evaluation.out / "failures.png"] and Image.open(files[0]).size == (6 * 200, 228)


def test_an_old_sheet_of_failures_goes_when_there_are_none(evaluation, monkeypatch):
    asked = make_requests(8, "train", 2) + make_requests(7, "held_out", 2)
    monkeypatch.setattr(prompts, "get_recogniser", lambda device: Oracle(asked, wrong=()))
    (evaluation.out / "failures.png").touch()
    assert prompts.measure(evaluation).files == [] and not list(evaluation.out.iterdir())


def test_only_models_of_toyworld_can_be_measured(evaluation):
    prompts.check(evaluation)
    for defaults, name in (({"data": ["photos", "toyworld"]}, "photos, toyworld"), ({}, "something else")):
        evaluation.model.defaults = defaults
        with pytest.raises(ValueError, match=f"{name}.*--data toyworld"):
            prompts.check(evaluation)
