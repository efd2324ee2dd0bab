"""The contrastive losses against the papers' formulas in float64, and cached features against the whole batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyldm.config import make_config
from tinyldm.models.clip import CLIP, CLIPFeatures, unit
from tinyldm.objectives import contrastive, split
from tinyldm.objectives.contrastive import Contrastive, Samples, clip_config, normalised, whole_losses

SIZE = 12
SETTINGS = dict(objective="contrastive", resolution=8, batch_size=SIZE, vocab_size=600, dtype="fp32",
                text=dict(width=16, layers=1, heads=2, mlp_width=32, context_length=12))
OPTIONS = dict(embed=16, patch=4, width=16, layers=1, heads=2)


def features(seed: int = 0) -> CLIPFeatures:
    made = torch.Generator().manual_seed(seed)
    return CLIPFeatures(*(unit(torch.randn(SIZE, 16, generator=made, dtype=torch.float64)) for _ in range(2)))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


DISTINCT = torch.arange(SIZE)[:, None].expand(SIZE, 3)
REPEATED = torch.tensor([0, 1, 2, 1, 3, 4, 1, 5, 6, 5, 7, 8])[:, None].expand(SIZE, 3)


def objective(loss: str, dtype=torch.float64, **settings) -> Contrastive:
    config = make_config(**SETTINGS | dict(objective_options=OPTIONS | dict(loss=loss)) | settings)
    torch.manual_seed(0)
    return Contrastive(config, CLIP(clip_config(config, 600, bos_token_id=598, eos_token_id=599)).to(dtype), ("clip",))


def batch(made: Contrastive, part: slice = slice(0, SIZE), dtype=torch.float64):
    rng = np.random.default_rng(1)
    tokens = torch.from_numpy(rng.integers(0, 590, (SIZE, 12)))
    tokens[:, -1], tokens[5] = 599, tokens[2]                   # two pictures have the same caption
    images = rng.integers(0, 256, (SIZE, 8, 8, 3)).astype(np.uint8)
    drawn = made.draw(Samples(images[part], tokens[part]), torch.Generator(), SIZE, part)
    return drawn._replace(pixels=drawn.pixels.to(dtype))


def gradients(made: Contrastive, drawn, parts: int) -> dict[str, torch.Tensor]:
    """Of one step, taken as the trainer takes it."""
    micro_batches = split(drawn, parts)
    made.collect(made.turns[0], {"clip": made.clip}, micro_batches)
    values = []
    for micro in micro_batches:
        losses = made.losses(made.turns[0], {"clip": made.clip}, micro, 0.0)
        (losses.sum() / SIZE).backward()
        values.append(losses.detach())
    found = {name: p.grad.clone() for name, p in made.clip.named_parameters()}
    made.clip.zero_grad()
    return found | {"losses": torch.cat(values)}


def plain(made: Contrastive, drawn) -> dict[str, torch.Tensor]:
    """The same of the whole batch at once, by autograd alone."""
    losses = whole_losses(made.loss, made.clip(drawn.pixels, drawn.tokens), drawn.tokens, made.clip.log_scale, made.clip.bias)
    losses.mean().backward()
    found = {name: p.grad.clone() for name, p in made.clip.named_parameters()}
    made.clip.zero_grad()
    return found | {"losses": losses.detach()}


def assert_equal(one: dict, two: dict, rtol: float) -> None:
    """rtol: of the largest gradient, because that of a key's bias is 0 but for rounding."""
    largest = max(float(tensor.abs().max()) for name, tensor in two.items() if name != "losses")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=rtol, atol=rtol * largest), name


# ---------------------------------------------------------------- the losses


def test_the_loss_of_different_captions_is_clip_s():
    """arXiv:2103.00020, Fig. 3: the mean of two cross-entropies with the diagonal as labels (open_clip's ClipLoss)."""
    found, labels = features(), torch.arange(SIZE)
    logits = math.exp(2.5) * found.images @ found.texts.T
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    losses = whole_losses("clip", found, DISTINCT, number(2.5), None)
    assert losses.shape == (SIZE,) and torch.allclose(losses.mean(), expected, rtol=1e-12)


def test_the_loss_of_different_captions_is_siglip_s():
    """arXiv:2303.15343, Algorithm 1, whose sum is divided by the batch and not by its square (open_clip's SigLipLoss)."""
    found = features()
    z = 2 * torch.eye(SIZE, dtype=torch.float64) - 1
    logits = math.exp(2.3) * found.images @ found.texts.T - 10
    expected = -F.logsigmoid(z * logits).sum() / SIZE
    assert torch.allclose(whole_losses("siglip", found, DISTINCT, number(2.3), number(-10.0)).mean(), expected, rtol=1e-12)


