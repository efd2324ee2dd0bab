"""sample.py sends all captions of a drawing through the text encoders together: each of these works once."""

from dataclasses import replace

import pytest
import torch
from helpers import PROMPT, load_script
from small_models import unet_model

from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.pipeline import Canvas, Morph, PromptFeatures, all_captions, draw, draw_settings

NEGATIVE, OTHER = "a small green triangle", "a red fox"
CANVAS = Canvas(torch.linspace(-1, 1, 16 * 16).view(1, 1, 16, 16).expand(1, 3, 16, 16), 0.5, shows="the quick brown fox")


def test_drawing_needs_no_other_captions_than_those_that_are_prepared():
    """draw() is the witness: with all of them prepared, no text encoder works."""
    model, calls = unet_model(), []
    model.text.modules["text"].register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    for cfg in (1.0, 3.0):
        for options in ({}, {"negative": NEGATIVE}, {"morph": Morph(OTHER, 5, [0.5])}, {"canvas": CANVAS}, {"canvas": CANVAS._replace(shows="")}):
            how, features = draw_settings(model, cfg=cfg), PromptFeatures(model)
            features.prepare(all_captions(how, [PROMPT], **options))
            assert len(calls) == 1
            draw(model, [PROMPT], [3], how, features=features, **options)
            assert len(calls) == 1 and calls.pop() == len(features.known)


def test_what_is_not_steered_away_from_is_not_encoded():
    model = unet_model()
    plain, guided = draw_settings(model, cfg=1.0), draw_settings(model, cfg=3.0)
    assert all_captions(plain, [PROMPT], NEGATIVE) == [PROMPT] and all_captions(guided, [PROMPT], NEGATIVE) == [NEGATIVE, PROMPT]
    assert all_captions(guided, [PROMPT, OTHER]) == ["", PROMPT, OTHER]
    whole = all_captions(guided, [PROMPT], canvas=CANVAS, morph=Morph(OTHER, 5, [0.5]))
    assert sorted(whole) == sorted(["", CANVAS.shows, OTHER, PROMPT])
    assert all_captions(plain, [PROMPT], canvas=CANVAS._replace(shows="")) == [PROMPT]


@pytest.mark.parametrize("words, captions", [(["--interpolate", "5", "--frames", "3"], 3), ([], 3), (["--cfg", "1"], 2)])
def test_sample_encodes_all_of_its_captions_at_once(words, captions, tmp_path, monkeypatch):
    model = replace(unet_model(), defaults={"steps": 2, "cfg": 3.0})
    save_model(tmp_path / "model", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    sample, calls, load = load_script("sample"), [], load_model

    def watched(*args):
        found = load(*args)
        found.text.modules["text"].register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
        return found

    monkeypatch.setattr(sample, "load_model", watched)
    sample.ARGS = sample.parse([PROMPT, OTHER, "--model", str(tmp_path / "model"), "--device", "cpu", "--batch-size", "1", *words,
                                "--out", str(tmp_path / "out")])
    sample.main()
    assert calls == [captions]
