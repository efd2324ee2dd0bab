"""Captions of different lengths in one batch: every picture is the one that its caption gives alone, with padding masked or not, with
guidance, masks and morphs. The captions of the other tests are of one length, or their networks attend to the padding."""

import numpy as np
import pytest
import torch
from helpers import randomise, thinned
from PIL import Image
from test_sample import make

from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.pictures.animation import even_fractions
from tinyldm.pictures.pixels import to_pixels
from tinyldm.pipeline import Canvas, Morph, draw, draw_settings, PromptFeatures

SHORT, LONG = "blue", "a small green triangle on the left of a red square"
CAPTIONS = [SHORT, LONG, "a red circle", ""]
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module", params=[False, True], ids=["attended", "masked"])
def model(request):
    """A model with a transformer that attends to the padding, or does not."""
    model = make()
    net = DiT(DiTConfig(patch=4, width=32, layers=2, heads=2, mlp_width=32, context_dim=32, time_dim=16))
    model.net, model.defaults = randomise(net, 2), model.defaults | {"mask_padding": request.param}
    with torch.no_grad():
        for block in net.blocks:
            block.cross.to_out.weight.mul_(6)                   # captions decide much of the picture
    return model


def drawn(model, prompts=CAPTIONS, seeds=SEEDS, how=None, **options) -> np.ndarray:
    return draw(model, prompts, seeds, how or draw_settings(model), **options).astype(int)


def canvas(mask: bool) -> Canvas:
    pixels = to_pixels(np.array(Image.linear_gradient("L").resize((32, 32)).convert("RGB"))[None])
    half = torch.zeros(1, 1, 32, 32)
    half[..., 16:] = 1
    return Canvas(pixels, 0.8, half if mask else None)


OPTIONS = {"plain": {}, "short negative": dict(negative=SHORT), "long negative": dict(negative=LONG), "canvas": dict(canvas=canvas(False)),
           "mask": dict(canvas=canvas(True)), "mask and negative": dict(canvas=canvas(True), negative=LONG),
           "inverted": dict(canvas=canvas(False)._replace(shows=LONG)), "inverted as itself": dict(canvas=canvas(False)._replace(shows=""))}


@pytest.mark.parametrize("name", thinned(2, OPTIONS))
def test_a_picture_of_a_batch_of_uneven_captions_is_the_one_drawn_alone(model, name):
    together = drawn(model, **OPTIONS[name])
    for i, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS)):
        assert abs(together[i] - drawn(model, [caption], [seed], **OPTIONS[name])[0]).max() <= 1
    assert abs(together[0] - drawn(model, [LONG], SEEDS[:1], **OPTIONS[name])[0]).mean() > 0.5        # captions matter


def test_the_mask_reaches_to_the_end_token_of_every_caption_and_no_further(model):
    mask, ids = PromptFeatures(model)(CAPTIONS).mask, model.text.tokenize(CAPTIONS)
    assert (mask is not None) == model.defaults["mask_padding"]
    if mask is None:
        return
    ends = (ids == model.text.tokenizers[0].eos_token_id).int().argmax(1)
    assert mask.sum(1).tolist() == (ends + 1).tolist() and mask.sum(1).tolist()[3] == 2              # of "": start and end
    assert all(mask[i, : end + 1].all() for i, end in enumerate(ends.tolist()))


@pytest.mark.parametrize("captions", [(SHORT, LONG), (LONG, SHORT)], ids=["to a longer one", "to a shorter one"])
def test_a_morph_between_uneven_captions_begins_and_ends_at_the_pictures_of_both(model, captions):
    first, second = captions
    frames = drawn(model, [first] * 9, [3] * 9, morph=Morph(second, 4, even_fractions(9)))
    for frame, caption, seed in ((frames[0], first, 3), (frames[-1], second, 4)):
        assert abs(frame - drawn(model, [caption], [seed])[0]).max() <= 1
    whole, moves = abs(frames[0] - frames[-1]).mean(), [abs(one - two).mean() for one, two in zip(frames, frames[1:])]
    assert whole > 5 and max(moves) < 0.7 * whole               # with all tokens of both at once, the first step would be 1.3