def test_equal_captions_share_the_target():
    found, captions = features(), REPEATED[:, 0]
    same = captions[:, None] == captions
    target = same.double() / same.sum(1, keepdim=True)
    logits = 10 * found.images @ found.texts.T
    expected = -((target * logits.log_softmax(1)).sum() + (target * logits.T.log_softmax(1)).sum()) / (2 * SIZE)
    assert torch.allclose(whole_losses("clip", found, REPEATED, number(math.log(10)), None).mean(), expected, rtol=1e-12)
    expected = -F.logsigmoid((2 * same.double() - 1) * (logits - 1)).sum() / SIZE
    assert torch.allclose(whole_losses("siglip", found, REPEATED, number(math.log(10)), number(-1.0)).mean(), expected, rtol=1e-12)


def test_equal_captions_with_equal_features_cost_clip_no_more_than_they_must():
    """A CLIP that is sure of everything reaches the entropy of the target, which then has no gradient."""
    images = torch.eye(SIZE, dtype=torch.float64)[REPEATED[:, 0]].requires_grad_()
    losses = whole_losses("clip", CLIPFeatures(images, images.detach()), REPEATED, number(math.log(60)), None)
    counts = (REPEATED[:, :1] == REPEATED[:, 0]).sum(1).double()
    assert torch.allclose(losses, counts.log(), atol=1e-12)
    losses.sum().backward()
    assert float(images.grad.abs().max()) < 1e-10


@pytest.mark.parametrize("loss, log_scale, bias", [("clip", math.log(1 / 0.07), None), ("siglip", math.log(10), -10.0)])
def test_temperature_and_bias_begin_as_published_and_the_temperature_is_clamped(loss, log_scale, bias):
    made = objective(loss)
    assert made.clip.log_scale.item() == pytest.approx(log_scale)
    assert made.clip.bias is bias is None or made.clip.bias.item() == bias
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        made.clip.log_scale.data.fill_(value)
        made.after_step(1)
        assert made.clip.log_scale.item() == pytest.approx(clamped)


# ---------------------------------------------------------------- exact large batches


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("parts", [1, 3, 5, SIZE])
def test_micro_batches_have_the_gradient_of_the_whole_batch(loss, parts, monkeypatch):
    monkeypatch.setattr(contrastive, "ROWS_AT_ONCE", 5)         # so that they are compared in parts, too
    made = objective(loss)
    expected = plain(made, batch(made))
    assert_equal(gradients(made, batch(made), parts), expected, 1e-11)
    assert float(expected["log_scale"].abs()) > 1e-3 and float(expected["losses"].std()) > 1e-3


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_in_float32_they_agree_to_a_millionth(loss):
    made = objective(loss, torch.float32)
    drawn = batch(made, dtype=torch.float32)
    assert_equal(gradients(made, drawn, 4), plain(made, drawn), 1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradients_of_several_processes_sum_to_that_of_the_whole_batch(parts):
    """Each process sees its own samples; what a sum over the processes would give is computed here from all of them beforehand."""
    whole, pieces = objective("siglip"), (slice(0, 5), slice(5, SIZE))
    expected, makers = plain(whole, batch(whole)), [objective("siglip") for _ in pieces]
    sums = []                                                   # of every call, in the order of the calls

    for turn in range(4):                                       # features, tokens, gradients; then all sums are known
        contributed, total = [], None
        for made, part in zip(makers, pieces):
            calls = iter(range(99))

            def add(tensors, calls=calls):
                at = next(calls)
                if at < len(sums):
                    for tensor, known in zip(tensors, sums[at]):
                        tensor.copy_(known)
                elif at == len(sums):
                    contributed.append([tensor.clone() for tensor in tensors])

            made.sum = add
            found = gradients(made, batch(made, part), parts)
            total = found if total is None else {name: total[name] + found[name] for name in found if name != "losses"}
        if contributed:
            sums.append([sum(each) for each in zip(*contributed)])
    expected.pop("losses")
    assert len(sums) == 3
    assert_equal(total, expected, 1e-11)


def test_pictures_are_normalised_as_clip_s():
    pixels = normalised(np.full((1, 2, 2, 3), 255, np.uint8))
    assert pixels.shape == (1, 3, 2, 2) and pixels[0, :, 0, 0].tolist() == pytest.approx([1.93034, 2.07488, 2.14590], rel=1e-5)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("options, said", [
    (dict(loss="sigmoid"), "contrastive loss"), (dict(patch=3), "not a multiple of the patch size 3"),
    (dict(width=18, heads=4), "not divisible by heads=4"),
    *((dict([(name, 0)]), f"^--objective-options {name}=0 must be 1 or more") for name in ("embed", "patch", "width", "layers", "heads")),
    (dict(patch=-4), "patch=-4 must be 1 or more")])
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Contrastive.check(make_config(**SETTINGS | dict(objective_options=OPTIONS | options)))


def test_the_towers_are_as_the_options_and_text_say():
    found = clip_config(make_config(**SETTINGS | dict(objective_options=OPTIONS)), 600)
    assert (found.vision.image_size, found.vision.patch, found.vision.width, found.vision.mlp_width) == (8, 4, 16, 64)
    assert (found.text.width, found.text.context_length, found.text.projection_dim, found.vision.projection_dim) == (16, 12, 16, 16)
